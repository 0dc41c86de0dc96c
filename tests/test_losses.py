"""The objectives against float64 computations by hand."""

import math

import pytest
import torch
from torch import nn

import losses
from model_definitions import Discriminator


def critic_64() -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(16, 3, (4, 8)).double()


class QuadraticCritic(nn.Module):
    """D(x) = a/2 ‖x‖² + b·x, whose gradient a·x + b is known on paper."""

    def __init__(self, a: float, b: torch.Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=b.dtype))
        self.b = b

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (0.5 * self.a * x.square() + self.b * x).flatten(1).sum(1)


def test_gradient_penalty_equals_the_hand_computation() -> None:
    torch.manual_seed(0)
    x_real, x_fake, b = torch.rand(4, 3, 5, 5), torch.rand(4, 3, 5, 5), torch.rand(3, 5, 5)
    epsilon = torch.rand(4)
    critic = QuadraticCritic(0.3, b)
    penalty = losses.gradient_penalty(critic, x_real, x_fake, epsilon)
    penalty.backward()

    expected, slope = 0.0, 0.0
    for real, fake, share in zip(x_real.double(), x_fake.double(), epsilon.double(), strict=True):
        x_hat = share * real + (1 - share) * fake
        gradient = 0.3 * x_hat + b.double()
        norm = math.sqrt(gradient.square().sum())
        expected += (norm - 1) ** 2 / 4
        slope += 2 * (norm - 1) * float((gradient * x_hat).sum()) / norm / 4  # d penalty / d a
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    assert critic.a.grad.item() == pytest.approx(slope, rel=1e-5)


def test_penalty_on_the_critic_equals_a_float64_double_backward() -> None:
    torch.manual_seed(1)
    critic = critic_64()
    x_real, x_fake = torch.rand(3, 3, 16, 16).double(), torch.rand(3, 3, 16, 16).double()
    epsilon = torch.rand(3).double()
    single = Discriminator(16, 3, (4, 8))
    single.load_state_dict(critic.state_dict())
    penalty = losses.gradient_penalty(single, x_real.float(), x_fake.float(), epsilon.float())
    gradients = torch.autograd.grad(penalty, [single.stages.stage1.conv.weight, single.to_score.weight])

    # The reference takes each picture alone, and the textbook's autograd.grad with create_graph.
    total = 0.0
    for index in range(3):
        share = epsilon[index]
        x_hat = (share * x_real[index] + (1 - share) * x_fake[index])[None].requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x_hat).sum(), x_hat, create_graph=True)
        total = total + (gradient.norm() - 1).square() / 3
    reference = torch.autograd.grad(total, [critic.stages.stage1.conv.weight, critic.to_score.weight])
    assert penalty.item() == pytest.approx(total.item(), rel=1e-5)
    for got, wanted in zip(gradients, reference, strict=True):
        assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-6)


def test_penalty_is_finite_where_the_critic_is_flat() -> None:
    flat = QuadraticCritic(0.0, torch.zeros(3, 4, 4))
    penalty = losses.gradient_penalty(flat, torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), torch.rand(2))
    penalty.backward()
    assert penalty.item() == pytest.approx(1, abs=1e-4)
    assert torch.isfinite(flat.a.grad)


def test_penalty_stays_in_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    critic = Discriminator(16, 3, (4, 8))
    arguments = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16), torch.rand(2)
    plain = losses.gradient_penalty(critic, *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = losses.gradient_penalty(critic, *arguments)
    assert torch.equal(plain, mixed)


def test_critic_loss_is_the_sum_of_its_parts() -> None:
    torch.manual_seed(0)
    critic = critic_64()
    x_real, x_fake, epsilon = (
        torch.rand(4, 3, 16, 16).double(),
        torch.rand(4, 3, 16, 16).double(),
        torch.rand(4).double(),
    )
    loss = losses.critic_loss(critic, x_real, x_fake, epsilon, lambda_gp=7.0, epsilon_drift=0.5)
    real, fake = critic(x_real), critic(x_fake)
    assert torch.allclose(loss.score_real, real)
    assert torch.allclose(loss.score_fake, fake)
    assert loss.wasserstein.item() == pytest.approx((fake.mean() - real.mean()).item())
    assert loss.drift.item() == pytest.approx(real.square().mean().item())
    expected = loss.wasserstein + 7 * loss.penalty + 0.5 * loss.drift
    assert loss.total.item() == pytest.approx(expected.item())


def test_vae_loss_matches_the_formula_and_torch_distributions() -> None:
    torch.manual_seed(0)
    x, x_rec = torch.rand(5, 3, 4, 4), torch.rand(5, 3, 4, 4)
    mu, logvar = torch.randn(5, 7), torch.randn(5, 7)
    reconstruction, kl = losses.vae_loss(x, x_rec, mu, logvar)
    assert reconstruction.item() == pytest.approx(((x - x_rec).double() ** 2).sum().item() / 5, rel=1e-6)
    normal = torch.distributions.Normal
    reference = torch.distributions.kl_divergence(
        normal(mu.double(), (0.5 * logvar.double()).exp()),
        normal(torch.zeros(5, 7).double(), torch.ones(5, 7).double()),
    )
    assert kl.item() == pytest.approx(reference.sum(1).mean().item(), rel=1e-6)


def test_kl_is_zero_exactly_at_the_prior() -> None:
    x = torch.rand(2, 1, 2, 2)
    reconstruction, kl = losses.vae_loss(x, x, torch.zeros(2, 3), torch.zeros(2, 3))
    assert (reconstruction.item(), kl.item()) == (0, 0)


def test_generator_loss_weighs_every_term() -> None:
    terms = {"reconstruction": 2.0, "kl": 3.0, "update": 5.0, "video": 7.0}
    loss = losses.generator_loss(
        score_fake=torch.tensor([1.0, 3.0]),
        score_base=torch.tensor([-4.0, 2.0]),
        **{name: torch.tensor(value) for name, value in terms.items()},
        lambda_adv=0.5,
        lambda_base=0.25,
        lambda_vae=0.1,
        beta=2.0,
        lambda_update=0.01,
        lambda_video=10.0,
    )
    assert loss.adversarial.item() == -2
    assert loss.adversarial_base.item() == 1
    assert loss.total.item() == pytest.approx(-0.5 * 2 + 0.25 * 1 + 0.1 * (2 + 2 * 3) + 0.01 * 5 + 10 * 7)


def test_video_loss_by_hand() -> None:
    frames, video = torch.zeros(2, 3, 1, 2, 2), torch.full((2, 3, 1, 2, 2), 0.5)
    assert losses.video_loss(frames, video).item() == pytest.approx(4 * 0.25)

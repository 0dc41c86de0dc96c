"""The loss terms against float64 computations by hand; DiffAugment: off by default, repeatable, differentiable."""

import math

import pytest
import torch
from torch import nn

import losses
from configuration import LossConfig
from losses import AUGMENTATION_NUMBERS, diffaugment
from model_definitions import Discriminator


def critic_64() -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(16, 3, (4, 8)).double()


def two_batches(size: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Real images and generated ones (size, 3, 16, 16), and ε (size,)."""
    torch.manual_seed(1)
    shape = (size, 3, 16, 16)
    return torch.rand(shape, dtype=dtype), torch.rand(shape, dtype=dtype), torch.rand(size, dtype=dtype)


class QuadraticCritic(nn.Module):
    """D(x) = a/2 ‖x‖² + b·x, whose gradient a·x + b is known on paper."""

    def __init__(self, a: float, b: torch.Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=b.dtype))
        self.b = b

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (0.5 * self.a * x.square() + self.b * x).flatten(1).sum(1)


def test_gradient_penalty_equals_the_hand_computation() -> None:
    x_real, x_fake, epsilon = two_batches(4)
    b = torch.rand(3, 16, 16)
    critic = QuadraticCritic(0.3, b)
    penalty = losses.gradient_penalty(critic, x_real, x_fake, epsilon)
    penalty.backward()

    expected, slope = 0.0, 0.0
    for real, fake, e in zip(x_real.double(), x_fake.double(), epsilon.double(), strict=True):
        x_hat = e * real + (1 - e) * fake
        gradient = 0.3 * x_hat + b.double()
        norm = math.sqrt(gradient.square().sum())
        expected += (norm - 1) ** 2 / 4
        slope += 2 * (norm - 1) * float((gradient * x_hat).sum()) / norm / 4  # d penalty / d a
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    assert critic.a.grad.item() == pytest.approx(slope, rel=1e-5)


def test_penalty_is_finite_where_the_critic_is_flat() -> None:
    flat = QuadraticCritic(0.0, torch.zeros(3, 16, 16))
    penalty = losses.gradient_penalty(flat, *two_batches(2))
    penalty.backward()
    assert penalty.item() == pytest.approx(1, abs=1e-4)
    assert torch.isfinite(flat.a.grad)


def test_critic_loss_is_the_sum_of_its_parts() -> None:
    critic = critic_64()
    x_real, x_fake, epsilon = two_batches(4, torch.float64)
    loss = losses.critic_loss(critic, x_real, x_fake, epsilon, LossConfig(lambda_gp=7.0, epsilon_drift=0.5))
    real, fake = critic(x_real), critic(x_fake)
    assert torch.allclose(loss.score_real, real)
    assert torch.allclose(loss.score_fake, fake)
    assert loss.wasserstein.item() == pytest.approx((fake.mean() - real.mean()).item())
    assert loss.penalty.item() == pytest.approx(losses.gradient_penalty(critic, x_real, x_fake, epsilon).item())
    assert loss.drift.item() == pytest.approx(real.square().mean().item())
    expected = loss.wasserstein + 7 * loss.penalty + 0.5 * loss.drift
    assert loss.total.item() == pytest.approx(expected.item())


def test_vae_loss_matches_the_formula_and_torch_distributions() -> None:
    torch.manual_seed(0)
    x, x_rec = torch.rand(5, 3, 4, 4), torch.rand(5, 3, 4, 4)
    mu, logvar = torch.randn(5, 7), torch.randn(5, 7)
    reconstruction, kl = losses.vae_loss(x, x_rec, mu, logvar)
    assert reconstruction.item() == pytest.approx(((x - x_rec).double() ** 2).sum().item() / 5, rel=1e-6)
    posterior = torch.distributions.Normal(mu.double(), (0.5 * logvar.double()).exp())
    prior = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    reference = torch.distributions.kl_divergence(posterior, prior)
    assert kl.item() == pytest.approx(reference.sum(1).mean().item(), rel=1e-6)
    at_prior = losses.vae_loss(x, x, torch.zeros(5, 3), torch.zeros(5, 3))
    assert [term.item() for term in at_prior] == [0, 0]


def test_generator_loss_weighs_every_term() -> None:
    terms = {"reconstruction": 2.0, "kl": 3.0, "update": 5.0, "video": 7.0}
    factors = {"lambda_adv": 0.5, "lambda_base": 0.25, "beta": 2.0, "lambda_update": 0.01,
               "lambda_video": 10.0}  # fmt: skip
    scores = {"score_fake": torch.tensor([1.0, 3.0]), "score_base": torch.tensor([-4.0, 2.0])}
    values = {name: torch.tensor(value) for name, value in terms.items()}
    loss = losses.generator_loss(**scores, **values, lambda_vae=0.1, weights=LossConfig(**factors))
    assert loss.adversarial.item() == -2
    assert loss.adversarial_base.item() == 1
    assert {name: getattr(loss, name).item() for name in terms} == terms
    assert loss.total.item() == pytest.approx(-0.5 * 2 + 0.25 * 1 + 0.1 * (2 + 2 * 3) + 0.01 * 5 + 10 * 7)


# ------------------------------------------------------------------------------------------------------- DiffAugment


def numbers_of(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, AUGMENTATION_NUMBERS, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["color", "translation", "cutout"])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_kind_changes_each_image_by_its_numbers_and_passes_gradients(kind: str, channels: int) -> None:
    x, numbers = torch.rand(6, channels, 16, 16, requires_grad=True), numbers_of(6)
    assert diffaugment(x, [], numbers) is x
    y = diffaugment(x, [kind], numbers)
    assert y.shape == x.shape
    assert torch.autograd.grad(y.sum(), x)[0].abs().sum() > 0
    assert torch.allclose(y[2:3], diffaugment(x[2:3], [kind], numbers[2:3]), atol=1e-6)


def test_colour_is_the_papers_in_its_range_from_minus_1_to_1() -> None:
    x, numbers = torch.rand(6, 3, 8, 8).double(), numbers_of(6).double()
    y, (brightness, saturation, contrast) = 2 * x - 1, numbers[:, :3].T.reshape(3, 6, 1, 1, 1)
    y = y + (brightness - 0.5)  # as in Zhao et al.'s DiffAugment_pytorch.py
    y = (y - y.mean(1, keepdim=True)) * (saturation * 2) + y.mean(1, keepdim=True)
    y = (y - y.mean((1, 2, 3), keepdim=True)) * (contrast + 0.5) + y.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(diffaugment(x, ["color"], numbers), (y + 1) / 2, atol=1e-12)


def test_translation_moves_whole_pixels_up_to_an_eighth_and_grey_moves_in() -> None:
    x, numbers = torch.rand(64, 3, 16, 16), numbers_of(64)
    on_grey = nn.functional.pad(x, (2, 2, 2, 2), value=0.5)
    offsets = (5 * numbers[:, 3:5]).int().tolist()
    moved = [one[:, dy : dy + 16, dx : dx + 16] for one, (dy, dx) in zip(on_grey, offsets, strict=True)]
    assert torch.equal(diffaugment(x, ["translation"], numbers), torch.stack(moved))
    assert len(set(map(tuple, offsets))) > 15  # of 25


def test_cutout_greys_a_square_of_half_the_side_also_over_the_edge() -> None:
    numbers = torch.full((2, AUGMENTATION_NUMBERS), 0.1)
    numbers[:, 5:7] = torch.tensor([[0.25, 0.75], [0.0, 0.5]])  # its centre
    expected = torch.ones(2, 3, 16, 16)
    expected[0, :, :8, 8:] = expected[1, :, :4, 4:12] = 0.5
    assert torch.equal(diffaugment(torch.ones(2, 3, 16, 16), ["cutout"], numbers), expected)

"""The two steps: which pictures the critic sees, and which weights each loss reaches."""

import pytest
import torch
from conftest import networks_and_draws

from augmentation import DiffAugment
from objectives import critic_objective, generator_objective
from random_draws import base_fakes
from step_runners import EagerSteps
from training_state import TrainingState


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_critic_sees_that_share_of_base_pictures(share: float) -> None:
    config, generator, discriminator, draws = networks_and_draws(f"loss.base_fake_share={share}")
    numbers = draws.critic(generator, 1, 0)
    loss = critic_objective(generator, discriminator, torch.rand(4, 3, 16, 16), numbers, DiffAugment([]), config)
    n_base = base_fakes(config)
    assert n_base == 4 * share
    base = discriminator(generator.vae.decode(numbers.z))
    assert torch.allclose(loss.score_fake[:n_base], base[:n_base], atol=1e-5)
    updated = (loss.score_fake[n_base:] - base[n_base:]).abs()
    assert len(updated) == 4 - n_base
    assert (updated > 1e-5).all()


def test_the_critic_step_leaves_the_generator_alone_and_the_other_way_round() -> None:
    config, generator, discriminator, draws = networks_and_draws()
    x_real = torch.rand(4, 3, 16, 16)
    critic = critic_objective(generator, discriminator, x_real, draws.critic(generator, 1, 0), DiffAugment([]), config)
    assert not any(g is not None for g in torch.autograd.grad(
        critic.total, list(generator.parameters()), allow_unused=True, retain_graph=True))  # fmt: skip
    loss, _ = generator_objective(
        generator, discriminator, x_real, draws.generator(generator, 1), DiffAugment([]), config
    )
    assert all(g is not None for g in torch.autograd.grad(loss.total, list(generator.parameters()), retain_graph=True))
    state = TrainingState(config, torch.device("cpu"))
    before = {name: value.clone() for name, value in state.discriminator.state_dict().items()}
    EagerSteps(state, DiffAugment([])).generator_step(x_real, draws.generator(state.generator, 1))
    for name, value in state.discriminator.state_dict().items():
        assert torch.equal(value, before[name])


def test_generator_loss_reaches_the_gru_and_every_vae_layer() -> None:
    config, generator, discriminator, draws = networks_and_draws("loss.lambda_video=1")
    loss, _ = generator_objective(
        generator, discriminator, torch.rand(4, 3, 16, 16), draws.generator(generator, 1), DiffAugment([]), config
    )
    assert loss.video > 0
    names = dict(generator.named_parameters())
    for name, gradient in zip(names, torch.autograd.grad(loss.total, list(names.values())), strict=True):
        assert gradient.abs().max() > 0, name

"""How the two steps of an iteration are run on a training state."""

import torch
from torch import Tensor

from augmentation import DiffAugment
from objectives import critic_metrics, critic_objective, generator_metrics, generator_objective
from random_draws import CriticDraws, GeneratorDraws
from training_state import TrainingState


class EagerSteps:
    """Runs each operation as Python reaches it.

    Args:
        state: whose weights the steps change.
        augment: DiffAugment of the pictures that the critic sees.
    """

    def __init__(self, state: TrainingState, augment: DiffAugment) -> None:
        self.state = state
        self.augment = augment

    def critic_step(self, x_real: Tensor, draws: CriticDraws) -> dict[str, Tensor]:
        """One critic step on real pictures (B, C, H, W) in [0, 1]; returns its metrics, scalars on the device."""
        state = self.state
        loss = critic_objective(state.generator, state.discriminator, x_real, draws, self.augment, state.config)
        gradients = torch.autograd.grad(loss.total, state.parameters["discriminator"])
        norms = state.apply_gradients("discriminator", {"discriminator": gradients})
        state.discriminator.calibration.observe(loss.score_real.detach(), loss.score_fake.detach())
        return critic_metrics(loss, state.config) | norms

    def generator_step(self, x_real: Tensor, draws: GeneratorDraws) -> dict[str, Tensor]:
        """One step of θ, the GRU and their average. Returns its metrics, scalars on the device."""
        state = self.state
        loss, output = generator_objective(
            state.generator, state.discriminator, x_real, draws, self.augment, state.config
        )
        vae, predictor = state.parameters["vae"], state.parameters["predictor"]
        # Only these: the critic's weights get no gradient here. Zero for what the loss doesn't reach (a λ of 0, say).
        gradients = torch.autograd.grad(loss.total, [*vae, *predictor], allow_unused=True, materialize_grads=True)
        norms = state.apply_gradients("generator", {"vae": gradients[: len(vae)], "predictor": gradients[len(vae) :]})
        state.update_ema(state.step + 1)
        return generator_metrics(loss, output, state.generator.bound) | norms

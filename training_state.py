"""All that training changes: the networks, the generator's average, the optimizers and the step. A checkpoint holds it.

Everything else that a step depends on follows from the settings and the step's number: its random draws
(`random_draws.py`), its pictures (`TrainingImages.batches`), and the decay of the average.
"""

import copy
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from configuration import Config, TrainingConfig
from devices import channels_last_on
from generator_path import build_generator
from model_definitions import build_discriminator
from weight_predictor import WeightPredictorRNN


class TrainingState:
    """Networks, average and optimizers of a run, on `device`; at step 0 they follow from the seed.

    Attributes:
        step: iterations done.
        generator: θ, the GRU and its head, as they train.
        generator_ema: their exponential moving average, which draws samples.
        discriminator: the critic, with the calibration of its probability.
        optimizers: "generator" (a group of parameters for the VAE, one for the predictor) and "discriminator".
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        random.seed(config.training.seed)
        np.random.seed(config.training.seed % 2**32)  # noqa: NPY002
        torch.manual_seed(config.training.seed)
        self.config = config
        self.device = device
        self.step = 0
        self.generator = channels_last_on(device, build_generator(config))
        # The same critic whatever the generator is: an ablation pairs runs by their seeds.
        torch.manual_seed(config.training.seed + 1)
        self.discriminator = channels_last_on(device, build_discriminator(config))
        self.generator_ema = copy.deepcopy(self.generator).requires_grad_(False)
        if isinstance(self.generator_ema.predictor, WeightPredictorRNN):
            self.generator_ema.predictor.gru.flatten_parameters()  # a copy's lie apart: cuDNN mends it every call
        training = config.training
        self.parameters: dict[str, list[nn.Parameter]] = {
            "vae": list(self.generator.vae.parameters()),
            "predictor": [
                parameter
                for network in (self.generator.predictor, self.generator.head)
                for parameter in network.parameters()
                if parameter.requires_grad
            ],
            "discriminator": list(self.discriminator.parameters()),
        }
        rates = learning_rates(training)

        def adam(*networks: str) -> torch.optim.Adam:
            groups = [
                {"params": self.parameters[name], "lr": rates[name], "betas": decay_rates(training, name)}
                for name in networks
            ]
            return torch.optim.Adam(groups, fused=True)

        # The predictor's rate is its own: at the VAE's, its first step would move the weights several times further
        # than the VAE's own step does, since every weight's update sums a step of each GRU unit.
        self.optimizers = {"generator": adam("vae", "predictor"), "discriminator": adam("discriminator")}

    def apply_gradients(self, optimizer: str, gradients: dict[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """One optimizer step; a network's gradient longer than `training.clip_<network>` is scaled down to it first.

        Args:
            optimizer: "generator" or "discriminator".
            gradients: network name -> gradients in the order of `parameters[name]`.

        Returns:
            `gradient_norm/<network>` before clipping, and where clipping is on `clipped_share/<network>`, 0 or 1;
            scalars on the device.
        """
        metrics = {}
        for network, values in gradients.items():
            for parameter, gradient in zip(self.parameters[network], values, strict=True):
                parameter.grad = _laid_out_like(parameter, gradient)
            norm = get_total_norm(values) if values else torch.zeros((), device=self.device)  # no predictor, say
            metrics[f"gradient_norm/{network}"] = norm
            longest = getattr(self.config.training, f"clip_{network}")
            if longest is not None:
                # A norm that is no number makes every gradient one: the log stops the run before its next checkpoint.
                clip_grads_with_norm_(self.parameters[network], longest, norm)
                metrics[f"clipped_share/{network}"] = (norm > longest).float()
        self.optimizers[optimizer].step()
        for network in gradients:
            for parameter in self.parameters[network]:
                parameter.grad = None  # or the predictor's large ones would take room through all critic steps
        return metrics

    @torch.no_grad()
    def update_ema(self, step: int) -> None:
        """Moves the average towards the generator: average += (1 - decay) · (network - average).

        Early on the decay is smaller, (1 + step) / (10 + step), so that the average doesn't remember the first weights.
        """
        weight = 1 - min(self.config.training.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.generator_ema.parameters()), list(self.generator.parameters()), weight)

    def networks(self) -> dict[str, Tensor]:
        """All that the networks and their average hold, by name."""
        parts = ("generator", "generator_ema", "discriminator")
        return {f"{part}.{name}": value for part in parts for name, value in getattr(self, part).state_dict().items()}

    def to_dict(self) -> dict[str, Any]:
        """The state as plain dicts, numbers, texts and tensors; the tensors are the training ones, not copies."""
        return {
            "step": self.step,
            "generator": self.generator.state_dict(),
            "generator_ema": self.generator_ema.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "random": _random_states(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes over what `to_dict` gave, with the learning rates of the present settings.

        Raises:
            RuntimeError, KeyError, ValueError: `saved` is of other networks.
        """
        for name in ("generator", "generator_ema", "discriminator"):
            getattr(self, name).load_state_dict(saved[name])
        rates = learning_rates(self.config.training)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
            networks = ("vae", "predictor") if name == "generator" else ("discriminator",)
            for network, group in zip(networks, optimizer.param_groups, strict=True):
                group["lr"] = rates[network]
                group["betas"] = decay_rates(self.config.training, network)
            for parameter, moments in optimizer.state.items():
                for moment in ("exp_avg", "exp_avg_sq"):
                    moments[moment] = _laid_out_like(parameter, moments[moment])
        _restore_random_states(saved["random"])
        self.step = saved["step"]


def learning_rates(training: TrainingConfig) -> dict[str, float]:
    """Network name -> learning rate."""
    return {
        "vae": training.lr_vae,
        "predictor": training.lr_predictor,
        "discriminator": training.lr_discriminator,
    }


def decay_rates(training: TrainingConfig, network: str) -> tuple[float, float]:
    """Adam's two decay rates for this network."""
    first, second = training.adam_betas_predictor if network == "predictor" else training.adam_betas
    return first, second


def _laid_out_like(parameter: Tensor, values: Tensor) -> Tensor:
    """`values` in the parameter's memory layout: fused Adam reads both in the order of memory, without a check."""
    if values.stride() == parameter.stride():
        return values
    return torch.empty_like(parameter).copy_(values)


def _random_states() -> dict[str, Any]:
    """The libraries' own random states. Training draws nothing from them, but code that somebody adds may."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    assert isinstance(numpy_state, tuple)  # a dict for other bit generators than NumPy's global one
    kind, keys, position, has_gauss, gauss = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def _restore_random_states(saved: dict[str, Any]) -> None:
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(saved["torch"].cpu())
    if len(saved["cuda"]) == torch.cuda.device_count():  # on another machine there is nothing they could mean
        torch.cuda.set_rng_state_all([state.cpu() for state in saved["cuda"]])

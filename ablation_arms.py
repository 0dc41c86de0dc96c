"""What an ablation compares: the arms, each a few settings on top of the same base, and the rates that tuning tries."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from configuration import Config, UserError, load_config
from generator_path import Generator, build_generator

REFERENCE = "off"
"""The arm that all others are compared with."""

METHOD = "full"
"""The arm that is the whole method."""

RATES = ("lr_vae", "lr_discriminator", "lr_predictor")

DEFAULTS = [
    "runtime.device=cpu", "runtime.step=eager", "output.tensorboard=false", "output.log_every=20",
    "output.sample_every=1000000000", "output.keep_checkpoints=1000000000",
]  # fmt: skip
"""Of all arms; what the user gives on the command line wins."""


class Arm(NamedTuple):
    """One variant of the method."""

    name: str
    meaning: str
    overrides: list[str]
    computed: Callable[[Config, Config], list[str]] = lambda base, full: []
    """Overrides that depend on the base's and on the whole method's settings."""
    tuned: bool = True
    """Whether `--tune` looks for its own learning rates."""

    @property
    def is_textbook(self) -> bool:
        return self.name == "textbook"

    def settings(self, config: Config) -> list[str]:
        """All its overrides, on top of `config`, the base."""
        return [*self.overrides, *self.computed(config, config)]


def _wide(base: Config, full: Config) -> list[str]:
    return [f"vae.channels={equal_parameter_channels(base, count_parameters(full))}".replace(" ", "")]


def _constant_rate(base: Config, full: Config) -> list[str]:
    # A predicted weight sums a step of each GRU unit, whose values are about ½: the constant gets as large a step.
    rate = min(1.0, base.training.lr_predictor * base.weight_predictor.hidden_size / 2)
    return [f"training.lr_predictor={rate:.6g}"]


_OFF = "weight_predictor.update=off"
ARMS = {
    arm.name: arm
    for arm in (
        Arm("off", "no predictor", [_OFF]),
        Arm("full", "the whole method: each picture its own update", []),
        Arm("no-video-loss", "no frame has to follow the synthetic video: λ_video 0", ["loss.lambda_video=0"]),
        Arm("off-amplified", "no predictor, lr_vae of `full` times its amplification", [_OFF], tuned=False),
        Arm("constant", "a learned constant update", ["weight_predictor.update=constant"], _constant_rate),
        Arm("mismatched", "the GRU watches another picture's video", ["weight_predictor.watches=other"]),
        Arm("still", "the GRU watches one frame, repeated", ["weight_predictor.watches=still"]),
        Arm("frozen", "the GRU stays as it was drawn at first", ["weight_predictor.train_gru=false"]),
        Arm("wide", "no predictor, a wider VAE with as many parameters as `full`", [_OFF], _wide),
        Arm("shared", "one update for the batch: the mean", ["weight_predictor.sharing=shared"]),
        Arm("full-head", "head full", ["weight_predictor.head=full"]),
        Arm("per-channel", "head per_channel", ["weight_predictor.head=per_channel"]),
        Arm(
            "textbook",
            "a textbook's WGAN-GP and VAE: no predictor, no average, no augmentation",
            [_OFF, "training.diffaugment=[]"],
        ),
    )
}


def choose_arms(names: str) -> list[Arm]:
    """The arms of a list such as `off,full`; the reference is always among them, and comes first.

    Raises:
        UserError: an unknown name.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in ARMS:
            raise UserError(f"--arms: there is no arm '{name}'; the arms are {', '.join(ARMS)}")
    if "off-amplified" in wanted:
        wanted.append(METHOD)  # whose amplification it takes
    return [arm for name, arm in ARMS.items() if name in wanted or name == REFERENCE]


def arm_config(arm: Arm, file: str | None, common: list[str], extra: list[str]) -> Config:
    """The settings of an arm: `file`, then `common` (of all arms), then the arm's own, then `extra` (rates, seed).

    Raises:
        UserError: as `load_config`.
    """
    base = load_config(file, [*DEFAULTS, *common])
    return load_config(file, [*DEFAULTS, *common, *arm.settings(base), *extra])


# ----------------------------------------------------------------------------------------------------- equal parameters


def count_parameters(config: Config) -> int:
    """Trained parameters of VAE, predictor and head (the critic is the same in all arms)."""
    with torch.device("meta"):  # shapes alone: nothing is drawn
        generator: Generator = build_generator(config)
    return sum(parameter.numel() for parameter in generator.parameters() if parameter.requires_grad)


def equal_parameter_channels(config: Config, count: int) -> list[int]:
    """Widths, in the proportions of `vae.channels`, of a VAE without predictor whose parameters are nearest to `count`.

    Raises:
        UserError: no width does.
    """
    section, key = "vae.channels", "weight_predictor.update"

    def widened(factor: float) -> list[int]:
        return [max(1, round(factor * width)) for width in config.vae.channels]

    def parameters(channels: list[int]) -> int:
        changed = load_config(None, [
            f"image.size={config.image.size}", f"image.channels={config.image.channels}", f"{key}=off",
            f"vae.latent_dim={config.vae.latent_dim}", f"{section}={channels}".replace(" ", ""),
        ])  # fmt: skip
        return count_parameters(changed)

    low, high = 0.0, 8192 / max(config.vae.channels)
    if parameters(widened(high)) < count:
        raise UserError(
            f"arm wide: no VAE of up to 8,192 channels has {count:,} parameters; make the predictor smaller"
        )
    tried: dict[tuple[int, ...], int] = {}
    while high - low > 0.25 / max(config.vae.channels):
        middle = (low + high) / 2
        channels = widened(middle)
        tried[tuple(channels)] = found = parameters(channels)
        low, high = (middle, high) if found < count else (low, middle)
    nearest = min(tried, key=lambda channels: abs(tried[channels] - count))
    return list(nearest)


# -------------------------------------------------------------------------------------------------------- amplification


def amplification(theta: Tensor, updates: Tensor) -> float:
    """How many times further than θ the weights θ + Δ, which draw the picture, move in a training step.

        √( mean ‖(θ + Δ)ₖ₊₁ - (θ + Δ)ₖ‖² / mean ‖θₖ₊₁ - θₖ‖² )

    A predictor multiplies the step that the drawing weights take, as a larger learning rate would: an Adam step moves
    each weight by about its rate, and each *predicted* weight by a step of every unit behind it. A gain that a higher
    rate without predictor gives as well is none of the method.

    Args:
        theta: (K, total_size), the updated tensors' weights after each of K > 1 steps.
        updates: (K, B, total_size), the update Δ of the same B latents and motions at these moments, in the same unit.

    Raises:
        ValueError: θ doesn't move.
    """
    own = theta.diff(dim=0).double()
    drawn = (theta[:, None] + updates).diff(dim=0).double()
    moved = own.square().sum(-1).mean()
    if not moved > 0:
        raise ValueError("θ does not move, so nothing can be said about how much further θ + Δ does")
    return (drawn.square().sum(-1).mean() / moved).sqrt().item()


# --------------------------------------------------------------------------------------------------------- rates to try


def candidate_rates(config: Config, count: int) -> list[dict[str, float]]:
    """`count` choices of learning rates: the settings' own, then random ones around them (Bergstra & Bengio 2012).

    Uniform in the logarithm: the VAE's and critic's rates within a factor 4, the predictor's within a factor 10 of the
    settings'. The numbers are the same for every arm, whether it has a predictor or not.
    """
    spread = torch.tensor([4.0, 4.0, 10.0], dtype=torch.float64)
    points = torch.rand(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    points[0] = 0
    factors = spread**points
    own = [getattr(config.training, rate) for rate in RATES]
    return [
        {
            rate: float(f"{min(1.0, value * factor):.3g}")
            for rate, value, factor in zip(RATES, own, row.tolist(), strict=True)
        }
        for row in factors
    ]


def rate_overrides(rates: dict[str, float]) -> list[str]:
    """Learning rates as overrides."""
    return [f"training.{rate}={value:.6g}" for rate, value in rates.items()]

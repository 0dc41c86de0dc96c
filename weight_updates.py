"""Predicted weight updates: which tensors they change, what the network predicts for them, and how far they may go.

A hypernetwork (Ha et al. 2016, https://arxiv.org/abs/1609.09106) predicts another network's weights. Ours predicts
*offsets*, as HyperStyle does for StyleGAN (Alaluf et al. 2022, https://arxiv.org/abs/2111.15666): θ + Δ decodes the
image, while θ itself is trained as usual.

    code (B, update_size)  --head, within ± bound-->  Δ / rms θ (B, total_size)

`UpdateSpec` lists the tensors that Δ is made of. A head turns the predicted code into an update in units of each
tensor's root mean square, and keeps it within ± α, so that no prediction can ruin the decoder. An update of low rank
stays in its two factors: `generator.decode_factored` decodes with them, and no image's weights are written out.

To add a head, write a class like `FullHead` and enter it in `HEADS`, and its name in the setting's choices.
"""

import difflib
import fnmatch
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from util import UserError

# Biases start at zero, so their own RMS would pin their updates to zero: below this they count as this large.
SMALLEST_SCALE = 0.01
SATURATION_THRESHOLD = 0.95
"""From this fraction of its bound on, a predicted number counts as saturated."""


@dataclass(frozen=True)
class UpdatedTensor:
    """One tensor that the predictor updates: its place in the VAE and in the flat update."""

    name: str
    """Full parameter name, for example `decoder.stage1.weight`."""
    shape: tuple[int, ...]
    offset: int
    """Index of its first element in the flat update Δ (total_size,)."""
    channel_dim: int
    """The dimension that counts output channels: 1 for ConvTranspose2d weights, else 0."""

    @cached_property
    def decoder_name(self) -> str:
        """Its name within the decoder, for example `stage1.weight`."""
        return self.name.removeprefix("decoder.")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(output channels, all the rest): the matrix that the head `low_rank` factors."""
        channels = self.shape[self.channel_dim]
        return channels, self.size // channels


@dataclass(frozen=True)
class UpdateSpec:
    """The tensors of Δ in order. Built once by `build_update_spec`; saved in every checkpoint."""

    tensors: tuple[UpdatedTensor, ...]

    @property
    def total_size(self) -> int:
        """How many weights are updated: the sum of the tensors' sizes."""
        return sum(tensor.size for tensor in self.tensors)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Cuts a flat update (..., total_size) into views by their names within the decoder, each (..., *shape)."""
        pieces = flat.split([tensor.size for tensor in self.tensors], dim=-1)
        return {t.decoder_name: piece.unflatten(-1, t.shape) for t, piece in zip(self.tensors, pieces, strict=True)}

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split` for unbatched tensors: (total_size,)."""
        return torch.cat([named[tensor.decoder_name].reshape(-1) for tensor in self.tensors])

    def scales(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The unit of Δ for every updated weight, its `tensor_scale`: (total_size,).

        Args:
            weights: name within the decoder -> θ.
        """
        return torch.cat([tensor_scale(weights[tensor.decoder_name]).expand(tensor.size) for tensor in self.tensors])

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for a checkpoint that `weights_only=True` loads."""
        return {"tensors": [asdict(tensor) | {"shape": list(tensor.shape)} for tensor in self.tensors]}


def build_update_spec(vae: nn.Module, patterns: list[str]) -> UpdateSpec:
    """Finds the decoder's parameters that match `patterns` (shell wildcards, such as `decoder.stage1.*`).

    Tensors come in the decoder's own order, whatever the order of the patterns, so that the same choice always means
    the same Δ.

    Raises UserError: a pattern that matches nothing (with the nearest name), that matches only the encoder (an update
    there cannot change an image), that adds nothing to the patterns before it, or that names a frozen or non-float
    tensor.
    """
    parameters = {name: tensor for name, tensor in vae.named_parameters() if name.startswith("decoder.")}
    encoder_names = [name for name, _ in vae.named_parameters() if not name.startswith("decoder.")]
    chosen: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(parameters, pattern)
        if not matches:
            if fnmatch.filter(encoder_names, pattern):
                raise UserError(
                    f"weight_predictor.layers: '{pattern}' names encoder tensors, which decode no image; "
                    "choose decoder tensors"
                )
            raise UserError(
                f"weight_predictor.layers: '{pattern}' matches no VAE tensor{_nearest(pattern, parameters)}"
            )
        if not set(matches) - chosen:
            raise UserError(
                f"weight_predictor.layers: '{pattern}' repeats tensors that the patterns before it name; remove it"
            )
        for name in matches:
            if not parameters[name].requires_grad:
                raise UserError(
                    f"weight_predictor.layers: '{pattern}' names {name}, which is frozen; choose a trained tensor"
                )
            if not parameters[name].is_floating_point():
                raise UserError(
                    f"weight_predictor.layers: '{pattern}' names {name}, which holds no real numbers; remove it"
                )
        chosen.update(matches)

    tensors: list[UpdatedTensor] = []
    for name, parameter in parameters.items():
        if name in chosen:
            owner = vae.get_submodule(name.rpartition(".")[0])
            transposed = isinstance(owner, nn.ConvTranspose2d) and parameter.dim() > 1
            offset = tensors[-1].offset + tensors[-1].size if tensors else 0
            tensors.append(UpdatedTensor(name, tuple(parameter.shape), offset, 1 if transposed else 0))
    return UpdateSpec(tuple(tensors))


def _nearest(pattern: str, names: dict[str, Any]) -> str:
    modules = sorted({f"{name.rpartition('.')[0]}.*" for name in names})
    close = difflib.get_close_matches(pattern, [*names, *modules], 1, 0.4)
    return f"; did you mean '{close[0]}'?" if close else f"; the tensors are {', '.join(names)}"


# ------------------------------------------------------------------------------------------------------- the update


class DenseUpdate(NamedTuple):
    """A batch of updates with a number for each weight."""

    spec: UpdateSpec
    numbers: Tensor
    """Δ / rms θ (B, total_size); (1, total_size) where all images share it."""
    scales: Tensor
    """rms θ of every updated weight's tensor: (total_size,)."""

    def dense(self) -> "DenseUpdate":
        """Itself, as for `FactoredUpdate`."""
        return self

    def mean_square(self) -> Tensor:
        """mean (Δ / rms θ)², a scalar."""
        return self.numbers.square().mean()

    def saturated(self, bound: float) -> dict[str, Tensor]:
        """Which predicted numbers of each tensor have nearly reached their bound: its name -> bool (B, numbers)."""
        at_bound = self.spec.split(self.numbers.abs() > SATURATION_THRESHOLD * bound)
        return {tensor.name: at_bound[tensor.decoder_name].flatten(1) for tensor in self.spec.tensors}


class FactoredUpdate(NamedTuple):
    """A batch of updates of low rank: Δ / rms θ of a tensor, seen as (output channels, rest), is the product A V."""

    spec: UpdateSpec
    a: list[Tensor | None]
    """Per tensor (B, output channels, rank); None for biases."""
    v: list[Tensor]
    """Per tensor (B, rank, rest), each value within ± bound / rank and A's within ± 1; a bias's (B, size)."""
    scales: list[Tensor]
    """Per tensor rms θ, a scalar."""

    def dense(self) -> DenseUpdate:
        """The same updates with every weight written out."""
        pieces = []
        for tensor, a, v in zip(self.spec.tensors, self.a, self.v, strict=True):
            update = v if a is None else a @ v
            if a is not None and tensor.channel_dim == 1:  # from (out, in, ...) back to the stored (in, out, ...)
                inputs, _, *kernel = tensor.shape
                update = update.unflatten(-1, (inputs, *kernel)).transpose(1, 2)
            pieces.append(update.flatten(1))
        scales = [scale.expand(tensor.size) for tensor, scale in zip(self.spec.tensors, self.scales, strict=True)]
        return DenseUpdate(self.spec, torch.cat(pieces, dim=1), torch.cat(scales))

    def mean_square(self) -> Tensor:
        """mean (Δ / rms θ)², a scalar, from the factors alone: ‖A V‖² = Σ (AᵀA) ∘ (V Vᵀ)."""
        total = self.v[0].new_zeros(())
        for a, v in zip(self.a, self.v, strict=True):
            total = total + (v.square().sum() if a is None else ((a.mT @ a) * (v @ v.mT)).sum())
        return total / (len(self.v[0]) * self.spec.total_size)

    def saturated(self, bound: float) -> dict[str, Tensor]:
        """As `DenseUpdate.saturated`, of A's numbers and of the biases': bool (B, numbers)."""
        return {
            tensor.name: (v / bound if a is None else a).abs().flatten(1) > SATURATION_THRESHOLD
            for tensor, a, v in zip(self.spec.tensors, self.a, self.v, strict=True)
        }


Update = DenseUpdate | FactoredUpdate


def bounded_update(u: Tensor, bound: float) -> Tensor:
    """Δ / rms θ = α · tanh(u / α): equal to u while that is small, and never beyond ±α.

    Args:
        u: (..., total_size), in units of each tensor's RMS.
        bound: α > 0.
    """
    return bound * torch.tanh(u / bound)


def tensor_scale(weight: Tensor) -> Tensor:
    """The unit of one tensor's update: its root mean square, at least `SMALLEST_SCALE`; a scalar.

    Detached: the scale is a unit of measure, not a way to change θ.
    """
    return weight.detach().square().mean().sqrt().clamp_min(SMALLEST_SCALE)


# ------------------------------------------------------------------------------------------------------------- heads


class UpdateHead(nn.Module):
    """Turns the predicted code into updates; a zero code into zero ones. `rank` is for heads that have one."""

    update_size: int  # length of the code, WEIGHT_UPDATE_SIZE

    def __init__(self, spec: UpdateSpec, rank: int) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, code: Tensor, bound: float, weights: Mapping[str, Tensor]) -> Update:
        """The updates of B images.

        Args:
            code: (B, update_size).
            bound: α, in units of each tensor's RMS.
            weights: name within the decoder -> θ.
        """
        raise NotImplementedError


class FullHead(UpdateHead):
    """One predicted number per updated weight: Δ / rms θ = α tanh(code / α). The source's vector of weight updates."""

    def __init__(self, spec: UpdateSpec, rank: int) -> None:
        super().__init__(spec, rank)
        self.update_size = spec.total_size

    def forward(self, code: Tensor, bound: float, weights: Mapping[str, Tensor]) -> Update:
        return DenseUpdate(self.spec, bounded_update(code, bound), self.spec.scales(weights))


class LowRankHead(UpdateHead):
    """Per tensor two predicted factors: Δ / rms θ = α / rank · tanh(a) tanh(v₀ + v), seen as (output channels, rest).

    As in LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) only *one* factor is zero at the start: the code gives
    a and v, both zero at first, and v₀ is a trained matrix of standard normal numbers. Without v₀ the product would
    have no gradient at zero and would never leave it. The bound lies on the factors, so that the rank is exact. Biases
    get one predicted number each.
    """

    def __init__(self, spec: UpdateSpec, rank: int) -> None:
        super().__init__(spec, rank)
        self.ranks = [min(rank, *tensor.matrix_shape) if len(tensor.shape) > 1 else 0 for tensor in spec.tensors]
        self.start_factors = nn.ParameterList()  # v₀ of the tensors with a rank, in order
        self.sizes: list[int] = []  # of a and v of each tensor in the code; of a bias, its update's
        for tensor, tensor_rank in zip(spec.tensors, self.ranks, strict=True):
            rows, columns = tensor.matrix_shape
            if tensor_rank:
                self.start_factors.append(nn.Parameter(torch.randn(tensor_rank, columns)))
            self.sizes += [rows * tensor_rank, tensor_rank * columns] if tensor_rank else [tensor.size]
        self.update_size = sum(self.sizes)

    def forward(self, code: Tensor, bound: float, weights: Mapping[str, Tensor]) -> Update:
        pieces = iter(code.split(self.sizes, dim=1))
        start_factors = iter(self.start_factors)
        all_a: list[Tensor | None] = []
        all_v: list[Tensor] = []
        for tensor, rank in zip(self.spec.tensors, self.ranks, strict=True):
            if not rank:
                all_a.append(None)
                all_v.append(bounded_update(next(pieces), bound))
                continue
            rows, columns = tensor.matrix_shape
            all_a.append(torch.tanh(next(pieces).view(-1, rows, rank)))
            v = next(start_factors) + next(pieces).view(-1, rank, columns)
            all_v.append(torch.tanh(v) * (bound / rank))
        scales = [tensor_scale(weights[tensor.decoder_name]) for tensor in self.spec.tensors]
        return FactoredUpdate(self.spec, all_a, all_v, scales)


class PerChannelHead(UpdateHead):
    """One predicted factor per output channel: u = s · θ / rms(θ), so θ + Δ turns each channel up or down.

    The per-channel offsets of HyperStyle (Alaluf et al. 2022, eq. 4). Biases get one predicted number each. The bound,
    Δ / rms θ = α tanh(u / α), acts on each weight, so a channel's factor is the same for all only while u is small.
    """

    def __init__(self, spec: UpdateSpec, rank: int) -> None:
        super().__init__(spec, rank)
        self.update_size = sum(tensor.shape[tensor.channel_dim] for tensor in spec.tensors)

    def forward(self, code: Tensor, bound: float, weights: Mapping[str, Tensor]) -> Update:
        tensors = self.spec.tensors
        scales = self.spec.scales(weights)
        relative_weights = self.spec.flatten(weights) / scales
        pieces = []
        factors = code.split([tensor.shape[tensor.channel_dim] for tensor in tensors], dim=-1)
        for tensor, factor in zip(tensors, factors, strict=True):
            if len(tensor.shape) == 1:
                pieces.append(factor)
                continue
            relative = relative_weights[tensor.offset : tensor.offset + tensor.size].view(tensor.shape)
            per_channel = [1] * len(tensor.shape)
            per_channel[tensor.channel_dim] = -1
            u = factor.unflatten(-1, per_channel) * relative
            pieces.append(u.flatten(-len(tensor.shape)))
        return DenseUpdate(self.spec, bounded_update(torch.cat(pieces, dim=-1), bound), scales)


HEADS: dict[str, type[UpdateHead]] = {"full": FullHead, "low_rank": LowRankHead, "per_channel": PerChannelHead}
"""`weight_predictor.head` -> its class."""


def check_update_size(given: int | str, head: UpdateHead) -> int:
    """The head's update size, after checking the number that the user may have given by hand. Raises UserError: a
    number that is not the head's; the message says the right one.
    """
    if given not in ("auto", head.update_size):
        kind = next(name for name, head_class in HEADS.items() if type(head) is head_class)
        raise UserError(
            f"weight_predictor.update_size is {given}, but a '{kind}' head for these {len(head.spec.tensors)} tensors "
            f"({head.spec.total_size:,} weights) predicts {head.update_size}; write {head.update_size} or auto"
        )
    return head.update_size

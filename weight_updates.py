"""Predicted weight updates: which tensors they change, what the network predicts for them, and how far they may go.

A hypernetwork (Ha et al. 2016, https://arxiv.org/abs/1609.09106) writes another network's weights. Ours writes
*offsets*, as HyperStyle does for StyleGAN (Alaluf et al. 2022, https://arxiv.org/abs/2111.15666): θ + Δ draws the
picture, while θ itself is trained as usual.

    code (..., update_size)  --head, within ± bound-->  Δ / rms θ (..., total_size)

`UpdateSpec` says which tensors Δ is made of; a head turns the predicted code into an update in units of each tensor's
root mean square, and keeps it within ± α, so that no prediction can wreck the decoder. An update of low rank stays in
its two factors as long as it can: `draw_factored` draws with them, and no picture's weights are ever written out.
"""

import difflib
import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from configuration import UserError
from losses import at_least_fp32

# Biases start at zero, so their own RMS would pin their updates to zero: below this they count as this large.
SMALLEST_SCALE = 0.01
NEARLY = 0.95
"""From this share of its bound on, a number counts as being at it."""


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

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(output channels, all the rest): the shape in which `low_rank` sees the tensor."""
        channels = self.shape[self.channel_dim]
        return channels, self.size // channels


@dataclass(frozen=True)
class UpdateSpec:
    """The tensors of Δ in order. Built once by `build_update_spec`; kept in every checkpoint."""

    tensors: tuple[UpdatedTensor, ...]

    @property
    def total_size(self) -> int:
        """How many weights are updated: the sum of the tensors' sizes."""
        return sum(tensor.size for tensor in self.tensors)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Cuts a flat update (..., total_size) into views by name, each (..., *shape)."""
        if flat.shape[-1] != self.total_size:
            raise ValueError(f"a flat update of this spec has {self.total_size} values, not {flat.shape[-1]}")
        pieces = flat.split([tensor.size for tensor in self.tensors], dim=-1)
        return {
            tensor.name: piece.unflatten(-1, tensor.shape)
            for tensor, piece in zip(self.tensors, pieces, strict=True)
        }  # fmt: skip

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split` for unbatched tensors: (total_size,)."""
        return torch.cat([named[tensor.name].reshape(-1) for tensor in self.tensors])

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for a checkpoint that `weights_only=True` loads."""
        return {"tensors": [asdict(tensor) | {"shape": list(tensor.shape)} for tensor in self.tensors]}


def build_update_spec(vae: nn.Module, patterns: list[str]) -> UpdateSpec:
    """Finds the decoder's parameters that match `patterns` (shell wildcards, such as `decoder.stage1.*`).

    Tensors come in the decoder's own order, whatever the order of the patterns, so that the same choice always means
    the same Δ.

    Raises:
        UserError: a pattern that matches nothing (with the nearest name), that matches only the encoder (an update
            there cannot change a picture), that adds nothing to the patterns before it, or that names a frozen or
            non-float tensor.
    """
    parameters = {name: tensor for name, tensor in vae.named_parameters() if name.startswith("decoder.")}
    encoder_names = [name for name, _ in vae.named_parameters() if not name.startswith("decoder.")]
    chosen: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(parameters, pattern)
        if not found:
            if fnmatch.filter(encoder_names, pattern):
                raise UserError(
                    f"weight_predictor.layers: '{pattern}' names encoder tensors, which draw no picture; "
                    "choose decoder tensors"
                )
            raise UserError(
                f"weight_predictor.layers: '{pattern}' matches no VAE tensor{_nearest(pattern, parameters)}"
            )
        if not set(found) - chosen:
            raise UserError(
                f"weight_predictor.layers: '{pattern}' repeats tensors that the patterns before it name; remove it"
            )
        for name in found:
            if not parameters[name].requires_grad:
                raise UserError(
                    f"weight_predictor.layers: '{pattern}' names {name}, which is frozen; choose a trained tensor"
                )
            if not parameters[name].is_floating_point():
                raise UserError(
                    f"weight_predictor.layers: '{pattern}' names {name}, which holds no real numbers; remove it"
                )
        chosen.update(found)

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


# ------------------------------------------------------------------------------------------------------------- heads


class FullHead(nn.Module):
    """One predicted number per updated weight: Δ / rms θ = α tanh(code / α). The source's vector of weight updates."""

    def __init__(self, spec: UpdateSpec) -> None:
        super().__init__()
        self.update_size = spec.total_size

    def forward(self, code: Tensor, relative_weights: Tensor, bound: float) -> Tensor:
        """code (..., update_size) -> Δ / rms θ (..., total_size); `relative_weights` is not needed."""
        return bounded_update(code, bound)


class FactoredUpdate(NamedTuple):
    """A batch of updates of low rank: Δ / rms θ of a tensor, seen as (output channels, rest), is the product A V."""

    tensors: tuple[UpdatedTensor, ...]
    a: list[Tensor | None]
    """Per tensor (B, output channels, rank); None for biases."""
    v: list[Tensor]
    """Per tensor (B, rank, rest), each value within ± bound / rank and A's within ± 1; a bias's (B, size)."""

    def relative(self) -> Tensor:
        """Δ / rms θ with every weight written out: (B, total_size)."""
        pieces = []
        for tensor, a, v in zip(self.tensors, self.a, self.v, strict=True):
            update = v if a is None else a @ v
            if a is not None and tensor.channel_dim == 1:  # from (out, in, ...) back to the stored (in, out, ...)
                inputs, _, *kernel = tensor.shape
                update = update.unflatten(-1, (inputs, *kernel)).transpose(1, 2)
            pieces.append(update.flatten(1))
        return torch.cat(pieces, dim=1)

    def mean_square(self) -> Tensor:
        """mean (Δ / rms θ)², from the factors alone: ‖A V‖² = Σ (AᵀA) ∘ (V Vᵀ)."""
        total = self.v[0].new_zeros(())
        for a, v in zip(self.a, self.v, strict=True):
            total = total + (v.square().sum() if a is None else ((a.mT @ a) * (v @ v.mT)).sum())
        return total / (len(self.v[0]) * sum(tensor.size for tensor in self.tensors))

    def at_bound(self, bound: float) -> Tensor:
        """Share of the predicted numbers that have nearly reached their bound: of A's, and of the biases'."""
        numbers = [v / bound if a is None else a for a, v in zip(self.a, self.v, strict=True)]
        return torch.cat([(number.abs() > NEARLY).float().flatten() for number in numbers]).mean()


class DenseUpdate(NamedTuple):
    """A batch of updates with a number for each weight."""

    numbers: Tensor
    """Δ / rms θ (B, total_size); (1, total_size) where all pictures share it."""

    def relative(self) -> Tensor:
        """Δ / rms θ: (B or 1, total_size)."""
        return self.numbers

    def mean_square(self) -> Tensor:
        """mean (Δ / rms θ)²."""
        return self.numbers.square().mean()

    def at_bound(self, bound: float) -> Tensor:
        """Share of the weights whose update has nearly reached its bound."""
        return (self.numbers.abs() > NEARLY * bound).float().mean()


Update = DenseUpdate | FactoredUpdate


class LowRankHead(nn.Module):
    """Per tensor two predicted factors: Δ / rms θ = α / rank · tanh(a) tanh(v₀ + v), seen as (output channels, rest).

    As in LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) only *one* factor is zero at the start: the code gives
    a and v, both zero at first, and v₀ is a trained matrix of standard normal numbers. Without v₀ the product would
    have no gradient at zero and would never leave it. The bound lies on the factors, so that the rank is exact. Biases
    get one predicted number each.
    """

    def __init__(self, spec: UpdateSpec, rank: int) -> None:
        super().__init__()
        self.tensors = spec.tensors
        self.ranks = [min(rank, *tensor.matrix_shape) if len(tensor.shape) > 1 else 0 for tensor in spec.tensors]
        self.start_factors = nn.ParameterList()  # of the tensors with a rank, in order
        self.sizes: list[int] = []  # of a and v of each tensor in the code; of a bias, its update's
        for tensor, tensor_rank in zip(self.tensors, self.ranks, strict=True):
            rows, columns = tensor.matrix_shape
            if tensor_rank:
                self.start_factors.append(nn.Parameter(torch.randn(tensor_rank, columns)))
            self.sizes += [rows * tensor_rank, tensor_rank * columns] if tensor_rank else [tensor.size]
        self.update_size = sum(self.sizes)

    def factors(self, code: Tensor, bound: float) -> FactoredUpdate:
        """code (B, update_size) -> the update in its factors."""
        pieces = iter(code.split(self.sizes, dim=1))
        start_factors = iter(self.start_factors)
        all_a: list[Tensor | None] = []
        all_v: list[Tensor] = []
        for tensor, rank in zip(self.tensors, self.ranks, strict=True):
            if not rank:
                all_a.append(None)
                all_v.append(bounded_update(next(pieces), bound))
                continue
            rows, columns = tensor.matrix_shape
            all_a.append(torch.tanh(next(pieces).view(-1, rows, rank)))
            v = next(start_factors) + next(pieces).view(-1, rank, columns)
            all_v.append(torch.tanh(v) * (bound / rank))
        return FactoredUpdate(self.tensors, all_a, all_v)

    def forward(self, code: Tensor, relative_weights: Tensor, bound: float) -> Tensor:
        """code (B, update_size) -> Δ / rms θ (B, total_size); `relative_weights` is not needed."""
        return self.factors(code, bound).relative()


class PerChannelHead(nn.Module):
    """One predicted factor per output channel: u = s · θ / rms(θ), so θ + Δ turns each channel up or down.

    The per-channel offsets of HyperStyle (Alaluf et al. 2022, eq. 4). Biases get one predicted number each. The bound,
    Δ / rms θ = α tanh(u / α), acts on each weight, so a channel's factor is the same for all only while u is small.
    """

    def __init__(self, spec: UpdateSpec) -> None:
        super().__init__()
        self.tensors = spec.tensors
        self.update_size = sum(tensor.shape[tensor.channel_dim] for tensor in spec.tensors)

    def forward(self, code: Tensor, relative_weights: Tensor, bound: float) -> Tensor:
        """code (..., update_size), relative_weights θ / rms(θ) (total_size,) -> Δ / rms θ (..., total_size)."""
        pieces = []
        factors = code.split([tensor.shape[tensor.channel_dim] for tensor in self.tensors], dim=-1)
        for tensor, factor in zip(self.tensors, factors, strict=True):
            if len(tensor.shape) == 1:
                pieces.append(factor)
                continue
            relative = relative_weights[tensor.offset : tensor.offset + tensor.size].view(tensor.shape)
            per_channel = [1] * len(tensor.shape)
            per_channel[tensor.channel_dim] = -1
            u = factor.unflatten(-1, per_channel) * relative
            pieces.append(u.flatten(-len(tensor.shape)))
        return bounded_update(torch.cat(pieces, dim=-1), bound)


UpdateHead = FullHead | LowRankHead | PerChannelHead


def build_head(kind: str, spec: UpdateSpec, rank: int = 4) -> UpdateHead:
    """The head called `full`, `low_rank` or `per_channel`; its `update_size` is what the GRU's Linear predicts."""
    if kind == "low_rank":
        return LowRankHead(spec, rank)
    heads: dict[str, Callable[[UpdateSpec], UpdateHead]] = {"full": FullHead, "per_channel": PerChannelHead}
    return heads[kind](spec)


def check_update_size(given: int | str, head: UpdateHead, spec: UpdateSpec) -> int:
    """The head's update size, after checking the number that the user may have given by hand.

    Raises:
        UserError: a number that is not the head's; the message says the right one.
    """
    if given not in ("auto", head.update_size):
        kind = {FullHead: "full", LowRankHead: "low_rank", PerChannelHead: "per_channel"}[type(head)]
        raise UserError(
            f"weight_predictor.update_size is {given}, but a '{kind}' head for these {len(spec.tensors)} tensors "
            f"({spec.total_size:,} weights) predicts {head.update_size}; write {head.update_size} or auto"
        )
    return head.update_size


# ------------------------------------------------------------------------------------------------- drawing, and bound


def draw_factored(
    decoder: nn.Sequential,
    features: Tensor,
    update: FactoredUpdate,
    weights: dict[str, Tensor],
    scales: dict[str, Tensor],
) -> Tensor:
    """Draws each picture with its own weights θ + Δ, Δ = rms θ · A V, without ever writing Δ out.

    A layer is linear in its weights, so its output is θ's, which is the same work for the whole batch, and Δ's, which
    passes through `rank` channels: A (V x). A transposed convolution is a matrix product followed by `fold`, which adds
    up overlapping patches; so is V's.

    Args:
        decoder: Linear, ConvTranspose2d, and layers without weights.
        features: (B, ...), the input.
        update: of B pictures.
        weights: name of a parameter of `decoder` -> θ.
        scales: name -> rms θ, the unit of its update.
    """
    factors = {
        tensor.name.removeprefix("decoder."): (a, v)
        for tensor, a, v in zip(update.tensors, update.a, update.v, strict=True)
    }
    h = features
    for name, layer in decoder.named_children():
        if not isinstance(layer, nn.Linear | nn.ConvTranspose2d):
            h = layer(h)
            continue
        x = h
        own = {key: weights[f"{name}.{key}"] for key in ("weight", "bias")}
        h = functional_call(layer, own, (x,), strict=True)
        a, v = factors.get(f"{name}.weight", (None, None))
        if a is not None and v is not None:
            a = a * scales[f"{name}.weight"]
            if isinstance(layer, nn.Linear):
                h = h + (a @ (v @ x[:, :, None]))[:, :, 0]
            else:
                kernel, padding = layer.kernel_size, layer.padding
                assert not isinstance(padding, str)  # only other convolutions take it by name
                # (B, rank, in · kernel) -> (B, rank · kernel, in): what each input channel adds to each patch.
                taps = v.unflatten(2, (layer.in_channels, -1)).transpose(2, 3).flatten(1, 2)
                patches = taps @ x.flatten(2)
                thin = functional.fold(patches, h.shape[2:], kernel, padding=padding, stride=layer.stride)
                h = h + (a @ thin.flatten(2)).unflatten(2, h.shape[2:])
        _, shift = factors.get(f"{name}.bias", (None, None))
        if shift is not None:
            shift = shift * scales[f"{name}.bias"]
            h = h + shift.view(*shift.shape, *[1] * (h.dim() - 2))
    return h


def weight_scales(spec: UpdateSpec, parameters: dict[str, Tensor]) -> Tensor:
    """The unit of u for every updated weight: its tensor's root mean square, at least `SMALLEST_SCALE`. (total_size,)

    Detached: the scale is a unit of measure, not a way to change θ.
    """
    scales = [tensor_scale(parameters[tensor.name]).expand(tensor.size) for tensor in spec.tensors]
    return torch.cat(scales)


def tensor_scale(weight: Tensor) -> Tensor:
    """The unit of one tensor's update: its root mean square, at least `SMALLEST_SCALE`; a scalar, detached."""
    return at_least_fp32(weight.detach()).square().mean().sqrt().clamp_min(SMALLEST_SCALE)


def bounded_update(u: Tensor, bound: float) -> Tensor:
    """Δ / rms(θ) = α · tanh(u / α): equal to u while that is small, and never beyond ±α.

    Args:
        u: (..., total_size), in units of each tensor's RMS.
        bound: α > 0.
    """
    return bound * torch.tanh(u / bound)

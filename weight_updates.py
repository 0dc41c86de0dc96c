"""Predicted weight updates: which tensors they change, what the network predicts for them, and how far they may go.

A hypernetwork (Ha et al. 2016, https://arxiv.org/abs/1609.09106) writes another network's weights. Ours writes
*offsets*, as HyperStyle does for StyleGAN (Alaluf et al. 2022, https://arxiv.org/abs/2111.15666): θ + Δ draws the
picture, while θ itself is trained as usual. Three pieces lie between the GRU and Δ:

    code (..., update_size)  --head-->  u (..., total_size)  --bounded_update · rms θ-->  Δ (..., total_size)

The bound acts on each weight, so a low rank and a channel's common factor are exact only while u is small against it.
`UpdateSpec` says which tensors Δ is made of; a head turns the predicted code into one number u per weight, in units of
that tensor's root mean square; `bounded_update` limits it, so that no prediction can wreck the decoder.
"""

import difflib
import fnmatch
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from configuration import UserError

# Biases start at zero, so their own RMS would pin their updates to zero: below this they count as this large.
SMALLEST_SCALE = 0.01


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

    def flatten(self, named: dict[str, Tensor]) -> Tensor:
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
    """One predicted number per updated weight: the code *is* u. The source's vector of weight updates."""

    def __init__(self, spec: UpdateSpec) -> None:
        super().__init__()
        self.update_size = spec.total_size

    def forward(self, code: Tensor, relative_weights: Tensor) -> Tensor:
        """code (..., update_size) -> u (..., total_size); `relative_weights` is not needed."""
        return code


class LowRankHead(nn.Module):
    """Per tensor two predicted factors: u = A (V₀ + V) / √rank, for the tensor seen as (output channels, rest).

    As in LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) only *one* factor is zero at the start: the code gives
    A and V, both zero at first, and V₀ is a trained matrix of standard normal numbers. Without V₀, A V would have no
    gradient at zero and would never leave it. Biases get one predicted number each.
    """

    def __init__(self, spec: UpdateSpec, rank: int) -> None:
        super().__init__()
        self.tensors = spec.tensors
        self.ranks = [min(rank, *tensor.matrix_shape) if len(tensor.shape) > 1 else 0 for tensor in spec.tensors]
        self.update_size = 0
        self.start_factors = nn.ParameterList()  # of the tensors with a rank, in order
        for tensor, tensor_rank in zip(self.tensors, self.ranks, strict=True):
            rows, columns = tensor.matrix_shape
            if tensor_rank:
                self.start_factors.append(nn.Parameter(torch.randn(tensor_rank, columns)))
            self.update_size += tensor_rank * (rows + columns) if tensor_rank else tensor.size

    def forward(self, code: Tensor, relative_weights: Tensor) -> Tensor:
        """code (..., update_size) -> u (..., total_size); `relative_weights` is not needed."""
        pieces, start = [], 0
        start_factors = iter(self.start_factors)
        for tensor, rank in zip(self.tensors, self.ranks, strict=True):
            if not rank:
                pieces.append(code[..., start : start + tensor.size])
                start += tensor.size
                continue
            rows, columns = tensor.matrix_shape
            a = code[..., start : start + rows * rank].unflatten(-1, (rows, rank))
            start += rows * rank
            v = code[..., start : start + rank * columns].unflatten(-1, (rank, columns))
            start += rank * columns
            u = a @ (next(start_factors) + v) / math.sqrt(rank)
            if tensor.channel_dim == 1:  # back from (out, in, ...) to the stored (in, out, ...)
                inputs, _, *kernel = tensor.shape
                u = u.unflatten(-1, (inputs, *kernel)).transpose(-2 - len(kernel), -1 - len(kernel))
                pieces.append(u.flatten(-len(tensor.shape)))
            else:
                pieces.append(u.flatten(-2))
        return torch.cat(pieces, dim=-1)


class PerChannelHead(nn.Module):
    """One predicted factor per output channel: u = s · θ / rms(θ), so θ + Δ turns each channel up or down.

    The per-channel offsets of HyperStyle (Alaluf et al. 2022, eq. 4). Biases get one predicted number each.
    """

    def __init__(self, spec: UpdateSpec) -> None:
        super().__init__()
        self.tensors = spec.tensors
        self.update_size = sum(tensor.shape[tensor.channel_dim] for tensor in spec.tensors)

    def forward(self, code: Tensor, relative_weights: Tensor) -> Tensor:
        """code (..., update_size), relative_weights θ / rms(θ) (total_size,) -> u (..., total_size)."""
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
        return torch.cat(pieces, dim=-1)


class ConstantUpdate(nn.Module):
    """What stands in the predictor's place when nothing is predicted: one code for all pictures, whatever they show.

    A learned vector, zero at first, so that θ + Δ = θ before training. It has the GRU predictor's `watch` and
    `to_update`, but looks at nothing and knows nothing: its states are empty.
    """

    def __init__(self, update_size: int) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.zeros(update_size))

    def watch(self, video: Tensor, hidden: None = None) -> tuple[Tensor, None]:
        """Video (B, T, C, height, width) -> states (B, T, 0), and no hidden state."""
        return video.new_empty(*video.shape[:2], 0), None

    def to_update(self, states: Tensor) -> Tensor:
        """States (B, 0) -> the one code for all of them, (1, update_size)."""
        return self.code[None]


UpdateHead = FullHead | LowRankHead | PerChannelHead


def build_head(kind: str, spec: UpdateSpec, rank: int = 4) -> UpdateHead:
    """The head called `full`, `low_rank` or `per_channel`; its `update_size` is what the GRU's Linear predicts."""
    if kind == "low_rank":
        return LowRankHead(spec, rank)
    return {"full": FullHead, "per_channel": PerChannelHead}[kind](spec)


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


# ------------------------------------------------------------------------------------------------------------- bound


def weight_scales(spec: UpdateSpec, parameters: dict[str, Tensor]) -> Tensor:
    """The unit of u for every updated weight: its tensor's root mean square, at least `SMALLEST_SCALE`. (total_size,)

    Detached: the scale is a unit of measure, not a way to change θ.
    """
    scales = [
        parameters[tensor.name].detach().float().square().mean().sqrt().clamp_min(SMALLEST_SCALE).expand(tensor.size)
        for tensor in spec.tensors
    ]
    return torch.cat(scales)


def bounded_update(u: Tensor, bound: float) -> Tensor:
    """Δ / rms(θ) = α · tanh(u / α): equal to u while that is small, and never beyond ±α.

    Args:
        u: (..., total_size), in units of each tensor's RMS.
        bound: α > 0.
    """
    return bound * torch.tanh(u / bound)

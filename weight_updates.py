"""Predicted weight updates: which tensors they change, what the network predicts for them, and how far they may go.

A hypernetwork (Ha et al. 2016, https://arxiv.org/abs/1609.09106) predicts another network's weights. Ours predicts
*offsets*, as HyperStyle does for StyleGAN (Alaluf et al. 2022, https://arxiv.org/abs/2111.15666): θ + Δ decodes the
image, while θ itself is trained as usual.

    code (B, update_size)  --head, within ± bound-->  Δ / rms θ (B, total_size)

`UpdateSpec` lists the tensors that Δ is made of. A head turns the predicted code into an update in units of each
tensor's root mean square, and keeps it within ± α, so that no prediction can ruin the decoder. An update of low rank
stays in its two factors: `generator.decode_updated` decodes with them, and no image's weights are written out.

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

    name: str  # full parameter name, for example `decoder.stage1.weight`
    shape: tuple[int, ...]
    offset: int  # index of its first element in the flat update Δ (total_size,)
    channel_dim: int  # the dimension that counts output channels: 1 for ConvTranspose2d weights, else 0

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
        """The unit of each tensor's update: its root mean square, at least `SMALLEST_SCALE`; (tensors,).
        Detached: a scale is a unit of measure, not a way to change θ. `weights`: name within the decoder -> θ.
        """
        norms = torch._foreach_norm([weights[tensor.decoder_name].detach() for tensor in self.tensors])
        roots = torch._foreach_div(norms, [math.sqrt(tensor.size) for tensor in self.tensors])
        return torch.stack(roots).clamp_min(SMALLEST_SCALE)

    def expand(self, values: Tensor) -> Tensor:
        """A number for each tensor, (tensors,) -> for each updated weight, (total_size,)."""
        return torch.cat([value.expand(t.size) for t, value in zip(self.tensors, values.unbind(), strict=True)])

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for a checkpoint that `weights_only=True` loads."""
        return {"tensors": [asdict(tensor) | {"shape": list(tensor.shape)} for tensor in self.tensors]}


def build_update_spec(vae: nn.Module, patterns: list[str]) -> UpdateSpec:
    """Finds the decoder's parameters that match `patterns` (shell wildcards, such as `decoder.stage1.*`).

    Tensors come in the decoder's own order, whatever the order of the patterns, so that the same choice always means
    the same Δ.

    Raises UserError: a pattern that matches nothing (with the nearest name), that matches only the encoder (an update
    there cannot change an image), or that adds nothing to the patterns before it.
    """
    parameters = {name: tensor for name, tensor in vae.named_parameters() if name.startswith("decoder.")}
    encoder_names = [name for name, _ in vae.named_parameters() if not name.startswith("decoder.")]
    chosen: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(parameters, pattern)
        problem = ""
        if not matches and fnmatch.filter(encoder_names, pattern):
            problem = "names encoder tensors, which decode no image; choose decoder tensors"
        elif not matches:
            problem = f"matches no VAE tensor{_nearest(pattern, parameters)}"
        elif not set(matches) - chosen:
            problem = "repeats tensors that the patterns before it name; remove it"
        if problem:
            raise UserError(f"weight_predictor.layers: '{pattern}' {problem}")
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

Factors = tuple[Tensor, Tensor]
"""Δ = A V of one tensor for B images: A (B, output channels, rank) and V, which is a tensor like the weight with `rank`
output channels: (B, rank, in) of a Linear, (B, in, rank, kernel) of a ConvTranspose2d."""


class Prepared(NamedTuple):
    """What all updates of the same θ share, computed once by `UpdateHead.prepare`."""

    theta: Mapping[str, Tensor]  # name within the decoder -> weights
    scales: Tensor  # rms θ of each tensor: (tensors,)
    code: tuple[Tensor, ...] = ()
    """Of low rank, for each number of the code: where it starts, v₀ or 0; its bound, of V and biases times rms θ; what
    it is added to, a bias or 0. (update_size,) each."""


class DenseUpdate(NamedTuple):
    """A batch of updates with a number for each weight."""

    spec: UpdateSpec
    numbers: Tensor  # Δ / rms θ (B, total_size); (1, total_size) where all images share it
    prepared: Prepared

    def dense(self) -> "DenseUpdate":
        """Itself, as for `FactoredUpdate`."""
        return self

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Name within the decoder -> θ + Δ (B, *shape)."""
        theta, scales = self.spec.flatten(self.prepared.theta), self.spec.expand(self.prepared.scales)
        return self.spec.split(torch.addcmul(theta, self.numbers, scales))

    def mean_square(self) -> Tensor:
        """mean (Δ / rms θ)², a scalar."""
        return self.numbers.square().mean()

    def saturated_fraction(self, bound: float) -> Tensor:
        """The fraction of the predicted numbers that have nearly reached their bound, a scalar."""
        return (self.numbers.abs() > SATURATION_THRESHOLD * bound).float().mean()


class FactoredUpdate(NamedTuple):
    """A batch of updates of low rank: Δ / rms θ of a tensor, seen as (output channels, rest), is the product A V.

    All factors lie in one tensor, tensor by tensor, A before V: a GPU takes as long for few numbers as for many.
    """

    head: "LowRankHead"
    numbers: Tensor  # the factors over their bounds, each within ± 1: (B, update_size)
    prepared: Prepared
    weights: Mapping[str, Tensor | Factors]  # name within the decoder -> the factors of Δ; of a bias θ + Δ (B, size)

    def dense(self) -> DenseUpdate:
        """The same updates with every weight written out."""
        spec, pieces = self.head.spec, []
        for tensor, part in zip(spec.tensors, self._relative().values(), strict=True):
            if isinstance(part, tuple):  # A V has the output channels in front; the tensor, where it has them
                others = [size for dim, size in enumerate(tensor.shape) if dim != tensor.channel_dim]
                product = part[0] @ _output_channels_first(part[1], tensor)
                part = product.unflatten(2, others).movedim(1, 1 + tensor.channel_dim)
            pieces.append(part.flatten(1))
        return DenseUpdate(spec, torch.cat(pieces, dim=1), self.prepared)

    def mean_square(self) -> Tensor:
        """mean (Δ / rms θ)², a scalar, from the factors alone: ‖A V‖² = Σ (AᵀA) ∘ (V Vᵀ)."""
        left, right, biases = [], [], []
        for tensor, part in zip(self.head.spec.tensors, self._relative().values(), strict=True):
            if isinstance(part, tuple):
                a, v = part[0], _output_channels_first(part[1], tensor)
                left.append((a.mT @ a).flatten(1))
                right.append((v @ v.mT).flatten(1))
            else:
                biases.append(part)
        same = [torch.cat(biases, dim=1)] if biases else []
        total = (torch.cat(left + same, dim=1) * torch.cat(right + same, dim=1)).sum()
        return total / (len(self.numbers) * self.head.spec.total_size)

    def saturated_fraction(self, bound: float) -> Tensor:
        """As `DenseUpdate.saturated_fraction`, of A's numbers and of the biases'."""
        at_bound = self.head.split(self.numbers.abs() > SATURATION_THRESHOLD).values()
        predicted = [part[0].flatten(1) if isinstance(part, tuple) else part for part in at_bound]
        return torch.cat(predicted, dim=1).float().mean()

    def _relative(self) -> dict[str, Tensor | Factors]:
        """Name within the decoder -> Δ / rms θ of each tensor."""
        return self.head.split(self.numbers * self.head.limits)


def _output_channels_first(v: Tensor, tensor: UpdatedTensor) -> Tensor:
    """V (B, *shape with rank output channels) -> (B, rank, rest)."""
    return v.movedim(1 + tensor.channel_dim, 1).flatten(2)


Update = DenseUpdate | FactoredUpdate


def bounded_update(u: Tensor, bound: float) -> Tensor:
    """Δ / rms θ = α · tanh(u / α): equal to u while that is small, and never beyond ±α. `u`: (..., total_size)."""
    return bound * torch.tanh(u / bound)


# ------------------------------------------------------------------------------------------------------------- heads


class UpdateHead(nn.Module):
    """Turns predicted codes into updates; a zero code into zero ones.

    Args:
        spec: the tensors that are updated.
        bound: α, the largest update of a weight in units of its tensor's RMS.
        rank: for heads that have one.
    """

    update_size: int  # length of the code, WEIGHT_UPDATE_SIZE

    def __init__(self, spec: UpdateSpec, bound: float, rank: int) -> None:
        super().__init__()
        self.spec = spec
        self.bound = bound

    def prepare(self, theta: Mapping[str, Tensor]) -> Prepared:
        """What all updates of the same θ share, to be computed once. `theta`: name within the decoder -> weights."""
        return Prepared(theta, self.spec.scales(theta))

    def forward(self, code: Tensor, prepared: Prepared) -> Update:
        """Codes (B, update_size), and what `prepare` gave -> the updates of B images."""
        raise NotImplementedError


class FullHead(UpdateHead):
    """One predicted number per updated weight: Δ / rms θ = α tanh(code / α). The source's vector of weight updates."""

    def __init__(self, spec: UpdateSpec, bound: float, rank: int) -> None:
        super().__init__(spec, bound, rank)
        self.update_size = spec.total_size

    def forward(self, code: Tensor, prepared: Prepared) -> Update:
        return DenseUpdate(self.spec, bounded_update(code, self.bound), prepared)


class LowRankHead(UpdateHead):
    """Per tensor two predicted factors: Δ / rms θ = α / rank · tanh(a) tanh(v₀ + v), seen as (output channels, rest).

    As in LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) only *one* factor is zero at the start: the code gives
    a and v, both zero at first, and v₀ is trained, from standard normal numbers. Without v₀ the product would have no
    gradient at zero and would never leave it. The bound lies on the factors, so that the rank is exact. Biases get one
    predicted number each, α tanh(code / α).
    """

    limits: Tensor
    slopes: Tensor

    def __init__(self, spec: UpdateSpec, bound: float, rank: int) -> None:
        super().__init__(spec, bound, rank)
        self.ranks = tuple(min(rank, *tensor.matrix_shape) if len(tensor.shape) > 1 else 0 for tensor in spec.tensors)
        self.start_factors = nn.ParameterList()  # v₀ of the tensors with a rank, in order
        parts: list[tuple[int, float, float]] = []  # of the code: how many numbers, their bound, their slope at zero
        for tensor, own_rank in zip(spec.tensors, self.ranks, strict=True):
            rows, columns = tensor.matrix_shape
            if own_rank:
                parts += [(rows * own_rank, 1, 1), (own_rank * columns, bound / own_rank, 1)]
                self.start_factors.append(nn.Parameter(torch.randn(own_rank * columns)))
            else:
                parts.append((tensor.size, bound, 1 / bound))
        self.sizes = [size for size, *_ in parts]  # of A and V of each tensor in turn; of a bias, its own
        self.update_size = sum(self.sizes)
        for name, values in zip(("limits", "slopes"), list(zip(*parts, strict=True))[1:], strict=True):
            whole = torch.cat([torch.full((size,), value) for size, value in zip(self.sizes, values, strict=True)])
            self.register_buffer(name, whole, persistent=False)

    def prepare(self, theta: Mapping[str, Tensor]) -> Prepared:
        scales = self.spec.scales(theta)
        zero, one = scales.new_zeros(()), scales.new_ones(())
        start_factors, sizes = iter(self.start_factors), iter(self.sizes)
        start: list[Tensor] = []
        factors: list[Tensor] = []
        base: list[Tensor] = []
        for tensor, rank, scale in zip(self.spec.tensors, self.ranks, scales.unbind(), strict=True):
            size = next(sizes)
            start.append(zero.expand(size))
            factors.append((one if rank else scale).expand(size))
            base.append(zero.expand(size) if rank else theta[tensor.decoder_name])
            if rank:
                start.append(next(start_factors))
                factors.append(scale.expand(len(start[-1])))
                base.append(zero.expand(next(sizes)))
        return Prepared(theta, scales, (torch.cat(start), self.limits * torch.cat(factors), torch.cat(base)))

    def forward(self, code: Tensor, prepared: Prepared) -> FactoredUpdate:
        start, units, base = prepared.code
        numbers = torch.tanh(torch.addcmul(start, code, self.slopes))
        return FactoredUpdate(self, numbers, prepared, self.split(torch.addcmul(base, numbers, units)))

    def split(self, numbers: Tensor) -> dict[str, Tensor | Factors]:
        """Cuts (B, update_size) into views, A and V or a bias's numbers, by the tensors' names within the decoder."""
        pieces = iter(numbers.split(self.sizes, dim=1))
        parts: dict[str, Tensor | Factors] = {}
        for tensor, rank in zip(self.spec.tensors, self.ranks, strict=True):
            piece = next(pieces)
            parts[tensor.decoder_name] = piece
            if rank:
                v_shape = [rank if dim == tensor.channel_dim else size for dim, size in enumerate(tensor.shape)]
                parts[tensor.decoder_name] = piece.unflatten(1, (-1, rank)), next(pieces).unflatten(1, v_shape)
        return parts


class PerChannelHead(UpdateHead):
    """One predicted factor per output channel: u = s · θ / rms(θ), so θ + Δ turns each channel up or down.

    The per-channel offsets of HyperStyle (Alaluf et al. 2022, eq. 4). Biases get one predicted number each. The bound,
    Δ / rms θ = α tanh(u / α), acts on each weight, so a channel's factor is the same for all only while u is small.
    """

    def __init__(self, spec: UpdateSpec, bound: float, rank: int) -> None:
        super().__init__(spec, bound, rank)
        self.update_size = sum(tensor.shape[tensor.channel_dim] for tensor in spec.tensors)

    def forward(self, code: Tensor, prepared: Prepared) -> Update:
        tensors, pieces = self.spec.tensors, []
        relative_weights = self.spec.flatten(prepared.theta) / self.spec.expand(prepared.scales)
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
        return DenseUpdate(self.spec, bounded_update(torch.cat(pieces, dim=-1), self.bound), prepared)


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

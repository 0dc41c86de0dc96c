"""What `benchmark.py` checks beside time: gradients with the same choices, the peak of tensors, and where time goes.

Slow ways of looking at a step, so they have a process of their own, apart from the timed ones.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmark_worker import Variant
from configuration import Config, load_config
from devices import prepare_device

aten = torch.ops.aten

SIDE_OF = {aten.relu: 0, aten.leaky_relu: 0, aten.gt: 0, aten.threshold_backward: 1, aten.leaky_relu_backward: 1}
"""Operations that ask on which side of 0 the values of a tensor lie: which argument that is."""

PARTS = {
    "convolutions forward": ("aten::mkldnn_convolution", "aten::cudnn_convolution", "aten::slow_conv"),
    "convolutions backward": ("aten::convolution_backward", "aten::cudnn_convolution_backward"),
    "pooling": ("aten::max_pool2d",),
    "activations": ("aten::relu", "aten::leaky_relu", "aten::threshold", "aten::clamp_min"),
    "matrix products (GRU, Linear)": ("aten::addmm", "aten::mm", "aten::bmm", "aten::_cudnn_rnn"),
    "Adam": ("aten::_fused_adam_", "Optimizer.step"),
    "waiting for data": ("enumerate(DataLoader)",),
}
"""Parts of a step, by how the names of their operations begin."""


class Choices(TorchDispatchMode):
    """Records the choices of a pass, or makes another pass take the same: forward, backward and double backward.

    A critic is piecewise linear. A choice is which pixel a max_pool2d takes, and which slope an activation has. Where
    two pixels are nearly equal, or a value nearly 0, rounding decides, and the gradient jumps from one piece's to the
    other's: both are right, and their distance tells nothing about the accuracy of either.

    Args:
        given: `taken` of a recorded pass with the same operations in the same order; None records.

    Attributes:
        taken: one integer or boolean tensor for each operation.
        flipped, of: how many choices were not the pass's own, and how many there were.
        widest_gap: the largest distance between a candidate that was taken against the pass's own choice and its rival
            (the other pixel, or 0), in units of the map's root mean square.
    """

    def __init__(self, given: Iterable[Tensor] | None = None) -> None:
        super().__init__()
        self.taken: list[Tensor] = []
        self._recording = given is None
        self._given = iter(() if given is None else given)
        self.flipped, self.of, self.widest_gap = 0, 0, 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation, kwargs = function._overloadpacket, kwargs or {}
        if operation is aten.max_pool2d_with_indices:
            values, index = function(*args, **kwargs)
            if self._recording:
                self.taken.append(index)
                return values, index
            index = self._next(index)
            chosen = args[0].flatten(-2).gather(-1, index.flatten(-2)).view_as(index)
            self._compare(args[0], values - chosen, values != chosen)
            return chosen, index
        if operation not in SIDE_OF or (operation is aten.gt and args[1] != 0):
            return function(*args, **kwargs)
        x = args[SIDE_OF[operation]]
        above = x > 0
        if self._recording:
            self.taken.append(above)
            return function(*args, **kwargs)
        own, above = above, self._next(above)
        self._compare(x, x.abs(), own != above)
        if operation is aten.gt:
            return above
        slope = 0.0
        if operation in (aten.leaky_relu, aten.leaky_relu_backward):
            slope = args[1 if operation is aten.leaky_relu else 2]
        return torch.where(above, args[0], slope * args[0])  # forward the value, backward its gradient

    def _next(self, own: Tensor) -> Tensor:
        taken = next(self._given, None)
        if taken is None or taken.shape != own.shape or taken.dtype != own.dtype:
            raise ValueError("the recorded pass had other operations")
        self.taken.append(taken)
        return taken

    def _compare(self, x: Tensor, gap: Tensor, flipped: Tensor) -> None:
        self.of += flipped.numel()
        if flipped.any():
            self.flipped += int(flipped.sum())
            self.widest_gap = max(self.widest_gap, float(gap[flipped].max() / x.square().mean().sqrt()))


def same_choices(config: Config, device: torch.device, runner: str, numbers: Iterable[int]) -> list[dict[str, Any]]:
    """For each number of draws: the fp32 gradients of `runner` against float64 with the choices of the fp32 pass.

    Returns:
        The relative errors `critic` and `generator`; `flipped`, how many choices float64 would have made otherwise;
        `widest_gap` between their candidates, see `Choices`.
    """
    single, double = Variant(config, device, runner), Variant(config, device, runner, torch.float64)
    found = []
    for number in numbers:
        with Choices() as recorded:
            mine = single.gradients(number)
        with Choices(recorded.taken) as replayed:
            wanted = double.gradients(number)
        line = {part: relative_error(mine[part], wanted[part]) for part in mine}
        found.append(line | {"flipped": replayed.flipped, "of": replayed.of, "widest_gap": replayed.widest_gap})
    return found


def relative_error(mine: Tensor, wanted: Tensor) -> float:
    """‖mine - wanted‖ / ‖wanted‖ of whole gradient vectors."""
    return float((mine.double() - wanted.double()).norm() / wanted.double().norm())


def tensor_peak(variant: Callable[[], Variant]) -> tuple[Variant, Iterator[Tensor], int]:
    """Builds a variant and takes two iterations; returns it, its pictures, and the most bytes its tensors ever held.

    On a CPU. Counted at PyTorch's allocator, so it is the same at each run, unlike the process's resident memory, which
    holds the libraries, their scratch memory and what the C library keeps for later too.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        built = variant()
        batches = built.batches()
        for step in (1, 2):  # the first makes Adam's moments
            built.iteration(batches, step, lambda: None)
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return built, batches, peak


def time_shares(variant: Variant, batches: Iterator[Tensor]) -> dict[str, float]:
    """The share of each of `PARTS` in the time of one iteration's operations; the rest is `other`."""
    on_gpu = variant.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as recorded:
        variant.iteration(batches, 3, torch.cuda.synchronize if on_gpu else lambda: None)
    microseconds = dict.fromkeys([*PARTS, "other"], 0.0)
    for entry in recorded.key_averages():
        part = next((part for part, names in PARTS.items() if entry.key.startswith(names)), "other")
        if (
            entry.device_type == DeviceType.CPU
        ):  # an operation with its kernels, which have entries of their own on a GPU
            microseconds[part] += entry.self_device_time_total if on_gpu else entry.self_cpu_time_total
    return {part: time / sum(microseconds.values()) for part, time in microseconds.items()}


def main(settings: dict[str, Any]) -> None:
    """Answers `benchmark.py` with one line of JSON: runner -> what was found.

    Args:
        settings: `overrides`, `device`, `runners` (of eager and textbook), `gradients`, the number of draws to compare,
            and the `folder` where the reference's gradients go.
    """
    config, device = load_config(None, settings["overrides"]), torch.device(settings["device"])
    prepare_device(device)
    numbers = range(1, 1 + settings["gradients"])
    answer: dict[str, Any] = {}
    for runner in settings["runners"]:
        build = functools.partial(Variant, config, device, runner)
        if device.type == "cpu":
            variant, batches, peak = tensor_peak(build)
        else:  # the timed process asks the GPU's allocator
            variant, peak = build(), None
            batches = variant.batches()
            variant.iteration(batches, 1, torch.cuda.synchronize)
        shares = time_shares(variant, batches)
        del variant, batches
        answer[runner] = {
            "peak_tensor_bytes": peak, "time_shares": shares,
            "same_choices": same_choices(config, device, runner, numbers),
        }  # fmt: skip
    reference = Variant(config, device, "reference")
    for number in numbers:
        torch.save(reference.gradients(number), Path(settings["folder"]) / f"reference {number}")
    print(json.dumps(answer), flush=True)

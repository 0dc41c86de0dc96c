"""Another way to run the two steps of `training_step.py`, recorded as CUDA graphs; and which one to take.

The pass is most of a step's work, so it alone is replayed from a CUDA graph. Averaging over processes, Adam and the
moving average stay outside.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from configuration import Config, UserError
from distributed import SINGLE_PROCESS, World
from training_step import CriticNoise, EagerSteps, GeneratorNoise, Pass, TrainingState


class CudaGraphSteps(EagerSteps):
    """Records each pass at its first call as a CUDA graph and replays it: one launch instead of hundreds. A pass that
    cannot be recorded runs eagerly.

    A graph reads and writes fixed places in memory, so images and random numbers are copied into the tensors that it
    was recorded with. All random numbers come in from outside, so a replay is as right as the first time. Adam stays
    outside: fused, it is one launch already, and its step count lies on the GPU.

    Args:
        required: the user asked for this runner, so a pass that cannot be recorded is an error.
    """

    _pool: Any = None  # one for both graphs: they run in turn, and never need their memory at the same time

    def __init__(
        self, state: TrainingState, world: World = SINGLE_PROCESS, log: Callable[[str], None] = print,
        required: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(state, world, log)
        self.required = required
        self._recorded: dict[str, tuple[list[Any], Callable[[Tensor, Any], Pass]]] = {}

    @property
    def is_new(self) -> bool:  # type: ignore[override]
        return not self._recorded

    def run_pass(self, name: str, x_real: Tensor, noise: CriticNoise | GeneratorNoise) -> Pass:
        """As `EagerSteps.run_pass`. Gradients may be overwritten at the next call for either pass, metrics at the next
        one for the same. Raises UserError: the pass could not be recorded, and the user asked for this runner.
        """
        # A pass is recorded for shapes, and for what is None: both change when schedules reach 0 or updates start.
        form = [leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(noise)]
        if name not in self._recorded or self._recorded[name][0] != form:
            self._recorded.pop(name, None)  # frees what was recorded before: the next recording takes its memory
            started = time.perf_counter()
            try:
                run = self.record(getattr(self, name), x_real, noise)
                seconds = time.perf_counter() - started
                self.log(f"recording a CUDA graph of the {name.replace('_', ' ')}: {seconds:.1f} s")
            except (UserError, torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # CUDA fails in many ways
                run = self._fall_back(name, error)
            self._recorded[name] = form, run
        return self._recorded[name][1](x_real, noise)

    def release(self) -> None:
        self._recorded.clear()

    def record(self, run: Callable[..., Pass], x_real: Tensor, noise: Any) -> Callable[[Tensor, Any], Pass]:
        """A faster function that does what `run` does, tried on these inputs."""
        static = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (x_real, noise))
        # Libraries choose algorithms and reserve memory at their first calls, which no graph can hold.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                metrics, _ = run(*static)
        torch.cuda.current_stream().wait_stream(side)
        # Outside of the pool: metrics are read when the other graph may have used its memory.
        values = torch.stack(list(metrics.values()))
        graph = torch.cuda.CUDAGraph()
        # Other threads (the loader's, that pins memory) may call CUDA meanwhile: only this one's calls are checked.
        # The outer `stream` restores the current one if recording fails: the inner context then doesn't.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            metrics, gradients = run(*static)
            torch.stack(list(metrics.values()), out=values)
        self._pool = graph.pool()
        inputs = _by_type(static)

        def replay(x_real: Tensor, noise: Any) -> Pass:
            for kind, tensors in _by_type((x_real, noise)).items():
                torch._foreach_copy_(inputs[kind], tensors)
            graph.replay()
            return Pass(dict(zip(metrics, values.unbind(), strict=True)), gradients)

        return replay

    def _fall_back(self, name: str, error: BaseException) -> Callable[..., Pass]:
        cause = error
        while cause.__context__ is not None:  # leaving a recording that failed raises another error
            cause = cause.__context__
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        reason = (lines[0] if lines else type(cause).__name__)[:200]
        if self.required:
            raise UserError(f"recording a CUDA graph failed ({reason}); use runtime.step=eager") from error
        self.log(
            f"WARNING: recording a CUDA graph of the {name.replace('_', ' ')} failed; it now runs eagerly: {reason}"
        )
        return getattr(self, name)  # a pass changes nothing, so it can simply be run again


def _by_type(value: Any) -> dict[torch.dtype, list[Tensor]]:
    """The tensors in nested tuples by type, in order: those of one type are copied in one launch."""
    tensors: dict[torch.dtype, list[Tensor]] = {}
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            tensors.setdefault(leaf.dtype, []).append(leaf)
    return tensors


# ------------------------------------------------------------------------------------------------------------ choosing


def choose_step(config: Config, device: torch.device) -> tuple[str, str]:
    """`eager` or `cuda_graph`, and one or two lines for the log that say why. Raises UserError: the settings ask for
    what this machine cannot do.
    """
    kind, reason = config.runtime.step, "as runtime.step says"
    if kind == "cuda_graph" and device.type != "cuda":
        raise UserError("runtime.step is cuda_graph, but the device is a CPU; use auto or eager")
    if kind == "auto" and device.type == "cuda":
        kind, reason = "cuda_graph", "since launching each operation would take the GPU longer than doing it"
    elif kind == "auto":
        kind, reason = "eager", "since only a GPU has CUDA graphs"
    line, tf32 = f"steps: {kind}, {reason}", config.runtime.precision == "tf32"
    if tf32 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        line += "\nWARNING: this device has no TF32 (NVIDIA's from Ampere on have it): products are in fp32"
    return kind, line


def build_steps(
    kind: str, state: TrainingState, world: World = SINGLE_PROCESS, log: Callable[[str], None] = print
) -> EagerSteps:
    """The runner that `choose_step` has chosen."""
    if kind == "eager":
        return EagerSteps(state, world, log)
    return CudaGraphSteps(state, world, log, required=state.config.runtime.step == kind)


def describe_device(device: torch.device, asked: str = "cpu") -> str:
    """A line for the log; where `asked` was auto, it says why a GPU that the machine seems to have is not used."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 1e9
        return f"device: {device}, {torch.cuda.get_device_name(device)}, {memory:.0f} GB"
    line = f"device: CPU, {torch.get_num_threads()} threads"
    if asked == "auto" and os.path.exists("/proc/driver/nvidia/version"):
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            return f"{line}; CUDA_VISIBLE_DEVICES hides the GPU"
        needs = f"needs a driver for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
        line += f"\nWARNING: PyTorch cannot use this machine's GPU: {torch.__version__} {needs}; see nvidia-smi"
    return line + ("; Apple's GPU is not used" if asked == "auto" and torch.backends.mps.is_available() else "")

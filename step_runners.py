"""Other ways to run the two steps of `training_step.py`: recorded as CUDA graphs, or compiled; and which one to take.

The pass is most of a step's work, so it alone is replayed from a CUDA graph (`CudaGraphSteps`) or run under
`torch.compile` (`CompiledSteps`), on a GPU both. Averaging over processes, Adam and the moving average stay outside.
"""

import os
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from configuration import Config, UserError
from distributed import SINGLE_PROCESS, World
from training_step import CriticNoise, EagerSteps, GeneratorNoise, Pass, TrainingState


class PreparedSteps(EagerSteps):
    """Steps whose passes are prepared at their first call; a pass that cannot be prepared runs eagerly.

    Args:
        required: the user asked for this runner, so a pass that cannot be prepared is an error.
    """

    preparation = "preparing"
    """What `prepare` does, for messages."""

    def __init__(
        self, state: TrainingState, world: World = SINGLE_PROCESS, log: Callable[[str], None] = print,
        required: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(state, world, log)
        self.required = required
        self._prepared: dict[str, tuple[list[Any], Callable[[Tensor, Any], Pass]]] = {}

    @property
    def is_new(self) -> bool:  # type: ignore[override]
        return not self._prepared

    def run_pass(self, name: str, x_real: Tensor, noise: CriticNoise | GeneratorNoise) -> Pass:
        """As `EagerSteps.run_pass`. Gradients may be overwritten at the next call for either pass, metrics at the next
        one for the same. Raises UserError: the pass could not be prepared, and the user asked for this runner.
        """
        # A pass is prepared for shapes, and for what is None: both change when schedules reach 0 or updates start.
        form = [leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(noise)]
        if name not in self._prepared or self._prepared[name][0] != form:
            self._prepared.pop(name, None)  # frees what was recorded before: the next recording takes its memory
            started = time.perf_counter()
            try:
                run = self.prepare(getattr(self, name), x_real, noise)
                seconds = time.perf_counter() - started
                self.log(f"{self.preparation} of the {name.replace('_', ' ')}: {seconds:.1f} s")
            except (UserError, torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # compilers and CUDA fail in many ways
                run = self._fall_back(name, error)
            self._prepared[name] = form, run
        return self._prepared[name][1](x_real, noise)

    def release(self) -> None:
        self._prepared.clear()

    def prepare(self, run: Callable[..., Pass], x_real: Tensor, noise: Any) -> Callable[[Tensor, Any], Pass]:
        """A faster function that does what `run` does, tried on these inputs."""
        raise NotImplementedError

    def _fall_back(self, name: str, error: BaseException) -> Callable[..., Pass]:
        cause = error
        while cause.__context__ is not None:  # leaving a recording that failed raises another error
            cause = cause.__context__
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        reason = (lines[0] if lines else type(cause).__name__)[:200]
        if self.required:
            raise UserError(f"{self.preparation} failed ({reason}); use runtime.step=eager") from error
        self.log(f"WARNING: {self.preparation} of the {name.replace('_', ' ')} failed; it now runs eagerly: {reason}")
        return getattr(self, name)  # a pass changes nothing, so it can simply be run again


class CudaGraphSteps(PreparedSteps):
    """Records each pass once as a CUDA graph and replays it: one launch instead of hundreds.

    A graph reads and writes fixed places in memory, so images and random numbers are copied into the tensors that it
    was recorded with. All random numbers come in from outside, so a replay is as right as the first time. Adam stays
    outside: fused, it is one launch already, and its step count lies on the GPU.
    """

    preparation = "recording a CUDA graph"
    _pool: Any = None  # one for both graphs: they run in turn, and never need their memory at the same time

    def prepare(self, run: Callable[..., Pass], x_real: Tensor, noise: Any) -> Callable[[Tensor, Any], Pass]:
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


class CompiledSteps(CudaGraphSteps):
    """Runs each pass as one program that `torch.compile` makes, its gradients included; on a GPU in a CUDA graph."""

    preparation = "torch.compile"

    def prepare(self, run: Callable[..., Pass], x_real: Tensor, noise: Any) -> Callable[[Tensor, Any], Pass]:
        import torch._dynamo  # here: it takes a second, which eager runs need not wait

        torch._dynamo.config.allow_rnn = True  # the GRU is unrolled over its few frames
        torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad inside the graph
        compiled = torch.compile(run, fullgraph=True, dynamic=False)
        compiled(x_real, noise)
        return super().prepare(compiled, x_real, noise) if x_real.is_cuda else compiled


def _by_type(value: Any) -> dict[torch.dtype, list[Tensor]]:
    """The tensors in nested tuples by type, in order: those of one type are copied in one launch."""
    tensors: dict[torch.dtype, list[Tensor]] = {}
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            tensors.setdefault(leaf.dtype, []).append(leaf)
    return tensors


# ------------------------------------------------------------------------------------------------------------ choosing


def choose_step(config: Config, device: torch.device) -> tuple[str, str]:
    """`eager`, `compiled` or `cuda_graph`, and one or two lines for the log that say why. Raises UserError: the
    settings ask for what this machine cannot do.
    """
    kind, reason = config.runtime.step, "as runtime.step says"
    if kind == "cuda_graph" and device.type != "cuda":
        raise UserError("runtime.step is cuda_graph, but the device is a CPU; use auto, eager or compiled")
    if kind == "compiled" and not has_compiler(device):
        needs = "Triton" if device.type == "cuda" else "a C++ compiler (g++ or clang++)"
        raise UserError(f"runtime.step is compiled, which needs {needs}, and none was found; install it, or use eager")
    if kind == "auto" and device.type == "cuda":
        kind, reason = "cuda_graph", "since launching each operation would take the GPU longer than doing it"
    elif kind == "auto":
        kind, reason = "eager", "since compiled steps were measured to be no faster on a CPU"
    line, precision = f"steps: {kind}, {reason}", config.runtime.precision
    if precision == "tf32" and kind == "compiled":
        raise UserError("runtime.precision is tf32, which compiled steps cannot leave for the penalty; use cuda_graph")
    if precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        line += "\nWARNING: this device has no TF32 (NVIDIA's from Ampere on have it): products are in fp32"
    if precision == "bf16" and not has_bf16(device):
        line += "\nWARNING: this device has no bf16 arithmetic; runtime.precision=bf16 will be much slower than fp32"
    return kind, line


def has_compiler(device: torch.device) -> bool:
    """Whether `torch.compile` has what it needs: Triton for a GPU, a C++ compiler for a CPU."""
    if device.type == "cuda":
        return find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl") if name)


def build_steps(
    kind: str, state: TrainingState, world: World = SINGLE_PROCESS, log: Callable[[str], None] = print
) -> EagerSteps:
    """The runner that `choose_step` has chosen."""
    if kind == "eager":
        return EagerSteps(state, world, log)
    runner = CompiledSteps if kind == "compiled" else CudaGraphSteps
    return runner(state, world, log, required=state.config.runtime.step == kind)


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 matrix products itself, instead of emulating them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

"""How the two steps of an iteration are run on a training state: one definition, three ways.

A step is a *pass*, a pure function from pictures and random draws to metrics, scores and gradients, and a *tail* that
changes the state: clipping, Adam, average. The pass is most of the work, so it alone is run as written
(`EagerSteps`), under `torch.compile` (`CompiledSteps`) or replayed from a CUDA graph (`CudaGraphSteps`). Between the
two lie the gradients: several processes average theirs there, outside any graph (`World.average`).
"""

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from augmentation import DiffAugment
from configuration import Config, UserError
from distributed import ALONE, World
from objectives import critic_metrics, critic_objective, finished_metrics, generator_metrics, generator_objective
from random_draws import CriticDraws, GeneratorDraws
from training_state import TrainingState

# What compiling costs and saves on a CPU, as `python benchmark.py` measures it (2 cores with AVX2, November 2026: 85 s,
# and steps as long as eager ones, at 32 as at 128 pixels). What it used to save lay in the double backward and between
# pooling and activation, and neither is there any more. Where it does save, enter it: a long enough run then compiles.
COMPILE_SECONDS = 90
SAVED_SECONDS_PER_MEGAPIXEL = 0.0  # of pictures through an iteration


class CriticPass(NamedTuple):
    """What a critic pass computes."""

    metrics: dict[str, Tensor]
    """Scalars."""
    gradients: tuple[Tensor, ...]
    """In the order of `state.parameters["discriminator"]`."""


class GeneratorPass(NamedTuple):
    """What a generator pass computes."""

    metrics: dict[str, Tensor]
    """Scalars."""
    gradients: tuple[Tensor, ...]
    """In the order of `state.parameters["vae"]`, then `state.parameters["predictor"]`."""


class EagerSteps:
    """Runs each operation as Python reaches it.

    Args:
        state: whose weights the steps change.
        augment: DiffAugment of the pictures that the critic sees.

    Attributes:
        world: the processes that share a batch; each step takes this one's share of pictures and draws.
    """

    def __init__(self, state: TrainingState, augment: DiffAugment) -> None:
        self.state = state
        self.augment = augment
        self.world: World = ALONE
        self.autocast = state.config.runtime.precision == "bf16"
        self.say: Callable[[str], None] = print  # where a runner tells what the user should know

    # ------------------------------------------------------------------------------------------------- the two passes

    def critic_pass(self, x_real: Tensor, draws: CriticDraws) -> CriticPass:
        """The critic's loss and its gradients on real pictures (B, C, H, W) in [0, 1]. Changes nothing."""
        state = self.state
        with torch.autocast(x_real.device.type, torch.bfloat16, enabled=self.autocast):
            loss = critic_objective(state.generator, state.discriminator, x_real, draws, self.augment, state.config)
        gradients = torch.autograd.grad(loss.total, state.parameters["discriminator"])
        return CriticPass(critic_metrics(loss, draws, state.config), gradients)

    def generator_pass(self, x_real: Tensor, draws: GeneratorDraws) -> GeneratorPass:
        """The loss of θ and the GRU, and its gradients. Changes nothing."""
        state = self.state
        with torch.autocast(x_real.device.type, torch.bfloat16, enabled=self.autocast):
            loss, output = generator_objective(
                state.generator, state.discriminator, x_real, draws, self.augment, state.config
            )
        weights = [*state.parameters["vae"], *state.parameters["predictor"]]
        # Only these: the critic's weights get no gradient here. Zero for what the loss doesn't reach (a λ of 0, say).
        gradients = torch.autograd.grad(loss.total, weights, allow_unused=True, materialize_grads=True)
        return GeneratorPass(generator_metrics(loss, output, state.generator.bound), gradients)

    def run_pass(self, name: str, x_real: Tensor, draws: CriticDraws | GeneratorDraws) -> Any:
        """Runs `critic_pass` or `generator_pass`, as this runner does."""
        return getattr(self, name)(x_real, draws)

    def _give_up(self, what: str, name: str, error: Exception, required: bool) -> Callable[..., Any]:
        """The pass as written, for a runner that cannot prepare it its own way, with a warning that says why.

        Raises:
            UserError: the user asked for this runner.
        """
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines[0] if lines else type(error).__name__)[:200]
        if required:
            raise UserError(f"{what} failed ({reason}); use runtime.step=eager") from error
        self.say(f"WARNING: {what} of the {name.replace('_', ' ')} failed, which now runs eagerly: {reason}")
        return getattr(self, name)  # a pass changes nothing, so it can simply be run again

    # -------------------------------------------------------------------------------------------------- the two steps

    def critic_step(self, x_real: Tensor, draws: CriticDraws) -> dict[str, Tensor]:
        """One critic step on real pictures (B, C, H, W) in [0, 1]; returns its metrics, scalars on the device."""
        done = self.run_pass("critic_pass", x_real, draws)
        gradients, metrics = self.world.average("discriminator", done.gradients, done.metrics)
        return metrics | self.state.apply_gradients("discriminator", {"discriminator": gradients})

    def generator_step(self, x_real: Tensor, draws: GeneratorDraws) -> dict[str, Tensor]:
        """One step of θ, the GRU and their average. Returns its metrics, scalars on the device."""
        done = self.run_pass("generator_pass", x_real, draws)
        averaged, metrics = self.world.average("generator", done.gradients, done.metrics)
        count = len(self.state.parameters["vae"])
        gradients = {"vae": averaged[:count], "predictor": averaged[count:]}
        norms = self.state.apply_gradients("generator", gradients)
        self.state.update_ema(self.state.step + 1)
        return finished_metrics(metrics) | norms


class CompiledSteps(EagerSteps):
    """Runs each pass as one graph that `torch.compile` makes at its first call, its gradients included.

    Args:
        required: the user asked for it, so a compiler that fails is an error; otherwise the steps go on eagerly.
    """

    def __init__(self, state: TrainingState, augment: DiffAugment, required: bool = True) -> None:
        super().__init__(state, augment)
        self.required = required
        self._compiled: dict[str, Callable[..., Any]] = {}

    def run_pass(self, name: str, x_real: Tensor, draws: CriticDraws | GeneratorDraws) -> Any:
        """As `EagerSteps.run_pass`.

        Raises:
            UserError: compiling failed, and it was asked for.
        """
        if name in self._compiled:
            return self._compiled[name](x_real, draws)
        import torch._dynamo  # here: it takes a second, which eager runs need not wait

        torch._dynamo.config.allow_rnn = True  # the GRU is unrolled over its few frames
        torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad inside the graph
        compiled = torch.compile(getattr(self, name), fullgraph=True, dynamic=False)
        try:
            done = compiled(x_real, draws)
        except (UserError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            compiled = self._give_up("torch.compile", name, error, self.required)
            done = compiled(x_real, draws)
        self._compiled[name] = compiled
        return done


class CudaGraphSteps(EagerSteps):
    """Records each pass once as a CUDA graph and replays it: one launch instead of hundreds.

    A graph reads and writes fixed places in memory, so pictures and draws are copied into the tensors that it was
    recorded with. All random numbers come in with the draws, so a replay is as right as the first time. Adam stays
    outside: fused, it is one launch already, and its step count lives on the GPU.

    Args:
        required: the user asked for it, so a pass that cannot be recorded is an error; otherwise it runs eagerly.
    """

    def __init__(self, state: TrainingState, augment: DiffAugment, required: bool = True) -> None:
        super().__init__(state, augment)
        self.required = required
        self._recorded: dict[str, tuple[Any, list[Tensor], Any]] = {}
        self._eager: dict[str, Callable[..., Any]] = {}
        self._pool: Any = None  # one for both graphs: they run in turn, and never need their memory at the same time

    def run_pass(self, name: str, x_real: Tensor, draws: CriticDraws | GeneratorDraws) -> Any:
        """As `EagerSteps.run_pass`. Gradients are overwritten at the next replay of either pass.

        Raises:
            UserError: recording failed, and it was asked for.
        """
        if name not in self._recorded and name not in self._eager:
            try:
                self._recorded[name] = self._record(getattr(self, name), x_real, draws)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except RuntimeError as error:
                self._eager[name] = self._give_up("recording a CUDA graph", name, error, self.required)
        if name in self._eager:
            return self._eager[name](x_real, draws)
        graph, inputs, output = self._recorded[name]
        torch._foreach_copy_(inputs, _tensors((x_real, draws)))
        graph.replay()
        # Metrics are read only when the iteration is over, and by then the other graph may have used their memory.
        values = torch.stack(list(output.metrics.values())).unbind()
        return output._replace(metrics=dict(zip(output.metrics, values, strict=True)))

    def _record(self, run: Callable[..., Any], x_real: Tensor, draws: Any) -> tuple[Any, list[Tensor], Any]:
        """The graph, the tensors that it reads, and the output that it writes."""
        static = _clone((x_real, draws))
        # Libraries choose algorithms and reserve memory at their first calls, which no graph can hold.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads (the loader's, that pins memory) may call CUDA meanwhile: only this one's calls are checked.
        # The outer `stream` brings back the current one if recording fails: the inner context then doesn't.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            output = run(*static)
        self._pool = graph.pool()
        return graph, _tensors(static), output


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, tuple) else []


def _clone(value: Any) -> Any:
    """Nested (named) tuples with every tensor copied."""
    if isinstance(value, tuple):
        parts = [_clone(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value.clone() if isinstance(value, Tensor) else value


# ------------------------------------------------------------------------------------------------------------ choosing


def choose_step(config: Config, device: torch.device, steps: int) -> tuple[str, str]:
    """`eager`, `compiled` or `cuda_graph`, and one line for the log that says why.

    It depends on the length of the whole run, so that a resumed run makes the same choice.

    Raises:
        UserError: the settings ask for what this machine cannot do.
    """
    asked = config.runtime.step
    if asked == "cuda_graph" and device.type != "cuda":
        raise UserError("runtime.step is cuda_graph, but the device is a CPU; use auto, eager or compiled")
    compiler = has_compiler(device)
    if asked == "compiled" and not compiler:
        needs = "Triton" if device.type == "cuda" else "a C++ compiler (g++ or clang++)"
        raise UserError(f"runtime.step is compiled, which needs {needs}, and none was found; install it, or use eager")
    if asked != "auto":
        return asked, f"steps: {asked}, as runtime.step says"
    if device.type == "cuda":
        return "cuda_graph", "steps: cuda_graph, since launching each operation would take the GPU longer than doing it"
    if not compiler:
        return "eager", "steps: eager, since no C++ compiler (g++ or clang++) was found for torch.compile"
    training, side = config.training, config.image.size
    megapixels = training.batch_size * side**2 * (training.n_critic + 1) / 1e6  # of an iteration
    saved = steps * megapixels * SAVED_SECONDS_PER_MEGAPIXEL
    length = f"for {steps:,} steps of {side} x {side} pixels compiling would save about {saved:,.0f} s on a CPU"
    if saved < 2 * COMPILE_SECONDS:
        return "eager", f"steps: eager; {length}, as measured, and cost about {COMPILE_SECONDS} s"
    return "compiled", f"steps: compiled; {length}, as measured, and costs about {COMPILE_SECONDS} s now"


def has_compiler(device: torch.device) -> bool:
    """Whether `torch.compile` has what it needs: Triton for a GPU, a C++ compiler for a CPU."""
    if device.type == "cuda":
        return find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl") if name)


def build_steps(config: Config, state: TrainingState, augment: DiffAugment, steps: int) -> tuple[EagerSteps, str]:
    """The runner for a run of `steps` iterations, and one or two lines for the log: what was picked, and why.

    Raises:
        UserError: as `choose_step`.
    """
    kind, why = choose_step(config, state.device, steps)
    if config.runtime.precision == "bf16" and not has_bf16(state.device):
        why += (
            "\nWARNING: this device has no bf16 arithmetic; runtime.precision=bf16 will be much slower than fp32 here"
        )
    if kind == "eager":
        return EagerSteps(state, augment), why
    runner = CompiledSteps if kind == "compiled" else CudaGraphSteps
    return runner(state, augment, required=config.runtime.step == kind), why


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 matrix products itself, instead of emulating them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

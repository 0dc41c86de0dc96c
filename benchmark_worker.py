"""One measured variant of the training iteration, in a process of its own; `benchmark.py` starts and asks it.

A process for each variant makes its peak memory its own, and lets each have the settings of its own kind of program. It
reads one word a line from standard input and answers with one line of JSON.
"""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from configuration import Config, load_config
from devices import prepare_device
from image_data import open_images
from random_draws import Draws, base_fakes
from step_runners import CompiledSteps, CudaGraphSteps, EagerSteps, has_bf16
from textbook import Textbook, textbook_batches
from training_state import TrainingState
from weight_predictor import WeightPredictorRNN

KINDS = {"eager": EagerSteps, "compiled": CompiledSteps, "cuda_graph": CudaGraphSteps}


class Variant:
    """A runner, or the textbook, with networks, draws and pictures.

    Args:
        runner: `textbook`, `eager`, `compiled`, `cuda_graph`, or `reference`: the textbook in float64.
        dtype: of weights and pictures; the reference's is float64 anyway.
    """

    def __init__(self, config: Config, device: torch.device, runner: str, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.device, self.runner = config, device, runner
        self.draws = Draws(config, device)
        self.is_textbook = runner in ("textbook", "reference")
        self.dtype = torch.float64 if runner == "reference" else dtype
        if self.is_textbook:
            self.steps: Any = Textbook(config, device, self.dtype)
            self.generator = self.steps.generator
        else:
            state = TrainingState(config, device)
            for network in (state.generator, state.discriminator):
                network.to(dtype)
            self.steps = KINDS[runner](state, self.draws.augment)
            self.generator = state.generator
        # A head of zeros, as at the start of a training, would hide most of the generator's gradient.
        if isinstance(self.generator.predictor, WeightPredictorRNN):
            head = self.generator.predictor.to_update.weight
            moved = torch.randn(head.shape, generator=torch.Generator().manual_seed(1)) * 0.1
            with torch.no_grad():
                head.copy_(moved)

    def batches(self) -> Iterator[Tensor]:
        """Pictures as this variant reads them."""
        if self.is_textbook:
            return textbook_batches(self.config, self.device)
        training = self.config.training
        images = open_images(
            self.config.data, self.config.image, batch_size=training.batch_size, seed=training.seed,
            device=self.device, progress=False,
        )  # fmt: skip
        return images.batches()

    def gradients(self, number: int) -> dict[str, Tensor]:
        """The gradients of one critic and one generator pass, each as one vector on the CPU; `number`: which draws."""
        size, batch = self.config.image.size, self.config.training.batch_size
        x_real = torch.rand(
            batch, self.config.image.channels, size, size, generator=torch.Generator().manual_seed(number)
        )
        x_real = x_real.to(self.device, self.dtype)
        critic_draws, generator_draws = _as(self.dtype, self.pass_draws(number))
        if self.is_textbook:
            losses = [
                (self.steps.discriminator, self.steps.critic_loss(x_real, critic_draws)[0]),
                (self.generator, self.steps.generator_loss(x_real, generator_draws).total),
            ]
            values = [torch.autograd.grad(loss, list(network.parameters())) for network, loss in losses]
            named = [
                dict(zip(network.parameters(), part, strict=True))
                for (network, _), part in zip(losses, values, strict=True)
            ]
            networks = [network for network, _ in losses]
        else:
            state = self.steps.state
            networks = [state.discriminator, state.generator]
            done = self.steps.run_pass("critic_pass", x_real, critic_draws).gradients
            named = [dict(zip(state.parameters["discriminator"], map(Tensor.clone, done), strict=True))]
            done = self.steps.run_pass("generator_pass", x_real, generator_draws).gradients
            named.append(dict(zip(state.parameters["vae"] + state.parameters["predictor"], done, strict=True)))
        return {
            name: torch.cat([part[parameter].reshape(-1).cpu() for parameter in network.parameters()])
            for name, network, part in zip(("critic", "generator"), networks, named, strict=True)
        }

    def pass_draws(self, step: int = 1) -> tuple[Any, Any]:
        """The random numbers of a critic and a generator step."""
        return self.draws.critic(self.generator, step, 0), self.draws.generator(self.generator, step)

    def iteration(self, batches: Iterator[Tensor], step: int, synchronize: Callable[[], None]) -> dict[str, float]:
        """Runs one whole iteration; returns the seconds of its parts. `synchronize` is called between them."""
        seconds = {"data": 0.0, "critic": 0.0, "generator": 0.0}
        last = time.perf_counter()

        def lap(part: str) -> None:
            nonlocal last
            synchronize()
            seconds[part] += (now := time.perf_counter()) - last
            last = now

        for repeat in range(self.config.training.n_critic):
            x_real = next(batches)
            lap("data")
            self.steps.critic_step(x_real, self.draws.critic(self.generator, step, repeat))
            lap("critic")
        self.steps.generator_step(x_real, self.draws.generator(self.generator, step))
        lap("generator")
        return seconds

    def gru_seconds(self, synchronize: Callable[[], None]) -> float:
        """What watching the videos takes in one iteration: synthesis, and the GRU forward and backward."""
        config, watch = self.config, self.generator.watch
        if config.weight_predictor.update != "predicted":
            return 0.0
        batch, weights = config.training.batch_size, list(self.generator.predictor.parameters())[:-1]
        x_base = torch.rand(batch, *self.generator.vae.image_shape, device=self.device)
        motion = self.generator.draw_motion(batch)

        def forward() -> None:
            updated = batch - base_fakes(config)
            with torch.no_grad():
                watch(x_base[:updated], type(motion)(*(part[:updated] for part in motion)))

        def forward_and_backward() -> None:
            torch.autograd.grad(watch(x_base, motion)[1].sum(), weights, allow_unused=True)

        return config.training.n_critic * _median_time(forward, synchronize) + _median_time(
            forward_and_backward, synchronize
        )

    def work(self) -> dict[str, dict[str, float]]:
        """Arithmetic and bytes of one iteration's matrix operations, by precision; and Adam's bytes."""
        critic_draws, generator_draws = self.pass_draws()
        x_real = torch.rand(len(critic_draws.z), *self.generator.vae.image_shape, device=self.device)
        n_critic = self.config.training.n_critic
        total: dict[str, dict[str, float]] = {}
        for count, name, draws in (
            (n_critic, "critic_pass", critic_draws),
            (1, "generator_pass", generator_draws),
        ):
            with MatrixWork() as counted:
                getattr(self.steps, name)(x_real, draws)
            for precision, numbers in counted.by_precision.items():
                place = total.setdefault(precision, {"flops": 0.0, "bytes": 0.0})
                for key, number in numbers.items():
                    place[key] += count * number
        parameters = self.steps.state.parameters
        size = {name: sum(parameter.nbytes for parameter in group) for name, group in parameters.items()}
        # Adam writes and reads each gradient, and reads and writes each weight and its two moments.
        total.setdefault("fp32", {"flops": 0.0, "bytes": 0.0})["bytes"] += 8 * (
            n_critic * size["discriminator"] + size["vae"] + size["predictor"]
        )
        return total


class MatrixWork(TorchDispatchMode):
    """Counts floating point operations and bytes of products and convolutions, at the precision of their operands.

    Bytes are the operands read and the results written, once each: all else could be fused into these operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_precision: dict[str, dict[str, float]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if (count := flop_registry.get(function._overloadpacket)) is not None:
            tensors = [value for value in args if isinstance(value, Tensor)]
            precision = "bf16" if tensors[0].dtype == torch.bfloat16 else "fp32"
            results = result if isinstance(result, tuple) else (result,)
            place = self.by_precision.setdefault(precision, {"flops": 0.0, "bytes": 0.0})
            place["flops"] += count(*args, **kwargs, out_val=result)
            place["bytes"] += sum(value.nbytes for value in (*tensors, *results) if isinstance(value, Tensor))
        return result


def _as(dtype: torch.dtype, value: Any) -> Any:
    """Nested tuples with their real numbers in `dtype`."""
    if isinstance(value, tuple):
        parts = [_as(dtype, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _median_time(run: Callable[[], object], synchronize: Callable[[], None], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats + 1):
        synchronize()
        started = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[repeats // 2]


def device_rates(device: torch.device, precisions: list[str]) -> dict[str, float]:
    """The device's best measured matrix rates (FLOP/s, by precision) and its copy bandwidth (bytes/s)."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    megabytes = 1024 if device.type == "cuda" else 256
    rates = {}
    for precision in precisions:
        side = 8192 if device.type == "cuda" else 1536
        if precision == "bf16" and not has_bf16(device):
            side = 256  # emulated, it takes 100 times as long
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        a = torch.rand(side, side, device=device, dtype=dtype)
        times = [_median_time(partial(torch.mm, a, a), synchronize, 1) for _ in range(4)]
        rates[precision] = 2 * side**3 / min(times)
        # Where the library's products are slower than its convolutions, the latter show what the device can do.
        batch, channels, size = (64, 256, 64) if device.type == "cuda" else (16, 128, 32)
        if precision == "bf16" and not has_bf16(device):
            batch = 1
        x = torch.rand(batch, channels, size, size, device=device, dtype=dtype)
        kernel = torch.rand(channels, channels, 3, 3, device=device, dtype=dtype)
        x, kernel = (value.to(memory_format=torch.channels_last) for value in (x, kernel))
        times = [_median_time(partial(functional.conv2d, x, kernel, padding=1), synchronize, 1) for _ in range(4)]
        rates[precision] = max(rates[precision], 2 * 9 * batch * channels**2 * size**2 / min(times))
    source = torch.zeros(megabytes * 250_000, device=device)
    target = torch.zeros_like(source)
    times = [_median_time(lambda: target.copy_(source), synchronize, 1) for _ in range(4)]
    return rates | {"copy": 2 * source.nbytes / min(times)}


def peak_memory(device: torch.device) -> int:
    """Peak bytes since `forget_peak`, of the GPU's allocator or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak(device: torch.device) -> None:
    """Lets the peak begin again: what compiling took is not what training takes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def main(settings: dict[str, Any]) -> None:
    """Answers `benchmark.py` until it closes the pipe.

    Args:
        settings: `overrides`, `device`, `runner`, and `folder` for the gradients.
    """
    config = load_config(None, settings["overrides"])
    device, runner = torch.device(settings["device"]), settings["runner"]
    if runner != "textbook":
        prepare_device(device)  # the textbook leaves the library's settings alone
    elif device.type == "cuda":
        torch.cuda.set_device(device)  # which is what gets waited for
        torch.backends.cudnn.allow_tf32 = False  # but "fp32" is to mean fp32 for both
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    answer: dict[str, Any] = {}
    if runner == "rates":
        for _ in sys.stdin:
            print(json.dumps(device_rates(device, settings["precisions"])), flush=True)
        return
    variant = Variant(config, device, runner)
    started = time.perf_counter()
    for number in range(1, 1 + settings["gradients"]):
        torch.save(variant.gradients(number), Path(settings["folder"]) / f"{settings['name']} {number}")
        if number == 1:
            wait()
            answer["first_seconds"] = time.perf_counter() - started
    print(json.dumps(answer), flush=True)
    batches: Iterator[Tensor] | None = None
    step = 0
    for line in sys.stdin:
        word = line.strip()
        if word == "iteration":
            if batches is None:
                batches = variant.batches()
                forget_peak(device)
            step += 1
            started = time.perf_counter()
            if device.type == "cuda":  # the whole without a stop, then once more for the parts
                variant.iteration(batches, step, lambda: None)
                wait()
                whole = time.perf_counter() - started
                answer = variant.iteration(batches, step, wait) | {"iteration": whole}
            else:
                answer = variant.iteration(batches, step, wait)
                answer["iteration"] = time.perf_counter() - started
        else:
            questions: dict[str, Callable[[], dict[str, Any]]] = {
                "memory": lambda: {"bytes": peak_memory(device)},
                "gru": lambda: {"seconds": variant.gru_seconds(wait)},
                "work": variant.work,
            }
            answer = questions[word]()
        print(json.dumps(answer), flush=True)

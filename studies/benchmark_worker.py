"""One measured variant of the training iteration, in a process of its own; `benchmark.py` starts it and asks it.

A process for each variant makes its peak memory its own, and gives each the library settings of its kind of program.
It reads one word a line from standard input and answers with one line of JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

from util import prepare_device

# isort: split
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from configuration import Config, load_config
from image_data import open_images
from model_definitions import WeightPredictorRNN
from step_runners import CudaGraphSteps, EagerSteps
from studies.textbook import Textbook, textbook_batches
from training import build_networks, iteration
from training_log import peak_memory_gb
from training_step import NoiseSampler, TrainingState

RUNNERS = {"eager": EagerSteps, "cuda_graph": CudaGraphSteps}


class Variant:
    """A step runner, or the textbook, with networks, random numbers and images.

    Args:
        runner: `textbook`, `eager`, `cuda_graph`, or `reference`: the textbook in float64.
        dtype: of weights and images; the reference's is float64 anyway.
    """

    def __init__(self, config: Config, device: torch.device, runner: str, dtype: torch.dtype = torch.float32) -> None:
        self.config, self.device, self.noise = config, device, NoiseSampler(config, device)
        self.is_textbook = runner in ("textbook", "reference")
        self.dtype = torch.float64 if runner == "reference" else dtype
        self.wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        if self.is_textbook:
            self.steps: Any = Textbook(config, device, self.dtype)
        else:
            generator, critic = build_networks(config)
            self.steps = RUNNERS[runner](TrainingState(generator.to(dtype), critic.to(dtype), config, device))
        self.generator = self.steps.generator if self.is_textbook else self.steps.state.generator
        # A head of zeros, as at the start of a training, would hide most of the generator's gradient.
        if isinstance(self.generator.predictor, WeightPredictorRNN):
            head = self.generator.predictor.to_update.weight.data
            head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)) * 0.1)

    def batches(self) -> Iterator[Tensor]:
        """Images as this variant reads them: (B, C, H, W) in [0, 1]."""
        if self.is_textbook:
            return textbook_batches(self.config, self.device)
        batch_size, seed = self.config.training.batch_size, self.config.training.seed
        how: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "device": self.device, "progress": False}
        return open_images(self.config.data, self.config.image, **how).batches()

    def inputs(self, number: int) -> tuple[Tensor, Any, Any]:
        """Random images (B, C, H, W), and the random numbers of a critic and of a generator step."""
        shape = (self.config.training.batch_size, *self.generator.vae.image_shape)
        x_real = torch.rand(shape, generator=torch.Generator().manual_seed(number)).to(self.device)
        inputs = x_real, self.noise.critic(number, 0), self.noise.generator(number)
        return tree_map(lambda x: x.to(self.dtype) if getattr(x, "dtype", None) == torch.float32 else x, inputs)

    def gradients(self, number: int) -> dict[str, Tensor]:
        """The gradients of one critic and one generator pass over `inputs(number)`, each as one vector on the CPU."""
        x_real, *noise = self.inputs(number)
        vectors = {}
        for name, numbers in zip(("critic", "generator"), noise, strict=True):
            if not self.is_textbook:
                gradients = self.steps.run_pass(f"{name}_pass", x_real, numbers).gradients
            elif name == "critic":
                loss = self.steps.critic_loss(x_real, numbers)[0]
                gradients = torch.autograd.grad(loss, list(self.steps.critic.parameters()))
            else:
                modules = self.generator.vae, self.generator.predictor, self.generator.head  # as our runners order them
                weights = [p for module in modules for p in module.parameters() if p.requires_grad]
                loss = self.steps.generator_loss(x_real, numbers).total
                gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            vectors[name] = torch.cat([part.flatten().cpu() for part in gradients])  # a CUDA graph overwrites its own
        return vectors

    def iteration(self, batches: Iterator[Tensor], step: int, count: int = 1) -> dict[str, float | None]:
        """Runs iterations as training does, which waits for the device only now and then; the seconds of one, those of
        waiting for images, and the peak memory so far.
        """
        waits: list[float] = []

        def timed_batches() -> Iterator[Tensor]:
            while True:
                started = time.perf_counter()
                x_real = next(batches)
                waits.append(time.perf_counter() - started)
                yield x_real

        started = time.perf_counter()
        for number in range(count):
            iteration(self.steps, self.noise, timed_batches(), step + number)
        self.wait()
        seconds, waited = (time.perf_counter() - started) / count, sum(waits) / count
        return {"seconds": seconds, "data_seconds": waited, "peak_memory_gb": peak_memory_gb(self.device)}

    def parts(self) -> dict[str, float]:
        """Seconds of a critic step and of a generator step, on images that are there already."""
        x_real, critic_noise, generator_noise = self.inputs(1)
        return {
            "critic_seconds": median_seconds(lambda: self.steps.critic_step(x_real, critic_noise)),
            "generator_seconds": median_seconds(lambda: self.steps.generator_step(x_real, generator_noise)),
        }

    def flops(self, batches: Iterator[Tensor]) -> dict[str, float]:
        """Floating point operations of the products and convolutions of one iteration, run eagerly."""
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = NoModuleTracker()
        with counter:
            self.iteration(batches, 1)
        return {"flops": counter.get_total_flops()}


class NoModuleTracker(ModuleTracker):
    """Nobody asks for FLOPs by module, and the hooks for it fail where a module (a head) is called with parameters."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def median_seconds(run: Callable[[], object]) -> float:
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())  # it waits for a GPU
    return timer.blocked_autorange().median


def device_rate(device: torch.device, precision: str) -> float:
    """The best rate of matrix products or convolutions that the device reaches, FLOP/s."""
    side, batch, channels, size = (8192, 64, 256, 64) if device.type == "cuda" else (1536, 16, 128, 32)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    a, x = torch.rand(side, side, device=device), torch.rand(batch, channels, size, size, device=device)
    kernel = torch.rand(channels, channels, 3, 3, device=device).to(memory_format=torch.channels_last)
    convolution = partial(functional.conv2d, x.to(memory_format=torch.channels_last), kernel, padding=1)
    flops = 2 * 9 * batch * channels**2 * size**2
    return max(2 * side**3 / median_seconds(lambda: a @ a), flops / median_seconds(convolution))


def main(settings: dict[str, Any]) -> None:
    """Answers `benchmark.py` until it closes the pipe; `settings` are those that it sends in `Worker`."""
    config, runner = load_config(None, settings["overrides"]), settings["runner"]
    device, folder = torch.device(settings["device"]), Path(settings["folder"])
    if runner != "textbook":
        prepare_device(device)  # the textbook leaves the library's settings alone
    elif device.type == "cuda":
        torch.cuda.set_device(device)  # which is what gets waited for
        torch.backends.cudnn.allow_tf32 = False  # but "fp32" is to mean fp32 for both
    variant = Variant(config, device, runner)
    answer, errors = dict[str, Any](), dict[str, list[float]]()
    for number in range(1, 1 + settings["gradients"]):
        vectors, path = variant.gradients(number), folder / f"{number}.pt"
        if runner == "reference":
            torch.save(vectors, path)
        for name, exact in torch.load(path).items() if path.exists() else ():
            errors.setdefault(name, []).append(float((vectors[name] - exact).norm() / exact.norm()))
    answer["gradient_errors"] = {name: statistics.median(values) for name, values in errors.items()}
    print(json.dumps(answer), flush=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # what recording took is not what training takes
    batches = variant.batches()
    questions: dict[str, Callable[[int], dict[str, Any]]] = {
        # On a GPU ten at a time, or its idle time between turns would count.
        "iteration": lambda step: variant.iteration(batches, step, 10 if device.type == "cuda" else 1),
        "parts": lambda _: variant.parts(),
        "flops": lambda _: variant.flops(batches),
        "rate": lambda _: {"rate": device_rate(device, config.runtime.precision)},
    }
    for step, line in enumerate(sys.stdin, start=1):
        print(json.dumps(questions[line.strip()](step)), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

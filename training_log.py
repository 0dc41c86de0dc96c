"""What the user sees while a run trains: progress, metrics, samples of fixed latents, and how it is stopped."""

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from command_line import silence_output
from configuration import Config, UserError
from distributed import ALONE, World
from generator_path import Generator
from image_data import TrainingImages
from random_draws import stable_seed
from run_directory import RunDirectory
from sampling import weight_driven_frames
from video_synth import Motion


class Log:
    """Averages each interval's metrics, writes them, shows progress, and stops a run whose losses are no numbers.

    Steps hand over scalars that stay on the device; only `write` and `check` wait for it.
    """

    def __init__(self, run: RunDirectory, steps: int, config: Config, done: int = 0, world: World = ALONE) -> None:
        self.run, self.steps, self.world = run, steps, world
        self.images_per_step = config.training.n_critic * config.training.batch_size
        self.names: list[str] = []
        self.latest: dict[str, float] = {}
        self.skipped_count = 0
        self.evaluated: int | None = None  # the step whose quality was measured last
        self.waited = 0.0  # seconds of this interval in which the loop had no pictures
        self.sums: Tensor | None = None
        self.first_bad: Tensor | None = None
        self.step = self.since_step = done
        self.since_time = self.started = time.perf_counter()
        self.is_terminal = sys.stderr.isatty() and world.is_first
        self.bar = tqdm(
            total=steps,
            initial=done,
            unit="step",
            disable=not self.is_terminal,
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )

    def state(self) -> dict[str, Any]:
        """The interval that has begun, so that the line it becomes is the same after a stop between its steps."""
        now = time.perf_counter()
        return {
            "names": self.names,
            "sums": self.sums,
            "since_step": self.since_step,
            "interval_seconds": now - self.since_time,
            "waited_seconds": self.waited,
            "seconds": now - self.started,
            "latest": self.latest,
        }

    def restore(self, saved: dict[str, Any], device: torch.device) -> None:
        """Goes on with what `state` gave."""
        now = time.perf_counter()
        self.since_step, self.latest = saved["since_step"], saved["latest"]
        self.since_time, self.started = now - saved["interval_seconds"], now - saved["seconds"]
        self.waited = saved.get("waited_seconds", 0.0)
        if saved["sums"] is not None:
            self.names = saved["names"]
            self._begin_interval(saved["sums"].to(device))

    def line(self, text: str) -> None:
        """Prints one line, above the bar where there is one. A terminal or pipe that is gone stops no training.

        Of several processes the first one speaks.
        """
        if not self.world.is_first:
            return
        try:
            tqdm.write(text) if self.is_terminal else print(text, flush=True)
        except OSError:
            silence_output()

    def collect(self, step: int, metrics: dict[str, Tensor]) -> None:
        """Adds one step's scalars, without waiting for the device."""
        values = torch.stack([value.float() for value in metrics.values()])
        if self.sums is None or self.first_bad is None or self.names != list(metrics):
            self.names = list(metrics)
            self.since_step = step - 1
            self._begin_interval(torch.zeros_like(values))
        assert self.sums is not None
        assert self.first_bad is not None
        self.sums += values
        self.first_bad = torch.where(values.isfinite(), self.first_bad, self.first_bad.clamp_max(step))
        self.step = step
        self.bar.update()

    def next_batch(self, batches: Iterator[Tensor]) -> Tensor:
        """The next of `batches`; the time that the host waits for it becomes `speed/data_wait_share`."""
        started = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - started
        return batch

    def _begin_interval(self, sums: Tensor) -> None:
        self.sums = sums.clone()
        self.first_bad = torch.full(sums.shape, math.inf, device=sums.device, dtype=torch.float64)

    def check(self, networks: dict[str, nn.Module] | None = None) -> None:
        """Stops a run that has gone wrong, before its state reaches a checkpoint. Waits for the device.

        Raises:
            UserError: a loss, score or gradient, or a weight of `networks`, is no finite number; names the first step.
        """
        if self.first_bad is not None and (bad := self.first_bad.min().item()) < math.inf:
            first = self.first_bad.tolist()
            names = [name for name, step in zip(self.names, first, strict=True) if step == bad]
            self._stop(f"{', '.join(names)} not finite at step {int(bad)}")
        for name, network in (networks or {}).items():
            if not torch.stack([parameter.isfinite().all() for parameter in network.parameters()]).all():
                self._stop(f"a weight of the {name} is not finite at step {self.step}")

    def write(self, step: int) -> None:
        """Reads the averages since the last call, writes them and shows them.

        Raises:
            UserError: as `check`.
        """
        if self.sums is None or self.first_bad is None or step == self.since_step:
            return
        waited, memory = self.world.largest([self.waited, peak_memory_gb(self.sums.device) or 0.0])
        self.check()
        averages = (self.sums / (step - self.since_step)).tolist()
        seconds = time.perf_counter() - self.since_time
        metrics = dict(zip(self.names, averages, strict=True))
        metrics["images_seen"] = step * self.images_per_step
        metrics["speed/images_per_second"] = (step - self.since_step) * self.images_per_step / seconds
        metrics["speed/seconds_per_step"] = seconds / (step - self.since_step)
        metrics["speed/data_wait_share"] = waited / seconds
        if memory:
            metrics["memory/peak_gb"] = memory
        metrics["seconds"] = time.perf_counter() - self.started
        self.run.log_metrics(step, metrics)
        self.latest = metrics
        self.show(step, metrics)
        self.sums.zero_()
        self.since_step, self.since_time, self.waited = step, time.perf_counter(), 0.0

    def note_quality(self, step: int, metrics: dict[str, float]) -> None:
        """Writes and shows what a `QualityCheck` has measured, as a line of its own."""
        self.run.log_metrics(step, metrics)
        self.latest = self.latest | metrics
        self.evaluated = step
        kid, spread, base = (metrics[f"quality/{name}"] for name in ("kid", "kid_std", "kid_base"))
        text = f"KID {kid:.4f} ± {spread:.4f} (base {base:.4f})"
        text += f", critic's gap {metrics['quality/train_gap']:.2f} on training pictures"
        if "quality/heldout_gap" in metrics:
            text += f", {metrics['quality/heldout_gap']:.2f} on held-out ones"
        self.line(f"quality at step {step}: {text}")

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """The bar's tail, or a plain line where output goes to a file."""
        summary = (
            f"gap {metrics['critic/gap']:.2f}, rec {metrics['generator/reconstruction']:.1f}, "
            f"kl {metrics['generator/kl']:.1f}, update {metrics['update/relative_size']:.1%}, "
            f"{metrics['speed/images_per_second']:.0f} images/s"
        )
        if self.is_terminal:
            self.bar.set_postfix_str(summary)
        else:
            left = (self.steps - step) * metrics["speed/seconds_per_step"]
            self.line(f"step {step}/{self.steps}  {summary}, {duration(left)} left")

    def skipped(self, skipped: list[tuple[Path, str]]) -> None:
        """Lists broken images that were met since the last call, on the screen and in skipped.txt."""
        new = skipped[self.skipped_count :]
        if new:
            self.skipped_count = len(skipped)
            self.run.list_skipped(new)
            self.line(
                f"skipped {len(new)} broken images, {len(skipped)} in all; {self.run.path / 'skipped.txt'} lists them"
            )

    def pause(self) -> "_Pause":
        """A context whose time is not counted in images/s: drawing samples, writing a checkpoint."""
        return _Pause(self)

    def finish(self, step: int, stop: "StopRequest") -> None:
        """The last words of a run."""
        self.close()
        if stop.requested and step < self.steps:
            self.line(f"stopped by {stop.reason} after step {step}; all is saved in {self.run.path}/")
            self.line("the same command goes on from there")
            return
        self.line(f"finished {step} steps in {duration(time.perf_counter() - self.started)}. Look at:")
        self.results(step)

    def results(self, step: int) -> None:
        """Where to find what a finished run has left."""
        for what, where in (
            ("pictures", f"samples/step_{step:06d}.png"),
            ("videos", f"clips/step_{step:06d}.mp4"),
            ("curves", "loss_curves.png"),
            ("checkpoint", "checkpoints/latest.pt"),
        ):
            self.line(f"  {what:<11}{self.run.path / where}")

    def _stop(self, what: str) -> NoReturn:
        self.close()
        kept, network = self.run.path / "checkpoints" / "latest.pt", _suspect(what)
        raise UserError(
            f"training stopped: {what}; "
            + (f"the last good checkpoint is {kept}" if kept.exists() else "no checkpoint was written yet")
            + f"; it began in the {network}: try a smaller training.lr_{network}, or training.clip_{network}=10"
            + (", and go on from there with --accept-changes" if kept.exists() else "")
        )

    def close(self) -> None:
        """Ends the progress bar."""
        self.bar.close()


def _suspect(what: str) -> str:
    """The network that the first bad numbers point at. A bad loss spoils several gradients, so losses count first."""
    for signs, network in (
        (("critic/", "score/", "discriminator"), "discriminator"),
        (("generator/reconstruction", "generator/kl"), "vae"),
        (("generator/update", "generator/video", "update/"), "predictor"),
        (("gradient_norm/vae",), "vae"),
        (("gradient_norm/predictor",), "predictor"),
    ):
        if any(sign in what for sign in signs):
            return network
    return "vae"


class _Pause:
    def __init__(self, log: Log) -> None:
        self.log = log

    def __enter__(self) -> None:
        if self.log.sums is not None and self.log.sums.device.type == "cuda":
            torch.cuda.synchronize()  # or steps still under way would count as pause
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.log.since_time += time.perf_counter() - self.started


class FixedSamples:
    """The same latents, motions and real pictures through the whole run, drawn by the averaged networks."""

    def __init__(self, config: Config, generator: Generator, images: TrainingImages, last_step: int) -> None:
        self.every, self.last_step = config.output.sample_every, last_step
        device = generator.vae.to_mu.weight.device
        random = torch.Generator(device).manual_seed(stable_seed(config.training.seed, "samples"))
        count = config.output.samples
        self.z = torch.randn(count, config.vae.latent_dim, device=device, generator=random)
        self.motion = generator.draw_motion(count, random)
        self.x_real = images.fixed_sample(count)

    def missing(self, run: RunDirectory, step: int) -> bool:
        """Whether the pictures of `step` are due and not there: a kill may come between a checkpoint and them."""
        due = step in (0, self.last_step) or step % self.every == 0
        return due and not (run.path / "samples" / f"step_{step:06d}.png").exists()

    @torch.no_grad()
    def save(self, run: RunDirectory, step: int, generator: Generator) -> Path:
        """Writes the sample grid, the clips and the curves of this moment; returns the grid's path.

        Of several processes only the one that writes draws them.
        """
        if not run.writes:
            return run.path / "samples"
        output = generator(self.z, self.motion)
        mu, _ = generator.vae.encode(self.x_real)
        path = run.save_samples(
            step,
            {
                "real": self.x_real,
                "reconstruction": generator.vae.decode(mu),
                "base image": output.x_base,
                "updated image": output.x_fake,
            },
        )
        # A shared update is the mean over all samples; otherwise only those that are shown need be drawn.
        count = len(self.z) if generator.shared else min(4, len(self.z))
        motion = Motion(*(part[:count] for part in self.motion))
        frames = torch.stack(
            list(weight_driven_frames(generator, self.z[:count], motion, output.video.shape[1])), dim=1
        )[:4]
        watched = functional.interpolate(output.video.flatten(0, 1), size=frames.shape[-2:])  # as coarse as it is
        watched = watched.unflatten(0, output.video.shape[:2])[:4]
        run.save_clip(step, {"synthetic video": watched, "weight-driven video": frames})
        if step:
            run.plot_losses()
        return path


class StopRequest:
    """Turns Ctrl-C, SIGTERM, a closed terminal or the end of `training.max_minutes` into a stop after the step.

    A second signal ends the process at once. Several processes stop together, whichever of them was told to.
    """

    REASONS = (None, "SIGINT", "SIGTERM", "SIGHUP", "time")  # as processes tell them to each other

    def __init__(self, max_minutes: float | None = None, world: World = ALONE) -> None:
        self.world = world
        if world.size > 1:
            world.vote(self._vote)
        self.signal_number = 0
        self.max_minutes = max_minutes
        self._ends = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal_number != 0 or time.monotonic() >= self._ends

    def agreed(self) -> bool:
        """To be asked once after each iteration: whether to stop now. The same for all processes."""
        if self.world.size == 1:
            return self.requested
        reason = self.REASONS[self.world.verdict()]
        if reason == "time":
            self._ends = -math.inf
        elif reason:
            self.signal_number = getattr(signal, reason)
        return reason is not None

    def _vote(self) -> int:
        if self.signal_number:
            return self.REASONS.index(signal.Signals(self.signal_number).name)
        return self.REASONS.index("time") if self.requested else 0

    @property
    def reason(self) -> str:
        """`SIGINT`, `SIGTERM`, or which time is over."""
        if self.signal_number:
            return signal.Signals(self.signal_number).name
        return f"training.max_minutes={self.max_minutes:g}"

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells have it; 0 for the end of a time that the user has set."""
        return 128 + self.signal_number if self.signal_number else 0

    def __enter__(self) -> "StopRequest":
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue  # under nohup a closed terminal is to be ignored
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        self.signal_number = number
        for other in self._before:
            signal.signal(other, signal.SIG_DFL)
        if not self.world.is_first:
            return
        with suppress(OSError):  # not print: it may have been interrupted in the middle of a print itself
            os.write(2, b"\nstopping after this step and saving; press Ctrl-C again to leave at once\n")


def peak_memory_gb(device: torch.device) -> float | None:
    """Peak memory so far, of the GPU's allocator, or of the process on a CPU; None where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def duration(seconds: float) -> str:
    """93 -> `1:33`, 4000 -> `1:06:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

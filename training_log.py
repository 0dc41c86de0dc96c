"""What the user sees while a run trains: progress, metrics, samples of fixed latents, checkpoints, and how it stops."""

import itertools
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import profile, schedule
from tqdm import tqdm

from checkpoints import snapshot
from configuration import Config, UserError, config_to_dict
from distributed import SINGLE_PROCESS, World
from image_data import TrainingImages
from media import to_pixels
from run_directory import RunDirectory
from sampling import weight_driven_frames
from training_step import TrainingState, stable_seed
from util import discard_output

SHOWN = {"gap": "critic/gap", "rec": "generator/reconstruction", "kl": "generator/kl", "video": "generator/video"}
"""Beside the speed and the update's size; where the predictor learns alone, there is no critic's gap."""


class Log:
    """Averages each interval's metrics, writes them, shows progress, and stops a run whose losses are not finite.

    Steps hand over scalars that stay on the device; only `write` and `check` wait for it. Of several processes the
    first alone has a folder to write to, and prints.

    Args:
        run: the run's folder; None where another process writes.
        steps: of the whole run.
        images: whose waiting times and broken images are reported.
        step: iterations done before.
    """

    def __init__(self, run: RunDirectory | None, steps: int, config: Config, images: TrainingImages, step: int = 0,
                 world: World = SINGLE_PROCESS) -> None:  # fmt: skip
        self.run, self.steps, self.images, self.world = run, steps, images, world
        self.path = config.output.folder
        self.images_per_step = config.training.n_critic * config.training.batch_size
        self.names: list[str] = []
        self.latest: dict[str, float] = {}
        self.skipped_count = 0
        self.evaluated: int | None = None  # the step whose quality was measured last
        self.waited_before = images.seconds_waited
        self.sums: Tensor | None = None
        self.good_steps = torch.zeros(0)  # of the interval, until a metric's sum was first not finite
        self.step = self.since_step = step
        self.since_time = self.started = self.session_began = time.perf_counter()
        self.paused = 0.0  # seconds of this session
        self.steps_before: int | None = step  # this session; None: how long it takes has been said
        begins, has_updates = config.weight_predictor.start, config.weight_predictor.update != "off"
        self.updates_from = math.ceil(begins * steps) + 1 if has_updates else 0  # their first step
        self.is_terminal = sys.stderr.isatty() and world.is_main
        self.bar = tqdm(
            total=steps, initial=step, unit="step", disable=not self.is_terminal, dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """The interval that has begun, so that the line it becomes is the same after a stop between its steps."""
        now = time.perf_counter()
        return {"names": self.names, "sums": self.sums, "since_step": self.since_step, "latest": self.latest,
                "interval_seconds": now - self.since_time, "seconds": now - self.started,
                "waited_seconds": self.images.seconds_waited - self.waited_before}  # fmt: skip

    def restore(self, saved: dict[str, Any] | None, device: torch.device) -> None:
        """Goes on with what `state` gave; None: from the start."""
        if saved is None:
            return
        now = time.perf_counter()
        self.since_step, self.latest = saved["since_step"], saved["latest"]
        self.since_time, self.started = now - saved["interval_seconds"], now - saved["seconds"]
        self.waited_before -= saved["waited_seconds"]
        if saved["sums"] is not None:
            self.names = saved["names"]
            self._begin_interval(saved["sums"].to(device))

    def line(self, text: str) -> None:
        """Prints one line, above the bar if there is one. A closed terminal or pipe stops no training."""
        if not self.world.is_main:
            return
        try:
            # In one piece with its line break: the background thread prints, too.
            tqdm.write(text) if self.is_terminal else print(text + "\n", end="", flush=True)
        except OSError:
            discard_output()

    def collect(self, step: int, metrics: dict[str, Tensor]) -> None:
        """Adds one step's scalars, without waiting for the device."""
        values = torch.stack([value.float() for value in metrics.values()])
        if self.sums is None or self.names != list(metrics):
            self.write(self.step)  # what an interval has until a stage of the run ends
            self.names = list(metrics)
            self.since_step = step - 1
            self._begin_interval(torch.zeros_like(values))
        assert self.sums is not None
        self.sums += values
        self.good_steps += self.sums - self.sums == 0  # once NaN or infinite, a sum stays so
        self.step = step
        self.bar.update()
        if self.steps_before is not None:
            self._estimate_time(step - self.steps_before, self.steps - self.steps_before)

    def _estimate_time(self, done: int, steps: int) -> None:
        """Says how long this session's steps take, once the first 10 are done, or 20 s are over."""
        if self.sums is None or (done < 10 and time.perf_counter() - self.session_began - self.paused < 20):
            return
        self.sums.sum().item()  # waits for the device
        seconds = (time.perf_counter() - self.session_began - self.paused) / done * steps
        later = f", longer from step {self.updates_from:,} on, where updates begin" * (self.updates_from > self.step)
        self.line(describe_time(seconds, steps, self.sums.device, later))
        self.steps_before = None

    def _begin_interval(self, sums: Tensor) -> None:
        self.sums = sums.clone()
        self.good_steps = torch.full(sums.shape, self.step - self.since_step, device=sums.device)

    def check(self, networks: dict[str, nn.Module] | None = None) -> None:
        """Stops a run that has gone wrong, before its state reaches a checkpoint. Waits for the device. Raises
        UserError: a loss, score, gradient or weight of `networks` is not finite; names the first step.
        """
        good_steps = self.good_steps.tolist()
        if good_steps and (fewest := min(good_steps)) < self.step - self.since_step:
            names = [name for name, steps in zip(self.names, good_steps, strict=True) if steps == fewest]
            self._stop(f"{', '.join(names)} not finite at step {self.since_step + fewest + 1}")
        for name, network in (networks or {}).items():
            if not torch.stack([parameter.isfinite().all() for parameter in network.parameters()]).all():
                self._stop(f"a weight of the {name} is not finite at step {self.step}")

    def write(self, step: int) -> None:
        """Reads the averages since the last call, writes them and shows them. Raises UserError: as `check`."""
        if self.sums is None or step == self.since_step:
            return
        waited = self.images.seconds_waited - self.waited_before  # seconds in which the loop had no images
        waited, memory = self.world.maximum([waited, peak_memory_gb(self.sums.device) or 0.0])
        self.check()
        averages = (self.sums / (step - self.since_step)).tolist()
        seconds = time.perf_counter() - self.since_time
        metrics = dict(zip(self.names, averages, strict=True))
        metrics["images_seen"] = step * self.images_per_step
        metrics["speed/images_per_second"] = (step - self.since_step) * self.images_per_step / seconds
        metrics["speed/seconds_per_step"] = seconds / (step - self.since_step)
        metrics["speed/data_wait_fraction"] = waited / seconds
        metrics["speed/step_fraction"] = 1 - self.paused / (time.perf_counter() - self.session_began)
        if memory:
            metrics["memory/peak_gb"] = memory
        metrics["seconds"] = time.perf_counter() - self.started
        if self.run:
            self.run.log_metrics(step, metrics)
        self.latest = metrics
        self.show(step, metrics)
        self.report_skipped()
        self.sums.zero_()
        self.good_steps.zero_()
        self.since_step, self.since_time = step, time.perf_counter()
        self.waited_before = self.images.seconds_waited

    def write_quality(self, step: int, metrics: dict[str, float]) -> None:
        """Writes and shows what a `QualityCheck` has measured, as a line of its own."""
        if self.run:
            self.run.log_metrics(step, metrics)
        self.latest = self.latest | metrics
        self.evaluated = step
        kid, spread, base = (metrics[f"quality/{name}"] for name in ("kid", "kid_std", "kid_base"))
        text = f"KID {kid:.4f} ± {spread:.4f} (base {base:.4f})"
        text += f", critic's gap {metrics['quality/train_gap']:.2f} on training images"
        if "quality/heldout_gap" in metrics:
            text += f", {metrics['quality/heldout_gap']:.2f} on held-out ones"
        self.line(f"quality at step {step}: {text}")

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """The bar's tail, or a plain line where output goes to a file."""
        parts = [f"{metrics['speed/images_per_second']:.0f} images/s"]
        parts += [f"{label} {metrics[name]:.3g}" for label, name in SHOWN.items() if metrics.get(name)]
        parts.append(f"update {metrics['update/relative_size']:.1%}")
        if "memory/peak_gb" in metrics:
            parts.append(f"{metrics['memory/peak_gb']:.1f} GB")
        if self.is_terminal:  # as much as fits beside the bar: its counts and times take 41 columns and more
            room = shutil.get_terminal_size().columns - 41 - 2 * len(str(self.steps))
            lengths = itertools.accumulate(len(part) + 2 for part in parts)
            self.bar.set_postfix_str(", ".join(part for part, end in zip(parts, lengths, strict=True) if end <= room))
        else:
            left = (self.steps - step) * metrics["speed/seconds_per_step"]
            self.line(f"step {step}/{self.steps}  {', '.join(parts)}, {tqdm.format_interval(left)} left")

    def report_skipped(self) -> None:
        """Lists broken images that any process has met since the last call, on the screen and in skipped.txt."""
        skipped = self.images.skipped
        if self.images.storage == "stream":  # each process meets its own
            skipped = list(dict.fromkeys(entry for part in self.world.gather_objects(skipped) for entry in part))
        new = skipped[self.skipped_count :]
        if new and self.run:
            self.skipped_count = len(skipped)
            self.run.list_skipped(new)
            self.line(f"skipped {len(new)} broken images, {len(skipped)} in all; see {self.path / 'skipped.txt'}")

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A context whose time is not counted in images/s; at its start, all files of the pause before are written."""
        if self.sums is not None and self.sums.device.type == "cuda":
            torch.cuda.synchronize()  # or steps still under way would count as pause
        started = time.perf_counter()
        if self.run:
            self.run.wait()
        yield
        seconds = time.perf_counter() - started
        self.since_time += seconds
        self.paused += seconds

    def finish(self, step: int, stop: "StopRequest") -> None:
        """The last lines of a run."""
        if stop.requested and step < self.steps:
            self.line(f"stopped by {stop.reason} after step {step}; all is saved in {self.path}/")
            self.line("the same command goes on from there")
            return
        self.line(f"finished {step} steps in {tqdm.format_interval(time.perf_counter() - self.started)}. Look at:")
        files = {"images": f"samples/step_{step:06d}.png", "videos": f"clips/step_{step:06d}.mp4",
                 "curves": "loss_curves.png", "checkpoint": "checkpoints/latest.pt"}  # fmt: skip
        for what, where in files.items():
            self.line(f"  {what:<11}{self.path / where}")

    def _stop(self, what: str) -> NoReturn:
        if self.run:
            self.run.wait()
        latest, network = self.path / "checkpoints" / "latest.pt", _likely_network(what)
        raise UserError(
            f"training stopped: {what}; "
            + (f"the last good checkpoint is {latest}" if os.path.exists(latest) else "no checkpoint was written yet")
            + f"; it began in the {network}: try a smaller training.lr_{network}, or training.clip=10"
            + (", and go on from there with --accept-changes" if os.path.exists(latest) else "")
        )


def describe_time(seconds: float, steps: int, device: torch.device, more: str = "") -> str:
    """Such as `about 1 h 50 min for 11,000 steps`; on a CPU a second line warns of more than two hours."""
    hours, minutes = divmod(round(seconds / 60), 60)
    text = f"{hours:,} h {minutes} min" if hours else f"{minutes} min" if seconds > 90 else f"{seconds:.0f} s"
    text = f"about {text} for {steps:,} steps{more}"
    if device.type == "cpu" and seconds > 2 * 60 * 60:
        text += "\nWARNING: a CPU takes minutes for --config configs/quick.yaml (32 px), two hours for configs/64.yaml"
    return text


def _likely_network(what: str) -> str:
    """The network that the first bad numbers point at. A bad loss spoils several gradients, so losses count first."""
    losses = {"critic/|score/|the critic": "critic", "/reconstruction|/kl": "vae", "update|video": "predictor"}
    gradients = {f"gradient_norm/{network}": network for network in ("critic", "vae", "predictor")}
    return next((network for signs, network in (losses | gradients).items() if re.search(signs, what)), "vae")


class FixedSamples:
    """The same latents, motions and real images through the whole run, decoded by the averaged networks; `clips` are
    real ones (N, L, C, H, W), to be shown beside.
    """

    def __init__(
        self, state: TrainingState, images: TrainingImages, last_step: int, clips: Tensor | None = None
    ) -> None:
        config, device = state.config, state.device
        self.every, self.last_step = config.output.sample_every, last_step
        self.plotted = 0  # the step of the last loss curves
        random = torch.Generator(device).manual_seed(stable_seed(config.training.seed, "samples"))
        count = config.output.samples
        self.z = torch.randn(count, config.vae.latent_dim, device=device, generator=random)
        self.motion = state.generator.sample_motion(count, random)
        self.x_real, self.clips = images.fixed_sample(count), clips

    def missing(self, run: RunDirectory, step: int) -> bool:
        """Whether the samples of `step` are due and not there: a kill may come between a checkpoint and them."""
        due = step in (0, self.last_step) or step % self.every == 0
        return due and not os.path.exists(run.path / "samples" / f"step_{step:06d}.png")

    @torch.no_grad()
    def save(self, run: RunDirectory, state: TrainingState, log: Log, last: bool) -> None:
        """Has the sample grid and the clips of this moment written, which the log then names; and the loss curves, if
        this is the `last` moment or half as many steps again are done as at the last curves.
        """
        generator, step = state.generator_ema, state.step
        output = generator(self.z, self.motion)
        mu, _ = generator.vae.encode(self.x_real)
        columns = {"real": self.x_real, "reconstruction": generator.vae.decode(mu)}
        columns |= {"base image": output.x_base, "updated image": output.x_fake}
        # A shared update is the mean over all samples; otherwise only those that are shown need be decoded.
        shown = slice(len(self.z) if generator.shared else 4)
        motion = type(self.motion)(*(numbers[shown] for numbers in self.motion))
        label, video = "synthetic video", output.video[:4]
        if self.clips is not None:
            label, video = "clips", self.clips[:4]
        videos = weight_driven_frames(generator, self.z[shown], motion, video.shape[1])
        frames = torch.stack(list(videos), dim=1)[:4]
        coarse = functional.interpolate(video.flatten(0, 1), size=frames.shape[-2:])  # as coarse as it is
        # Pixels, not tensors: torch would start a second team of threads in the thread that writes them.
        images = {label: to_pixels(column) for label, column in columns.items()}
        clip = {label: to_pixels(coarse.unflatten(0, video.shape[:2])), "weight-driven video": to_pixels(frames)}
        plot_due = step > 0 and (last or step >= 1.5 * self.plotted)
        self.plotted = step if plot_due else self.plotted

        def write() -> None:
            path = run.save_samples(step, images)
            run.save_clip(step, clip)
            if plot_due:
                run.plot_losses()
            log.line(f"samples of step {step}: {path}")

        run.later(write)


class CheckpointManager:
    """Saves the state of a run with all that resuming it needs, and remembers which checkpoint was the best.

    A full disk may have room again when the next checkpoint is due. So a run ends only when `MOST_FAILURES` checkpoints
    in a row could not be written, or its last one.
    """

    MOST_FAILURES = 3

    def __init__(self, run: RunDirectory, config: Config, images: dict[str, Any], saved: dict[str, Any] | None) -> None:
        self.run, self.config = run, config
        self.images = images  # what a resumed run must find again
        self.best: dict[str, Any] | None = saved["best"] if saved else None
        self.failures = 0

    def save(self, state: TrainingState, log: Log, last: bool) -> None:
        """Has a checkpoint of this moment written; `last`: nothing comes after it. `run.wait` raises UserError where it
        cannot be written, and that was the last chance.
        """
        self._update_best(state.step, log)
        content = snapshot(state.to_dict() | {
            "images_seen": state.step * log.images_per_step, "config": config_to_dict(self.config), "best": self.best,
            "update_spec": state.generator.spec.to_dict(), "images": self.images, "log": log.state(),
        })  # fmt: skip
        self.run.sync_logs()

        def write() -> None:
            try:
                self.run.checkpoints.save(content)
                self.failures = 0
            except UserError as error:
                self.failures += 1
                latest = self.run.path / "checkpoints" / "latest.pt"
                what_is_left = f"{latest} is whole" if os.path.exists(latest) else "no checkpoint was written yet"
                if last or self.failures == self.MOST_FAILURES or not self.run.exists:
                    raise UserError(
                        f"training stopped at step {content['step']}: {error}; {what_is_left}; fix that, and the same "
                        "command goes on from there"
                    ) from None
                log.line(f"warning: {error}; {what_is_left}; training goes on and tries again at the next checkpoint")

        self.run.later(write)

    def _update_best(self, step: int, log: Log) -> None:
        """Checks whether this is the best checkpoint so far, by the newest mean of `output.best_metric`."""
        metric = self.config.output.best_metric
        if metric == "quality/kid" and log.evaluated != step:  # the newest value is of an older step
            return
        value = log.latest.get(metric, math.nan) if metric else math.nan
        if not math.isnan(value) and (self.best is None or self.best["metric"] != metric or value < self.best["value"]):
            self.best = {"metric": metric, "value": value, "step": step}


class StopRequest:
    """Turns Ctrl-C, SIGTERM, a closed terminal or the end of `training.max_minutes` into a stop after the step.

    A second signal ends the process at once. Several processes stop together, whichever of them got the signal.
    """

    def __init__(self, max_minutes: float | None = None, world: World = SINGLE_PROCESS) -> None:
        self.world = world
        self.signal_number = 0
        self.max_minutes = max_minutes
        self._ends = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal_number != 0 or time.monotonic() >= self._ends

    def agreed(self) -> bool:
        """Whether to stop now, to be asked once after each iteration. The same for all processes.

        Processes exchange 1 + the number of the signal, or 1 when the time is over.
        """
        reason = self.world.agree_on_stop(1 + self.signal_number if self.signal_number else int(self.requested))
        if reason > 1:
            self.signal_number = reason - 1
        elif reason == 1:
            self._ends = -math.inf
        return reason > 0

    @property
    def reason(self) -> str:
        """`SIGINT`, `SIGTERM`, or the time limit that has passed."""
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
        if not self.world.is_main:
            return
        with suppress(OSError):  # not print: it may have been interrupted in the middle of a print itself
            os.write(2, b"\nstopping after this step and saving; press Ctrl-C again to leave at once\n")


def step_profiler(folder: Path, log: Callable[[str], None]) -> profile:
    """Profiles iterations 4 and 5 of a session into trace.json; needs `step()` after each. The first three warm up."""
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"

    def report(profiler: profile) -> None:
        log(profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=60))
        path = folder / "trace.json"
        try:
            profiler.export_chrome_trace(str(path))
            log(f"trace: {path}; open it at https://ui.perfetto.dev or chrome://tracing")
        except (OSError, RuntimeError) as error:
            log(f"warning: cannot write {path} ({error})")

    return profile(schedule=schedule(wait=2, warmup=1, active=2, repeat=1), on_trace_ready=report)


def peak_memory_gb(device: torch.device) -> float | None:
    """Peak memory so far, of the GPU's allocator, or of the process on a CPU; None if the system doesn't report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9  # with the graphs' memory, which isn't called allocated
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9

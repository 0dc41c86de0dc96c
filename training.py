"""Trains a VAE decoder, the GRU that predicts updates to its weights, and a WGAN-GP critic, in one loop.

python training.py                                      the default settings of config.yaml
python training.py --config configs/quick.yaml          small images, a few minutes on a laptop
python training.py data.root=my_images output.name=my-run training.steps=50000
python training.py image.size=64 training.epochs=100 --dry-run    check everything, show what would run, and stop
python training.py --print-config > my.yaml             every setting with its meaning, to edit
torchrun --nproc-per-node=8 training.py                 one process on each of 8 GPUs

The same command again resumes a run that was stopped or killed.
"""

import argparse
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # under PYTHONSAFEPATH too

from configuration import Config, config_template, load_config, setting_of
from util import CommandParser, UserError, answer_early, print_line, run_command


def build_parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = CommandParser(setting_of=setting_of, description=first, epilog=rest)
    default = Path(__file__).with_name("config.yaml")
    add = parser.add_argument
    add("--config", metavar="FILE", default=str(default), help="YAML file with settings (config.yaml)")
    add("--dry-run", action="store_true", help="check everything, try some steps, print what would run, and stop")
    add("-v", "--verbose", action="store_true", help="--dry-run: also the settings that have their defaults")
    add("--print-config", action="store_true", help="print every setting with its default, meaning and range, and stop")
    add("--accept-changes", action="store_true", help="resume with settings that change what is learned")
    add("--profile", action="store_true", help="leave a torch.profiler trace of steps 4 and 5")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    return parser


def read_options(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Config]:
    options = build_parser().parse_args(arguments)
    return options, load_config(None if options.print_config else options.config, options.overrides)


# Mistakes and --help are answered before torch is imported, which takes seconds.
EARLY = answer_early(read_options) if __name__ == "__main__" else None

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints import at_fractions, setting_texts
from distributed import SINGLE_PROCESS, World, join_processes, report_error
from generator import Generator, build_critic, build_head, build_predictor, build_synthesizer, build_vae
from image_data import VIDEO_EXTENSIONS, TrainingImages, failure_reason, open_image, open_images
from media import BrokenImageError, find_images
from model_definitions import Discriminator
from quality import QualityCheck, calibrate, calibration_images
from run_directory import RunDirectory, free_name
from sampling import clip_frames, take_weights
from step_runners import EagerSteps, build_steps, choose_step, describe_device
from training_log import CheckpointManager, FixedSamples, Log, StopRequest, describe_time, step_profiler
from training_step import NoiseSampler, TrainingState
from util import Sample, absolute, choose_device, names_digest, one_line, prepare_device, shown_path, split_held_out
from video_synth import ClipFrames, TrainingClips


def build_networks(config: Config) -> tuple[Generator, Discriminator]:
    """The generator, part by part, and the critic, from the settings and the seed."""
    torch.manual_seed(config.training.seed)
    vae = build_vae(config)  #                                     z -> image, by its decoder
    synthesizer = build_synthesizer(config)  #                     image -> synthetic video
    head = build_head(config, vae)  #                              code -> updates Δ of chosen decoder weights
    predictor = build_predictor(config, synthesizer, head)  #      synthetic video -> code, by a GRU
    generator = Generator(vae, synthesizer, predictor, head, config)
    torch.manual_seed(config.training.seed + 1)  # so that critics are the same whatever the generator's settings
    critic = build_critic(config)  #                               image -> Wasserstein score
    return generator, critic


def iteration(
    runner: EagerSteps, noise: NoiseSampler, batches: Iterator[Tensor], step: int, clips: Iterator[Tensor] | None = None
) -> dict[str, Tensor]:
    """n_critic critic steps and one step of the generator (Gulrajani et al. 2017, algorithm 1).

    `step` is the iteration's number, from 1. Of the `batches`, real images (B, C, H, W) in [0, 1], the generator's step
    takes the last critic step's, and the next windows of `clips` (N, L, C, H, W). Returns the metrics of that one and
    of the generator's, scalars on the device. Where the predictor learns alone, the critic takes no step.
    """
    runner.state.set_rates(noise, step)
    alone = noise.is_alone(step)
    if alone and not runner.state.is_resting:
        runner.state.rest_at_average()
    critic_metrics: dict[str, Tensor] = {}
    for repeat in range(noise.config.training.n_critic):
        x_real = next(batches)
        if not alone:
            critic_metrics = runner.critic_step(x_real, noise.critic(step, repeat))
    return critic_metrics | runner.generator_step(x_real, noise.generator(step, next(clips) if clips else None))


def train(config: Config, accept_changes: bool = False, profile: bool = False, world: World = SINGLE_PROCESS) -> int:
    """Runs the training that the settings describe, from its newest checkpoint on. Returns the exit status:
    0, or 128 + the number of the signal that stopped it.

    Args:
        accept_changes: resume a run although settings that change what is learned have changed.
        profile: leave a trace of two steps in the run's folder.
        world: the processes that share each batch. All go through this function in step; only rank 0 writes.
    """
    stop, output = StopRequest(config.training.max_minutes, world), config.output
    run = RunDirectory(config) if world.is_main else None
    saved, notes = run.resume_point(accept_changes) if run else (None, [])
    state, images, clips, steps, step_kind, step_line = prepare(config, world)
    # Reads images, so that a broken one is found before the run's folder is made.
    samples = FixedSamples(state, images, steps, next(clips.batches()) if clips else None)
    if run and saved:
        check_images(saved, images, run, accept_changes)
        state.restore(saved)
    elif run and config.training.init_from:
        notes.append(take_weights(state.networks(), config.training.init_from))
    if run and clips and not saved:
        notes.append(state.learn_motions(clips))
    if world.size > 1:  # only the first process has read the checkpoint
        state.restore(world.broadcast(state.to_dict()))
    quality_check, calibration_set = QualityCheck(config, images, world), calibration_images(images)
    samples_missing = world.broadcast(bool(run and samples.missing(run, state.step)))
    if state.step >= steps and not samples_missing:
        if run:
            run.close()
            print_line(describe_finished(config, state.step))
        return 0
    if run:
        run.begin(state.step)
    log = Log(run, steps, config, images, state.step, world)
    noise, runner = NoiseSampler(config, state.device, world, steps), build_steps(step_kind, state, world, log.line)
    for line in [*notes, *describe_run(state, images, clips, steps, step_line, world), f"writing to {output.folder}/"]:
        log.line(line)
    log.report_skipped()
    log.restore(world.broadcast(saved and saved["log"]), state.device)
    batches = images.batches(first=state.step * config.training.n_critic)
    windows = clips.batches(first=state.step) if clips else None
    manager = CheckpointManager(run, config, images.identity, saved) if run else None
    profiler = step_profiler(run.path, log.line) if run and profile else None
    with closing(log.bar), stop, run or nullcontext(), profiler or nullcontext():
        if run and samples_missing:
            with log.pause():
                samples.save(run, state, log, last=True)
                run.wait()  # the loader's workers, forked next, must not inherit a thread's locks
        while state.step < steps:
            step = state.step + 1
            world.set_phase(f"step {step}")
            with log.pause() if runner.is_new else nullcontext():  # it records first: no measure of speed
                metrics = iteration(runner, noise, batches, step, windows)
            state.step = step
            log.collect(step, metrics)
            if profiler:
                profiler.step()

            last, stopping = step == steps, stop.agreed()
            ends, check_due = last or stopping, quality_check.due(step, last)
            sample_due = ends or step % output.sample_every == 0
            checkpoint_due = ends or step % output.checkpoint_every == 0 or (check_due and quality_check.keeps_best)
            if last or step % output.log_every == 0:
                log.write(step)  # the host waits for the device here, at a stage's end and where something is due below
            if sample_due or checkpoint_due or check_due:
                with log.pause():
                    log.check({"generator": state.generator, "critic": state.critic})
                    world.check_networks_equal(state.tensors(), step)
                    if check_due:  # before the checkpoint, which this may make the best one
                        log.write_quality(step, quality_check.measure(state))
                    if checkpoint_due:  # before the samples: after SIGTERM there may be no time for them
                        calibrate(state, config, calibration_set, world)
                        if manager:
                            manager.save(state, log, ends)
                    if run and sample_due:
                        samples.save(run, state, log, ends)
            if stopping:
                break
    log.finish(state.step, stop)
    return stop.exit_status if state.step < steps else 0


# ------------------------------------------------------------------------------------------------------ small helpers


def prepare(config: Config, world: World) -> tuple[TrainingState, TrainingImages, TrainingClips | None, int, str, str]:
    """A new state, the images, the clips if any, the run's steps, and what `choose_step` gives. Raises UserError."""
    check_processes(config, world)
    device = choose_device(config.runtime.device)
    prepare_device(device)
    step = choose_step(config, device)
    state = TrainingState(*build_networks(config), config, device)
    images = open_shard(config, device, world)
    noise = NoiseSampler(config, device, world)
    clips = open_clips(config, device, world, noise.window, noise.clip_count)
    images.identity |= clips.identity if clips else {}
    return state, images, clips, total_steps(config, images.count), *step


def total_steps(config: Config, image_count: int) -> int:
    """`training.steps`, or the iterations that `training.epochs` passes over the images take."""
    if config.training.steps is not None:
        return config.training.steps
    assert config.training.epochs is not None  # load_config demands one of them
    per_step = config.training.batch_size * config.training.n_critic
    return max(1, math.ceil(config.training.epochs * image_count / per_step))


def check_processes(config: Config, world: World) -> None:
    """Refuses what several processes cannot do together. Raises UserError: the batch cannot be divided evenly, has too
    few clips, or an update would depend on other processes' images.
    """
    batch_size = config.training.batch_size
    if batch_size % world.size:
        raise UserError(
            f"training.batch_size is {batch_size}, which {world.size} processes cannot split evenly; "
            f"use {max(1, batch_size // world.size) * world.size}, or another number of processes"
        )
    if config.data.clips and batch_size < 2 * world.size:
        raise UserError(f"training.batch_size is {batch_size}: data.clips needs {2 * world.size}, two for each process")
    if world.size > 1 and config.weight_predictor.sharing == "shared":
        raise UserError(
            "weight_predictor.sharing is shared, which takes other images of the batch, and no single one of "
            f"{world.size} processes sees them all; use per_sample, or one process"
        )


def check_images(saved: dict[str, Any], images: TrainingImages, run: RunDirectory, accept_changes: bool) -> None:
    """Refuses another set of images or clips than the run was begun with: its place in the data would mean nothing.
    Raises UserError: other names or another number of images, unless `accept_changes`.
    """
    before, what = saved["images"], ""
    if images.identity.get("clips") != before.get("clips"):
        what = "data.clips now holds clips of other names than"
    if images.fingerprint != before["fingerprint"]:
        what = "data.root now holds images of other names than"
        if images.count != before["count"]:
            what = f"data.root now holds {images.count:,} readable images, and held {before['count']:,}"
    if what and not accept_changes:
        raise UserError(
            f"cannot resume {run.path}: {what} when the run was begun; bring them back, start a new run "
            "with another output.name, or go on with these on purpose with --accept-changes"
        )


def open_shard(config: Config, device: torch.device, world: World) -> TrainingImages:
    """The images, of whose batches this process takes its shard. Raises UserError: as `open_images`; or the processes
    see different images, settings or versions.
    """
    images = open_images(
        config.data, config.image, batch_size=config.training.batch_size, seed=config.training.seed, device=device,
        progress=world.is_main, shard=slice(world.rank, None, world.size),
    )  # fmt: skip
    may_differ = {"data.root", "data.clips", "output.root", "runtime.device"}  # each machine may have its own names
    settings = {name: value for name, value in setting_texts(config).items() if name not in may_differ}
    files = {"images in data.root": images.count, "names of images, by their SHA-256": images.fingerprint}
    world.check_equal(settings | files | {"torch": torch.__version__})
    return images


def find_clips(config: Config) -> tuple[list[Sample], list[Sample], str]:
    """The clips below `data.clips`, to train on and those held out; and a line about files that are not read. A folder
    that holds still images alone is a clip of these. Raises UserError: as `find_images`.
    """
    root = config.data.clips or ""
    files, note = find_images(root, "data.clips", VIDEO_EXTENSIONS)
    found: list[str] = []
    for place, group in itertools.groupby(sorted(files, key=os.path.dirname), os.path.dirname):
        inside = [*group]  # sorted by folder: by name, those of a folder in it could lie between them
        is_clip = len(inside) > 1 and not any(is_moving(file) for file in inside[:: -(-len(inside) // 200)])
        found += [place] if is_clip else inside
    return *split_held_out([(path, 0) for path in sorted(found)], str(absolute(root)), config.data.holdout), note


def is_moving(path: str) -> bool:
    """Whether a file is a video or an animated image; where it cannot be read, it says so when it is."""
    with suppress(Exception), open_image(path) as image:
        return bool(getattr(image, "is_animated", False))
    return True


def read_clip(path: str, config: Config) -> tuple[Tensor, bool]:
    """The frames of a clip at `video.fps`, uint8 (T, C, H, W), and whether it repeats. Raises BrokenImageError."""
    try:
        times, frames = zip(*clip_frames(path, config), strict=True)
    except Exception as error:  # damaged files raise nearly anything
        raise BrokenImageError(path, failure_reason(path, error)) from None
    clip = ClipFrames(path, [*frames], [*times])
    if all(torch.equal(frame, frames[0]) for frame in frames):
        raise BrokenImageError(path, "it is a still image")
    return clip.resampled(max(2, round(clip.duration * config.video.fps))), clip.repeats


def open_clips(config: Config, device: torch.device, world: World, window: int, count: int) -> TrainingClips | None:
    """The clips that teach motion, of whose windows this process takes its shard; None where `data.clips` is null.
    Raises UserError: as `find_images`, or they don't fit into `data.memory_gb`, or the processes see different clips;
    BrokenImageError as `open_images`.
    """
    data = config.data
    if data.clips is None:
        return None
    samples, held_out, note = find_clips(config)
    found, size, broken = list[tuple[str, Tensor, bool]](), 0, list[str]()  # bytes of all frames
    for path, _ in tqdm(samples, desc="decoding", unit="clip", leave=False, disable=None if world.is_main else True):
        try:
            frames, again = read_clip(path, config)
        except BrokenImageError as error:
            if data.on_broken == "error":
                raise
            broken.append(f"{shown_path(path)} ({error.reason})")  # the error itself holds the frames
            continue
        found.append((path, frames, again))
        size += frames.nbytes
        if size > data.memory_gb * 1e9:
            raise UserError(
                f"data.clips: its clips take more than data.memory_gb={data.memory_gb:g} GB decoded; raise it, lower "
                "video.fps or image.size, or take fewer clips"
            )
    if not found:
        raise UserError(f"data.clips: none of {len(samples)} clips can be read; {broken[0]}")
    kept, decoded, repeats = zip(*found, strict=True)
    clips = TrainingClips(decoded, repeats, window=window, count=count, seed=config.training.seed, device=device,
                          mirror=data.mirror, shard=slice(world.rank, None, world.size))  # fmt: skip
    names = [path.removeprefix(str(absolute(data.clips))) for path in kept]
    classes = {Path(name).parts[1:-1][:1] for name in names}
    layout = f"in {len(classes)} class folders of" if () not in classes else "from"
    line = f"{len(kept):,} clips {layout} {shown_path(data.clips)}, {clips.summary} at {config.video.fps:g} a second"
    line += f", {clips.lengths.sum() / config.video.fps:,.0f} s ({size / 1e6:,.1f} MB decoded)"
    line += f"; {len(held_out):,} more are held out for evaluation" * bool(held_out)
    skipped = f"skipped {len(broken):,} broken: {', '.join(broken[:3])}{', ...' * (len(broken) > 3)}" if broken else ""
    clips.lines = [line for line in (line, note, skipped) if line]
    clips.identity = {"clips": names_digest(names)}
    world.check_equal({"number of clips": len(kept), "names of clips, by their SHA-256": clips.identity["clips"]})
    return clips


def describe_finished(config: Config, step: int) -> str:
    """Says that there is nothing left to do, and how to go on."""
    training, path = config.training, config.output.folder
    longer = f"training.epochs={2 * training.epochs:g}" if training.epochs else f"training.steps={2 * step}"
    longer += " --accept-changes" * bool(at_fractions(config))
    further = f"{path} is finished: {step:,} steps. To train it further, add for example {longer};"
    return f"{further}\nto begin a new run, add output.name={free_name(path)}"


def describe_run(
    state: TrainingState, images: TrainingImages, clips: TrainingClips | None, steps: int, kind: str, world: World
) -> Iterator[str]:
    """The lines with which a run begins; `kind` is the one by `choose_step`."""
    yield images.description
    yield from clips.lines if clips else []
    config, generator, batch = state.config, state.generator, state.config.training.batch_size
    shard = f"; {world.size} processes, each with {batch // world.size} of a batch's images" if world.size > 1 else ""
    yield describe_device(state.device, config.runtime.device) + shard
    weights, tensors = generator.spec.total_size, len(generator.spec.tensors)
    update = f"WEIGHT_UPDATE_SIZE {generator.head.update_size:,} for {weights:,} weights in {tensors} tensors"
    off = "no weight update, since weight_predictor.update is off"
    passes = steps * batch * config.training.n_critic / images.count
    yield f"{off if generator.update_kind == 'off' else update}; {steps:,} steps = {passes:,.1f} passes over the images"
    yield kind
    size, keep = checkpoint_bytes(state), config.output.keep_checkpoints
    one, kept = (f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB" for n in (size, keep * size))
    yield f"disk: {one} a checkpoint, {kept} for the {keep} that are kept, and one more while it is written"


def checkpoint_bytes(state: TrainingState) -> int:
    """What a checkpoint's tensors take, as `TrainingState.to_dict` has them: Adam's first moments only where β₁ > 0."""
    groups = itertools.chain(*(optimizer.param_groups for optimizer in state.optimizers.values()))
    moments = sum(weights.nbytes * (2 if group["betas"][0] else 1) for group in groups for weights in group["params"])
    return moments + sum(x.nbytes for x in state.tensors().values())


def estimate_time(runner: EagerSteps, noise: NoiseSampler, batches: Iterator[Tensor], done: int, steps: int,
                  clips: Iterator[Tensor] | None = None) -> float:  # fmt: skip
    """Seconds of the steps after step `done`, by some of each stage. Changes the networks."""
    total, ends = 0.0, [min(steps, max(done, math.ceil(steps * min(1.0, end)))) for end in (noise.start, noise.alone)]
    least = 1 if type(runner) is EagerSteps else 2  # others prepare in the first
    for begin, end in itertools.pairwise([done, *ends, steps]):
        step, count = end, end - begin
        seconds: list[float] = []
        while count > 0 and len(seconds) < 10 and (len(seconds) < least or sum(seconds) < 10):
            started = time.perf_counter()
            [*iteration(runner, noise, batches, step, clips).values()][-1].item()  # waits for the device
            seconds += runner.world.maximum([time.perf_counter() - started])  # all processes stop together
        total += count * statistics.median(seconds[1:] or seconds) if seconds else 0.0
    return total


# ---------------------------------------------------------------------------------------------------------- commands


def dry_run(config: Config, accept_changes: bool, verbose: bool, world: World) -> Iterator[str]:
    """Checks everything, tries some steps, and describes what would run; if `verbose`, all settings. Writes nothing."""
    state, images, clips, steps, step_kind, step_line = prepare(config, world)
    generator, critic, batch = state.generator, state.critic, next(images.batches())
    description, *lines = describe_run(state, images, None, steps, step_line, world)
    yield "# settings" + " that differ from the defaults" * (not verbose)
    defaults, settings = setting_texts(Config()), setting_texts(config)
    for name, value in settings.items():
        if verbose or value != defaults[name]:
            yield one_line(f"  {name}: {value}" + f"   (default {defaults[name]})" * (value != defaults[name]))
    yield "  none: all are the defaults of config.yaml\n" if settings == defaults and not verbose else ""
    yield f"# data\n{description}"
    for name, count in images.class_counts.items():
        yield f"  {name:<24} {count:>8,}"
    yield from clips.lines if clips else []
    low, mean, high = (f"{value:.3f}" for value in (batch.min(), batch.mean(), batch.max()))
    yield f"  first batch {tuple(batch.shape)}, values {low} to {high}, mean {mean}\n"
    yield "# networks                             parameters"
    vae = generator.vae
    for name, *modules in (
        ("VAE encoder", vae.encoder, vae.to_mu, vae.to_logvar), ("VAE decoder θ", vae.decoder),
        ("WeightPredictorRNN and update head", generator.predictor, generator.head),
        ("Discriminator (the critic)", critic),
    ):  # fmt: skip
        yield f"  {name:<36} {sum(p.numel() for module in modules for p in module.parameters()):>12,}"
    yield "\n# updated tensors                      shape                  weights"
    for tensor in generator.spec.tensors:
        yield f"  {tensor.name:<36} {' x '.join(map(str, tensor.shape)):<20} {tensor.size:>9,}"
    yield "\n".join(["\n# the run", *lines])
    done, verdict = 0, list[str]()
    try:
        with RunDirectory(config, dry_run=True) if world.is_main else nullcontext() as run:
            saved, verdict = run.resume_point(accept_changes) if run else (None, [])
            if run and saved:
                check_images(saved, images, run, accept_changes)
                done = saved["step"]
            elif run and config.training.init_from:
                verdict.append(take_weights(state.networks(), config.training.init_from))
        if run:
            verb = "go on in" if run.exists else "write to"
            verdict = [f"a run would {verb} {run.path}/; nothing was written", *verdict]
    except UserError as error:  # no reason to hide the rest
        verdict = [f"a run would be refused: {error}"]
    if (done := world.broadcast(done)) >= steps:
        verdict = [describe_finished(config, done)]
    else:
        noise = NoiseSampler(config, state.device, world, steps)
        runner = build_steps(step_kind, state, world, lambda _: None)
        seconds = estimate_time(runner, noise, images.batches(), done, steps, clips.batches() if clips else None)
        yield describe_time(seconds, steps - done, state.device)
    yield from verdict


def work(options: argparse.Namespace, config: Config) -> int:
    if options.print_config:
        print_line(config_template().rstrip())
        return 0
    with join_processes(config.runtime, choose_device(config.runtime.device)) as world:
        if options.dry_run:
            for line in dry_run(config, options.accept_changes, options.verbose, world):
                if world.is_main:
                    print_line(line)
            return 0
        return train(config, options.accept_changes, options.profile, world)


def main(arguments: list[str] | None = None) -> int:
    hint = "try a smaller training.batch_size, video.height and video.width, or weight_predictor.head=low_rank"
    return run_command(lambda: work(*(EARLY or read_options(arguments))), report_error, hint)


if __name__ == "__main__":
    sys.exit(main())

"""Trains the generator: VAE decoder θ, weight predictor (GRU) and Wasserstein critic, in one loop.

python training.py                                      the default settings of config.yaml
python training.py --config config_quick.yaml           small pictures, a few minutes on a laptop
python training.py data.root=my_pictures output.name=my-run training.steps=50000
python training.py --dry-run                            check everything, show what would run, and stop
torchrun --nproc-per-node=8 training.py                 one process on each of 8 GPUs

The same command again goes on with a run that was stopped or killed.
"""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# torch's threads wait for each other by spinning, long by default: on 2 cores at a load near 4 a critic step took 887
# ms instead of 34. Asleep after 1,000 turns they took 98 ms beside two busy processes, and 45 ms alone.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported

import torch
from torch import Tensor, nn

from command_line import OneLineParser, silence_output
from configuration import Config, UserError, config_to_dict, config_to_yaml, load_config
from devices import choose_device, describe_device, prepare_device
from distributed import ALONE, World, join_processes, report, report_lost
from generator_path import Generator, build_generator
from image_data import TrainingImages, open_images
from model_definitions import Discriminator, build_discriminator
from process_watch import PeerLostError
from quality_check import QualityCheck
from random_draws import Draws
from resume import CheckpointKeeper, already_finished, check_pictures, resume_point
from run_directory import OnlookersDirectory, RunDirectory
from step_profile import StepProfile
from step_runners import build_steps, choose_step
from training_log import FixedSamples, Log, StopRequest
from training_state import TrainingState


def train(config: Config, accept_changes: bool = False, profile: bool = False, world: World = ALONE) -> int:
    """Runs the training that the settings describe, from its newest checkpoint on if it has one.

    Args:
        accept_changes: go on with a run although settings that change what is learned are other ones now.
        profile: leave a trace of a few steps in the run's folder.
        world: the processes that share each batch. All go through this function in step; the first one alone writes.

    Returns:
        The exit status: 0, or 128 + the number of the signal that stopped it.
    """
    stop = StopRequest(config.training.max_minutes, world)
    check_processes(config, world)
    run = (RunDirectory if world.is_first else OnlookersDirectory)(config)
    saved, notes = resume_point(run, config, accept_changes)
    device = choose_device(config.runtime.device)
    prepare_device(device)
    state = TrainingState(config, device)
    draws = Draws(config, device, world)
    images = open_share(config, device, world)
    steps = total_steps(config, images.count)
    runner, why = build_steps(config, state, draws.augment, steps)
    runner.world = world
    # Reads images, so that a broken one shows before the run's folder is made.
    fixed = FixedSamples(config, state.generator, images, last_step=steps)
    if saved:
        check_pictures(saved, images.fingerprint, images.count, str(run.path), accept_changes)
        state.restore(saved)
    check = QualityCheck(config, images, run.path, world)
    share_state(state, world)
    # Pictures of this step: a new run's first ones, or a kill came before them.
    owed = world.from_first(fixed.missing(run, state.step))
    if state.step >= steps and not owed:
        return already_finished(run, config, state.step) if world.is_first else 0
    run.begin(state.step)
    log = Log(run, steps, config, state.step, world)
    for note in notes:
        log.line(note)
    log.line(images.description)
    log.line(describe_device(device) + describe_processes(config, world))
    log.line(why)
    log.line(f"{describe_update(state.generator)}; {describe_length(config, steps, images.count)}")
    log.line(f"writing to {run.path}/")
    log.skipped(images.skipped)
    if log_before := world.from_first(saved["log"] if saved else None):
        log.restore(log_before, device)
    runner.say = log.line
    profiler = StepProfile(run.path, log.line) if profile and world.is_first else None
    n_critic = config.training.n_critic
    batches = images.batches(first=state.step * n_critic)
    keeper = CheckpointKeeper(run, config, images, saved, world)
    with run, stop:
        if owed:
            with log.pause():
                path = fixed.save(run, state.step, state.generator_ema)
            if state.step == 0:
                log.line(f"first pictures, untrained: {path}")
        while state.step < steps:
            step = state.step + 1
            world.at(f"step {step}")
            for repeat in range(n_critic):
                x_real = log.next_batch(batches)
                critic = runner.critic_step(x_real, draws.critic(state.generator, step, repeat))
            metrics = runner.generator_step(x_real, draws.generator(state.generator, step))
            state.step = step
            log.collect(step, critic | metrics)
            if profiler:
                profiler.step()

            last, stopping = step == steps, stop.agreed()
            sample_due = last or stopping or step % config.output.sample_every == 0
            check_due = check.due(step, last)
            checkpoint_due = last or stopping or step % config.output.checkpoint_every == 0
            checkpoint_due = checkpoint_due or (check_due and check.keeps_best)
            if last or step % config.output.log_every == 0:
                log.write(step)  # here, and below where something is due, the device is waited for; nowhere else
                log.skipped(gather_skipped(images, world))
            if sample_due or checkpoint_due or check_due:
                with log.pause():
                    log.check({"generator": state.generator, "discriminator": state.discriminator})
                    world.check_same(state.networks(), step)
                    if check_due:  # before the checkpoint, which may be the best one by this
                        log.note_quality(step, check.measure(state))
                    if checkpoint_due:  # first: who sends SIGTERM may not wait for pictures
                        keeper.save(state, log, last or stopping)
                    if sample_due:
                        fixed.save(run, step, state.generator_ema)
            if stopping:
                break
    if profiler:
        profiler.close()
    log.finish(state.step, stop)
    return stop.exit_status if state.step < steps else 0


# ------------------------------------------------------------------------------------------------------ small helpers


def total_steps(config: Config, image_count: int) -> int:
    """`training.steps`, or the iterations that `training.epochs` passes over the pictures take."""
    if config.training.steps is not None:
        return config.training.steps
    assert config.training.epochs is not None  # load_config demands one of them
    per_step = config.training.batch_size * config.training.n_critic
    return max(1, math.ceil(config.training.epochs * image_count / per_step))


def check_processes(config: Config, world: World) -> None:
    """Refuses what several processes cannot do together.

    Raises:
        UserError: the batch cannot be shared evenly, or a shared update would need all pictures of the batch.
    """
    world.share_batch(config.training.batch_size)
    if world.size > 1 and config.weight_predictor.sharing == "shared":
        raise UserError(
            "weight_predictor.sharing is shared, an update from the mean over the whole batch, which no single one of "
            f"{world.size} processes sees; use per_sample, or one process"
        )


def open_share(config: Config, device: torch.device, world: World) -> TrainingImages:
    """The images, of whose batches this process takes its share.

    Raises:
        UserError: as `open_images`; or the processes see different pictures, settings or versions.
    """
    images = open_images(
        config.data, config.image, batch_size=config.training.batch_size, seed=config.training.seed, device=device,
        progress=world.is_first, share=slice(world.rank, None, world.size),
    )  # fmt: skip
    own = {"data.root", "output.root", "runtime.device"}  # may be called differently on each machine
    settings = {
        f"{section}.{key}": value
        for section, values in config_to_dict(config).items()
        for key, value in values.items()
        if f"{section}.{key}" not in own
    }
    pictures = {"images in data.root": images.count, "names of images, by their SHA-256": images.fingerprint}
    world.agree(settings | pictures | {"torch": torch.__version__})
    return images


def share_state(state: TrainingState, world: World) -> None:
    """Gives all processes the first one's weights and moments: it alone has read the checkpoint, where there is one."""
    first = world.from_first(state.to_dict())
    if not world.is_first:
        state.restore(first)


def gather_skipped(images: TrainingImages, world: World) -> list[tuple[Path, str]]:
    """The broken images that any process has met; each meets its own when they stream."""
    if images.storage != "stream":
        return images.skipped
    return list(dict.fromkeys(found for skipped in world.gather_objects(images.skipped) for found in skipped))


def describe_processes(config: Config, world: World) -> str:
    if world.size == 1:
        return ""
    return f"; {world.size} processes, each with {config.training.batch_size // world.size} of a batch's pictures"


def describe_update(generator: Generator) -> str:
    if generator.update == "off":
        return "no weight update, since weight_predictor.update is off"
    return (
        f"WEIGHT_UPDATE_SIZE {generator.head.update_size:,} for {generator.spec.total_size:,} weights "
        f"in {len(generator.spec.tensors)} tensors"
    )


def describe_length(config: Config, steps: int, image_count: int) -> str:
    epochs = steps * config.training.batch_size * config.training.n_critic / image_count
    return f"{steps:,} steps = {epochs:,.1f} passes over the pictures"


# ---------------------------------------------------------------------------------------------------------- commands


def dry_run(config: Config, world: World = ALONE) -> int:
    """Checks everything, loads one batch, and prints what would run. Writes nothing."""
    check_processes(config, world)
    device = choose_device(config.runtime.device)
    prepare_device(device)
    torch.manual_seed(config.training.seed)
    generator, discriminator = build_generator(config).to(device), build_discriminator(config).to(device)
    images = open_share(config, device, world)
    batch = next(images.batches())
    if not world.is_first:
        return 0
    try:
        for line in dry_run_report(config, device, generator, discriminator, images, batch, world):
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; what is left goes nowhere, without a traceback
        silence_output()
    return 0


def dry_run_report(
    config: Config,
    device: torch.device,
    generator: Generator,
    discriminator: Discriminator,
    images: TrainingImages,
    batch: Tensor,
    world: World = ALONE,
) -> Iterator[str]:
    yield "# settings"
    yield config_to_yaml(config)
    yield "# data"
    yield images.description
    for name, count in images.class_counts.items():
        yield f"  {name:<24} {count:>8,}"
    yield f"  first batch {tuple(batch.shape)}, values {batch.min():.3f} to {batch.max():.3f}, mean {batch.mean():.3f}"
    yield ""
    yield "# networks                             parameters"
    networks: dict[str, list[nn.Module]] = {
        "VAE encoder": [generator.vae.encoder, generator.vae.to_mu, generator.vae.to_logvar],
        "VAE decoder θ": [generator.vae.decoder],
        "WeightPredictorRNN and update head": [generator.predictor, generator.head],
        "Discriminator": [discriminator],
    }
    for name, modules in networks.items():
        yield f"  {name:<36} {sum(p.numel() for module in modules for p in module.parameters()):>12,}"
    yield ""
    yield "# updated tensors                      shape                  weights"
    for tensor in generator.spec.tensors:
        yield f"  {tensor.name:<36} {' x '.join(map(str, tensor.shape)):<20} {tensor.size:>9,}"
    yield f"  head {config.weight_predictor.head}: {describe_update(generator)}"
    yield ""
    steps = total_steps(config, images.count)
    processes = describe_processes(config, world)
    yield f"{describe_device(device)}{processes}; {describe_length(config, steps, images.count)}"
    yield choose_step(config, device, steps)[1]
    try:
        RunDirectory.check(config)
        place = Path(config.output.root) / config.output.name
        yield f"a run would {'go on in' if RunDirectory.holds_run(place) else 'write to'} {place}/; nothing was written"
    except UserError as error:  # no reason not to look
        yield f"a run would be refused: {error}"


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(
        description="Train a VAE decoder, the GRU that predicts updates to its weights, and a WGAN-GP critic.",
        epilog="examples:\n"
        "  python training.py --config config_quick.yaml\n"
        "  python training.py data.root=my_pictures output.name=my-run\n"
        "  python training.py image.size=64 training.epochs=200 weight_predictor.head=low_rank output.name=low-rank\n"
        "  python training.py --dry-run weight_predictor.layers='[decoder.*.weight]'\n"
        "  torchrun --nproc-per-node=8 training.py        one process on each of 8 GPUs\n\n"
        "config.yaml explains every setting.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = Path(__file__).with_name("config.yaml")
    parser.add_argument("--config", metavar="FILE", default=default, help="YAML file with settings (config.yaml)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, and stop")
    parser.add_argument(
        "--accept-changes", action="store_true", help="resume with settings that change what is learned"
    )
    parser.add_argument("--profile", action="store_true", help="leave a torch.profiler trace of a few steps")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    try:
        options = parser.parse_args(arguments)
        config = load_config(options.config, options.overrides)
        with join_processes(config.runtime, choose_device(config.runtime.device)) as world:
            if options.dry_run:
                return dry_run(config, world)
            return train(config, options.accept_changes, options.profile, world)
    except UserError as error:
        return report(f"error: {error}", 2)
    except PeerLostError as error:
        return report_lost(error)
    except KeyboardInterrupt:  # before training began; from then on Ctrl-C saves first
        return 130
    except (torch.OutOfMemoryError, MemoryError) as error:
        return out_of_memory(error)
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        return out_of_memory(error)


def out_of_memory(error: BaseException) -> int:
    """One line for a device or a machine that is too small; exit status 2."""
    hint = "try a smaller training.batch_size, video.height and video.width, or weight_predictor.head=low_rank"
    return report(f"error: out of memory ({' '.join(str(error).split())[:100]}); {hint}", 2)


if __name__ == "__main__":
    sys.exit(main())

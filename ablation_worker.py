"""One job of an ablation, in a process of its own with one thread: `ablation.py` starts it with a file of settings.

train       trains one arm with one seed through `training.train`, then measures its pictures at every checkpoint
calibrate   seconds of an iteration of each arm, the arms taking turns
amplify     how much further θ + Δ moves than θ, from a trained checkpoint on
reals       features of the real pictures
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in training.py

import torch
from torch import Tensor, nn

import training
from ablation_arms import amplification
from checkpoints import load_checkpoint
from configuration import Config, UserError, config_from_dict
from devices import choose_device, prepare_device
from generator_path import build_generator
from image_data import open_images
from pictures import written_whole
from quality import frechet_distance, kernel_distance, load_features, picture_features, precision_recall
from random_draws import Draws
from sampling import BATCH, Sampler, load_sampler
from step_runners import build_steps
from textbook import Textbook
from training_state import TrainingState

PARTS = 5
"""Disjoint parts of the drawn pictures, each with a distance of its own: what intervals are made of."""

TEXTBOOK_FORMAT = "textbook"


# ------------------------------------------------------------------------------------------------------------- training


def train(job: dict[str, Any]) -> int:
    """Trains an arm to the last of `stops`, and measures it there and every `every`; goes on where it was stopped.

    Returns:
        The exit status of training: not 0 if it was stopped.

    Raises:
        UserError: as `training.train`, where a loss is not finite, say; until then the run was sound, and is measured.
    """
    config = config_from_dict(job["config"], "the ablation")
    folder = Path(config.output.root) / config.output.name
    try:
        for stop in job["stops"]:  # at the last step of a run there is always a checkpoint
            config.training.steps = stop
            status = train_textbook(config, folder) if job["textbook"] else training.train(config)
            if status:
                return status
    except UserError:
        measure(config, folder, job)
        raise
    measure(config, folder, job)
    return 0


def train_textbook(config: Config, folder: Path) -> int:
    """Trains with `textbook.py`'s own steps, on our pictures in our order; saves as `output.checkpoint_every` says."""
    device = choose_device(config.runtime.device)
    images = open_images(
        config.data, config.image, batch_size=config.training.batch_size, seed=config.training.seed, device=device
    )
    textbook, draws = Textbook(config, device), Draws(config, device)
    parts: dict[str, nn.Module | torch.optim.Optimizer] = {
        "generator": textbook.generator,
        "discriminator": textbook.discriminator,
        "optimizer": textbook.optimizer,
        "critic_optimizer": textbook.critic_optimizer,
    }
    step = 0
    if saved := sorted((folder / "checkpoints").glob("step_*.pt")):
        state = torch.load(saved[-1], weights_only=True)
        step = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    n_critic, steps = config.training.n_critic, training.total_steps(config, images.count)
    batches = images.batches(first=step * n_critic)
    while step < steps:
        step += 1
        for repeat in range(n_critic):
            x_real = next(batches)
            textbook.critic_step(x_real, draws.critic(textbook.generator, step, repeat))
        metrics = textbook.generator_step(x_real, draws.generator(textbook.generator, step))
        if step % config.output.log_every == 0 or step == steps:
            if not all(abs(value) < float("inf") for value in metrics.values()):
                raise UserError(f"training stopped: a loss is not finite at step {step}; try smaller learning rates")
            print(f"step {step}/{steps}  rec {metrics['reconstruction']:.1f}", flush=True)
        if step % config.output.checkpoint_every == 0 or step == steps:
            with written_whole(folder / "checkpoints" / f"step_{step:06d}.pt") as part_file:
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save({"step": step, "kind": TEXTBOOK_FORMAT, **state}, part_file)
    return 0


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(config: Config, folder: Path, job: dict[str, Any]) -> None:
    """Writes a line of `evaluations.jsonl` for every checkpoint at a multiple of `every`, and at each of `stops`."""
    path = folder / "evaluations.jsonl"
    done = [row for row in read_rows(path) if row["pictures"] == job["pictures"]]
    known = {row["step"] for row in done}
    real = torch.load(job["reals"], weights_only=True)
    due = [
        checkpoint
        for checkpoint in sorted((folder / "checkpoints").glob("step_*.pt"))
        if (step := int(checkpoint.stem[5:])) not in known and (step % job["every"] == 0 or step in job["stops"])
    ]
    if not due:
        return
    features = load_features()
    for checkpoint in due:
        sampler = load_textbook(checkpoint, config) if job["textbook"] else load_sampler(checkpoint, "cpu")
        done.append({"step": sampler.step, "pictures": job["pictures"], **quality_of(sampler, real, features, job)})
        with written_whole(path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in sorted(done, key=lambda row: row["step"])))


def load_textbook(path: Path, config: Config) -> Sampler:
    """A textbook run's networks, without average, ready to draw as ours are."""
    saved = torch.load(path, weights_only=True)
    generator = build_generator(config)
    generator.load_state_dict(saved["generator"])
    return Sampler(generator, config, saved["step"], path)


def quality_of(sampler: Sampler, real: Tensor, features: Any, job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Distances of pictures of the seeds 0, 1, ... drawn with θ + Δ (`updated`) and with θ alone (`base`)."""
    drawn: dict[str, list[Tensor]] = {"base": [], "updated": []}
    for first in range(0, job["pictures"], BATCH):
        pictures = sampler.draw(sampler.subjects(range(first, min(first + BATCH, job["pictures"]))))
        drawn["base"].append(pictures.x_base)
        drawn["updated"].append(pictures.x_fake)
    base = distances(real, picture_features(features, drawn["base"]))
    if sampler.generator.update == "off":
        return {"base": base, "updated": base}
    return {"base": base, "updated": distances(real, picture_features(features, drawn["updated"]))}


def distances(real: Tensor, fake: Tensor) -> dict[str, Any]:
    """All measures between features of real and drawn pictures; `kid_parts` are KIDs of disjoint parts of both."""
    precision, recall = precision_recall(real[_spread(len(real), len(fake))], fake[: len(real)])
    size = min(len(real), len(fake)) // PARTS
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))  # real pictures come sorted by class
    pairs = zip(real[order].split(size), fake.split(size), range(PARTS), strict=False)
    return {
        "kid": kernel_distance(real, fake)[0],
        "kid_parts": [kernel_distance(mine, theirs, subsets=1, subset_size=size)[0] for mine, theirs, _ in pairs],
        "frechet": frechet_distance(real, fake),
        "precision": precision,
        "recall": recall,
    }


def _spread(count: int, wanted: int) -> Tensor:
    """At most `wanted` of `count` indices, evenly spread: precision and recall want equal numbers of both kinds."""
    wanted = min(count, wanted)
    return torch.arange(wanted) * count // wanted


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines; none if it isn't there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def reals(job: dict[str, Any]) -> int:
    """Saves the features of all real pictures (N, D)."""
    config = config_from_dict(job["config"], "the ablation")
    images = open_images(config.data, config.image, batch_size=1, seed=0, device="cpu", progress=False)
    features = picture_features(load_features(), images.fixed_sample(images.count))
    with written_whole(job["reals"]) as part:
        torch.save(features, part)
    return 0


# ----------------------------------------------------------------------------------------------------------------- time


def calibrate(job: dict[str, Any]) -> int:
    """Writes the median seconds of an iteration of each arm. They take turns, so that what slows one slows all.

    On a CPU, seconds of this process's own work (one thread): other work on the machine doesn't count. On a GPU, of the
    clock.
    """
    configs = {name: config_from_dict(settings, "the ablation") for name, settings in job["configs"].items()}
    device = choose_device(next(iter(configs.values())).runtime.device)
    prepare_device(device)
    iterations = {name: _iteration(config, device, name in job["textbooks"]) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for turn in range(job["rounds"] + 1):
        for name, iterate in iterations.items():
            before = _clock(device)
            iterate(turn + 1)
            if turn:  # the first one makes ready
                seconds[name].append(_clock(device) - before)
    with written_whole(job["result"]) as part:
        part.write_text(json.dumps({name: sorted(values)[len(values) // 2] for name, values in seconds.items()}))
    return 0


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _iteration(config: Config, device: torch.device, is_textbook: bool) -> Any:
    """A function that takes the iteration of a given number."""
    draws, training = Draws(config, device), config.training
    if is_textbook:
        steps: Any = Textbook(config, device)
        generator = steps.generator
    else:
        state = TrainingState(config, device)
        steps, generator = build_steps(config, state, draws.augment, 1)[0], state.generator
    shape = (training.batch_size, config.image.channels, config.image.size, config.image.size)
    x_real = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)

    def iterate(step: int) -> None:
        for repeat in range(training.n_critic):
            steps.critic_step(x_real, draws.critic(generator, step, repeat))
        steps.generator_step(x_real, draws.generator(generator, step))

    return iterate


def amplify(job: dict[str, Any]) -> int:
    """Writes the amplification, measured over `iterations` iterations after a checkpoint, which stays as it is."""
    saved = load_checkpoint(job["checkpoint"])
    config = config_from_dict(saved["config"], job["checkpoint"])
    device = choose_device(config.runtime.device)
    prepare_device(device)
    state = TrainingState(config, device)
    state.restore(saved)
    draws, n_critic = Draws(config, device), config.training.n_critic
    runner = build_steps(config, state, draws.augment, 1)[0]
    images = open_images(
        config.data, config.image, batch_size=config.training.batch_size, seed=config.training.seed, device=device,
        progress=False,
    )  # fmt: skip
    batches, fixed = images.batches(first=state.step * n_critic), draws.generator(state.generator, 1)
    thetas, updates = [], []
    for step in range(state.step, state.step + job["iterations"] + 1):
        if step > state.step:
            for repeat in range(n_critic):
                x_real = next(batches)
                runner.critic_step(x_real, draws.critic(state.generator, step, repeat))
            runner.generator_step(x_real, draws.generator(state.generator, step))
        with torch.no_grad():
            weights = dict(state.generator.vae.named_parameters())
            thetas.append(state.generator.spec.flatten(weights).clone())
            updates.append(state.generator(fixed.z, fixed.motion).relative_update * state.generator.scales())
    with written_whole(job["result"]) as part:
        part.write_text(json.dumps({"amplification": amplification(torch.stack(thetas), torch.stack(updates))}))
    return 0


JOBS = {"train": train, "reals": reals, "calibrate": calibrate, "amplify": amplify}


def main(path: str) -> int:
    """Does the job that the file describes; returns the exit status, 2 after one line on standard error."""
    torch.set_num_threads(1)
    job = json.loads(Path(path).read_text())
    try:
        return JOBS[job["task"]](job)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""Measures what each part of the method is worth: trains variants that differ in one thing and compares their images.

python -m studies.ablation                                     12 arms, 3 seeds, 1,500 steps at 32 px: a day
python -m studies.ablation --arms off,constant,full --seeds 0,1,2,3,4 --jobs 4
python -m studies.ablation --quick --out runs/try              all of it in a few minutes; the results mean nothing
python -m studies.ablation --report                            table and plot again, of the runs that are there

Run it from the repository root. Arms with the same seed begin with the same VAE and critic, and see the same images in
the same order with the same noise. They are compared after equal steps, and after equal time: every arm's seconds per
step are measured first, the arms taking turns, as CPU time of one thread, so that other work on the machine counts
little. Cheaper arms then train for more steps. The same command again resumes where it was stopped.

The folder gets table.md, results.json, over_time.png, study.json (the settings it belongs to), and a run for each arm
and seed.
"""

import argparse
import copy
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from util import (
    CommandParser,
    absolute,
    atomic_write,
    choose_device,
    describe_device,
    int_between,
    names_digest,
    prepare_device,
    print_line,
    run_command,
)

# isort: split
import torch
from torch import Tensor

from checkpoints import differences
from configuration import Config, UserError, config_to_dict, config_to_yaml, load_config
from generator import build_generator
from image_data import open_images
from media import find_images, save_figure
from quality import frechet_distance, image_features, kernel_distance, load_features, precision_recall
from sampling import BATCH, Sampler, load_sampler
from step_runners import build_steps, choose_step
from studies.ablation_report import METHOD, REFERENCE, LearningCurve, compare, plot_over_time, write_table, write_text
from studies.textbook import Textbook
from training import build_networks, iteration
from training_step import NoiseSampler, TrainingState

ROOT = Path(__file__).parent.parent
QUICK = [
    "image.size=16", "vae.channels=[4,8]", "vae.latent_dim=8", "critic.channels=[4,8]", "video.height=8",
    "video.width=8", "video.frames=3", "weight_predictor.hidden_size=8", "training.batch_size=8", "output.samples=2",
]  # fmt: skip
"""Settings of --quick."""
DEFAULTS = [
    "runtime.device=cpu", "runtime.step=eager", "output.tensorboard=false", "output.log_every=20",
    "output.sample_every=1000000000", "output.keep_checkpoints=1000000000",
]  # fmt: skip
"""Of all arms; settings of the command line win."""
FIXED = ("training.seed", "training.steps", "training.epochs", "training.max_minutes", "output.root", "output.name",
         "output.checkpoint_every", "output.keep_checkpoints")  # fmt: skip
"""Settings that the ablation itself chooses."""
UNCOMPARED = (*FIXED, "data.root", "data.memory_gb", "data.workers", "runtime.timeout_minutes", "output.*")
"""Settings that may differ within one folder: they change no result. (Names of images are compared instead.)"""
REMEMBERED = ("config", "overrides", "arms", "seeds", "steps", "points", "seconds", "images")
"""Options that `--report` takes from the folder where they aren't given."""
PARTS = 5
"""Disjoint parts of the generated images, each with a distance of its own: the bootstrap resamples them."""

OFF = "weight_predictor.update=off"
ARMS: dict[str, tuple[str, list[str]]] = {
    "off": ("no predictor", [OFF]),
    "full": ("the whole method: each image its own update", []),
    "no-video-loss": ("no frame has to follow the synthetic video: λ_video 0", ["loss.lambda_video=0"]),
    "constant": ("a learned constant update, lr_predictor times hidden_size / 2", ["weight_predictor.update=constant"]),
    "mismatched": ("the GRU encodes another image's video", ["weight_predictor.input_video=other"]),
    "still": ("the GRU encodes the image itself, standing still", ["weight_predictor.input_video=static"]),
    "frozen": ("the GRU keeps its initial weights", ["weight_predictor.train_gru=false"]),
    "wide": ("no predictor, a wider VAE with about as many parameters as `full`", [OFF]),
    "shared": ("one update for the batch: the mean", ["weight_predictor.sharing=shared"]),
    "full-head": ("head full", ["weight_predictor.head=full"]),
    "per-channel": ("head per_channel", ["weight_predictor.head=per_channel"]),
    "textbook": ("a textbook's WGAN-GP and VAE: no predictor, no average, no augmentation",
                 [OFF, "training.diffaugment=[]"]),
}  # fmt: skip
"""Name -> meaning and settings."""


def choose_arms(names: str) -> list[str]:
    """The arms of a list such as `full,constant`, the reference always among them; a `UserError` for unknown names."""
    chosen = {name.strip() for name in names.split(",") if name.strip()}
    if unknown := sorted(chosen - {*ARMS}):
        raise UserError(f"--arms: there is no arm '{unknown[0]}'; the arms are {', '.join(ARMS)}")
    return [name for name in ARMS if name in {*chosen, REFERENCE}]


def arm_config(arm: str, file: str | None, common: list[str], extra: list[str]) -> Config:
    """The settings of an arm: `file`, then `common` (of all arms), then the arm's own, then `extra` (its seed)."""
    base = load_config(file, common)
    overrides = list(ARMS[arm][1])
    if arm == "constant":
        # A predicted weight sums a step of each GRU unit, whose values are about ½: the constant gets as large a step.
        rate = min(1.0, base.training.lr_predictor * base.weight_predictor.hidden_size / 2)
        overrides.append(f"training.lr_predictor={rate:.6g}")
    elif arm == "wide":
        overrides.append(f"vae.channels={wide_channels(base)}".replace(" ", ""))
    return load_config(file, [*common, *overrides, *extra])


def count_parameters(config: Config) -> int:
    """Trained parameters of VAE, predictor and head (the critic is the same in all arms)."""
    with torch.device("meta"):  # shapes alone
        return sum(weight.numel() for weight in build_generator(config).parameters() if weight.requires_grad)


def wide_channels(config: Config) -> list[int]:
    """Widths of a VAE without predictor, in the proportions of `vae.channels`, with about the parameters of `config`.

    With k times the widths it has a k² + b k parameters: convolutions grow with k², layers at pixels and z with k.
    """

    def widened(k: float) -> Config:
        changed = copy.deepcopy(config)
        changed.weight_predictor.update = "off"
        changed.vae.channels = [max(1, round(k * width)) for width in config.vae.channels]
        return changed

    single, double = (count_parameters(widened(k)) for k in (1, 2))
    a = double / 2 - single
    b = single - a
    return widened((math.sqrt(b**2 + 4 * a * count_parameters(config)) - b) / (2 * a)).vae.channels


def seed_list(text: str) -> list[int]:
    """Reads `0,1,2`."""
    seeds = [int(part) if re.fullmatch(r" *\d{1,9} *", part, re.ASCII) else -1 for part in text.split(",")]
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds must be different whole numbers such as 0,1,2, but is '{text}'")
    return seeds


def read_options(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line; `--report` takes what it isn't given from the folder's record."""
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = CommandParser("python -m studies.ablation", description=summary, epilog=more)
    add = parser.add_argument
    add("--config", metavar="FILE", help="the base settings (configs/quick.yaml)")
    add("--out", metavar="FOLDER", default="runs/ablation", help="where all is written (%(default)s)")
    add("--arms", metavar="NAMES", type=choose_arms, help="such as off,constant,full (all)")
    add("--seeds", metavar="LIST", type=seed_list, help="such as 0,1,2 (that)")
    add("--steps", metavar="N", type=int_between("steps", 1, 10**9), help="of each arm (%(default)s)")
    add("--seconds", metavar="S", type=int_between("seconds", 1, 10**9), help="of training (of N steps of `full`)")
    add("--points", type=int_between("points", 1, 1000), help="evaluations up to step N (%(default)s)")
    add("--images", type=int_between("images", 20, 10**6), help="generated for an evaluation (%(default)s)")
    add("--jobs", type=int_between("jobs", 1, 1000), default=1, help="processes at a time (%(default)s)")
    add("--quick", action="store_true", help="tiny networks and few steps: tries the command itself")
    add("--report", action="store_true", help="only write table and plot of the runs that are there")
    add("--task", nargs=2, help=argparse.SUPPRESS)  # what this command starts for each run
    add("overrides", nargs="*", metavar="section.key=value", help="settings of all arms")
    parser.set_defaults(config=str(ROOT / "configs/quick.yaml"), arms=[*ARMS], seeds=[0, 1, 2], steps=1500,
                        points=5, images=1000)  # fmt: skip
    options = parser.parse_intermixed_args(arguments)
    if fixed := [key for override in options.overrides if (key := override.partition("=")[0].strip()) in FIXED]:
        raise UserError(f"{fixed[0]} is set by the ablation itself; use --seeds, --steps, --points and --out")
    if options.quick:
        parser.set_defaults(arms=["off", "full", "constant", "textbook"], seeds=[0, 1], steps=20, points=2, images=40)
    if options.report and options.overrides:
        raise UserError("--report takes the settings of the folder's ablation, and no others")
    if options.report:
        parser.set_defaults(**read_json(Path(options.out) / "study.json").get("options", {}))
    options = parser.parse_intermixed_args(arguments)
    options.arguments = arguments
    options.overrides = [*DEFAULTS, *(QUICK if options.quick else []), *options.overrides]
    return options


def read_json(path: Path) -> dict[str, Any]:
    """What an earlier command has left in a file, empty if it isn't there; a `UserError` if it is damaged."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        raise UserError(f"{path} is damaged; remove it, or name another folder with --out") from None


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, with null for numbers that JSON doesn't have."""
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    write_text(path, json.dumps(finite, indent=1))


class Study:
    """One ablation's folder, its settings, and its runs: one for each arm and seed. Refuses wrong settings."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder, self.seeds = options, Path(options.out), options.seeds
        self.arms = [arm for arm in ARMS if arm in options.arms]
        self.every = max(1, options.steps // options.points)
        self.base = load_config(options.config, options.overrides)
        for arm in self.arms:
            self.config(arm, 0)  # mistakes show before anything is written
        self.failures: dict[str, str] = read_json(self.folder / "failures.json")
        self.processes: list[subprocess.Popen] = []
        self.stopping = False

    def config(self, arm: str, seed: int) -> Config:
        """Settings of an arm's run."""
        own = [f"training.seed={seed}", f"output.root={self.folder}", f"output.name={arm}-seed{seed}",
               f"training.steps={self.options.steps}", f"output.checkpoint_every={self.every}"]  # fmt: skip
        return arm_config(arm, self.options.config, self.options.overrides, own)

    def claim(self) -> None:
        """Saves the real images' features, and the record with earlier arms and seeds. Refuses another study."""
        record, root = read_json(self.folder / "study.json"), absolute(self.base.data.root)
        names = names_digest(path.removeprefix(str(root)) for path in find_images(root)[0])
        changes = [str(one) for one in (differences(record, self.base, "study.json") if record else ())
                   if not any(fnmatch(one.key, pattern) for pattern in UNCOMPARED)]  # fmt: skip
        changes += ["data.root holds images of other names"] * (names != record.get("image_names", names))
        if changes:
            raise UserError(f"{self.folder} holds an ablation with other settings: {', '.join(changes)}; "
                            "put them back, or name another folder with --out")  # fmt: skip
        if not (self.folder / "reals.pt").exists():
            images = open_images(self.base.data, self.base.image, batch_size=1, seed=0, device="cpu", progress=False)
            real = image_features(load_features(), images.fixed_sample(images.count))
            with atomic_write(self.folder / "reals.pt") as part:
                torch.save(real, part)
        # Until here, where all images could be read, the folder belongs to no ablation.
        options = {name: getattr(self.options, name) for name in REMEMBERED}
        earlier = record.get("options", options)
        options |= {name: sorted({*options[name], *earlier[name]}) for name in ("arms", "seeds")}
        record = {"config": config_to_dict(self.base), "image_names": names, "options": options}
        write_json(self.folder / "study.json", record)

    def seconds(self) -> dict[str, float]:
        """Seconds of an iteration of each arm; measured once."""
        known = read_json(self.folder / "seconds.json")
        missing = [arm for arm in self.arms if arm not in known]
        if missing:
            print_line(f"measuring the seconds of a step of {', '.join(missing)}")
            # The reference is measured each time: the machine may be faster or slower than it was for what is known.
            configs = {arm: self.config(arm, 0) for arm in dict.fromkeys([*missing, REFERENCE])}
            fresh = seconds_per_step(configs, rounds=3 if self.options.quick else 15)
            scale = known.get(REFERENCE, fresh[REFERENCE]) / fresh[REFERENCE]
            known |= {arm: fresh[arm] * scale for arm in missing}
            write_json(self.folder / "seconds.json", known)
        return known

    def budget(self) -> float:
        """Seconds of training after which arms are compared."""
        return self.options.seconds or self.options.steps * self.seconds().get(METHOD, self.seconds()[REFERENCE])

    def lengths(self, arm: str) -> list[int]:
        """The steps at which an arm is compared: equal steps, and equal time rounded up to a step."""
        return sorted({self.options.steps, max(1, math.ceil(self.budget() / self.seconds()[arm] - 1e-6))})

    def steps(self, arm: str) -> set[int]:
        """The steps at which an arm is evaluated."""
        return {*range(self.every, self.lengths(arm)[-1] + 1, self.every), *self.lengths(arm)}

    def rows(self, arm: str, seed: int) -> list[dict[str, Any]]:
        """The evaluations of a run so far, by step."""
        path = self.folder / f"{arm}-seed{seed}" / "evaluations.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if row["images"] == self.options.images]

    def train(self) -> None:
        """Trains and measures what isn't complete, seed by seed: stopped early, the first seeds can be compared.

        `--jobs` runs at a time, each in processes of its own; Ctrl-C and SIGTERM let them save and end.
        """
        runs = [(arm, seed) for seed, arm in itertools.product(self.seeds, self.arms)
                if self.steps(arm).difference(row["step"] for row in self.rows(arm, seed))]  # fmt: skip
        print_line(f"training {len(runs)} runs; {len(self.seeds) * len(self.arms) - len(runs)} are complete")
        with ThreadPoolExecutor(self.options.jobs) as pool:
            try:
                for run, future in [(run, pool.submit(self.work, *run)) for run in runs]:
                    self.note(*run, future.result())
            except BaseException:
                self.stopping = True  # from now on no process begins
                pool.shutdown(wait=False, cancel_futures=True)
                for process in self.processes:
                    process.terminate()
                raise

    def work(self, arm: str, seed: int) -> int:
        """Trains and measures one run; returns the first exit status that is not 0."""
        run, status = f"{arm}-seed{seed}", 0
        settings, log = self.folder / "settings" / f"{run}.yaml", self.folder / "logs" / f"{run}.log"
        write_text(settings, config_to_yaml(self.config(arm, seed)))
        write_text(log, "")
        # At its last step a training always leaves a checkpoint.
        trainings = [[str(ROOT / "training.py"), "--config", str(settings), f"training.steps={length}"]
                     for length in self.lengths(arm)]  # fmt: skip
        this = ["-m", "studies.ablation", *self.options.arguments, "--task"]
        with log.open("ab") as output:
            for command in trainings if arm != "textbook" else [[*this, "train", run]]:
                status = status or self.start(command, output)
            if status in (0, 2):  # a run that diverged was sound before, and is measured until then
                status = self.start([*this, "measure", run], output) or status
        return status

    def start(self, command: list[str], output: IO[bytes]) -> int:
        """Runs Python with one thread, in a session of its own: Ctrl-C reaches it through `train`, once."""
        if self.stopping:
            return -1
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, env=environment,
                              start_new_session=True) as process:  # fmt: skip
            self.processes.append(process)
            return process.wait()

    def note(self, arm: str, seed: int, status: int) -> None:
        """Prints how a run ended, and remembers failures."""
        run = f"{arm}-seed{seed}"
        self.failures.pop(run, None)
        if status:
            lines = (self.folder / "logs" / f"{run}.log").read_text(errors="replace").splitlines()
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            self.failures[run] = (errors or lines or ["no output"])[-1]
            print_line(f"  {run} failed (status {status}): {self.failures[run]}")
        else:
            last = self.rows(arm, seed)[-1]
            updated, base = (1000 * last[side]["kid"] for side in ("updated", "base"))
            print_line(f"  {run}: step {last['step']:,}, KID x 1000 {updated:.1f} (θ alone {base:.1f})")
        write_json(self.folder / "failures.json", self.failures)

    def train_textbook(self, arm: str, seed: int) -> None:
        """Trains with the textbook's own steps on our images in our order. If it was stopped, it starts over."""
        config, steps = self.config(arm, seed), self.steps(arm)
        checkpoints = self.folder / config.output.name / "checkpoints"
        if (checkpoints / f"step_{max(steps):06d}.pt").exists():
            return
        device, batch_size = choose_device(config.runtime.device), config.training.batch_size
        images = open_images(config.data, config.image, batch_size=batch_size, seed=seed, device=device)
        textbook: Any = Textbook(config, device)
        noise, batches = NoiseSampler(config, device), images.batches()
        for step in range(1, max(steps) + 1):
            metrics = iteration(textbook, noise, batches, step)
            if not all(math.isfinite(value) for value in metrics.values()):
                raise UserError(f"training stopped: a loss is not finite at step {step}; try smaller learning rates")
            if step % config.output.log_every == 0:
                print(f"step {step}/{max(steps)}  rec {metrics['generator/reconstruction']:.1f}", flush=True)
            if step in steps:
                with atomic_write(checkpoints / f"step_{step:06d}.pt") as part:
                    torch.save(textbook.generator.state_dict(), part)

    def measure(self, arm: str, seed: int) -> None:
        """Adds what is missing to a run's `evaluations.jsonl`, from its checkpoints."""
        folder, rows = self.folder / f"{arm}-seed{seed}", self.rows(arm, seed)
        real, features = torch.load(self.folder / "reals.pt", weights_only=True), load_features()
        for step in sorted(self.steps(arm).difference(row["step"] for row in rows)):
            checkpoint = folder / "checkpoints" / f"step_{step:06d}.pt"
            if not checkpoint.exists():  # the run failed before
                continue
            if arm == "textbook":  # it has no average
                generator = build_generator(config := self.config(arm, seed))
                generator.load_state_dict(torch.load(checkpoint, weights_only=True))
                sampler = Sampler(generator, config, step, checkpoint)
            else:
                sampler = load_sampler(checkpoint, "cpu")
            quality = quality_of(sampler, real, features, self.options.images)
            rows.append({"step": step, "images": self.options.images, **quality})
            rows.sort(key=lambda row: row["step"])
            write_text(folder / "evaluations.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def report(self) -> str:
        """Writes table, results and plot of the runs that are there; a `UserError` at the end names failed ones."""
        rows = {run: self.rows(*run) for run in itertools.product(self.arms, self.seeds)}
        arms = [arm for arm in self.arms if any(rows[arm, seed] for seed in self.seeds)]
        if REFERENCE not in arms:
            raise UserError(f"{self.folder} has no evaluations of {REFERENCE} with --images {self.options.images}")
        seconds, features = self.seconds(), load_features().name
        curves = [LearningCurve(arm, seed, seconds[arm], own) for (arm, seed), own in rows.items() if own]
        failed = {run: reason for run, reason in self.failures.items() if run in {f"{arm}-seed{n}" for arm, n in rows}}
        command = shlex.join(["python", "-m", "studies.ablation", *self.options.arguments])
        device = describe_device(choose_device(self.base.runtime.device))
        about = {arm: {"meaning": ARMS[arm][0], "parameters": count_parameters(self.config(arm, 0)),
                       "seconds_per_step": seconds[arm]} for arm in arms}  # fmt: skip
        results = {"command": command, "device": device, "date": date.today().isoformat(), "features": features,
                   "images": self.options.images, "failures": failed, "arms": about}  # fmt: skip
        for key, where in (("at_steps", {"steps": self.options.steps}), ("at_seconds", {"seconds": self.budget()})):
            results[key] = {"where": where, "arms": [compare(curves, arm, where) for arm in arms]}
        write_json(self.folder / "results.json", results | {"curves": [curve._asdict() for curve in curves]})
        write_table(self.folder / "table.md", results)
        save_figure(self.folder / "over_time.png", lambda: plot_over_time(curves, features), dpi=120)
        summary = f"wrote {self.folder}/table.md, results.json and over_time.png"
        if failed and not self.options.report:
            raise UserError(f"{len(failed)} runs failed ({', '.join(failed)}); {summary}")
        return summary


def quality_of(sampler: Sampler, real: Tensor, features: Any, count: int) -> dict[str, dict[str, Any]]:
    """Distances of the images of seeds 0, 1, ... decoded with θ + Δ (`updated`) and with θ alone (`base`)."""
    batches = [sampler.decode(sampler.inputs(range(first, min(first + BATCH, count))))
               for first in range(0, count, BATCH)]  # fmt: skip
    base = distances(real, image_features(features, [batch.x_base for batch in batches]))
    if sampler.generator.update_kind == "off":
        return {"base": base, "updated": base}
    return {"base": base, "updated": distances(real, image_features(features, [batch.x_fake for batch in batches]))}


def distances(real: Tensor, fake: Tensor) -> dict[str, Any]:
    """All measures between features (N, D) of real and generated images; `kid_parts` are of disjoint parts of both."""
    count = min(len(real), len(fake))  # precision and recall need equal numbers of both, of all classes
    precision, recall = precision_recall(real[torch.arange(count) * len(real) // count], fake[:count])
    size = count // PARTS
    shuffled = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]  # files are sorted by class
    pairs = itertools.islice(zip(shuffled.split(size), fake.split(size), strict=False), PARTS)
    parts = [kernel_distance(*pair, subsets=1, subset_size=size)[0] for pair in pairs]
    return {"kid": kernel_distance(real, fake)[0], "kid_parts": parts, "frechet": frechet_distance(real, fake),
            "precision": precision, "recall": recall}  # fmt: skip


def seconds_per_step(configs: dict[str, Config], rounds: int) -> dict[str, float]:
    """Median seconds of an iteration of each arm. They take turns, so that what slows one slows all.

    On a CPU, seconds of this process's own work (one thread), on a GPU of the clock.
    """
    device = choose_device(configs[REFERENCE].runtime.device)
    prepare_device(device)

    def clock() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    runners: dict[str, tuple[Any, NoiseSampler, Iterator[Tensor]]] = {}
    for arm, config in configs.items():
        state = TrainingState(*build_networks(config), config, device)
        kind = choose_step(config, device)[0]
        runner = Textbook(config, device) if arm == "textbook" else build_steps(kind, state)
        batch_size, size = config.training.batch_size, config.image.size
        x_real = torch.rand(batch_size, config.image.channels, size, size, device=device)
        runners[arm] = runner, NoiseSampler(config, device), itertools.repeat(x_real)
    seconds: dict[str, list[float]] = {arm: [] for arm in configs}
    for turn, arm in itertools.product(range(rounds + 1), configs):
        before = clock()
        iteration(*runners[arm], turn + 1)
        seconds[arm].append(clock() - before)
    return {arm: sorted(values[1:])[rounds // 2] for arm, values in seconds.items()}  # the first one allocates memory


def ablate(arguments: list[str]) -> str:
    """Does what the arguments ask for, and returns the last line to print."""
    torch.set_num_threads(1)  # as each run has
    study = Study(read_options(arguments))
    if study.options.task:
        task, run = study.options.task
        arm, _, seed = run.rpartition("-seed")
        (study.train_textbook if task == "train" else study.measure)(arm, int(seed))
        return f"{task} {run}: complete"
    if not study.options.report:
        study.claim()
        study.train()
    return study.report()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return run_command(lambda: ablate(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())

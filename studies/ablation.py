"""Measures what each part of the method is worth: trains variants that differ in one thing and compares their images.

python -m studies.ablation                                    all arms, 3 seeds, 3,000 steps and 260 s at 32 px: hours
python -m studies.ablation --arms constant,full --seeds 0,1,2,3,4 training.n_critic=1

Run it from the repository root. Arms with the same seed begin with the same VAE and critic, and see the same images in
the same order with the same noise. Their KID is compared after equal steps, and after equal time: CPU time of one
thread, on a GPU time of the clock, without the first step. The arms of a seed train in one process, a step each of
whichever has had the least time, so that other work on the machine slows all alike.

The folder gets table.md, and of each arm and seed measures.json and checkpoints, which generate.py and
studies.motion_report read. What is measured there is not trained again. Two commands may share a folder if their seeds
differ; then a third one with all seeds writes the table.
"""

import argparse
import copy
import json
import math
import re
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from util import CommandParser, atomic_write, int_between, print_line, run_command

# isort: split
import torch
from torch import Tensor

from checkpoints import Checkpoints, setting_texts
from configuration import Config, UserError, config_to_dict, load_config
from image_data import TrainingImages, open_images
from losses import value_at
from quality import ImageFeatures, as_floats, decode_shard, image_features, kernel_distance, load_features
from sampling import Sampler
from step_runners import build_steps, choose_step
from studies.textbook import Textbook
from training import build_networks, iteration
from training_step import NoiseSampler, TrainingState
from util import choose_device, describe_device, prepare_device

ROOT = Path(__file__).parent.parent
DEFAULTS = ["runtime.device=cpu", "runtime.step=eager"]
"""Of all arms; settings of the command line win."""
FIXED = ("training.seed", "training.steps", "training.epochs", "training.max_minutes", "output.root", "output.name")
"""Settings that the ablation itself chooses."""
UNCOMPARED = (*FIXED, "data.root", "data.memory_gb", "data.workers", "runtime.timeout_minutes", "output.*")
"""Settings that may differ within one folder: they change no result. (Names of images are compared instead.)"""

REFERENCE, OFF = "off", "weight_predictor.update=off"
ARMS: dict[str, tuple[str, list[str]]] = {
    "off": ("no predictor", [OFF]),
    "full": ("the whole method: each image its own update", []),
    "no-video-loss": ("no frame has to follow the synthetic video: λ_video 0", ["loss.lambda_video=0"]),
    "constant": ("a learned constant update, lr_predictor times hidden_size / 2", ["weight_predictor.update=constant"]),
    "shared": ("one update for the batch: the mean", ["weight_predictor.sharing=shared"]),
    "full-head": ("head full", ["weight_predictor.head=full"]),
    "per-channel": ("head per_channel", ["weight_predictor.head=per_channel"]),
    "textbook": ("a textbook's step: no predictor, no average, no augmentation", [OFF, "training.diffaugment=[]"]),
}  # fmt: skip
"""Name -> meaning and settings; all others are compared with `REFERENCE`."""
NOTE = """KID × 1000 on {features}, of images decoded with θ + Δ / with θ: lower is better. *Against `off`*: the mean of
the seeds' ratios of θ + Δ, geometric, and its interval of 95 % by Student's t of their logarithms. Several arms are
compared with one: of 20 true zeros one excludes 0 by chance."""


def choose_arms(names: str) -> list[str]:
    """The arms of a list such as `full,constant`, the reference always among them; a `UserError` for unknown names."""
    chosen = {name.strip() for name in names.split(",") if name.strip()}
    if unknown := sorted(chosen - {*ARMS}):
        raise UserError(f"--arms: there is no arm '{unknown[0]}'; the arms are {', '.join(ARMS)}")
    return [name for name in ARMS if name in {*chosen, REFERENCE}]


def seed_list(text: str) -> list[int]:
    """Reads `0,1,2`."""
    seeds = [int(part) if re.fullmatch(r" *\d{1,9} *", part, re.ASCII) else -1 for part in text.split(",")]
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds must be different whole numbers such as 0,1,2, but is '{text}'")
    return seeds


def arm_config(arm: str, file: str | None, common: list[str], seed: int) -> Config:
    """The settings of an arm: `file`, then `common` (of all arms), then the arm's own and its seed."""
    overrides = [*ARMS[arm][1], f"training.seed={seed}"]
    if arm == "constant":
        # A predicted weight sums a step of each GRU unit, whose values are about ½: the constant gets as large a step.
        base = load_config(file, common)
        rate = min(1.0, value_at(base.training.lr_predictor, 1) * base.weight_predictor.hidden_size / 2)
        overrides.append(f"training.lr_predictor={rate:.6g}")
    return load_config(file, [*common, *overrides])


class Run:
    """One arm with one seed, as far as it is trained."""

    def __init__(self, arm: str, seed: int, config: Config, images: TrainingImages) -> None:
        device = images.device
        self.arm, self.name, self.config, self.step, self.seconds = arm, f"{arm}-seed{seed}", config, 0, 0.0
        self.found: dict[str, Any] = {"arm": arm, "seed": seed}  # with what was measured so far
        self.noise, self.batches = NoiseSampler(config, device), images.batches()
        self.state: TrainingState | None = None
        self.runner: Any
        if arm == "textbook":  # it has no average
            self.runner = Textbook(config, device)
            self.generator = self.runner.generator
        else:
            self.state = TrainingState(*build_networks(config), config, device)
            self.runner = build_steps(choose_step(config, device)[0], self.state)
            self.generator = self.state.generator_ema

    def train(self) -> None:
        """Takes one step. Raises UserError: a loss is not finite."""
        before = self._clock()
        metrics = iteration(self.runner, self.noise, self.batches, self.step + 1)
        taken = self._clock() - before
        self.seconds += taken if self.step else 0.0  # the first one reserves memory, and perhaps compiles
        self.step += 1
        if self.state:
            self.state.step = self.step
        if not all(math.isfinite(value) for value in metrics.values()):
            raise UserError(f"a loss is not finite at step {self.step}; try smaller learning rates")

    def _clock(self) -> float:
        if self.noise.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def measure(self, real: Tensor, features: ImageFeatures, count: int, folder: Path) -> dict[str, float]:
        """Saves the networks, and compares images of seeds 0, 1, ... with those of which `real` are features (N, D)."""
        checkpoints = Checkpoints(folder / self.name / "checkpoints", keep=2)
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
        # A sampler's networks don't train any more: an average never does, but the textbook's own go on.
        generator = self.generator if self.state else copy.deepcopy(self.generator)
        saved = {"step": self.step, "config": config_to_dict(self.config), "update_spec": generator.spec.to_dict()}
        checkpoints.save(saved | {"generator_ema": generator.state_dict()})
        shards = decode_shard(Sampler(generator, self.config, self.step, folder), range(count))
        kid = {name: kernel_distance(real, image_features(features, as_floats(x)))[0] for name, x in shards.items()}
        return {"step": self.step, "seconds": self.seconds, **kid}


class Study:
    """One ablation's folder and settings. Raises UserError: wrong settings of an arm."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, Path(options.out)
        common = [*DEFAULTS, *options.overrides]
        self.configs = {(arm, seed): arm_config(arm, options.config, common, seed)
                        for seed in options.seeds for arm in options.arms}  # fmt: skip
        self.base = load_config(options.config, common)
        self.device = choose_device(self.base.runtime.device)
        prepare_device(self.device)
        self.features = load_features(self.device)
        self.real: Tensor | None = None
        self.measures: dict[tuple[str, int], dict[str, Any]] = {}
        self.failed: list[str] = []

    def train(self, seed: int) -> None:
        """Trains and measures what is missing of a seed's arms. Raises UserError: the folder has other settings."""
        data, image, batch_size = self.base.data, self.base.image, self.base.training.batch_size
        images = open_images(data, image, batch_size=batch_size, seed=seed, device=self.device)
        amounts = {name: getattr(self.options, name) for name in ("steps", "seconds", "images")}
        texts = setting_texts(self.base).items()
        settings: dict[str, Any] = {key: x for key, x in texts if not any(fnmatch(key, one) for one in UNCOMPARED)}
        settings |= {f"--{name}": value for name, value in amounts.items()} | {"names of images": images.fingerprint}
        for path in sorted(self.folder.glob("*/measures.json")):
            found = read_measures(path, settings)
            self.measures[found["arm"], found["seed"]] = found
        if self.real is None:
            self.real = image_features(self.features, images.fixed_sample(images.count))
        runs = [Run(*run, self.configs[run], images) for run in self.configs
                if run[1] == seed and run not in self.measures]  # fmt: skip
        if runs:
            print_line(f"seed {seed}: training {', '.join(run.arm for run in runs)}")
        while runs:
            run = min(runs, key=lambda one: one.seconds)
            try:
                run.train()
                for moment, due in (("at_steps", run.step == self.options.steps),
                                    ("at_seconds", run.seconds >= self.options.seconds)):  # fmt: skip
                    if due and moment not in run.found:
                        run.found[moment] = run.measure(self.real, self.features, self.options.images, self.folder)
            except UserError as error:
                print_line(f"  {run.name} failed: {error}")
                self.failed.append(run.name)
                runs.remove(run)
            if {"at_steps", "at_seconds"} <= run.found.keys():
                runs.remove(run)
                self.measures[run.arm, seed] = run.found
                with atomic_write(self.folder / run.name / "measures.json") as part:
                    part.write_text(json.dumps(run.found | {"settings": settings}, indent=1), encoding="utf-8")
                kid = 1000 * run.found["at_seconds"]["updated"]
                print_line(f"  {run.name}: {run.step:,} steps, {run.seconds:.0f} s, KID x 1000 {kid:.1f}")

    def table(self) -> list[str]:
        """The comparison as lines of Markdown: of each arm over the seeds that it and the reference have."""
        moments = f"{self.options.steps:,} steps", f"{self.options.seconds:,} s"
        command = shlex.join(["python", "-m", "studies.ablation", *self.options.arguments])
        lines = [f"`{command}`, {describe_device(self.device)}, torch {torch.__version__}, {date.today()}", "",
                 "| arm | seeds | s / step " + "".join(f"| {moment}: θ + Δ / θ | against `off` " for moment in moments)
                 + "|", "|" + 7 * "---|"]  # fmt: skip
        for arm in self.options.arms:
            seeds = [n for n in self.options.seeds if {(arm, n), (REFERENCE, n)} <= self.measures.keys()]
            rows = [self.measures[arm, seed] for seed in seeds]
            cells = [f"`{arm}`: {ARMS[arm][0]}", str(len(seeds)), *["–"] * (5 * (not seeds))]
            if seeds:
                ends = [row["at_seconds"] for row in rows]
                cells.append(f"{statistics.fmean(end['seconds'] / max(1, end['step'] - 1) for end in ends):.3f}")
            for moment in ("at_steps", "at_seconds") if seeds else ():
                updated, base = ([row[moment][side] for row in rows] for side in ("updated", "base"))
                reference = [self.measures[REFERENCE, seed][moment]["updated"] for seed in seeds]
                cells.append(f"{1000 * statistics.fmean(updated):.1f} / {1000 * statistics.fmean(base):.1f}")
                cells.append("" if arm == REFERENCE else shown_difference(*t_difference(updated, reference)))
            lines.append(f"| {' | '.join(cells)} |")
        return [*lines, "", NOTE.format(features=self.features.name).replace("\n", " ")]


def read_measures(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier command has measured with these settings. Raises UserError: with others, or it is damaged."""
    try:
        found = json.loads(path.read_text())
        before, _, _ = (found[key] for key in ("settings", "arm", "seed"))
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; remove it, or name another folder with --out") from None
    changes = [f"{key} {before.get(key)} -> {value}" for key, value in settings.items() if value != before.get(key)]
    if changes:
        raise UserError(f"{path} was measured with other settings: {', '.join(changes)}; put them back, or name "
                        "another folder with --out")  # fmt: skip
    return found


def t_difference(arm: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """The relative difference as the geometric mean of the seeds' ratios, and its 95 % interval by Student's t.

    -0.15 is 15 % lower. The interval is NaN with one seed, all is NaN where a distance is not above 0.
    """
    from scipy.stats import t  # only studies need scipy

    if min(*arm, *reference) <= 0:
        return math.nan, math.nan, math.nan
    logs = [math.log(one / other) for one, other in zip(arm, reference, strict=True)]
    error = statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    reach, mean = t.ppf(0.975, max(1, len(logs) - 1)) * error, statistics.fmean(logs)
    return math.expm1(mean), math.expm1(mean - reach), math.expm1(mean + reach)


def shown_difference(difference: float, low: float, high: float) -> str:
    """`-12.0 % (-20.1 to -3.2)`; a dash for what there is none of."""
    if math.isnan(difference):
        return "–"
    interval = "" if math.isnan(low) else f" ({100 * low:+.1f} to {100 * high:+.1f})"
    return f"{100 * difference:+.1f} %{interval}"


def read_options(arguments: list[str]) -> argparse.Namespace:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = CommandParser("python -m studies.ablation", description=summary, epilog=more)
    add = parser.add_argument
    add("--config", metavar="FILE", default=str(ROOT / "configs/quick.yaml"), help="base settings (configs/quick.yaml)")
    add("--out", metavar="FOLDER", default="runs/ablation", help="where all is written (%(default)s)")
    add("--arms", metavar="NAMES", type=choose_arms, default=[*ARMS], help=f"of {', '.join(ARMS)} (all)")
    add("--seeds", metavar="LIST", type=seed_list, default=[0, 1, 2], help="such as 0,1,2 (that)")
    add("--steps", type=int_between("steps", 1, 10**9), default=3000, help="when arms are compared (%(default)s)")
    add("--seconds", type=int_between("seconds", 1, 10**9), default=260, help="likewise (%(default)s)")
    add("--images", type=int_between("images", 20, 10**6), default=600, help="that measure an arm (%(default)s)")
    add("overrides", nargs="*", metavar="section.key=value", help="settings of all arms")
    options = parser.parse_args(arguments)
    keys = [override.partition("=")[0].strip() for override in options.overrides]
    if fixed := [key for key in keys if key in FIXED]:
        raise UserError(f"{fixed[0]} is set by the ablation itself; use --seeds, --steps, --seconds and --out")
    options.arguments = arguments
    return options


def ablate(arguments: list[str]) -> str:
    """Trains and compares, seed by seed: stopped early, the first seeds can be compared. Returns the last line."""
    torch.set_num_threads(1)
    study = Study(read_options(arguments))
    for seed in study.options.seeds:
        study.train(seed)
    lines, path = study.table(), study.folder / "table.md"
    with atomic_write(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print_line("\n".join(lines))
    if study.failed:
        raise UserError(f"{len(study.failed)} runs failed ({', '.join(study.failed)}); wrote {path} of the others")
    return f"wrote {path}"


def main(arguments: list[str] | None = None) -> int:
    return run_command(lambda: ablate(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())

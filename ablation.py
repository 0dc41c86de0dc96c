"""What is each part of the method worth? Trains variants of it that differ in one thing, and compares their pictures.

python ablation.py                                     13 arms, 3 seeds, 1,500 steps of config_quick.yaml's 32 px: a day
python ablation.py --tune                              the same, after looking for each arm's own learning rates
python ablation.py --arms off,constant,full --seeds 0,1,2,3,4 --jobs 4
python ablation.py --quick --out runs/try              every part of it in a few minutes, with results that mean nothing
python ablation.py --report                            table and plot again, of what is there

Arms with the same seed begin with the same VAE and critic, and see the same pictures in the same order with the same
noise. They are compared after equal steps, and after equal time: every arm's seconds a step are measured first, the
arms taking turns, as CPU time of one thread, so that other work on the machine counts little. Cheaper arms then train
for more steps. The same command again goes on where it was stopped.

Left in the folder: table.md, results.json, over_time.png, rates.json, study.json (what it belongs to), and
a run's usual folder for each arm and seed.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from ablation_arms import (
    ARMS,
    METHOD,
    RATES,
    REFERENCE,
    Arm,
    arm_config,
    candidate_rates,
    choose_arms,
    count_parameters,
    rate_overrides,
)
from ablation_options import TUNING_SEED, read_options
from ablation_record import RECORD, check_record, make_record, read_record, read_stored
from ablation_report import Course, compare, plot_over_time, write_table
from ablation_worker import read_rows
from command_line import run_command, say
from configuration import Config, UserError, config_from_dict, config_to_dict, load_config
from devices import choose_device, describe_device
from job_processes import run_processes
from pictures import told_in_one_line, written_whole
from resume import differences

HERE = Path(__file__).parent
QUICK = [
    "image.size=16", "vae.channels=[4,8]", "vae.latent_dim=8", "discriminator.channels=[4,8]", "video.height=8",
    "video.width=8", "video.frames=3", "weight_predictor.hidden_size=8", "training.batch_size=8", "output.samples=2",
]  # fmt: skip
"""Settings of --quick."""

KEEP_ONE_IN = 3
"""Of the candidates of tuning, after the first stage."""

AMPLIFIED_STEPS = 20
"""Iterations over which the amplification is measured."""

FIXED = ("training.seed", "training.steps", "training.epochs", "training.max_minutes", "output.root", "output.name",
         "output.checkpoint_every", "output.keep_checkpoints")  # fmt: skip
"""Settings that the ablation itself needs."""


class Study:
    """One ablation's folder, its settings and its jobs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = Path(options.out)
        self.arms = choose_arms(options.arms)
        self.seeds: list[int] = options.seeds
        self.common = [*(QUICK if options.quick else []), *options.overrides]
        for override in options.overrides:
            if (key := override.partition("=")[0].strip()) in FIXED:
                raise UserError(f"{key} is set by the ablation itself; use --seeds, --steps, --points and --out")
        self.every = max(1, options.steps // options.points)
        self.base = load_config(options.config, self.common)
        for arm in self.arms:
            self.config(arm, 0)  # mistakes show before anything is written
        check_record(read_record(self.folder), self.base, self.folder)
        self.failures: dict[str, str] = self.stored("failures.json")
        # Real pictures are the same for all arms, and so are their features.
        self.reals = self.folder / "reals.pt"

    def config(self, arm: Arm, seed: int, *extra: str, name: str = "") -> Config:
        """Settings of an arm's run; `name` is its folder's."""
        place = [f"training.seed={seed}", f"output.root={self.folder}", f"output.name={name or arm.name}"]
        config = arm_config(arm, self.options.config, self.common, [*rate_overrides(self.rates(arm)), *place, *extra])
        if arm.is_textbook and config.training.diffaugment:
            raise UserError("arm textbook: no augmentation")
        return config

    # ------------------------------------------------------------------------------------------------------------ rates

    def stored(self, name: str) -> dict[str, Any]:
        """What an earlier part of this command has left in a file; empty if it isn't there."""
        return read_stored(self.folder / name)

    def store(self, name: str, content: Any) -> None:
        with told_in_one_line(self.folder / name), written_whole(self.folder / name) as part:
            part.write_text(json.dumps(_strict(content), indent=1, allow_nan=False))

    def rates(self, arm: Arm) -> dict[str, float]:
        """An arm's learning rates: tuned ones where there are some, else those of its settings."""
        tuned = self.stored("rates.json")
        if arm.name == "off-amplified":
            rates = self.rates(ARMS[METHOD])
            factor = self.stored("amplification.json").get("amplification", 1.0)
            return rates | {"lr_vae": min(1.0, rates["lr_vae"] * factor)}
        if arm.name in tuned:
            return tuned[arm.name]["rates"]
        own = arm_config(arm, self.options.config, self.common, []).training
        return {rate: getattr(own, rate) for rate in RATES}

    def tune(self) -> None:
        """Chooses each arm's rates by successive halving (Jamieson & Talwalkar 2016), on the same time for each arm."""
        rates, seconds = self.stored("rates.json"), self.seconds()
        for arm in self.arms:
            if not arm.tuned or arm.name in rates:
                continue
            candidates = candidate_rates(self.config(arm, TUNING_SEED), self.options.candidates)
            left, found = list(range(len(candidates))), {}
            stages = [len(left)] if len(left) < KEEP_ONE_IN else [len(left), math.ceil(len(left) / KEEP_ONE_IN)]
            work = len(left) if len(stages) == 1 else stages[0] + stages[1] * (KEEP_ONE_IN - 1)
            short = max(1, int(self.tune_seconds() / seconds[arm.name] / work))
            for stage, count in enumerate(stages):
                left = left[:count]
                steps = short * KEEP_ONE_IN**stage
                jobs = [self.tuning_job(arm, number, candidates[number], steps) for number in left]
                self.run(jobs, f"tuning {arm.name}")
                for number, job in zip(left, jobs, strict=True):
                    row = next((row for row in self.rows(job) if row["step"] == steps), None)
                    found[number] = row["updated"]["kid"] if row else math.inf
                left.sort(key=lambda number: found[number])
            best = left[0]
            if not math.isfinite(found[best]):
                raise UserError(f"tuning {arm.name}: no candidate could be trained; see {self.folder / 'logs'}")
            tried = [{"rates": candidates[number], "kid": kid} for number, kid in sorted(found.items())]
            rates[arm.name] = {"rates": candidates[best], "kid": found[best], "tried": tried, "steps": steps}
            self.store("rates.json", rates)
            chosen = ", ".join(f"{rate} {value:.3g}" for rate, value in candidates[best].items())
            say(f"tuned {arm.name}: {chosen} (KID x 1000 {1000 * found[best]:.1f} after {steps:,} steps)")

    def tuning_job(self, arm: Arm, number: int, rates: dict[str, float], steps: int) -> dict[str, Any]:
        name = f"tune-{arm.name}-{number:02d}"
        config = self.config(arm, TUNING_SEED, *rate_overrides(rates), name=name)
        return self.job(arm, config, [steps], every=10**12, pictures=max(10, self.options.pictures // 2))

    def tune_seconds(self) -> float:
        return self.options.tune_seconds or 2 * self.budget()

    # ------------------------------------------------------------------------------------------------------------- time

    def seconds(self) -> dict[str, float]:
        """Seconds of an iteration of each arm; measured once."""
        known = self.stored("seconds.json")
        missing = [arm for arm in self.arms if arm.name not in known and arm.name != "off-amplified"]
        if missing:
            say(f"measuring the seconds of a step of {', '.join(arm.name for arm in missing)}")
            # The reference is measured each time: what is known from before was on a faster or slower machine.
            measured = {arm.name: arm for arm in [*missing, next(arm for arm in self.arms if arm.name == REFERENCE)]}
            job = {
                "task": "calibrate",
                "name": "calibrate",
                "configs": {name: config_to_dict(self.config(arm, 0)) for name, arm in measured.items()},
                "textbooks": [name for name, arm in measured.items() if arm.is_textbook],
                "rounds": 3 if self.options.quick else 15,
                "result": str(self.folder / "calibration.json"),
            }
            self.run([job], "", needed=True)
            fresh = self.stored("calibration.json")
            scale = known.get(REFERENCE, fresh[REFERENCE]) / fresh[REFERENCE]
            known |= {arm.name: fresh[arm.name] * scale for arm in missing}
            self.store("seconds.json", known)
        return known | {"off-amplified": known[REFERENCE]}

    def budget(self) -> float:
        """Seconds of training after which arms are compared."""
        seconds = self.seconds()
        return self.options.seconds or self.options.steps * seconds.get(METHOD, seconds[REFERENCE])

    def stops_of(self, arm: Arm) -> list[int]:
        """The steps after which an arm is compared: at equal steps, and at equal time (rounded up to a whole one)."""
        in_time = max(1, math.ceil(self.budget() / self.seconds()[arm.name] - 1e-6))
        return sorted({self.options.steps, in_time})

    # ------------------------------------------------------------------------------------------------------------- jobs

    def job(self, arm: Arm, config: Config, stops: list[int], every: int, pictures: int) -> dict[str, Any]:
        steps = stops[-1]
        config.training.steps, config.training.epochs = steps, None
        config.output.checkpoint_every = min(every, steps)
        return {
            "task": "train",
            "name": config.output.name,
            "config": config_to_dict(config),
            "textbook": arm.is_textbook,
            "stops": stops,
            "every": every,
            "pictures": pictures,
            "reals": str(self.reals),
        }

    def arm_job(self, arm: Arm, seed: int) -> dict[str, Any]:
        config = self.config(arm, seed, name=f"{arm.name}-seed{seed}")
        return self.job(arm, config, self.stops_of(arm), self.every, self.options.pictures)

    def rows(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        """The evaluations that a job has left so far."""
        return [row for row in self.all_rows(job["name"]) if row["pictures"] == job["pictures"]]

    def all_rows(self, name: str) -> list[dict[str, Any]]:
        """The evaluations of a run, whatever the number of pictures."""
        return read_rows(self.folder / name / "evaluations.jsonl")

    def check_run(self, job: dict[str, Any]) -> None:
        """Refuses a run that is there and was one of other settings.

        Raises:
            UserError: it was.
        """
        before = self.folder / "jobs" / f"{job['name']}.json"
        if (self.folder / job["name"]).exists() and before.exists():
            config = config_from_dict(job["config"], job["name"])
            changed = [one for one in differences(json.loads(before.read_text()), config, str(before))
                       if one.effect != "free"]  # fmt: skip
            if changed:
                raise UserError(
                    f"{self.folder / job['name']} was trained with other settings: {', '.join(map(str, changed))}; "
                    "put them back, name another folder with --out, or remove that run"
                )

    def finished(self, job: dict[str, Any]) -> bool:
        """Whether there is nothing left to do; raises as `check_run`."""
        if job["task"] != "train":
            return False
        self.check_run(job)
        wanted = {*range(job["every"], job["stops"][-1] + 1, job["every"]), *job["stops"]}
        return wanted <= {row["step"] for row in self.rows(job)}

    def run(self, jobs: list[dict[str, Any]], what: str, needed: bool = False) -> None:
        """Does the jobs that aren't done, `--jobs` at a time, each in a process of its own.

        Raises:
            UserError: one failed that everything else needs.
            KeyboardInterrupt: stopped; the processes have saved.
        """
        todo = [job for job in jobs if not self.finished(job)]
        if what:
            kept = f", {len(jobs) - len(todo)} there already" if len(todo) < len(jobs) else ""
            say(f"{what}: {len(todo)} runs{kept}")
        run_processes([self.command(job) for job in todo], self.options.jobs, self.told(todo))
        if needed and (failed := [job["name"] for job in todo if job["name"] in self.failures]):
            raise UserError(f"{failed[0]}: {self.failures[failed[0]]}")

    def command(self, job: dict[str, Any]) -> tuple[list[str], Path]:
        path, log = self.folder / "jobs" / f"{job['name']}.json", self.folder / "logs" / f"{job['name']}.log"
        with told_in_one_line(path), written_whole(path) as part:
            part.write_text(json.dumps(job, indent=1))
        log.parent.mkdir(parents=True, exist_ok=True)
        return [sys.executable, str(HERE / "ablation_worker.py"), str(path)], log

    def told(self, todo: list[dict[str, Any]]) -> Callable[[int, int, float], None]:
        def tell(index: int, status: int, seconds: float) -> None:
            job = todo[index]
            if status:
                lines = (self.folder / "logs" / f"{job['name']}.log").read_text(errors="replace").strip().splitlines()
                reason = (lines or ["it said nothing"])[-1].removeprefix("error: ")
                say(f"  {job['name']} failed (status {status}): {reason}")
                if not job["name"].startswith("tune-"):  # a rate that was too high is what tuning is there to find
                    self.failures[job["name"]] = reason
                    self.store("failures.json", self.failures)
                return
            if self.failures.pop(job["name"], None):
                self.store("failures.json", self.failures)
            if job["task"] == "train" and (rows := self.rows(job)):
                last = rows[-1]
                updated, base = (1000 * last[side]["kid"] for side in ("updated", "base"))
                say(f"  {job['name']}: step {last['step']:,}, KID x 1000 {updated:.1f} (θ alone {base:.1f}), "
                    f"{seconds:.0f} s")  # fmt: skip

        return tell

    # -------------------------------------------------------------------------------------------------------- the whole

    def train(self) -> None:
        """Trains and measures every arm with every seed."""
        amplified = [arm for arm in self.arms if arm.name == "off-amplified"]
        others = [arm for arm in self.arms if arm not in amplified]
        # Seed by seed: whoever stops early has whole comparisons of the first seeds.
        self.run([self.arm_job(arm, seed) for seed in self.seeds for arm in others], "training")
        if not amplified:
            return
        if not self.stored("amplification.json"):
            name = f"{METHOD}-seed{self.seeds[0]}"
            middle = sorted((self.folder / name / "checkpoints").glob("step_*.pt"))
            if not middle:
                say(f"off-amplified is left out: {name} has no checkpoint to measure the amplification from")
                return
            job = {
                "task": "amplify", "name": "amplify", "checkpoint": str(middle[len(middle) // 2]),
                "iterations": AMPLIFIED_STEPS, "result": str(self.folder / "amplification.json"),
            }  # fmt: skip
            self.run([job], "", needed=True)
        factor = self.stored("amplification.json")["amplification"]
        say(f"amplification: θ + Δ moves {factor:.2f} times as far as θ in a step")
        self.run([self.arm_job(arm, seed) for arm in amplified for seed in self.seeds], "training off-amplified")

    def leave_out_what_is_not_there(self) -> None:
        """Only arms that were measured stay, for a report that trains nothing.

        Raises:
            UserError: the reference was not.
        """
        counts = {
            arm.name: {row["pictures"] for seed in self.seeds for row in self.all_rows(f"{arm.name}-seed{seed}")}
            for arm in self.arms
        }
        if self.options.pictures not in (known := sorted(counts[REFERENCE])):
            there = f"there are some of {', '.join(map(str, known))}" if known else "the ablation comes first"
            raise UserError(
                f"--report: {self.folder} holds no evaluations of arm {REFERENCE} with --pictures "
                f"{self.options.pictures}; {there}"
            )
        self.arms = [arm for arm in self.arms if self.options.pictures in counts[arm.name]]

    def failed(self) -> dict[str, str]:
        """The runs of this command's arms and seeds that have failed, now or before, and why."""
        names = [f"{arm.name}-seed{seed}" for arm in self.arms for seed in self.seeds]
        return {name: self.failures[name] for name in names if name in self.failures}

    def report(self) -> str:
        """Writes table, results and plot of what is there; returns the last words."""
        seconds, features = self.seconds(), _features_name()
        jobs = {(arm.name, seed): self.arm_job(arm, seed) for arm in self.arms for seed in self.seeds}
        for job in jobs.values():
            self.check_run(job)
        courses = [Course(*key, seconds[key[0]], self.rows(job)) for key, job in jobs.items()]
        tuned = self.stored("rates.json")
        places = {"at_steps": {"steps": self.options.steps}, "at_seconds": {"seconds": self.budget()}}
        results: dict[str, Any] = {
            "command": shlex.join(["python", "ablation.py", *self.options.arguments]),
            "device": describe_device(choose_device(self.config(self.arms[0], 0).runtime.device)),
            "date": date.today().isoformat(),
            "features": features,
            "pictures": self.options.pictures,
            "amplification": self.stored("amplification.json").get("amplification"),
            "failures": [f"{name}: {why}" for name, why in self.failed().items()],
            "arms": {
                arm.name: {
                    "meaning": arm.meaning,
                    "parameters": count_parameters(config := self.config(arm, 0)),
                    "seconds_per_step": seconds[arm.name],
                    "rates": {rate: getattr(config.training, rate) for rate in RATES},
                    "rates_from": "tuned" if arm.name in tuned else "computed" if not arm.tuned else "settings",
                }
                for arm in self.arms
            },
        }
        for key, where in places.items():
            results[key] = {"where": where, "arms": [compare(courses, arm.name, where) for arm in self.arms]}
        results["courses"] = [course._asdict() for course in courses]
        self.store("results.json", results)
        write_table(self.folder / "table.md", results)
        plot_over_time(self.folder / "over_time.png", courses, features)
        return f"wrote {self.folder}/table.md, results.json and over_time.png"


def _strict(content: Any) -> Any:
    """`content` with null for numbers that JSON doesn't have."""
    if isinstance(content, dict):
        return {key: _strict(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_strict(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _features_name() -> str:
    from quality import load_features

    return load_features().name


def ablate(arguments: list[str]) -> str:
    """Does what the arguments say, and returns the last words."""
    study = Study(read_options(arguments, __doc__ or ""))
    if study.options.report:
        study.leave_out_what_is_not_there()
    else:
        record = make_record(study.base, study.options, read_record(study.folder), study.folder)
        if not study.reals.exists():
            config = config_to_dict(study.config(study.arms[0], 0))
            study.run(
                [{"task": "reals", "name": "reals", "config": config, "reals": str(study.reals)}], "", needed=True
            )
        study.store(RECORD, record)  # now the pictures can be read: until then the folder belongs to nobody
        if study.options.tune:
            study.tune()
        study.train()
    words = study.report()
    if (failed := study.failed()) and not study.options.report:
        raise UserError(f"{len(failed)} runs failed ({', '.join(failed)}); {words}")
    return words


def main(arguments: list[str] | None = None) -> int:
    return run_command(lambda: ablate(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())

"""Measures the training step: our runners against a textbook's WGAN-GP, side by side in one run.

python benchmark.py                             this device, the source's sizes, and how the cost grows
python benchmark.py --quick --json quick.json   under a minute, small sizes
python benchmark.py --full                      every size, batch, head and video that fits into time and memory
python benchmark.py --full --minutes 120        more of them
python benchmark.py data.root=my_pictures training.batch_size=32

An iteration is n_critic critic steps and a generator step, with data, draws and optimizers. Variants run in processes
of their own and take turns, so that whatever else the machine does hits all alike; a speedup is the median of the
rounds' ratios to the textbook (`textbook.py`). The floor is what the matrix operations of our iteration would take at
the rates measured on the same device: the longer of arithmetic and fewest bytes.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in training.py

import torch

from benchmark_plan import SOURCE, Case, cases, fitted, free_bytes
from benchmark_report import page, plot
from command_line import OneLineParser, run_command, say, whole_number
from configuration import UserError, load_config
from devices import choose_device
from image_data import open_images

HERE = Path(__file__).parent
SMALL = [
    "image.size=32", "vae.channels=[16,32]", "vae.latent_dim=32", "discriminator.channels=[16,32]",
    "weight_predictor.hidden_size=32", "training.batch_size=8", "training.n_critic=2",
    "video.height=32", "video.width=32",
]  # fmt: skip
"""Settings of --quick."""


GRADIENTS = 3
"""Draws whose gradients are compared with the reference's: once with the reference's own choices, and once with the
choices of the fp32 pass (`benchmark_checks.Choices`). A critic in fp32 now and then takes another one of two almost
equal pixels than in float64, which moves its gradient by about 1e-3, the textbook's like ours."""


class Worker:
    """A process with one variant; see `benchmark_worker.py` and `benchmark_checks.py`."""

    def __init__(self, settings: dict[str, Any], module: str = "benchmark_worker") -> None:
        self.name = f"{settings['runner']} {settings.get('precision', '')}".strip()
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        program = f"import json, sys, {module}; {module}.main(json.loads(sys.argv[1]))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )  # fmt: skip

    def ask(self, word: str = "") -> dict[str, Any]:
        """Sends a word (none: waits for the first answer) and returns the answer.

        Raises:
            UserError: the variant failed; its last line says why.
        """
        assert self.process.stdout is not None
        try:
            if word:
                print(word, file=self.process.stdin, flush=True)
            for line in self.process.stdout:
                if line.startswith("{"):
                    return json.loads(line)
        except BrokenPipeError:
            pass
        status = self.process.wait()
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        reason = lines[-1] if lines else f"it ended with status {status}"
        raise UserError(f"{self.name} failed: {reason.removeprefix('configuration.UserError: ')[:300]}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def measure(case: Case, device: torch.device, rounds: int, base: list[str]) -> list[dict[str, Any]]:
    """The result lines of one case."""
    overrides = [*base, *case.overrides]
    config = load_config(None, overrides)
    with tempfile.TemporaryDirectory() as folder:
        workers: list[Worker] = []
        try:
            draws = range(1, 1 + (GRADIENTS if case.checked else 1))
            common = {"overrides": overrides, "device": str(device), "folder": folder, "gradients": len(draws)}
            checks: dict[str, Any] = {}
            if case.checked:  # ends before the others begin: in float64 it takes twice the memory
                # Only where operations can be seen one by one, and in the precision that is checked.
                runners = [runner for runner in ("textbook", "eager") if (runner, "fp32") in case.variants]
                checker = Worker(common | {"runner": "checks", "runners": runners}, "benchmark_checks")
                workers.append(checker)
                checks = checker.ask()
                checker.close()
            measured, lines = [], []
            for number, (runner, precision) in enumerate(case.variants):
                settings = common | {"runner": runner, "precision": precision, "name": str(number)}
                settings["overrides"] = [*overrides, f"runtime.precision={precision}"]
                worker = Worker(settings)
                workers.append(worker)
                measured.append(worker)
                first = worker.ask()["first_seconds"]
                line: dict[str, Any] = {
                    "case": case.name, "device": device.type, "precision": precision, "runner": runner,
                    "image_size": config.image.size, "batch_size": config.training.batch_size,
                    "n_critic": config.training.n_critic, "first_seconds": first, "gradient_error": None,
                    "gradient_error_same_choices": None, "peak_tensor_bytes": None, "time_shares": None,
                }  # fmt: skip
                if case.checked:
                    line |= gradient_errors(Path(folder), str(number), draws)
                    line |= checked(checks.get(runner) if precision == "fp32" else None)
                lines.append(line)
            for worker in measured:
                worker.ask("iteration")  # workers start, caches fill
            times: list[list[dict[str, float]]] = [[] for _ in measured]
            for _ in range(rounds):
                for worker, mine in zip(measured, times, strict=True):
                    mine.append(worker.ask("iteration"))
            for worker, mine, line in zip(measured, times, lines, strict=True):
                line["peak_memory_bytes"] = worker.ask("memory")["bytes"]
                summarise(line, mine, times[0] if case.variants[0][0] == "textbook" else None)
                if line["runner"] == "eager":
                    line["gru_share"] = worker.ask("gru")["seconds"] / line["seconds_per_iteration"]
                    line["work"] = worker.ask("work")
        finally:
            for worker in workers:
                worker.close()
    return lines


def gradient_errors(folder: Path, name: str, draws: range) -> dict[str, Any]:
    """The relative distance of whole gradient vectors from the reference's: medians over the draws."""
    errors: dict[str, list[float]] = {"critic": [], "generator": []}
    for number in draws:
        wanted, mine = torch.load(folder / f"reference {number}"), torch.load(folder / f"{name} {number}")
        for part, values in errors.items():
            values.append(float((mine[part].double() - wanted[part]).norm() / wanted[part].norm()))
    medians = {part: statistics.median(values) for part, values in errors.items()}
    return {"gradient_error": max(medians.values()), "gradient_errors": medians}


def checked(answer: dict[str, Any] | None) -> dict[str, Any]:
    """What a result line takes from the answer of `benchmark_checks`; medians over the draws, as above."""
    if answer is None:
        return {}
    draws = answer.pop("same_choices")
    medians = {part: statistics.median(draw[part] for draw in draws) for part in ("critic", "generator")}
    return answer | {
        "gradient_error_same_choices": max(medians.values()),
        "gradient_errors_same_choices": medians,
        "flipped_choices": [draw["flipped"] for draw in draws],
        "choices": draws[0]["of"],
        "widest_gap": max(draw["widest_gap"] for draw in draws),
    }


def summarise(line: dict[str, Any], times: list[dict[str, float]], textbook: list[dict[str, float]] | None) -> None:
    """Adds medians, quartiles and the speedup to a result line."""
    whole = [one["iteration"] for one in times]
    line["seconds_per_iteration"] = statistics.median(whole)
    line["quartiles"] = statistics.quantiles(whole, n=4)[::2] if len(whole) > 1 else [whole[0]] * 2
    line["fastest"] = min(whole)
    for part in ("critic", "generator", "data"):
        each = line["n_critic"] if part == "critic" else 1
        line[f"{part}_seconds"] = statistics.median(one[part] for one in times) / each
    line["data_wait_share"] = sum(one["data"] for one in times) / sum(
        one["data"] + one["critic"] + one["generator"] for one in times
    )
    line["images_per_second"] = line["n_critic"] * line["batch_size"] / line["seconds_per_iteration"]
    ratios = [theirs["iteration"] / ours["iteration"] for ours, theirs in zip(times, textbook or [], strict=False)]
    line["speedup"] = statistics.median(ratios) if ratios else None


def complete(results: list[dict[str, Any]], rates: dict[str, float]) -> None:
    """Adds what a line takes from the rates and from another's: the floor, and when compiling has paid."""
    eager = {(line["case"], line["precision"]): line for line in results if line["runner"] == "eager"}
    for line in results:
        own = eager.get((line["case"], line["precision"]))
        line["share_of_floor"] = line["compile_seconds"] = line["break_even_steps"] = None
        if own is None:
            continue
        arithmetic = sum(part["flops"] / rates[precision] for precision, part in own["work"].items())
        fewest_bytes = sum(part["bytes"] for part in own["work"].values())
        line["floor_seconds"] = max(arithmetic, fewest_bytes / rates["copy"])
        line["share_of_floor"] = line["floor_seconds"] / line["seconds_per_iteration"]
        if line["runner"] == "compiled":
            line["compile_seconds"] = max(0.0, line["first_seconds"] - own["first_seconds"])
            saved = own["seconds_per_iteration"] - line["seconds_per_iteration"]
            line["break_even_steps"] = math.ceil(line["compile_seconds"] / saved) if saved > 0 else None


# ----------------------------------------------------------------------------------------------------------- command


def run(options: argparse.Namespace) -> str:
    """Measures, and writes table, plot and JSON; returns the last words.

    Raises:
        UserError: settings, device or a variant that don't work, or a file that cannot be written.
    """
    if not options.minutes > 0:
        raise UserError(f"--minutes must be above 0, but is {options.minutes:g}")
    device = choose_device(options.device)
    base = [
        f"data.root={HERE / 'data' / 'emoji'}",
        *SOURCE,
        *(SMALL if options.quick else []),
        *options.overrides,
    ]
    config = load_config(None, base)
    if config.training.diffaugment:
        raise UserError("training.diffaugment is not in the textbook; leave it out")
    names_only = replace(config.data, memory_gb=0.0)  # finds the pictures without reading them
    open_images(names_only, config.image, batch_size=1, seed=0, device="cpu", progress=False)
    base.append(f"data.root={Path(config.data.root).resolve()}")  # the last of several wins
    for path in (options.out, *([options.json.parent] if options.json else [])):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write into {path} ({error.strerror}); choose another place") from None
    rounds = options.rounds or (3 if options.quick or options.full else 5)
    rater = Worker({"runner": "rates", "device": str(device), "overrides": [], "precisions": ["fp32", "bf16"]})
    rates: dict[str, float] = {}
    results: list[dict[str, Any]] = []
    left_out: list[str] = []
    planned, end = cases(device, options.quick, options.full), time.perf_counter() + 60 * options.minutes
    for number, wanted in enumerate(planned):
        started = time.perf_counter()
        left = end - started
        share, room = min(left, 2 * left / (len(planned) - number)), 0.9 * free_bytes(device)
        fit = fitted(wanted, rounds, base, results, share, room)
        if isinstance(fit, str):
            left_out.append(f"Left out: {wanted.name}, since {fit}.")
            print(left_out[-1], file=sys.stderr)
            continue
        case, turns = fit
        if len(case.variants) < len(wanted.variants):
            left_out.append(f"Left out: the textbook at {case.name}, for which time or memory is short.")
            print(left_out[-1], file=sys.stderr)
        for key, rate in rater.ask("go").items():  # the best ever: on a shared machine any single one may be too low
            rates[key] = max(rate, rates.get(key, 0.0))
        try:
            results += measure(case, device, turns, base)
        except UserError as error:
            if not results:
                raise
            left_out.append(f"Left out: {case.name}, since {error}.")
            print(left_out[-1], file=sys.stderr)
            continue
        print(f"measured {case.name} in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        complete(results, rates)
        publish(options, results, device, rates, left_out)  # a long measurement that is stopped leaves something
    rater.close()
    say(publish(options, results, device, rates, left_out))
    return f"also written to {options.out}/benchmark.md and benchmark.png"


def publish(
    options: argparse.Namespace,
    results: list[dict[str, Any]],
    device: torch.device,
    rates: dict[str, float],
    left_out: list[str],
) -> str:
    """Writes table, plot and JSON of what there is so far; returns the page.

    Raises:
        UserError: a file cannot be written.
    """
    text = page(results, device, rates, left_out)
    content = {
        "rates": rates, "torch": torch.__version__, "date": str(date.today()), "left_out": left_out, "results": results,
    }  # fmt: skip
    try:
        (options.out / "benchmark.md").write_text(text, encoding="utf-8")
        plot(results, options.out / "benchmark.png")
        if options.json:
            options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {error.filename or options.out} ({error.strerror})") from None
    return text


def main(arguments: list[str] | None = None) -> int:
    examples = list(itertools.takewhile(str.strip, __doc__.split("\n\n", 1)[1].splitlines()))
    parser = OneLineParser(
        description=__doc__.splitlines()[0],
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<number> (%(default)s)")
    add("--quick", action="store_true", help="small sizes without compiling, under a minute")
    add("--full", action="store_true", help="every size, as far as time and memory allow")
    add("--minutes", type=float, metavar="N", default=15.0, help="leave out what would take longer (%(default)g)")
    add("--rounds", type=whole_number("rounds", 1, 10_000), metavar="N",
        help="iterations of each variant (5; 3 with --quick or --full)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    add("--out", type=Path, metavar="FOLDER", default=Path("runs/benchmark"),
        help="where benchmark.md and benchmark.png go (%(default)s)")  # fmt: skip
    add("overrides", nargs="*", metavar="section.key=value", help="settings, as for training.py")
    return run_command(lambda: run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())

"""Measures the training step: our runners against a textbook's WGAN-GP, side by side in one run.

python -m studies.benchmark                             this device, the source's sizes, and how the cost grows
python -m studies.benchmark --quick --json quick.json   about a minute, small sizes
python -m studies.benchmark data.root=my_images training.batch_size=32

An iteration is n_critic critic steps and a generator step, with data, random numbers and optimizers: the training's own
loop body. Variants run in processes of their own and take turns, so that whatever else the machine does hits all alike;
a speedup is the median of the rounds' ratios to the textbook (`textbook.py`). The floor is what the products and
convolutions of our iteration would take at the best rate measured on the same device.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from util import CommandParser, atomic_write, int_between, print_line, run_command

# isort: split
import torch

from configuration import UserError, load_config
from image_data import open_images
from util import choose_device, os_errors_as_user_errors

ROOT = Path(__file__).parent.parent

Line = dict[str, Any]  # what is measured of one variant, by name

AT_ONCE = ["weight_predictor.start=0", "weight_predictor.alone=1", "loss.lambda_vae=0.1", "loss.vae_fraction=1",
           "training.diffaugment=[]"]  # fmt: skip
"""Everything learns in each step, as the textbook has it: not one after the other."""

SOURCE = [
    *AT_ONCE, "weight_predictor.layers=[decoder.stage1.*,decoder.stage2.*]", "weight_predictor.head=full",
    "weight_predictor.bound=0.2", "video.height=128", "video.width=128", "loss.lambda_video=0", "training.n_critic=5",
]  # fmt: skip
"""The method as the source has it: a number for each weight of the last layers, and no video loss."""

QUICK = [
    "vae.latent_dim=32", "vae.channels=[16,32]", "critic.channels=[16,32]", "training.n_critic=2",
    "weight_predictor.hidden_size=32", "training.batch_size=8", "image.size=32", "video.height=32", "video.width=32",
]  # fmt: skip

GRADIENTS = 3
"""Batches whose gradients are compared with the textbook's in float64; the error is their median. A critic in fp32 now
and then takes the other one of two almost equal maxima, which moves its gradient by about 1e-3."""


class Case(NamedTuple):
    """One setting of sizes, and the variants that are compared at it."""

    name: str
    overrides: list[str]
    variants: list[tuple[str, str]]
    """(runner, precision); the textbook first, where it takes part."""
    checked: bool = False
    """Whether gradients are compared with those of float64."""
    first: list[str] = SOURCE
    """Settings before the user's; `overrides` come after them."""


def cases(device: torch.device, quick: bool) -> list[Case]:
    """What is measured; on a CPU without the sizes that take it minutes an iteration."""
    on_gpu = device.type == "cuda"
    textbook, eager, graph = ("textbook", "fp32"), ("eager", "fp32"), ("cuda_graph", "fp32")
    few = [textbook, eager, graph, ("cuda_graph", "tf32")] if on_gpu else [textbook, eager]
    if quick:
        return [Case("quick", [], few, checked=True, first=[*SOURCE, *QUICK])]
    every = [*few, *[("eager", "tf32")] * on_gpu]
    ours = [eager, graph] if on_gpu else [eager]
    video = {size: [f"video.height={size}", f"video.width={size}"] for size in (32, 64, 256)}
    return [
        Case("source sizes", [], every, checked=True),
        Case("our defaults, all at once", [], few, first=AT_ONCE),
        *(Case(f"{size} px", [f"image.size={size}", *video[size]], few, checked=True) for size in (32, 64)),
        *(Case(f"{count} frames", [f"video.frames={count}"], ours) for count in ((4, 16, 32) if on_gpu else (16,))),
        Case("head low_rank", ["weight_predictor.head=low_rank"], ours),
        *[Case("head per_channel", ["weight_predictor.head=per_channel"], ours)] * on_gpu,
        *(Case(f"video {size} px", video[size], ours) for size in (64, 32)),
        *(Case(f"batch {n}", [f"training.batch_size={n}"], few) for n in ((32, 64, 128, 256) if on_gpu else (32,))),
        *[Case("256 px", ["image.size=256", *video[256]], few)] * on_gpu,
    ]


class Worker:
    """A process with one variant; see `benchmark_worker.py`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process: Any = subprocess.Popen(
            [sys.executable, "-m", "studies.benchmark_worker", json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )  # fmt: skip

    def ask(self, word: str = "") -> dict[str, Any]:
        """Sends a word (none: waits for the first answer) and returns the answer. Raises UserError: the variant failed;
        its last line says why.
        """
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
        reason = ([line.strip() for line in self.errors if line.strip()] or [f"it ended with status {status}"])[-1]
        memory = status == -9 or "out of memory" in reason or "DefaultCPUAllocator" in reason
        raise UserError("out of memory" if memory else reason.removeprefix("configuration.UserError: ")[:300])

    def close(self) -> None:
        with suppress(BrokenPipeError):  # of a process that has failed
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def measure(case: Case, device: torch.device, rounds: int, base: list[str], left_out: list[str]) -> list[Line]:
    """The result lines of one case; a line is added to `left_out` for each variant that fails."""
    overrides = [*case.first, *base, *case.overrides]
    config = load_config(None, overrides)
    common = {"case": case.name, "device": device.type, "image_size": config.image.size}
    common |= {"batch_size": config.training.batch_size, "n_critic": config.training.n_critic}
    lines, workers = [], []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        settings = {"device": str(device), "folder": folder, "gradients": GRADIENTS if case.checked else 1}
        # The reference ends before the others begin: in float64 it takes twice the memory.
        for runner, precision in [("reference", "fp32")] * case.checked + case.variants:
            own = {"runner": runner, "overrides": [*overrides, f"runtime.precision={precision}"]}
            worker = stack.enter_context(closing(Worker(settings | own)))
            try:
                line = worker.ask()
                if runner != "reference":
                    worker.ask("iteration")  # data workers start, caches fill
                    lines.append(line | common | {"runner": runner, "precision": precision})
                    workers.append(worker)
                    continue
            except UserError as error:
                left_out.append(f"Left out: {case.name}, {runner} {precision}: {error}.")
                print(left_out[-1], file=sys.stderr)
            worker.close()
        turns = [[worker.ask("iteration") for worker in workers] for _ in range(rounds)]
        for line, worker, own_turns in zip(lines, workers, zip(*turns, strict=True), strict=True):
            textbook = [turn[0]["seconds"] for turn in turns] if lines[0]["runner"] == "textbook" else []
            line |= summary(line, list(own_turns), textbook) | worker.ask("parts")
            if line["runner"] == "eager":
                line |= worker.ask("flops") | worker.ask("rate")
    return lines


def summary(line: Line, turns: list[Line], textbook: list[float]) -> Line:
    """Medians, quartiles and the speedup of a variant, from its answers of each round and the textbook's seconds."""
    seconds = [turn["seconds"] for turn in turns]
    median, ratios = statistics.median(seconds), [other / own for own, other in zip(seconds, textbook, strict=False)]
    return {
        "seconds_per_iteration": median,
        "quartiles": statistics.quantiles(seconds, n=4)[::2] if len(seconds) > 1 else seconds * 2,
        "speedup": statistics.median(ratios) if ratios else None,
        "images_per_second": line["n_critic"] * line["batch_size"] / median,
        "data_wait_fraction": sum(turn["data_seconds"] for turn in turns) / sum(seconds),
        "peak_memory_gb": turns[-1]["peak_memory_gb"],
        "gradient_error": max(line["gradient_errors"].values(), default=None),
    }


def complete(results: list[Line]) -> dict[str, float]:
    """Adds the floor; returns the best rates by precision, FLOP/s."""
    eager = {(line["case"], line["precision"]): line for line in results if line["runner"] == "eager"}
    # The best of all cases: on a machine with other work any single one may be too low.
    rates = {name: max(line["rate"] for key, line in eager.items() if key[1] == name) for _, name in eager}
    for line in results:
        line["fraction_of_floor"] = None
        if (own := eager.get((line["case"], line["precision"]))) is None:
            continue
        # tf32 leaves the penalty in fp32, so that either rate may be the better one.
        best = rates["fp32"] if line["precision"] == "fp32" else max(rates.values())
        line["fraction_of_floor"] = own["flops"] / best / line["seconds_per_iteration"]
    return rates


COLUMNS = {
    "case": ("case", "{}"), "runner": ("runner", "{}"), "precision": ("precision", "{}"),
    "s / iteration": ("seconds_per_iteration", "{:.3g}"), "quartiles": ("quartiles", "{0[0]:.3g} to {0[1]:.3g}"),
    "speedup": ("speedup", "{:.2f} ×"), "images/s": ("images_per_second", "{:.0f}"),
    "critic step, s": ("critic_seconds", "{:.3g}"), "generator step, s": ("generator_seconds", "{:.3g}"),
    "data wait": ("data_wait_fraction", "{:.1%}"), "peak memory": ("peak_memory_gb", "{:.2f} GB"),
    "gradient error": ("gradient_error", "{:.1e}"), "fraction of floor": ("fraction_of_floor", "{:.0%}"),
}  # fmt: skip
"""Title -> key of a result line, and its format."""


def page(results: list[Line], device: torch.device, rates: dict[str, float], left_out: list[str]) -> str:
    """The results as a Markdown page."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    measured = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {precision}" for precision, rate in rates.items())
    lines = ["# Training speed", "", f"{name}; PyTorch {torch.__version__}; {date.today()}. Measured: {measured}."]
    lines += [*left_out, "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for line in results:
        cells = ["" if line[key] is None else form.format(line[key]) for key, form in COLUMNS.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def processor() -> str:
    """The CPU's name and the number of threads."""
    name = platform.processor() or platform.machine()
    with suppress(OSError, IndexError):
        name = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0]
    return f"{name}, {torch.get_num_threads()} threads"


def run(options: argparse.Namespace) -> str:
    """Measures, and writes table and JSON after every case; returns the last line to print."""
    chosen = cases(device := choose_device(options.device), options.quick)
    base = [f"data.root={ROOT / 'data' / 'emoji'}", *options.overrides]
    config = load_config(None, [*chosen[0].first, *base])
    if config.training.diffaugment:
        raise UserError("training.diffaugment is not in the textbook; leave it out")
    names_only = replace(config.data, memory_gb=0.0)  # finds the images without reading them
    open_images(names_only, config.image, batch_size=1, seed=0, device="cpu", progress=False)
    base.append(f"data.root={Path(config.data.root).resolve()}")  # the last of several wins
    for folder in (options.out, *([options.json.parent] if options.json else [])):  # before minutes of measuring
        with os_errors_as_user_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    left_out, results, text = list[str](), list[Line](), ""
    for case in chosen:
        results += measure(case, device, options.rounds or (3 if options.quick else 5), base, left_out)
        print(f"measured {case.name}", file=sys.stderr)
        if not results:
            raise UserError(left_out[-1])
        rates = complete(results)
        text = page(results, device, rates, left_out)
        content = {"rates": rates, "torch": torch.__version__, "date": str(date.today()), "left_out": left_out}
        texts = {options.out / "benchmark.md": text, options.json: json.dumps(content | {"results": results}, indent=1)}
        for path in filter(None, texts):
            with atomic_write(path) as part:
                part.write_text(texts[path], encoding="utf-8")
    print_line(text)
    return f"also written to {options.out}/benchmark.md"


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m studies.benchmark", description=__doc__)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<number> (%(default)s)")
    add("--quick", action="store_true", help="small sizes, about a minute")
    add("--rounds", type=int_between("rounds", 1, 10_000), help="iterations of each variant (5; 3 with --quick)")
    add("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    add("--out", type=Path, metavar="FOLDER", default=Path("runs/benchmark"), help="of the report (%(default)s)")
    add("overrides", nargs="*", metavar="section.key=value", help="settings, as for training.py")
    return run_command(lambda: run(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())

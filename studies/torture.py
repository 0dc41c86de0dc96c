"""Tries what no test suite has the time for: kills by the hundred, ten thousand steps, and the price of saving.

python -m studies.torture kills --kills 100        SIGKILLs at random moments: does the run end as it does without them?
python -m studies.torture memory --steps 10000     does the memory of a long run stay flat?
python -m studies.torture saving                   which fraction of the training time goes into checkpoints?
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from util import CommandParser, int_between, run_command

# isort: split
import torch

from checkpoints import load_checkpoint
from configuration import UserError, load_config
from distributed import SINGLE_PROCESS
from run_directory import RunDirectory
from training import build_networks, iteration, open_shard
from training_log import CheckpointManager, Log
from training_step import EagerSteps, NoiseSampler, TrainingState

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))  # for the settings and comparisons of the tests

from conftest import SMALL, VARIED, final, same, start_command, untimed_metrics  # type: ignore[import-not-found]  # noqa: E402

TINY = [*SMALL, f"data.root={ROOT / 'data' / 'emoji' / 'symbols'}"]
KILLED = [*VARIED, "output.log_every=7", "output.sample_every=400", "output.checkpoint_every=2"]


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """A training run of its own, with its output in `folder / log.txt`."""
    folder.mkdir(exist_ok=True)
    arguments = [*TINY, f"output.root={folder}", "output.name=run", *overrides]
    with (folder / "log.txt").open("a") as log:
        return start_command("training.py", *arguments, stdout=log, stderr=subprocess.STDOUT)


def finish(folder: Path, *overrides: str) -> dict[str, Any]:
    """Trains to the end: the newest checkpoint, the metrics without clock times, and the sample grids."""
    if start(folder, *overrides).wait():
        raise UserError(f"a run failed: {(folder / 'log.txt').read_text().splitlines()[-1]}")
    run = folder / "run"
    grids = {path.name: path.read_bytes() for path in sorted(run.glob("samples/*.png"))}
    return {"checkpoint": final(run), "metrics": untimed_metrics(run), "grids": grids}


def logged_steps(folder: Path) -> int:
    log = folder / "log.txt"
    return log.read_text().count("\nstep ") if log.exists() else 0


def kills(folder: Path, count: int, steps: int, seed: int) -> str:
    """Kills a run `count` times, lets it end, and compares it with one that was left alone."""
    choose = random.Random(seed)
    alone, killed = folder / "alone", folder / "killed"
    overrides = [*KILLED, f"training.steps={steps}"]
    expected, moments = finish(alone, *overrides), dict.fromkeys(["starting", "training", "saving"], 0)
    checkpoints = killed / "run" / "checkpoints"
    for number in range(1, count + 1):
        process = start(killed, *overrides)
        moment = choose.choices([*moments], [1, 2, 2])[0]
        if moment == "starting":
            time.sleep(choose.uniform(0, 4))
        else:
            before = logged_steps(killed)
            while process.poll() is None and logged_steps(killed) == before:
                time.sleep(0.01)
            time.sleep(choose.uniform(0, 1))
            if moment == "saving":
                while process.poll() is None and not any(checkpoints.glob(".*.part")):
                    pass
                time.sleep(choose.uniform(0, 0.004))
        process.kill()
        if process.wait() == 0:
            raise UserError(f"the run was over after {number - 1} kills; give more --steps")
        moments[moment] += 1
        step = max((load_checkpoint(path)["step"] for path in checkpoints.glob("*.pt")), default=0)  # all are whole
        if number % 10 == 0:
            print(f"{number} kills, at step {step}; every checkpoint could be read", flush=True)
    end = finish(killed, *overrides)
    if different := [part for part in end if not same(expected[part], end[part])]:
        raise UserError(f"the killed run's {' and '.join(different)} differ from the undisturbed run's")
    if "Traceback" in (log := (killed / "log.txt").read_text()):
        raise UserError(f"a traceback in {killed / 'log.txt'}")
    return f"kills: {moments}; resumed {log.count('resuming ')} times; equal to the undisturbed run, bit for bit"


def memory(folder: Path, steps: int) -> str:
    """Prints the resident memory of a run ten times along its way."""
    often = ["output.log_every=100", "output.sample_every=1000", "output.checkpoint_every=500"]
    process = start(folder, f"training.steps={steps}", *often)
    readings: list[tuple[int, float]] = []
    while process.poll() is None:
        time.sleep(0.2)
        try:
            step = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (OSError, IndexError, ValueError):
            continue
        resident = next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")), None)
        if resident and (not readings or step >= readings[-1][0] + steps // 10):
            readings.append((step, resident))
            print(f"step {step:>7,}   resident {resident:7.1f} MiB", flush=True)
    if process.returncode or not readings:
        raise UserError(f"the run ended with status {process.returncode}: {folder / 'log.txt'}")
    return f"last reading minus first: {readings[-1][1] - readings[0][1]:+.1f} MiB"


def saving(folder: Path, name: str) -> str:
    """Times a checkpoint against the training steps between two of them, for the settings of a file."""
    from studies.benchmark_worker import median_seconds  # here: its import prints a warning where CUDA has no GPU

    data = f"data.root={ROOT / 'data' / 'emoji'}"
    config = load_config(ROOT / name, [f"output.root={folder}", data, "output.tensorboard=false"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state, noise = TrainingState(*build_networks(config), config, device), NoiseSampler(config, device)
    images = open_shard(config, device, SINGLE_PROCESS)
    with RunDirectory(config) as run:
        run.begin(0)
        log, manager = Log(run, 1, config, images), CheckpointManager(run, config, images, None)
        runner, batches = EagerSteps(state), images.batches()
        step_time = median_seconds(lambda: iteration(runner, noise, batches, 1))
        state.step = 1

        def save() -> None:
            manager.save(state, log, last=True)
            run.wait()

        save_time = median_seconds(save)
        size = (run.path / "checkpoints" / "latest.pt").stat().st_size / 1e6
    fraction = save_time / (save_time + config.output.checkpoint_every * step_time)
    return f"{name}: a checkpoint of {size:.1f} MB takes {save_time:.3f} s, {fraction:.2%} of the time"


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m studies.torture", description=__doc__)
    add = parser.add_argument
    add("study", choices=("kills", "memory", "saving"))
    add("--kills", type=int_between("kills", 1, 10**6), default=100, metavar="N", help="how many (%(default)s)")
    add("--steps", type=int_between("steps", 1, 10**9), metavar="N", help="kills: 20 for each; memory: 10,000")
    add("--seed", type=int, default=0, help="of the moments of the kills")
    add("--folder", type=Path, help="where to work and leave everything; a temporary one by default")

    def run() -> str:
        options = parser.parse_args(arguments)
        if options.folder:
            options.folder.mkdir(parents=True, exist_ok=True)
        with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if options.study == "kills":
                return kills(folder, options.kills, options.steps or 20 * options.kills, options.seed)
            if options.study == "memory":
                return memory(folder, options.steps or 10_000)
            return "\n".join(saving(folder, name) for name in ("config.yaml", "configs/quick.yaml"))

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())

"""Kills a run by the hundred, with SIGKILL at random moments: does it end as it does without them?

python -m studies.torture --kills 100
"""

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
from checkpoints import load_checkpoint
from configuration import UserError

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


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m studies.torture", description=__doc__)
    add = parser.add_argument
    add("--kills", type=int_between("kills", 1, 10**6), default=100, metavar="N", help="how many (%(default)s)")
    add("--steps", type=int_between("steps", 1, 10**9), metavar="N", help="of the run (20 for each kill)")
    add("--seed", type=int, default=0, help="of the moments of the kills")
    add("--folder", type=Path, help="where to work and leave everything; a temporary one by default")

    def run() -> str:
        options = parser.parse_args(arguments)
        if options.folder:
            options.folder.mkdir(parents=True, exist_ok=True)
        with nullcontext(options.folder) if options.folder else tempfile.TemporaryDirectory() as name:
            return kills(Path(name), options.kills, options.steps or 20 * options.kills, options.seed)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())

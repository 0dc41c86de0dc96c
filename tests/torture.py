"""What no test suite has the time for: kills by the hundred, ten thousand steps, and the price of saving.

python tests/torture.py kills --kills 100        SIGKILLs at random moments, then: the same end as without them?
python tests/torture.py memory --steps 10000     does the memory of a long run stay flat?
python tests/torture.py saving                   which share of the training time goes into checkpoints?
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as training.py does, and for the same reason

import torch
from conftest import ROOT, SMALL, VARIED, final, same, start_command, untimed_metrics

from checkpoints import load_checkpoint
from configuration import load_config

TINY = [*SMALL, f"data.root={ROOT / 'data' / 'emoji' / 'symbols'}"]
KILLED = [*VARIED, "output.log_every=7", "output.sample_every=400", "output.checkpoint_every=2"]


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """A training run of its own, with its output in `folder / log.txt`."""
    arguments = [*TINY, f"output.root={folder}", "output.name=run", *overrides]
    with (folder / "log.txt").open("a") as log:
        return start_command("training.py", *arguments, stdout=log, stderr=subprocess.STDOUT)


def end(folder: Path) -> dict[str, Any]:
    """What is to be the same: the newest checkpoint and the metrics without clock times, and the sample grids."""
    run = folder / "run"
    grids = {path.name: path.read_bytes() for path in sorted(run.glob("samples/*.png"))}
    return {"checkpoint": final(run), "metrics": untimed_metrics(run), "grids": grids}


def kills(count: int, steps: int, seed: int, folder: Path) -> int:
    """Kills a run `count` times, lets it end, and compares it with one that was left alone. Returns the exit status."""
    draw = random.Random(seed)
    alone, killed = folder / "alone", folder / "killed"
    for place in (alone, killed):
        place.mkdir()
    began = time.perf_counter()
    if start(alone, *KILLED, f"training.steps={steps}").wait():
        raise SystemExit(f"the undisturbed run failed: {(alone / 'log.txt').read_text()[-2000:]}")
    lifetime = time.perf_counter() - began
    print(f"undisturbed run: {steps} steps in {lifetime:.0f} s", flush=True)
    moments = {"starting": 0, "training": 0, "saving": 0}
    saved = killed / "run" / "checkpoints"
    read = 0
    while sum(moments.values()) < count:
        process = start(killed, *KILLED, f"training.steps={steps}")
        moment = draw.choices(["starting", "training", "saving"], [1, 2, 2])[0]
        if moment == "starting":
            time.sleep(draw.uniform(0, 4))
        else:
            lines = log_lines(killed)
            while process.poll() is None and log_lines(killed) == lines:  # until it has logged a step
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 1))
            if moment == "saving":
                while process.poll() is None and not any(saved.glob(".*.part")):
                    pass
                time.sleep(draw.uniform(0, 0.004))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            raise SystemExit(f"the run was over after {sum(moments.values())} kills; give more --steps")
        moments[moment] += 1
        step = 0
        for path in saved.glob("*.pt") if saved.exists() else ():
            step = max(step, load_checkpoint(path)["step"])  # raises if one cannot be read
            read += 1
        if sum(moments.values()) % 10 == 0:
            print(f"{sum(moments.values())} kills, at step {step}; all of {read} checkpoints could be read", flush=True)
    if start(killed, *KILLED, f"training.steps={steps}").wait():
        raise SystemExit(f"the killed run did not end well: {(killed / 'log.txt').read_text()[-2000:]}")
    first, second = end(alone), end(killed)
    log = (killed / "log.txt").read_text()
    print(f"kills: {moments}; resumed {log.count('resuming ')} times; tracebacks: {log.count('Traceback')}")
    equal = {part: same(first[part], second[part]) for part in first}
    print("equal to the undisturbed run, bit for bit: " + ", ".join(f"{part} {ok}" for part, ok in equal.items()))
    return 0 if all(equal.values()) and "Traceback" not in log else 1


def log_lines(folder: Path) -> int:
    """How many steps a run has told of so far."""
    return (folder / "log.txt").read_text().count("\nstep ")


def memory(steps: int, folder: Path) -> int:
    """Prints the memory of a run along its way."""
    process = start(folder, f"training.steps={steps}", "output.log_every=100", "output.sample_every=1000",
                    "output.checkpoint_every=500")  # fmt: skip
    shown: list[tuple[int, float]] = []
    metrics = folder / "run" / "metrics.jsonl"
    while process.poll() is None:
        time.sleep(0.2)
        try:
            step = json.loads(metrics.read_text().splitlines()[-1])["step"]
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (OSError, IndexError, ValueError):
            continue
        resident = next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")), None)
        if resident and (not shown or step >= shown[-1][0] + steps // 10):
            shown.append((step, resident))
            print(f"step {step:>7,}   resident {resident:7.1f} MiB", flush=True)
    print(f"exit status {process.returncode}; last reading minus first: {shown[-1][1] - shown[0][1]:+.1f} MiB")
    return process.returncode


def saving(folder: Path) -> int:
    """Times a checkpoint against the training steps between two of them, for the default and the quick settings."""
    from image_data import open_images
    from random_draws import Draws
    from resume import CheckpointKeeper
    from run_directory import RunDirectory
    from step_runners import EagerSteps
    from training_log import Log
    from training_state import TrainingState

    for name in ("config.yaml", "config_quick.yaml"):
        config = load_config(ROOT / name, [f"output.root={folder}", f"data.root={ROOT / 'data' / 'emoji'}",
                                           "output.tensorboard=false"])  # fmt: skip
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        state = TrainingState(config, device)
        images = open_images(config.data, config.image, batch_size=config.training.batch_size, seed=0, device=device)
        run = RunDirectory(config)
        run.begin(0)
        log, draws = Log(run, 1, config), Draws(config, device)
        keeper, runner, batches = (
            CheckpointKeeper(run, config, images, None),
            EagerSteps(state, draws.augment),
            images.batches(),
        )
        step_times, save_times = [], []
        for step in range(1, 7):
            began = time.perf_counter()
            for repeat in range(config.training.n_critic):
                x_real = next(batches)
                runner.critic_step(x_real, draws.critic(state.generator, step, repeat))
            runner.generator_step(x_real, draws.generator(state.generator, step))
            if device.type == "cuda":
                torch.cuda.synchronize()
            step_times.append(time.perf_counter() - began)
            state.step = step
            began = time.perf_counter()
            keeper.save(state, log, last=True)
            save_times.append(time.perf_counter() - began)
        step_time, save_time = statistics.median(step_times[1:]), statistics.median(save_times[1:])
        size = (run.path / "checkpoints" / "latest.pt").stat().st_size / 1e6
        every = config.output.checkpoint_every
        print(
            f"{name}: a checkpoint of {size:.1f} MB takes {save_time:.3f} s, {every} steps {every * step_time:.1f} s: "
            f"{save_time / (save_time + every * step_time):.2%} of the time goes into saving"
        )
        run.close()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "memory", "saving"))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, help="of the run (kills: 20 for each kill; memory: 10,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--folder", type=Path, help="where to work and leave everything; a temporary one by default")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if options.what == "kills":
            return kills(options.kills, options.steps or 20 * options.kills, options.seed, folder)
        return memory(options.steps or 10_000, folder) if options.what == "memory" else saving(folder)
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

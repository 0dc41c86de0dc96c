"""Everything that only a GPU can tell, in one call of about eight minutes: is it right, how fast, how much memory.

python -m studies.gpu_acceptance --out FOLDER                        all parts, the most important ones first
python -m studies.gpu_acceptance --out FOLDER --only facts,timing    some of them
python -m studies.gpu_acceptance --out FOLDER --small                tiny sizes, on a CPU too: does this script work?

Each part is a process with a time limit of its own and notes what it finds at once, so that one that fails or hangs
loses nothing but itself. FOLDER gets seven files: results.jsonl, a line for each finding; kernels.txt, where an
iteration's time goes; metrics.jsonl, samples.png, clip.mp4 and curves.png of a run with the default settings, and
rollout.mp4, made with it.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import product, repeat
from pathlib import Path
from typing import Any

from util import CommandParser, UserError, int_between, run_command

# isort: split
import torch

from checkpoints import load_checkpoint
from configuration import load_config
from sampling import load_sampler
from studies.benchmark import AT_ONCE, SOURCE
from studies.benchmark_worker import Variant
from util import choose_device, prepare_device

ROOT = Path(__file__).parent.parent
OUT, WORK = (Path(os.environ.get(f"ACCEPTANCE_{name}", ".")) for name in ("OUT", "WORK"))  # of the processes of parts
IS_SMALL, HAS_GPU = "ACCEPTANCE_SMALL" in os.environ, torch.cuda.is_available()
SMALL = [
    "image.size=32", "vae.channels=[4,8,8]", "critic.channels=[4,8,8]", "vae.latent_dim=8", "training.n_critic=2",
    "weight_predictor.hidden_size=8", "video.height=8", "video.width=8"]  # fmt: skip
TF32, BATCH = "runtime.precision=tf32", "training.batch_size=64"
CHECKED = [
    [], ["training.diffaugment=[color,translation,cutout]", "loss.adversarial_frame=random"], [TF32],
    ["weight_predictor.head=full"], ["weight_predictor.head=per_channel"], ["weight_predictor.sharing=shared"],
    ["weight_predictor.update=off"], ["video.detach=false"],
]  # fmt: skip
"""Settings under which the host must wait for nothing."""
TIMED: dict[str, tuple[str, list[str], bool]] = {
    "cuda_graph": ("cuda_graph", [], False), "eager": ("eager", [], False), "tf32": ("cuda_graph", [TF32], False),
    "textbook, images given": ("textbook", [], True),
    "source sizes": ("cuda_graph", SOURCE, False), "source sizes, textbook": ("textbook", SOURCE, False),
    "batch 64": ("cuda_graph", [BATCH], False), "batch 64, tf32": ("cuda_graph", [BATCH, TF32], False),
    "batch 64, textbook": ("textbook", [BATCH], True), "images alone": ("cuda_graph", ["weight_predictor.start=0.9"],
    False), "motion alone": ("cuda_graph", ["weight_predictor.alone=0"], False), "256 px": ("cuda_graph",
    ["image.size=256"], False),
}  # fmt: skip
"""Name -> runner, settings, and whether images are given instead of read."""
failures: list[str] = []


def note(**found: Any) -> None:
    """Prints a finding, and adds it to results.jsonl."""
    print(line := json.dumps(found, default=str), flush=True)
    with (OUT / "results.jsonl").open("a") as file:
        file.write(f"{line}\n")


@contextmanager
def attempt(what: str) -> Iterator[None]:
    """Notes an error of the block, and goes on."""
    try:
        yield
    except Exception as error:  # whatever it is: the next thing is to be tried
        failures.append(what)
        note(what=what, FAILED=f"{type(error).__name__}: {str(error)[:400]}")


def overrides(*more: str) -> list[str]:
    return [f"data.root={ROOT / 'data' / 'emoji'}", *more, *(SMALL if IS_SMALL else [])]


def variant_of(runner: str, *more: str) -> Variant:
    prepare_device(device := choose_device("auto"))
    return Variant(load_config(None, overrides(*AT_ONCE, *more)), device, runner)


def run_tool(*command: str, **found: Any) -> None:
    """Runs one of the project's commands, and notes its status, seconds and last lines."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    seconds, lines = round(time.perf_counter() - started, 1), done.stdout.splitlines()
    failures.extend([command[0]] if done.returncode else [])
    error = done.stderr[-600:] if done.returncode else ""
    note(ran=command[:2], status=done.returncode, seconds=seconds, **found, said=[*lines[:6], *lines[-6:]], error=error)


def facts() -> None:
    """Which machine and software this is."""
    about = {"cores": os.cpu_count(), "gpu": torch.cuda.get_device_properties(0) if HAS_GPU else None}
    note(torch=torch.__version__, cuda=torch.version.cuda, python=sys.version.split()[0], **about)
    with suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.draw,temperature.gpu", "--format=csv"]
        note(nvidia_smi=subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout)


def right() -> None:
    """The host waits for nothing; the gradients of every runner and precision against float64's."""
    runners = ("eager", "cuda_graph") if HAS_GPU else ("eager",)
    for more, runner in product(CHECKED, runners):
        with attempt(f"{runner} {more}"):
            variant = variant_of(runner, *SMALL, *more)
            for step in range(1, 5):
                x_real, *noise = variant.inputs(step)
                if HAS_GPU and step > 2:
                    torch.cuda.set_sync_debug_mode("error")
                metrics = variant.steps.critic_step(x_real, noise[0]) | variant.steps.generator_step(x_real, noise[1])
                if HAS_GPU:
                    torch.cuda.set_sync_debug_mode("default")
            assert all(value.isfinite() for value in metrics.values())
            note(waits_for_nothing=HAS_GPU, runner=runner, settings=more)
    if HAS_GPU:
        with attempt("a recording that fails"):
            variant, said = variant_of("cuda_graph", *SMALL), list[str]()
            steps, run = variant.steps, variant.steps.critic_pass
            steps.required, steps.log = False, said.append
            steps.critic_pass = lambda x_real, noise: (x_real.sum().item(), run(x_real, noise))[1]
            note(a_failed_recording_says=said, then=variant.iteration(variant.batches(), 1, 3))
    exact = [variant_of("reference").gradients(number) for number in (1, 2, 3)]
    for runner, kind in [("textbook", "fp32"), *product(runners, ("fp32", "tf32"))]:
        with attempt(f"gradients of {runner} {kind}"):
            variant, errors = variant_of(runner, f"runtime.precision={kind}"), dict[str, list[float]]()
            for number, vectors in enumerate(exact, start=1):
                for part, own in variant.gradients(number).items():
                    error = (own.double() - vectors[part]).norm() / vectors[part].norm()
                    errors.setdefault(part, []).append(float(error))
            note(gradients_of=f"{runner} {kind}", from_float64=errors)


def tests() -> None:
    """The project's tests of what a GPU does."""
    names = ["test_step_runners.py", "test_training.py::test_a_run_on_the_gpu"]
    names += [] if IS_SMALL else ["test_image_data.py", "test_fake_cuda.py", "test_training_step.py"]
    run_tool("-m", "pytest", "-n", "4", "-q", "-p", "no:cacheprovider", "-rfEs", *(f"tests/{name}" for name in names))


def training_command(name: str, *more: str) -> list[str]:
    return ["training.py", *more, *overrides(), f"output.root={WORK}", f"output.name={name}"]


def resume() -> None:
    """A run that is killed and goes on: how far from one that is left alone does it end?"""
    steps, every = (60, 10) if IS_SMALL else (300, 50)
    more = ["--config", "configs/quick.yaml", f"training.steps={steps}", f"output.checkpoint_every={every}"]
    vectors = []
    for name in ("alone", "again", "killed"):
        command = training_command(name, *more, "output.sample_every=1000", "output.log_every=10")
        if name == "killed":
            with subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
                for line in process.stdout or ():
                    if line.startswith("step ") and int(line.split()[1].split("/")[0]) > 2 * every:
                        process.send_signal(signal.SIGKILL)
        run_tool(*command, run=name)
        saved = load_checkpoint(WORK / name / "checkpoints" / "latest.pt")
        weights = [value.flatten() for part in ("generator", "critic") for value in saved[part].values()]
        vectors.append(torch.cat(weights))
        note(run=name, relative_distance_from_alone=float((vectors[-1] - vectors[0]).norm() / vectors[0].norm()))


def timing() -> None:
    """Milliseconds of an iteration, and memory."""
    for name, (runner, more, is_given) in TIMED.items():
        if HAS_GPU or runner != "cuda_graph":
            with attempt(name):
                time_variant(name, runner, more, is_given)


def time_variant(name: str, runner: str, more: list[str], is_given: bool) -> None:
    if HAS_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started, count = time.perf_counter(), 2 if IS_SMALL else 10
    variant, times = variant_of(runner, *more), list[float]()
    batches = repeat(variant.inputs(1)[0]) if is_given else variant.batches()
    answer = variant.iteration(batches, 1)
    ready = time.perf_counter() - started
    while len(times) < 3 or (sum(times) * count < 2 and len(times) < 9):
        times.append(variant.iteration(batches, 2, count)["seconds"] or 0.0)
    images = variant.config.training.n_critic * variant.config.training.batch_size
    note(variant=name, ms=1e3 * statistics.median(times), fastest_ms=1e3 * min(times), seconds_until_ready=ready,
         images_per_second=images / statistics.median(times), peak_memory_gb=answer["peak_memory_gb"])  # fmt: skip


def train() -> None:
    """The main job for a minute and a half, with its quality over time; then it goes on."""
    every = 20 if IS_SMALL else 500
    more = ["data.holdout=0.1", f"output.evaluate_every={every}", f"output.sample_every={every}"]
    more += [f"training.steps={60 if IS_SMALL else 6000}"]  # so that it reaches every stage
    more += ["output.evaluate_images=20", "output.log_every=10"] if IS_SMALL else []
    for minutes in (1.5, 0.1):
        run_tool(*training_command("default", *more, f"training.max_minutes={minutes}"))
    run, names = WORK / "default", {"samples": "samples/*.png", "clip": "clips/*.mp4", "curves": "loss_curves.png"}
    for name, pattern in (names | {"metrics": "metrics.jsonl"}).items():
        newest = max(run.glob(pattern))
        shutil.copyfile(newest, OUT / f"{name}{newest.suffix}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("speed/seconds_per_step", "speed/step_fraction", "speed/data_wait_fraction", "memory/peak_gb")
    quality = {x["step"]: (x["quality/kid"], x["quality/kid_base"]) for x in lines if "quality/kid" in x}
    note(last={key: value for x in lines for key, value in x.items() if key in keys}, kid_and_base=quality)


def rollouts() -> None:
    """Frames per second of videos that roll out, a file of one, and the run's figures."""
    sampler, frames, run = load_sampler(WORK / "default"), 20 if IS_SMALL else 1000, str(WORK / "default")
    for count in (1, 16):
        inputs = sampler.inputs(range(count))
        for length in (20, frames):  # the first to warm up
            started = time.perf_counter()
            last = deque(sampler.weight_driven(inputs, length, rollout_after=8), maxlen=1)[0]
            assert last.isfinite().all()  # waits for the device
            seconds = time.perf_counter() - started
        note(videos=count, frames=frames, frames_per_second=count * frames / seconds)
    run_tool("generate.py", run, "--rollout", "--frames", "100", "--out", str(OUT / "rollout.mp4"))
    run_tool(
        "-m", "studies.evaluate", run, "--images", "40" if IS_SMALL else "1000", "--sheet", str(WORK / "evaluation.png")
    )


def kernels() -> None:
    """How many kernels an iteration launches, and which take the time."""
    kind, spent = ("CUDA", "self_device_time_total") if HAS_GPU else ("CPU", "self_cpu_time_total")
    text = []
    for runner in ("eager", "cuda_graph") if HAS_GPU else ("eager",):
        variant = variant_of(runner)
        variant.iteration(batches := variant.batches(), 1)
        with torch.profiler.profile() as recorded:
            variant.iteration(batches, 2)
        entries = [entry for entry in recorded.key_averages() if entry.device_type.name == kind]  # else all count twice
        times = {entry.key: getattr(entry, spent) / 1e3 for entry in entries}
        note(runner=runner, kernels=sum(entry.count for entry in entries), busy_ms=sum(times.values()))
        for entry in sorted(entries, key=lambda entry: -times[entry.key])[:40]:
            text.append(f"{runner} {times[entry.key]:9.3f} ms {entry.count:6d} x  {entry.key[:140]}\n")
    (OUT / "kernels.txt").write_text("".join(text))


PARTS: dict[str, tuple[Callable[[], None], float]] = {
    "facts": (facts, 60), "right": (right, 110), "tests": (tests, 110), "resume": (resume, 110),
    "timing": (timing, 120), "train": (train, 170), "rollouts": (rollouts, 60), "kernels": (kernels, 40),
}  # fmt: skip
"""Name -> what is done, and the seconds that it may take."""
TOGETHER = [["facts"], ["right", "tests", "resume"], *([name] for name in list(PARTS)[4:])]
"""Those that measure no times run side by side."""


def run_parts(options: Any) -> int:
    ends, bad, running = time.monotonic() + options.seconds, list[str](), dict[str, tuple[Any, float]]()
    environment = os.environ | {"ACCEPTANCE_OUT": str(OUT), "ACCEPTANCE_WORK": str(WORK), "PYTHONUNBUFFERED": "1"}
    environment |= {"ACCEPTANCE_SMALL": "1"} if options.small else {}
    for names in TOGETHER:
        for name in (name for name in names if name in options.only):
            limit = min(ends, time.monotonic() + PARTS[name][1] * (4 if options.small else 1))
            command = [sys.executable, "-m", "studies.gpu_acceptance", "--part", name, "--out", str(OUT)]
            process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
            running[name] = process, limit
        for name, (process, limit) in running.items():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, limit - time.monotonic()))
            status = process.poll()
            with suppress(ProcessLookupError):  # and whatever it has started
                os.killpg(process.pid, signal.SIGKILL)
            bad += [name] if status else [f"{name} (its time was over)"] if status is None else []
            note(part=name, ended="its time was over" if status is None else status)
        running.clear()
    note(parts_that_failed=bad)
    return int(bool(bad))


def choose_parts(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(PARTS):
        raise UserError(f"--only: unknown part '{min(unknown)}'; the parts are {', '.join(PARTS)}")
    return text.split(",")


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m studies.gpu_acceptance", description=__doc__)
    add = parser.add_argument
    add("--out", metavar="FOLDER", required=True, type=Path, help="for the results")
    add("--seconds", type=int_between("seconds", 10, 10_000), default=500, help="of all parts together (%(default)s)")
    add("--only", type=choose_parts, default=list(PARTS), help=f"some of the parts, by commas: {', '.join(PARTS)}")
    add("--small", action="store_true", help="tiny sizes")
    add("--part", choices=PARTS, help="run this one here")

    def run() -> int:
        global OUT, WORK
        options = parser.parse_args(arguments)
        if options.part:
            with attempt(options.part):
                PARTS[options.part][0]()
            return int(bool(failures))
        OUT, WORK = options.out.absolute(), options.out.absolute() / "work"
        WORK.mkdir(parents=True, exist_ok=True)
        try:
            return run_parts(options)
        finally:
            shutil.rmtree(WORK)

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())

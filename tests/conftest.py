"""Small pictures, settings, networks and runs; commands as a user runs them; and several processes."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from processes import Ended, Launch, run_process
from torch.distributed import TCPStore

import training
from checkpoints import Checkpoints, load_checkpoint
from configuration import Config, UserError, load_config
from generator_path import Generator, build_generator
from model_definitions import Discriminator, build_discriminator
from random_draws import Draws
from run_directory import RunDirectory
from sampling import Sampler, load_sampler
from step_runners import EagerSteps

ROOT = Path(__file__).parent.parent

SMALL = [
    "image.size=16",
    "vae.channels=[4,8]",
    "vae.latent_dim=6",
    "discriminator.channels=[4,8]",
    "weight_predictor.hidden_size=8",
    "video.frames=3",
    "training.batch_size=4",
    "training.n_critic=2",
    "output.samples=2",
    "runtime.device=cpu",
    "output.tensorboard=false",
]
"""Overrides for a run that takes a second or two."""

VARIED = ["data.mirror=true", "training.diffaugment=[color,translation,cutout]", "loss.lambda_video=1",
          "loss.judged_frame=random"]  # fmt: skip
"""Overrides that switch on everything that draws random numbers."""

T = 4
"""Frames of a period of `drawing_run`."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small tensors, and pytest-xdist may run several tests at a time


_PICTURES = {"clips": "save_clip", "curves": "plot_losses"}
_DRAWN = {name: getattr(RunDirectory, name) for name in _PICTURES.values()}


@pytest.fixture(scope="session", autouse=True)
def _few_pictures() -> Iterator[None]:
    """Runs in this process leave out clips and curves, which take longer than small runs do."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _DRAWN:
            patch.setattr(RunDirectory, name, lambda *_: None)
        yield


@contextmanager
def pictures_drawn(*kinds: str) -> Iterator[None]:
    """Runs inside draw these of `clips` and `curves` all the same; unnamed: both."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in kinds or _PICTURES:
            patch.setattr(RunDirectory, _PICTURES[kind], _DRAWN[_PICTURES[kind]])
        yield


@pytest.fixture(autouse=True)
def _marked_pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same for a test marked `pictures`."""
    mark = request.node.get_closest_marker("pictures")
    with pictures_drawn(*mark.args) if mark else nullcontext():
        yield


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of coloured squares on white in two class folders."""
    root = tmp_path_factory.mktemp("pictures")
    for index in range(24):
        folder = root / ("warm" if index % 2 else "cold")
        folder.mkdir(exist_ok=True)
        picture = Image.new("RGB", (20, 20), "white")
        colour = (200, 10 * index, 30) if index % 2 else (30, 10 * index, 200)
        picture.paste(colour, (4 + index % 5, 3, 13 + index % 3, 15))
        picture.save(folder / f"{index:02d}.png")
    return root


def small(folder: Path, pictures: Path, *overrides: str, name: str = "run") -> list[str]:
    """Overrides for a small run that writes to `folder / name`."""
    return [*SMALL, f"data.root={pictures}", f"output.root={folder}", f"output.name={name}", *overrides]


def train(*overrides: str, accept_changes: bool = False) -> int:
    """Trains in this process with these settings; the exit status."""
    return training.train(load_config(None, overrides), accept_changes)


def refused(*overrides: str) -> str:
    """The one line with which `train` refuses these settings, or gives up."""
    with pytest.raises(UserError) as error:
        train(*overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, do: Callable[[], Any]) -> None:
    """Calls `do` just before the generator's part of step `step`, once."""
    original = EagerSteps.generator_step

    def generator_step(self: EagerSteps, *arguments: Any) -> Any:
        if self.state.step + 1 == step:
            monkeypatch.setattr(EagerSteps, "generator_step", original)
            do()
        return original(self, *arguments)

    monkeypatch.setattr(EagerSteps, "generator_step", generator_step)


def metrics_of(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(a: object, b: object) -> bool:
    """Whether two nests of dicts, lists, numbers, texts and tensors are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def final(run: Path) -> dict[str, Any]:
    """What the newest checkpoint holds, but for times and where run and pictures lie."""
    state = load_checkpoint(run / "checkpoints" / "latest.pt")
    for key in ("interval_seconds", "seconds", "latest"):
        del state["log"][key]
    del state["config"]["output"], state["config"]["data"]
    return state


def untimed_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what depends on the machine's speed and memory."""
    timed = ("speed/", "memory/", "seconds")
    return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in metrics_of(run)]


def networks_and_draws(*overrides: str) -> tuple[Config, Generator, Discriminator, Draws]:
    """Small networks of a seed, whose predictor moves the decoder, and the random numbers of their steps."""
    config = load_config(None, [*SMALL, *overrides])
    torch.manual_seed(0)
    generator, discriminator = build_generator(config), build_discriminator(config)
    torch.nn.init.normal_(generator.predictor.to_update.weight, std=0.2)
    return config, generator, discriminator, Draws(config, torch.device("cpu"))


@pytest.fixture(scope="session")
def drawing_run(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    """A run of 2 steps whose predictor was then given random weights, as its pictures must differ to be compared."""
    folder = tmp_path_factory.mktemp("drawing") / "runs"
    overrides = small(folder, picture_folder, "training.steps=2", "output.sample_every=1", f"video.frames={T}",
                      "weight_predictor.layers=[decoder.*]", "weight_predictor.bound=0.5", "video.height=8",
                      "video.width=8", name="quick")  # fmt: skip
    assert training.train(load_config(None, overrides)) == 0
    path = folder / "quick" / "checkpoints"
    saved = load_checkpoint(path / "latest.pt")
    random = torch.Generator().manual_seed(0)
    weights = saved["generator_ema"]
    weights["predictor.to_update.weight"] = torch.randn(weights["predictor.to_update.weight"].shape, generator=random)
    for name in ("vae.decoder.stage1.weight", "vae.decoder.stage2.weight", "vae.decoder.projection.weight"):
        weights[name] = 3 * weights[name]  # pictures of some contrast
    Checkpoints(path, keep=3).save(saved)
    return folder / "quick"


@pytest.fixture
def sampler(drawing_run: Path) -> Sampler:
    return load_sampler(drawing_run, "cpu")


def frames_of(iterator) -> torch.Tensor:
    """All frames of a video: (N, frames, C, H, W)."""
    return torch.stack(list(iterator), dim=1)


class Done(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Done]:
    """`python training.py <arguments>` from `tmp_path`, in this process: a new one takes seconds to import torch."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Done:
        capsys.readouterr()
        status = training.main([*arguments])
        return Done(status, *capsys.readouterr())

    return run


def assert_one_line(done: Done, words: list[str]) -> None:
    """That a command ended with status 2 and one line of error, which holds the words."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def run_command(*arguments: str, folder: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`python <arguments>` as a user runs it, from `folder`; relative script names are this project's."""
    with start_command(*arguments, cwd=folder) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start_command(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """The same, under way: standard output and errors are pipes, unless `options` of Popen say otherwise."""
    script, *rest = arguments
    command = [sys.executable, str(ROOT / script), *rest]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    return subprocess.Popen(command, text=True, **(pipes | options))


@pytest.fixture(scope="module")
def nursery() -> Any:
    """Forks processes from one that has torch loaded already, and has computed nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["conftest"])
        context.Process(target=int).start()
        yield context


@pytest.fixture(scope="module")
def store() -> TCPStore:
    """As torchrun's own: it outlives the processes of a launch, and the next ones find what these have left in it."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def launch(nursery: Any, store: TCPStore, tmp_path: Path) -> Launch:
    """`launch(size, work, *arguments)` runs `work` in as many processes, and tells how they ended."""

    def launch(
        size: int, work: Callable[..., int], *arguments: Any, timeout: float = 60, first_only: bool = False
    ) -> list[Ended]:
        processes = [
            nursery.Process(target=run_process, args=(rank, size, store.port, tmp_path, work, arguments))
            for rank in range(size)
        ]
        ends = time.monotonic() + timeout
        for process in processes:
            process.start()
        for process in processes[:1] if first_only else processes:
            process.join(max(0.0, ends - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive() and not (rank and first_only)]
        for process in processes:
            process.kill()  # a stopped one too
            process.join()
        texts = [[(tmp_path / f"{name}.{rank}").read_text() for name in ("output", "errors")] for rank in range(size)]
        assert not late, f"processes {late} did not end within {timeout} s: {texts}"
        return [Ended(process.exitcode, *text) for process, text in zip(processes, texts, strict=True)]

    return launch

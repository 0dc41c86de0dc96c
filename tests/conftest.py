"""Small images, settings, networks and runs; commands as a user runs them; and several processes."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch.distributed import TCPStore

import quality
import training
from checkpoints import Checkpoints, load_checkpoint
from configuration import Config, DataConfig, ImageConfig, UserError, load_config
from generator import Generator, build_critic, build_generator
from image_data import TrainingImages, open_images
from model_definitions import Discriminator
from quality import ImageFeatures
from run_directory import RunDirectory
from sampling import Sampler, load_sampler
from step_runners import EagerSteps
from training_step import NoiseSampler, TrainingState

ROOT = Path(__file__).parent.parent

SMALL = [
    "image.size=16", "vae.channels=[4,8]", "vae.latent_dim=6", "critic.channels=[4,8]",
    "weight_predictor.hidden_size=8", "video.frames=3", "training.batch_size=4", "training.n_critic=2",
    "output.samples=2", "runtime.device=cpu", "output.tensorboard=false", "training.diffaugment=[]",
    "weight_predictor.start=0", "weight_predictor.alone=1", "loss.lambda_vae=0.1", "loss.vae_fraction=1",
    "training.lr_vae=0.0005", "training.lr_predictor=0.0005", "training.lr_critic=0.0003", "output.keep_checkpoints=3",
]  # fmt: skip
"""Overrides for a run that takes a second or two, in which everything learns from the first step to the last."""

VARIED = ["data.mirror=true", "training.diffaugment=[color,translation,cutout]", "loss.lambda_video=1",
          "loss.adversarial_frame=random"]  # fmt: skip
"""Overrides that switch on everything that samples random numbers."""

T = 4
"""Frames of a period of `sample_run`."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small tensors, and pytest-xdist may run several tests at a time


@contextmanager
def fast_outputs() -> Iterator[None]:
    """Runs of this process leave out clips and curves, and use `Colours` for quality: these take longer than the runs.

    For fixtures that train; a test asks for the fixture `without_slow_outputs`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "save_clip", lambda *_: None)
        patch.setattr(RunDirectory, "plot_losses", lambda *_: None)
        patch.setattr(quality, "load_features", Colours)
        yield


@pytest.fixture
def without_slow_outputs() -> Iterator[None]:
    with fast_outputs():
        yield


class Colours(ImageFeatures):
    """Stands for an image network: an image's 4 x 4 pixels. Counts the images that it has seen."""

    name, num_features = "colours", 48

    def __init__(self, *_: object) -> None:
        torch.nn.Module.__init__(self)  # not the network's weights
        self.scale = torch.nn.Parameter(torch.tensor(1 / 255))
        self.seen = 0

    def of_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        return self.scale * torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)


# ------------------------------------------------------------------------------------------------------ images, videos


COLOUR = (200, 100, 50)


def write_image(path: Path, image: Image.Image | None = None, **options) -> Path:
    """Saves the image, or 20 × 20 pixels of `COLOUR`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (20, 20), COLOUR)).save(path, **options)
    return path


def numbered_images(folder: Path, count: int, size: int = 16) -> Path:
    """`count` images: number i has its left half at level i + 1 and its right half black, so that a flip shows."""
    for number in range(count):
        pixels = np.zeros((size, size, 3), np.uint8)
        pixels[:, : size // 2] = number + 1
        write_image(folder / f"{number:03}.png", Image.fromarray(pixels))
    return folder


def training_images(root: Path | str, *, batch_size=4, seed=0, size=16, channels=3, device="cpu", shard=slice(None),
                    **data) -> TrainingImages:  # fmt: skip
    """`open_images` on the CPU, without workers unless `data` asks for them."""
    config = DataConfig(root=str(root), **{"workers": 0, **data})
    image = ImageConfig(size=size, channels=channels)
    return open_images(config, image, batch_size=batch_size, seed=seed, device=device, progress=False, shard=shard)


def read_video(path: str | Path) -> np.ndarray:
    """All frames of a file or folder that `media.open_video` wrote: (T, H, W, 3) uint8.

    Equal neighbours may have been stored as one longer frame in a .gif, and come back as one.
    """
    path = Path(path)
    if path.is_dir():
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in sorted(path.glob("*.png"))])
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def moving_square(frames: int, size: int = 32, closed: bool = True) -> list[Image.Image]:
    """A red square that goes round on white, or away."""
    images, blank = [], np.full((size, size, 3), 255, np.uint8)
    for t in range(frames):
        turn, pixels = 2 * math.pi * t / frames * (1 if closed else 0.4), blank.copy()
        x, y = (round(size / 2 - 5 + 8 * function(turn)) for function in (math.cos, math.sin))
        pixels[y : y + 10, x : x + 10] = (220, 30, 30)
        images.append(Image.fromarray(pixels))
    return images


def write_clip(path: Path, images: list[Image.Image], codec: str = "libx264", rate: int = 10) -> Path:
    if path.suffix in (".gif", ".webp", ".png"):
        options = {"lossless": True} if path.suffix == ".webp" else {}
        images[0].save(path, save_all=True, append_images=images[1:], duration=1000 // rate, loop=0, **options)
    elif not path.suffix:
        path.mkdir()
        for number, image in enumerate(images):
            image.save(path / f"{number:03}.png")
    else:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate)
            stream.width, stream.height, stream.pix_fmt = *images[0].size, "yuv420p"
            for image in images:
                container.mux(stream.encode(av.VideoFrame.from_image(image).reformat(format="yuv420p")))
            container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of coloured squares on white in two class folders."""
    root = tmp_path_factory.mktemp("images")
    for index in range(24):
        folder = root / ("warm" if index % 2 else "cold")
        folder.mkdir(exist_ok=True)
        image = Image.new("RGB", (20, 20), "white")
        colour = (200, 10 * index, 30) if index % 2 else (30, 10 * index, 200)
        image.paste(colour, (4 + index % 5, 3, 13 + index % 3, 15))
        image.save(folder / f"{index:02d}.png")
    return root


def small(folder: Path, images: Path, *overrides: str, name: str = "run") -> list[str]:
    """Overrides for a small run that writes to `folder / name`."""
    return [*SMALL, f"data.root={images}", f"output.root={folder}", f"output.name={name}", *overrides]


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
    """What the newest checkpoint holds, but for times and where run and images lie."""
    state = load_checkpoint(run / "checkpoints" / "latest.pt")
    for key in ("interval_seconds", "waited_seconds", "seconds", "latest"):
        del state["log"][key]
    del state["config"]["output"], state["config"]["data"]
    return state


def untimed_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what depends on the machine's speed and memory."""
    timed = ("speed/", "memory/", "seconds")
    return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in metrics_of(run)]


def networks_and_noise(*overrides: str) -> tuple[Config, Generator, Discriminator, NoiseSampler]:
    """Small networks of a seed, whose predictor moves the decoder, and the random numbers of their steps."""
    config = load_config(None, [*SMALL, *overrides])
    torch.manual_seed(0)
    generator, critic = build_generator(config), build_critic(config)
    return config, moved(generator, 0.2), critic, NoiseSampler(config, torch.device("cpu"))


@pytest.fixture(scope="session")
def sample_run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A run of 2 steps whose predictor was then given random weights, as its images must differ to be compared."""
    folder = tmp_path_factory.mktemp("sample") / "runs"
    overrides = small(folder, image_folder, "training.steps=2", "output.sample_every=1", f"video.frames={T}",
                      "weight_predictor.layers=[decoder.*]", "weight_predictor.bound=0.5", "video.height=8",
                      "video.width=8", name="quick")  # fmt: skip
    with fast_outputs():
        assert training.train(load_config(None, overrides)) == 0
    path = folder / "quick" / "checkpoints"
    saved = load_checkpoint(path / "latest.pt")
    random = torch.Generator().manual_seed(0)
    weights = saved["generator_ema"]
    weights["predictor.to_update.weight"] = torch.randn(weights["predictor.to_update.weight"].shape, generator=random)
    for name in ("vae.decoder.stage1.weight", "vae.decoder.stage2.weight", "vae.decoder.projection.weight"):
        weights[name] = 3 * weights[name]  # images of some contrast
    Checkpoints(path, keep=3).save(saved)
    return folder / "quick"


@pytest.fixture
def sampler(sample_run: Path) -> Sampler:
    return load_sampler(sample_run, "cpu")


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
    """`python <arguments>` as a user runs it, from `folder`: `-m studies.x`, or the name of one of our scripts."""
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
    command = [sys.executable, *(["-m"] if script == "-m" else [str(ROOT / script)]), *rest]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    return subprocess.Popen(command, text=True, **(pipes | options))


# ----------------------------------------------------------------------------------------------- several processes


class Ended(NamedTuple):
    """What one process left."""

    status: int
    output: str
    errors: str


Launch = Callable[..., list[Ended]]


def run_process(
    rank: int, size: int, port: int, folder: Path, work: Callable[..., int | None], arguments: tuple
) -> None:
    """What a process of `launch` does: `work`, with the environment that a launcher gives."""
    for number, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(folder / f"{name}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_RANK": f"{rank}", "LOCAL_WORLD_SIZE": f"{size}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    torch.set_num_threads(1)
    try:
        status = work(*arguments) or 0
    except SystemExit as error:  # of a process that has lost the others
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


EVERYTHING = ["training.steps=3", "output.log_every=1", "output.sample_every=1", "output.checkpoint_every=1"]
"""Samples, metrics and a checkpoint at every step."""


def whole_command(arguments: list[str], others: list[str] | None = None) -> int:
    """`training.py` with `arguments`, or in process 1 with `others`."""
    with fast_outputs():
        return training.main(others if others and os.environ["RANK"] == "1" else arguments)


def assert_complete(ended: list[Ended]) -> None:
    for rank, one in enumerate(ended):
        assert one.status == 0, f"process {rank}: {one.errors[-3000:]}"


@pytest.fixture(scope="module")
def nursery() -> Any:
    """Forks processes from one that has torch loaded already, and has computed nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # who has a GPU's context cannot fork
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
        size: int, work: Callable[..., int | None], *arguments: Any, timeout: float = 300, first_only: bool = False
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


# ----------------------------------------------------------------------------------------------------------- iterations


def new_state(config: Config, device: torch.device | str = "cpu") -> TrainingState:
    """Networks as a run of these settings begins with them."""
    return TrainingState(*training.build_networks(config), config, torch.device(device))


def random_images(seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """A batch for `SMALL` settings, (4, 3, 16, 16) in [0, 1]."""
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(device)


def run_iterations(runner: EagerSteps, count: int) -> dict[str, torch.Tensor]:
    """Takes `count` iterations after the state's own step; a copy of all weights then."""
    state = runner.state
    noise = NoiseSampler(state.config, state.device)
    for step in range(state.step + 1, state.step + count + 1):
        batches = (random_images(10 * step + k, state.device) for k in range(10))
        metrics = training.iteration(runner, noise, batches, step)
        assert all(value.isfinite() for value in metrics.values())
        state.step = step
    return {name: value.clone() for name, value in state.tensors().items()}


# ------------------------------------------------------------------------------------------------------- generators

OFF = "weight_predictor.update=off"


def small_generator(*overrides: str) -> Generator:
    """The generator of `SMALL` as a run begins with it: its updates are zero."""
    torch.manual_seed(0)
    return build_generator(load_config(None, [*SMALL, *overrides]))


def moved(generator: Generator, size: float = 0.3) -> Generator:
    """The same generator with random numbers in its predictor's zero weights, so that it updates, as after training."""
    if generator.update_kind == "predicted":
        torch.nn.init.normal_(generator.predictor.to_update.weight, std=size)
    return generator


def generator_of(*overrides: str) -> Generator:
    """`small_generator` with updates."""
    return moved(small_generator(*overrides))

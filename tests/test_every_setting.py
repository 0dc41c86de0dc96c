"""No setting is dead: each key of config.yaml, given another value, changes what it is there to change.

Most settings show in one iteration at a tiny size, taken apart into stages (`iteration`): the first stage that changes
must be the one that the table names, and what is learned must change with it. So a setting that is read nowhere fails,
and so does one that reaches further than it should. The others show in what a short run leaves on disk (`run`), or have
a small test of their own (`OWN`).
"""

import dataclasses
import itertools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import metrics_of, pictures_drawn, same, small
from PIL import Image

import distributed
import quality_check
import run_directory
import training
from configuration import SECTIONS, UserError, load_config
from devices import choose_device
from image_data import open_images
from quality import PictureFeatures
from random_draws import Draws
from step_runners import build_steps
from training_state import TrainingState

KEYS = [f"{section}.{setting.name}" for section, cls in SECTIONS.items() for setting in dataclasses.fields(cls)]

# What all comparisons start from: small, and with everything switched on that some setting needs to show.
BASE = [
    *("weight_predictor.layers=[decoder.stage1.*,decoder.stage2.*]", "weight_predictor.rank=2", "video.height=8"),
    *("video.width=8", "loss.video_frames=2", "loss.own_frames=2", "loss.own_share=0.5", "loss.lambda_video=1"),
    *("training.n_critic=1", "training.steps=3", "runtime.step=eager"),
    *("output.log_every=1", "output.sample_every=1", "output.checkpoint_every=1"),
]

STAGES = ("pictures", "networks", "draws", "gradients", "learned")
"""Of an iteration, in order: each follows from the ones before it and the settings."""

# Key -> another value than in BASE, and the first stage that it changes. OTHER is a second folder of pictures.
OTHER = "<another folder>"
ITERATION: dict[str, tuple[str, str]] = {
    "data.root": (OTHER, "pictures"),
    "data.fit": ("pad", "pictures"),
    "data.background": ("#2080c0", "pictures"),
    "data.mirror": ("true", "pictures"),
    "data.holdout": ("0.5", "pictures"),
    "image.size": ("32", "pictures"),
    "image.channels": ("1", "pictures"),
    "vae.latent_dim": ("7", "networks"),
    "vae.channels": ("[4,9]", "networks"),
    "discriminator.channels": ("[4,9]", "networks"),
    "weight_predictor.update": ("constant", "networks"),
    "weight_predictor.watches": ("other", "gradients"),
    "weight_predictor.train_gru": ("false", "gradients"),
    "weight_predictor.layers": ("[decoder.stage1.*]", "networks"),
    "weight_predictor.head": ("full", "networks"),
    "weight_predictor.rank": ("1", "networks"),
    "weight_predictor.hidden_size": ("9", "networks"),
    "weight_predictor.num_layers": ("1", "networks"),
    "weight_predictor.bound": ("2", "gradients"),
    "weight_predictor.sharing": ("shared", "draws"),
    "video.frames": ("4", "gradients"),
    "video.height": ("4", "networks"),
    "video.width": ("4", "networks"),
    "video.shift": ("0.2", "gradients"),
    "video.zoom": ("0.2", "gradients"),
    "video.rotation": ("20", "gradients"),
    "video.brightness": ("0.4", "gradients"),
    "video.contrast": ("0.3", "gradients"),
    "video.noise": ("0.05", "gradients"),
    "video.detach": ("false", "gradients"),
    "loss.lambda_gp": ("5", "gradients"),
    "loss.epsilon_drift": ("0.01", "gradients"),
    "loss.base_fake_share": ("0.25", "draws"),
    "loss.lambda_adv": ("2", "gradients"),
    "loss.lambda_base": ("2", "gradients"),
    "loss.lambda_vae": ("0.2", "gradients"),
    "loss.beta": ("2", "gradients"),
    "loss.lambda_update": ("2", "gradients"),
    "loss.lambda_video": ("2", "gradients"),
    "loss.video_frames": ("3", "draws"),
    "loss.own_frames": ("3", "draws"),
    "loss.own_share": ("1", "draws"),
    "loss.judged_frame": ("random", "draws"),
    "training.batch_size": ("3", "pictures"),
    "training.n_critic": ("2", "pictures"),
    "training.lr_vae": ("0.001", "learned"),
    "training.lr_predictor": ("0.001", "learned"),
    "training.lr_discriminator": ("0.001", "learned"),
    "training.adam_betas": ("[0.5,0.9]", "learned"),
    "training.adam_betas_predictor": ("[0.5,0.9]", "learned"),
    "training.clip_vae": ("0.001", "learned"),
    "training.clip_predictor": ("0.001", "learned"),
    "training.clip_discriminator": ("0.001", "learned"),
    "training.ema_decay": ("0.1", "learned"),
    "training.diffaugment": ("[color]", "gradients"),
    "training.seed": ("1", "pictures"),
    "runtime.precision": ("bf16", "gradients"),
}

# Key -> another value, and what it changes of all that a short run leaves (`run`).
RUN: dict[str, tuple[str, str]] = {
    "training.steps": ("2", "files"),
    "training.epochs": ("0.2", "files"),
    "training.max_minutes": ("1e-9", "files"),
    "output.root": (OTHER, "place"),
    "output.name": ("other", "place"),
    "output.log_every": ("2", "metrics"),
    "output.sample_every": ("2", "files"),
    "output.checkpoint_every": ("2", "files"),
    "output.keep_checkpoints": ("1", "files"),
    "output.evaluate_every": ("2", "metrics"),
    "output.evaluate_images": ("12", "measured"),
    "output.best_metric": ("critic/gap", "files"),
    "output.samples": ("3", "sample size"),
    "output.fps": ("4", "clip"),
    "output.tensorboard": ("true", "files"),
}
WITH: dict[str, list[str]] = {"output.evaluate_images": ["output.evaluate_every=3", "output.evaluate_images=10"]}
"""What else both runs are given, where a setting means nothing without another."""
INSTEAD: dict[str, list[str]] = {"training.epochs": ["training.steps=null"]}
"""What the changed run is given too, where a setting excludes another."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders of pictures that are neither square nor opaque, and one with a broken picture among them."""
    made = [tmp_path_factory.mktemp(name) for name in ("pictures", "others", "broken")]
    for folder, index in itertools.product(made, range(8)):
        picture = Image.new("RGBA", (20, 28), (0, 0, 0, 0))
        colour = (30 * index, 100, 20 * made.index(folder), 255)
        picture.paste(colour, (2 + index, 6, 12, 20))
        picture.save(folder / f"{index}.png")
    (made[2] / "broken.png").write_bytes(b"no picture")
    return made


# -------------------------------------------------------------------------------------------------------- an iteration


def iteration(overrides: list[str]) -> dict[str, Any]:
    """Two iterations of a run, of the first one each stage, and what is learned in both."""
    config = load_config(None, overrides)
    device = choose_device(config.runtime.device)
    images = open_images(config.data, config.image, batch_size=config.training.batch_size, seed=config.training.seed,
                         device=device, progress=False)  # fmt: skip
    batches = images.batches()
    state = TrainingState(config, device)
    networks = {name: tensor.clone() for name, tensor in state.networks().items()}
    with torch.no_grad():  # an update of zero, as at the start, would hide what becomes of it
        for name, parameter in state.generator.predictor.named_parameters():
            if name.startswith(("to_update", "code")):
                parameter.normal_(std=0.5, generator=torch.Generator(device).manual_seed(0))
    random = Draws(config, device)
    steps, _ = build_steps(config, state, random.augment, steps=2)
    found: dict[str, Any] = {}
    for step in (1, 2):  # Adam's first step is the same for all decay rates
        pictures = [next(batches) for _ in range(config.training.n_critic)]
        draws = [random.critic(state.generator, step, repeat) for repeat in range(len(pictures))]
        last = random.generator(state.generator, step)
        if step == 1:
            # Before anything is learned; a pass changes nothing.
            passes = [steps.critic_pass(pictures[0], draws[0]), steps.generator_pass(pictures[-1], last)]
            gradients = [done.gradients for done in passes]
            found = {"pictures": pictures, "networks": networks, "draws": [*draws, last], "gradients": gradients}
        for x, numbers in zip(pictures, draws, strict=True):
            steps.critic_step(x, numbers)
        steps.generator_step(pictures[-1], last)
        state.step = step
    return found | {"learned": state.networks()}


@pytest.fixture(scope="module")
def plain_iteration(folders: list[Path]) -> dict[str, Any]:
    return iteration(small(Path("nowhere"), folders[0], *BASE))


def test_an_iteration_is_the_same_again(plain_iteration: dict[str, Any], folders: list[Path]) -> None:
    again = iteration(small(Path("nowhere"), folders[0], *BASE))
    assert list(again) == list(STAGES)
    assert all(same(again[stage], plain_iteration[stage]) for stage in STAGES)  # else a dead setting would seem alive


@pytest.mark.parametrize("key", ITERATION)
def test_a_setting_changes_the_stage_it_is_for(key: str, plain_iteration: dict[str, Any], folders: list[Path]) -> None:
    value, first = ITERATION[key]
    changed = iteration(small(Path("nowhere"), folders[0], *BASE, f"{key}={folders[1] if value is OTHER else value}"))
    differs = [stage for stage in STAGES if not same(changed[stage], plain_iteration[stage])]
    assert differs, f"{key} changes nothing"
    assert (differs[0], differs[-1]) == (first, "learned")


# --------------------------------------------------------------------------------------------------------------- a run


class Colours(PictureFeatures):
    """Stands for an image network: a picture's 4 x 4 pixels. Counts the pictures that it has seen."""

    name, num_features, seen = "colours", 48, 0

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(()))

    def of_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        Colours.seen += len(pixels)
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)


def run(folder: Path, pictures: Path, *overrides: str) -> dict[str, Any]:
    """What a short run leaves below `folder`, without what is slow to draw: curves, and clips but for their rate."""
    Colours.seen = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_check, "load_features", Colours)
        patch.setattr(run_directory, "plot_losses", lambda runs, path: path.touch())
        patch.setattr(run_directory, "write_video", lambda path, frames, fps: path.write_text(f"{fps}"))
        assert training.train(load_config(None, small(folder, pictures, *BASE, *overrides))) == 0
    (lock,) = folder.rglob("run.lock")
    place = lock.parent
    return {
        "place": place.relative_to(folder),
        "files": sorted(f"{path.relative_to(place)}" for path in place.rglob("*") if "tfevents" not in path.name),
        "metrics": [(line["step"], sorted(line)) for line in metrics_of(place)],
        "measured": Colours.seen,
        "sample size": {Image.open(path).size for path in place.glob("samples/*.png")},
        "clip": {path.read_text() for path in place.glob("clips/*")},
    }


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory, folders: list[Path]) -> dict[str, Any]:
    with pictures_drawn("clips"):
        return run(tmp_path_factory.mktemp("plain"), folders[0])


@pytest.mark.pictures("clips")
@pytest.mark.parametrize("key", RUN)
def test_a_setting_changes_what_a_run_leaves(
    key: str, plain_run: dict[str, Any], folders: list[Path], tmp_path: Path
) -> None:
    value, what = RUN[key]
    value = str(tmp_path / "changed" / "deeper") if value is OTHER else value
    more = WITH.get(key, [])
    before = run(tmp_path / "before", folders[0], *more) if more else plain_run
    assert run(tmp_path / "changed", folders[0], *more, *INSTEAD.get(key, []), f"{key}={value}")[what] != before[what]


# ------------------------------------------------------------------------------------ settings with a test of their own


def outcome(overrides: list[str]) -> str:
    """How a run ends that is refused before it begins, without what it was given."""
    with pytest.raises(UserError) as error:
        training.train(load_config(None, overrides))
    return str(error.value)


OWN: dict[str, Callable[..., None]] = {}
"""Key -> its test, which is collected below."""


def own(key: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return lambda test: OWN.setdefault(key, test)


@own("data.on_broken")
def test_broken_pictures_are_refused_or_left_out(folders: list[Path]) -> None:
    assert "broken.png" in outcome(small(Path("nowhere"), folders[2], "data.on_broken=error"))
    assert len(iteration(small(Path("nowhere"), folders[2], *BASE, "data.on_broken=skip"))["pictures"]) == 1


def opened(*overrides: str) -> Any:
    config = load_config(None, overrides)
    return open_images(config.data, config.image, batch_size=2, seed=0, device="cpu", progress=False)


@own("data.memory_gb")
def test_pictures_beyond_the_memory_stream(folders: list[Path]) -> None:
    places = [opened(f"data.root={folders[0]}", f"data.memory_gb={number}").storage for number in (4, 0)]
    assert places == ["memory", "stream"]


@own("data.workers")
def test_workers_are_processes(folders: list[Path]) -> None:
    for count in (0, 1, 2):
        before = len(multiprocessing.active_children())
        images = opened(f"data.root={folders[0]}", "data.memory_gb=0", f"data.workers={count}", "image.size=16")
        batches = images.batches()
        next(batches)
        assert len(multiprocessing.active_children()) - before == count
        batches.close()


@own("weight_predictor.update_size")
def test_another_update_size_is_refused(folders: list[Path]) -> None:
    assert "update_size is 5" in outcome(small(Path("nowhere"), folders[0], *BASE, "weight_predictor.update_size=5"))


@own("runtime.device")
def test_a_gpu_that_is_not_there_is_refused(folders: list[Path]) -> None:
    assert "cuda:99" in outcome(small(Path("nowhere"), folders[0], *BASE, "runtime.device=cuda:99"))


@own("runtime.step")
def test_a_graph_is_refused_on_a_cpu(folders: list[Path]) -> None:
    assert "cuda_graph" in outcome(small(Path("nowhere"), folders[0], *BASE, "runtime.step=cuda_graph"))


@own("runtime.timeout_minutes")
def test_other_processes_are_waited_for_so_long(folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    waits = []

    def rendezvous(_: str, timeout: Any) -> Any:
        waits.append(timeout.total_seconds())
        raise RuntimeError("nobody came")

    monkeypatch.setattr(distributed, "dist", SimpleNamespace(rendezvous=rendezvous))
    for minutes in (1, 2):
        overrides = small(Path("nowhere"), folders[0], *BASE, f"runtime.timeout_minutes={minutes}")
        assert training.main(overrides) == 2
    assert waits == [60, 120]


# ---------------------------------------------------------------------------------------------------------- all of them


def test_every_setting_is_observed_in_one_place() -> None:
    observed = [*ITERATION, *RUN, *OWN]
    assert sorted(observed) == sorted(KEYS), "a new setting needs another value and what it changes, in a table above"

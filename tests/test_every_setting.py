"""No setting is dead: each key of config.yaml, given another value, changes what it is there to change.

Most settings show in one iteration at a tiny size, taken apart into stages (`iteration`): the first stage that changes
must be the one that the table names, and what is learned must change with it. So a setting that is read nowhere fails,
and so does one that reaches further than it should. The others show in what a short run leaves on disk (`run`), or have
a small test of their own (`OWN`).
"""

import dataclasses
import itertools
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import (
    Colours,
    metrics_of,
    moving_square,
    new_state,
    random_images,
    refused,
    same,
    small,
    train,
    training_images,
    write_clip,
    write_image,
)
from PIL import Image

import distributed
import quality
import run_directory
import training
from configuration import SECTIONS, load_config
from distributed import SINGLE_PROCESS
from step_runners import EagerSteps, choose_step
from training_step import NoiseSampler

NOWHERE = Path("nowhere")
KEYS = [f"{section}.{setting.name}" for section, cls in SECTIONS.items() for setting in dataclasses.fields(cls)]

BASE = [
    "weight_predictor.layers=[decoder.stage1.*,decoder.stage2.*]", "weight_predictor.rank=2", "video.height=8",
    "video.width=8", "loss.video_frames=2", "loss.rollout_frames=2", "loss.rollout_fraction=0.5",
    "training.n_critic=1", "training.steps=3",
    "output.log_every=1", "output.sample_every=1", "output.checkpoint_every=1",
]  # fmt: skip
"""What all comparisons start from: small, and with everything switched on that some setting needs to show."""

STAGES = ("images", "networks", "random numbers", "gradients", "learned")
"""Of an iteration, in order: each follows from the ones before it and the settings."""

OTHER = "<another folder>"
"""Stands for a second folder of images."""
FIRST_CHANGED = {
    "images": [
        f"data.root={OTHER}", "data.fit=pad", "data.background=#2080c0", "data.mirror=true", "data.holdout=0.5",
        "image.size=32", "image.channels=1", "training.batch_size=3", "training.n_critic=2", "training.seed=1",
    ],
    "networks": [
        "vae.latent_dim=7", "vae.channels=[4,9]", "critic.channels=[4,9]", "weight_predictor.update=off",
        "weight_predictor.layers=[decoder.stage1.*]", "weight_predictor.head=full", "weight_predictor.rank=1",
        "weight_predictor.hidden_size=9", "weight_predictor.num_layers=1", "video.height=4", "video.width=4",
    ],
    "random numbers": [
        "weight_predictor.sharing=shared", "loss.base_fake_fraction=0.25", "loss.video_frames=3",
        "loss.rollout_frames=3", "loss.rollout_fraction=1", "loss.adversarial_frame=random", "loss.lambda_vae=0.2",
        "loss.vae_fraction=0.5", "weight_predictor.start=0.5",
    ],
    "gradients": [
        "weight_predictor.bound=2", "video.frames=4", "video.shift=0.2", "video.zoom=0.2", "video.rotation=20",
        "video.brightness=0.4", "video.contrast=0.3", "video.noise=0.05", "video.detach=false", "loss.lambda_gp=5",
        "video.input=changes",
        "loss.epsilon_drift=0.01", "loss.lambda_adv=2", "loss.lambda_base=2", "loss.beta=2",
        "loss.lambda_update=2", "loss.lambda_video=2", "training.diffaugment=[color]",
    ],
    "learned": [
        "training.lr_vae=0.001", "training.lr_predictor=0.001", "training.lr_critic=0.001",
        "training.adam_betas=[0.5,0.9]", "training.adam_betas_predictor=[0.5,0.9]", "training.clip=0.001",
        "training.ema_decay=0.1", "weight_predictor.alone=0.3",
    ],
}  # fmt: skip
"""Stage -> settings with another value than in BASE, which change this one first."""
ITERATION: dict[str, tuple[str, str]] = {
    key: (value, stage)
    for stage, settings in FIRST_CHANGED.items()
    for key, _, value in (setting.partition("=") for setting in settings)
}
"""Key -> another value, and the first stage that it changes."""

# Key -> another value, and what it changes of all that a short run leaves (`run`).
RUN: dict[str, tuple[str, str]] = {
    "training.steps": ("2", "files"), "training.epochs": ("0.2", "files"), "training.max_minutes": ("1e-9", "files"),
    "output.root": (OTHER, "place"), "output.name": ("other", "place"), "output.log_every": ("2", "metrics"),
    "output.sample_every": ("2", "files"), "output.checkpoint_every": ("2", "files"),
    "output.keep_checkpoints": ("1", "files"), "output.evaluate_every": ("2", "metrics"),
    "output.evaluate_images": ("12", "measured"), "output.best_metric": ("generator/reconstruction", "files"),
    "output.samples": ("3", "sample size"), "output.fps": ("4", "clip"), "output.tensorboard": ("true", "files"),
}  # fmt: skip
WITH: dict[str, list[str]] = {"output.evaluate_images": ["output.evaluate_every=3", "output.evaluate_images=10"]}
"""What else both runs are given, where a setting means nothing without another."""
INSTEAD: dict[str, list[str]] = {"training.epochs": ["training.steps=null"]}
"""What the changed run is given too, where a setting excludes another."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders of images that are neither square nor opaque, and one with a broken image among them."""
    made = [tmp_path_factory.mktemp(name) for name in ("images", "others", "broken")]
    for folder, index in itertools.product(made, range(8)):
        image = Image.new("RGBA", (20, 28), (0, 0, 0, 0))
        image.paste((30 * index, 100, 20 * made.index(folder), 255), (2 + index, 6, 12, 20))
        write_image(folder / f"{index}.png", image)
    (made[2] / "broken.png").write_bytes(b"no image")
    return made


# -------------------------------------------------------------------------------------------------------- an iteration


def iteration(overrides: list[str]) -> dict[str, Any]:
    """Each stage of a run's first iteration, and what is learned in two: Adam's first is the same for all betas."""
    config = load_config(None, overrides)
    state, images = new_state(config), training.open_shard(config, torch.device("cpu"), SINGLE_PROCESS)
    networks = {name: tensor.clone() for name, tensor in state.tensors().items()}
    with torch.no_grad():  # an update of zero, as at the start, would hide what becomes of it
        for name, parameter in state.generator.predictor.named_parameters():
            if name.startswith(("to_update", "code")):
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    noise, steps, batches = NoiseSampler(config, state.device), EagerSteps(state), images.batches()
    first = [next(batches) for _ in range(config.training.n_critic)]
    numbers = [*(noise.critic(1, repeat) for repeat in range(len(first))), noise.generator(1)]
    passes = [steps.critic_pass(first[0], numbers[0]), steps.generator_pass(first[-1], numbers[-1])]  # change nothing
    batches = itertools.chain(first, batches)
    for step in (1, 2):
        training.iteration(steps, noise, batches, step)
        state.step = step
    gradients = [one.gradients for one in passes]
    return dict(zip(STAGES, (first, networks, numbers, gradients, state.tensors()), strict=True))


@pytest.fixture(scope="module")
def plain_iteration(folders: list[Path]) -> dict[str, Any]:
    return iteration(small(NOWHERE, folders[0], *BASE))


def test_an_iteration_is_the_same_again(plain_iteration: dict[str, Any], folders: list[Path]) -> None:
    again = iteration(small(NOWHERE, folders[0], *BASE))
    assert list(again) == list(STAGES)
    assert all(same(again[stage], plain_iteration[stage]) for stage in STAGES)  # else a dead setting would seem alive


@pytest.mark.parametrize("key", ITERATION)
def test_a_setting_changes_the_stage_it_is_for(key: str, plain_iteration: dict[str, Any], folders: list[Path]) -> None:
    value, first = ITERATION[key]
    changed = iteration(small(NOWHERE, folders[0], *BASE, f"{key}={folders[1] if value == OTHER else value}"))
    differs = [stage for stage in STAGES if not same(changed[stage], plain_iteration[stage])]
    assert differs, f"{key} changes nothing"
    assert (differs[0], differs[-1]) == (first, "learned")


# --------------------------------------------------------------------------------------------------------------- a run


def run(folder: Path, images: Path, *overrides: str) -> dict[str, Any]:
    """What a short run leaves below `folder`, without what is slow to make: curves, and clips but for their rate."""
    features = Colours()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "load_features", lambda *_: features)
        patch.setattr(run_directory, "plot_losses", lambda runs, path: path.touch())
        patch.setattr(run_directory, "write_video", lambda path, frames, fps: path.write_text(f"{fps}"))
        assert train(*small(folder, images, *BASE, *overrides)) == 0
    (lock,) = folder.rglob("run.lock")
    path = lock.parent
    return {
        "place": path.relative_to(folder),
        "files": sorted(f"{file.relative_to(path)}" for file in path.rglob("*") if "tfevents" not in file.name),
        "metrics": [(line["step"], sorted(line)) for line in metrics_of(path)],
        "measured": features.seen,
        "sample size": {Image.open(file).size for file in path.glob("samples/*.png")},
        "clip": {file.read_text() for file in path.glob("clips/*")},
    }


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory, folders: list[Path]) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("plain"), folders[0])


@pytest.mark.parametrize("key", RUN)
def test_a_setting_changes_what_a_run_leaves(
    key: str, plain_run: dict[str, Any], folders: list[Path], tmp_path: Path
) -> None:
    value, what = RUN[key]
    value = str(tmp_path / "changed" / "deeper") if value == OTHER else value
    more = WITH.get(key, [])
    before = run(tmp_path / "before", folders[0], *more) if more else plain_run
    assert run(tmp_path / "changed", folders[0], *more, *INSTEAD.get(key, []), f"{key}={value}")[what] != before[what]


# ------------------------------------------------------------------------------------ settings with a test of their own


OWN: dict[str, Callable[..., None]] = {}
"""Key -> its test, which is collected below."""


def own(key: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return lambda test: OWN.setdefault(key, test)


@own("data.on_broken")
def test_broken_images_are_refused_or_left_out(folders: list[Path]) -> None:
    assert "broken.png" in refused(*small(NOWHERE, folders[2], "data.on_broken=error"))
    assert len(iteration(small(NOWHERE, folders[2], *BASE, "data.on_broken=skip"))["images"]) == 1


@own("data.memory_gb")
def test_images_beyond_the_memory_stream(folders: list[Path]) -> None:
    assert [training_images(folders[0], memory_gb=limit).storage for limit in (4.0, 0.0)] == ["memory", "stream"]


@own("data.workers")
def test_workers_are_processes(folders: list[Path]) -> None:
    for count in (0, 1, 2):
        before = len(multiprocessing.active_children())
        batches = training_images(folders[0], memory_gb=0.0, workers=count).batches()
        next(batches)
        assert len(multiprocessing.active_children()) - before == count
        batches.close()


@own("training.init_from")
def test_a_new_run_begins_with_anothers_weights_and_a_resumed_one_does_not_read_them(
    folders: list[Path], tmp_path: Path, capsys
) -> None:
    source = small(tmp_path, folders[0], *BASE, "training.steps=1", name="source")
    again = [*source, f"training.init_from={tmp_path / 'source'}", "output.name=new"]
    assert train(*source) == train(*again) == 0
    assert "began with weights of" in capsys.readouterr().out
    first, last = ((tmp_path / name).read_bytes() for name in (
        "new/samples/step_000000.png", "source/samples/step_000001.png"))  # fmt: skip
    assert first == last
    shutil.rmtree(tmp_path / "source")
    assert train(*again, "training.steps=2") == 0


@own("weight_predictor.update_size")
@own("runtime.device")
@own("runtime.step")
@pytest.mark.parametrize(("setting", "words"), [
    ("weight_predictor.update_size=5", "update_size is 5"),
    ("runtime.device=cuda:99", "cuda:99"),
    ("runtime.step=cuda_graph", "cuda_graph"),
])  # fmt: skip
def test_what_cannot_be_is_refused(setting: str, words: str, folders: list[Path]) -> None:
    assert words in refused(*small(NOWHERE, folders[0], *BASE, setting))


@own("runtime.precision")
def test_a_device_without_tf32_gets_a_warning() -> None:
    configs = [load_config(None, [f"runtime.precision={kind}"]) for kind in ("fp32", "tf32")]
    assert ["no TF32" in choose_step(config, torch.device("cpu"))[1] for config in configs] == [False, True]


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
        overrides = small(NOWHERE, folders[0], *BASE, f"runtime.timeout_minutes={minutes}")
        assert training.main(overrides) == 2
    assert waits == [60, 120]


@own("data.clips")
@own("video.source")
@own("video.fps")
@own("video.motions")
def test_clips_teach_motion_at_their_pace(folders: list[Path], tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.gif", moving_square(12))
    clips = [f"data.clips={tmp_path}", "video.source=clips", "video.motions=2"]
    base = small(NOWHERE, folders[0], *BASE, *clips)
    totals = []
    for changed in ([], ["video.source=both"], ["video.fps=4"], ["video.motions=3"]):
        config = load_config(None, [*base, *changed])
        noise, state = NoiseSampler(config, torch.device("cpu")), new_state(config)
        windows = training.open_clips(config, state.device, SINGLE_PROCESS, noise.window, noise.clip_count)
        state.learn_motions(windows)
        numbers = noise.generator(1, next(windows.batches()))
        totals.append(EagerSteps(state).generator_pass(random_images(0), numbers).metrics["generator/total"].item())
        assert windows.lengths.tolist() == [5 if "video.fps=4" in changed else 10]
    assert len(set(totals)) == 4


# ---------------------------------------------------------------------------------------------------------- all of them


def test_every_setting_is_observed_in_one_place() -> None:
    observed = [*ITERATION, *RUN, *OWN]
    assert sorted(observed) == sorted(KEYS), "a new setting needs another value and what it changes, in a table above"

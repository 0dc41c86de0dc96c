"""The loop and the command, run as a user runs them."""

import itertools
import json
import math
import re
import signal
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    Done,
    assert_one_line,
    final,
    metrics_of,
    pictures_drawn,
    run_command,
    small,
    start_command,
    train,
)
from PIL import Image

import resume
import step_runners
import training
from checkpoints import load_checkpoint
from configuration import Config, UserError, config_from_dict, load_config
from generator_path import build_generator
from image_data import open_images
from model_definitions import build_discriminator
from objectives import generator_objective
from training_state import TrainingState
from video_files import read_video


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    """A run of 150 steps that the tests below look at."""
    folder = tmp_path_factory.mktemp("runs")
    config = load_config(
        ROOT / "config.yaml",
        small(folder, picture_folder, "training.steps=150", "output.log_every=10", "output.sample_every=100",
              "output.checkpoint_every=100", "output.tensorboard=true", "training.lr_vae=3e-3",
              "training.lr_discriminator=3e-3"),
    )  # fmt: skip
    with pictures_drawn():
        assert training.train(config) == 0
    return folder / "run"


# ------------------------------------------------------------------------------------------------------ what a run does


def test_a_small_run_learns(finished_run: Path) -> None:
    metrics = metrics_of(finished_run)
    assert [line["step"] for line in metrics] == list(range(10, 151, 10))
    reconstruction = [line["generator/reconstruction"] for line in metrics]
    assert reconstruction[-1] < 0.7 * reconstruction[0]
    gap = [line["critic/gap"] for line in metrics]
    assert max(gap) > gap[0] + 0.1
    assert metrics[0]["update/relative_size"] < metrics[-1]["update/relative_size"] <= Config().weight_predictor.bound


def test_metrics_tell_every_term(finished_run: Path) -> None:
    wanted = [
        *("critic/total", "critic/gap", "critic/penalty", "critic/drift", "score/real", "score/base", "score/updated"),
        *("generator/total", "generator/adversarial", "generator/adversarial_base", "generator/reconstruction"),
        *("generator/kl", "generator/update", "generator/video", "update/relative_size", "update/saturated_share"),
        *("gradient_norm/discriminator", "gradient_norm/vae", "gradient_norm/predictor"),
        *("images_seen", "speed/images_per_second", "speed/data_wait_share", "memory/peak_gb"),
    ]
    for line in metrics_of(finished_run):
        assert all(math.isfinite(line[name]) for name in wanted)
        assert line["images_seen"] == line["step"] * 2 * 4
        assert line["critic/total"] == pytest.approx(
            -line["critic/gap"] + 10 * line["critic/penalty"] + 0.001 * line["critic/drift"], rel=1e-4, abs=1e-4
        )


def test_a_run_leaves_what_the_readme_promises(finished_run: Path) -> None:
    assert load_config(finished_run / "config.yaml").training.steps == 150
    (environment,) = json.loads((finished_run / "environment.json").read_text())["sessions"]
    assert environment["versions"]["torch"] == version("torch")
    assert {"git", "python", "command", "started"} <= environment.keys()
    for step in (0, 100, 150):
        with Image.open(finished_run / "samples" / f"step_{step:06d}.png") as picture:
            assert min(picture.size) > 200
        for ending in (".mp4", ".webp"):
            assert len(read_video(finished_run / "clips" / f"step_{step:06d}{ending}")) == 3
    assert Image.open(finished_run / "loss_curves.png").size[0] > 1000
    assert any((finished_run / "tensorboard").iterdir())
    assert not list(finished_run.rglob("*partial*"))


def test_the_checkpoint_rebuilds_the_generator(finished_run: Path) -> None:
    state = load_checkpoint(finished_run / "checkpoints" / "latest.pt")
    assert (state["step"], state["images_seen"]) == (150, 150 * 8)
    config = config_from_dict(state["config"], "checkpoint")
    torch.manual_seed(123)
    generator, discriminator = build_generator(config), build_discriminator(config)
    generator.load_state_dict(state["generator_ema"])
    discriminator.load_state_dict(state["discriminator"])
    assert generator.spec.to_dict() == state["update_spec"]
    x = generator(torch.randn(3, 6), generator.draw_motion(3)).x_fake
    p = discriminator.probability(x)
    assert ((p > 0) & (p < 1)).all()
    assert discriminator.calibration.slope != 0
    moments = state["optimizers"]["generator"]["state"]
    assert len(moments) == len(list(generator.parameters()))


def test_the_average_is_neither_the_start_nor_the_end(finished_run: Path) -> None:
    state = load_checkpoint(finished_run / "checkpoints" / "latest.pt")
    name = "vae.decoder.stage1.weight"
    config = config_from_dict(state["config"], "checkpoint")
    torch.manual_seed(config.training.seed)
    start = build_generator(config).state_dict()[name]
    end, average = state["generator"][name], state["generator_ema"][name]
    assert (average - end).norm() > 0
    assert (average - end).norm() < 0.9 * (start - end).norm()


@pytest.mark.pictures("clips")
def test_the_same_seed_gives_the_same_run_bit_for_bit(tmp_path: Path, picture_folder: Path) -> None:
    states = []
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        overrides = small(tmp_path, picture_folder, "training.steps=4", f"training.seed={seed}", name=name)
        assert training.train(load_config(None, overrides)) == 0
        states.append(load_checkpoint(tmp_path / name / "checkpoints" / "latest.pt"))
    for part in ("generator", "generator_ema", "discriminator"):
        for key, value in states[0][part].items():
            assert torch.equal(value, states[1][part][key]), key
    key = "vae.decoder.stage1.weight"
    assert not torch.equal(states[0]["generator"][key], states[2]["generator"][key])
    for file in ("samples/step_000004.png", "clips/step_000004.mp4"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_images_that_stream_give_the_same_run_as_images_in_memory(tmp_path: Path, picture_folder: Path) -> None:
    states = []
    for name, storage in (("memory", []), ("stream", ["data.memory_gb=0", "data.workers=2"])):
        overrides = small(tmp_path, picture_folder, "training.steps=3", "data.mirror=true", *storage, name=name)
        assert training.train(load_config(None, overrides)) == 0
        states.append(load_checkpoint(tmp_path / name / "checkpoints" / "latest.pt")["generator"])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_every_batch_reaches_the_critic_once_and_the_last_one_the_vae(
    tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {"critic_objective": [], "generator_objective": []}

    def recorded(name: str):
        function = getattr(step_runners, name)

        def record(generator, discriminator, x_real, *rest):
            seen[name].append(x_real)
            return function(generator, discriminator, x_real, *rest)

        return record

    for name in seen:
        monkeypatch.setattr(step_runners, name, recorded(name))
    config = load_config(None, small(tmp_path, picture_folder, "training.steps=3"))
    assert training.train(config) == 0
    images = open_images(config.data, config.image, batch_size=4, seed=config.training.seed, device="cpu")
    expected = list(itertools.islice(images.batches(), 6))
    assert torch.equal(torch.stack(seen["critic_objective"]), torch.stack(expected))
    assert torch.equal(torch.stack(seen["generator_objective"]), torch.stack(expected[1::2]))


@pytest.mark.parametrize(
    "overrides",
    [
        ["weight_predictor.head=low_rank", "weight_predictor.layers=[decoder.*.weight]"],
        ["weight_predictor.head=per_channel", "weight_predictor.sharing=shared"],
        pytest.param(["image.channels=1", "video.height=8", "video.width=5"], marks=pytest.mark.pictures),
        ["loss.lambda_video=0.1", "loss.judged_frame=random"],
        ["loss.lambda_video=0.1", "loss.judged_frame=random", "weight_predictor.sharing=shared"],
        ["training.diffaugment=[color,translation,cutout]", "loss.base_fake_share=0"],
        ["loss.base_fake_share=1", "video.detach=false", "data.mirror=true"],
        ["training.batch_size=30", "data.memory_gb=0", "data.workers=1"],
        ["training.batch_size=1", "training.n_critic=1", "video.frames=1"],
    ],
)
def test_every_way_of_training_runs(overrides: list[str], tmp_path: Path, picture_folder: Path) -> None:
    config = load_config(None, small(tmp_path, picture_folder, "training.steps=2", *overrides))
    assert training.train(config) == 0
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "latest.pt")["step"] == 2


def test_epochs_become_steps() -> None:
    config = load_config(None, ["training.epochs=3", "training.batch_size=10", "training.n_critic=2"])
    assert training.total_steps(config, 50) == 8  # 150 pictures at 20 a step, rounded up
    assert training.total_steps(config, 1) == 1


def test_clipping_shortens_the_gradient_and_says_how_often(tmp_path: Path, picture_folder: Path) -> None:
    arguments = small(tmp_path, picture_folder, "training.steps=4", "output.log_every=4", "training.clip_vae=1e-3",
                      "training.clip_discriminator=1e9")  # fmt: skip
    assert train(*arguments) == 0
    (line,) = metrics_of(tmp_path / "run")
    assert line["gradient_norm/vae"] > 1e-3
    assert line["clipped_share/vae"] == 1
    assert line["clipped_share/discriminator"] == 0
    assert "clipped_share/predictor" not in line
    moments = final(tmp_path / "run")["optimizers"]["generator"]["state"]
    vae_tensors = len(final(tmp_path / "run")["optimizers"]["generator"]["param_groups"][0]["params"])
    squares = sum(moments[index]["exp_avg"].square().sum() for index in range(vae_tensors))
    assert squares.sqrt() == pytest.approx(1e-3, rel=1e-2)  # β₁ = 0: the first moment is the last gradient


# ---------------------------------------------------------------------------------------------------------- the command


def test_help_shows_examples(tmp_path: Path) -> None:
    done = run_command("training.py", "--help", folder=tmp_path)
    assert done.returncode == 0
    assert "examples:" in done.stdout
    assert "--dry-run" in done.stdout


def test_dry_run_shows_everything_and_writes_nothing(
    run_training: Callable[..., Done], tmp_path: Path, picture_folder: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = run_training("--dry-run", *small(tmp_path, picture_folder))
    assert done.returncode == 0, done.stderr
    config = load_config(None, small(tmp_path, picture_folder))
    generator, discriminator = build_generator(config), build_discriminator(config)
    size = generator.head.update_size
    assert f"WEIGHT_UPDATE_SIZE {size:,}" in done.stdout
    assert re.search(rf"Discriminator +{sum(p.numel() for p in discriminator.parameters()):,}", done.stdout)
    for tensor in generator.spec.tensors:
        assert re.search(rf"{re.escape(tensor.name)} .* {tensor.size:,}", done.stdout)
    assert "24 images" in done.stdout
    assert "first batch (4, 3, 16, 16)" in done.stdout
    assert "batch_size: 4" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_still_shows_everything_where_a_run_lies_already(
    run_training: Callable[..., Done], tmp_path: Path, picture_folder: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("old")
    done = run_training("--dry-run", *small(tmp_path, picture_folder))
    assert done.returncode == 0, done.stderr
    assert "WEIGHT_UPDATE_SIZE" in done.stdout
    assert "would be refused" in done.stdout
    assert "output.name=run-2" in done.stdout


def test_dry_run_into_a_closed_pipe_is_quiet(tmp_path: Path, picture_folder: Path) -> None:
    process = start_command("training.py", "--dry-run", *small(tmp_path, picture_folder))
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


def test_a_closed_pipe_stops_no_training(tmp_path: Path, picture_folder: Path) -> None:
    arguments = small(tmp_path, picture_folder, "training.steps=3", "output.log_every=1")
    process = start_command("training.py", *arguments)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 0, errors
    assert "Traceback" not in errors
    assert final(tmp_path / "run")["step"] == 3


def test_plain_lines_where_output_is_no_terminal(tmp_path: Path, picture_folder: Path) -> None:
    arguments = small(tmp_path, picture_folder, "training.steps=4", "output.log_every=2")
    done = run_command("training.py", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^step 2/4 .*images/s, .* left$", done.stdout, re.MULTILINE)
    assert "finished 4 steps" in done.stdout
    assert "\r" not in done.stdout + done.stderr


def test_ctrl_c_saves_and_exits_with_130(tmp_path: Path, picture_folder: Path) -> None:
    arguments = small(tmp_path, picture_folder, "training.steps=1000000", "output.log_every=1")
    process = start_command("training.py", *arguments, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 130
    assert "stopped by SIGINT after step" in rest
    assert "Traceback" not in rest
    step = load_checkpoint(tmp_path / "run" / "checkpoints" / "latest.pt")["step"]
    assert step >= 3
    assert (tmp_path / "run" / "samples" / f"step_{step:06d}.png").exists()


@pytest.mark.parametrize(("log_every", "sample_every", "checkpoint_every"), [(20, 50, 2), (20, 1, 2), (1, 50, 2)])
def test_non_finite_losses_stop_the_run_and_keep_the_last_checkpoint(
    log_every: int, sample_every: int, checkpoint_every: int, tmp_path: Path, picture_folder: Path, monkeypatch
) -> None:
    calls = itertools.count(1)

    def poisoned(*arguments):
        loss, output = generator_objective(*arguments)
        if next(calls) == 5:
            loss = loss._replace(total=loss.total * math.nan, reconstruction=loss.reconstruction * math.nan)
        return loss, output

    monkeypatch.setattr(step_runners, "generator_objective", poisoned)
    overrides = ["training.steps=30", f"output.log_every={log_every}", f"output.sample_every={sample_every}",
                 f"output.checkpoint_every={checkpoint_every}"]  # fmt: skip
    with pytest.raises(UserError) as error:
        training.train(load_config(None, small(tmp_path, picture_folder, *overrides)))
    for words in ("generator/reconstruction", "not finite at step 5", "latest.pt", "training.lr_vae"):
        assert words in str(error.value)
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "latest.pt")
    assert state["step"] == 4
    assert all(torch.isfinite(value).all() for value in state["generator"].values())


def test_weights_that_are_no_numbers_never_reach_a_checkpoint(
    tmp_path: Path, picture_folder: Path, monkeypatch
) -> None:
    update_ema = TrainingState.update_ema

    def poisoned(state, step):
        update_ema(state, step)
        if step == 3:
            next(iter(state.generator.vae.decoder.parameters())).data[0] = math.inf

    monkeypatch.setattr(TrainingState, "update_ema", poisoned)
    overrides = ["training.steps=3", "output.checkpoint_every=2"]
    with pytest.raises(UserError, match="a weight of the generator is not finite at step 3"):
        training.train(load_config(None, small(tmp_path, picture_folder, *overrides)))
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "latest.pt")["step"] == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.stpes=3"], ["training.stpes", "training.steps"]),
        (["image.size=48"], ["image.size", "48", "32 or 64"]),
        (["weight_predictor.update_size=7"], ["weight_predictor.update_size", "7", "or auto"]),
        (["weight_predictor.layers=[decoder.stge1.*]"], ["decoder.stge1.*", "decoder.stage1"]),
        (["data.root=nowhere"], ["data.root", "nowhere", "jpg"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["output.name=a/b"], ["output.name", "a/b"]),
        (["runtime.device=tpu"], ["runtime.device", "tpu"]),
        (["runtime.device=cuda:99"], ["runtime.device", "cuda:99", "use auto or cpu"]),
        (["output.root=/proc/nothing"], ["output.root", "/proc/nothing"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    overrides: list[str], words: list[str], run_training: Callable[..., Done], tmp_path: Path, picture_folder: Path
) -> None:
    done = run_training(*small(tmp_path, picture_folder, "training.steps=1"), *overrides)
    assert_one_line(done, words)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def pictures(tmp_path: Path, picture_folder: Path) -> Path:
    """The 24 pictures in a flat folder of their own, for a test to spoil."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in picture_folder.rglob("*.png"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_broken_picture_is_named_or_skipped(
    run_training: Callable[..., Done], tmp_path: Path, pictures: Path
) -> None:
    (pictures / "bad one.jpg").write_bytes(b"\xff\xd8 no picture")
    arguments = small(tmp_path, pictures, "training.steps=1")
    assert_one_line(run_training(*arguments), ["bad one.jpg", "data.on_broken=skip"])
    done = run_training(*arguments, "data.on_broken=skip")
    assert done.returncode == 0, done.stderr
    assert "24 images" in done.stdout
    assert "skipped 1 broken" in done.stdout
    assert "bad one.jpg" in (tmp_path / "run" / "skipped.txt").read_text()


def test_broken_pictures_in_a_stream_are_listed_too(
    run_training: Callable[..., Done], tmp_path: Path, pictures: Path
) -> None:
    (pictures / "07.png").write_bytes(b"")
    stream = ["data.memory_gb=0", "data.on_broken=skip", "training.steps=6", "output.log_every=1"]
    done = run_training(*small(tmp_path, pictures, *stream))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "skipped.txt").read_text().count("07.png") == 1
    refused = run_training(*small(tmp_path, pictures, "data.memory_gb=0", "training.steps=6", name="other"))
    assert_one_line(refused, ["07.png"])


def test_the_default_settings_start_on_the_embedded_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 pixels, batch 16, as `python training.py` has them, for one critic step and one generator step."""
    monkeypatch.setattr(resume, "CALIBRATED", 16)  # 512 pictures of this size, drawn and judged, take half a minute
    config = load_config(ROOT / "config.yaml", [f"data.root={ROOT / 'data' / 'emoji'}", f"output.root={tmp_path}",
                                                "training.steps=1", "training.n_critic=1"])  # fmt: skip
    assert training.train(config) == 0
    assert (tmp_path / "default" / "samples" / "step_000001.png").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_run_on_the_gpu(tmp_path: Path, picture_folder: Path) -> None:
    config = load_config(None, small(tmp_path, picture_folder, "training.steps=3", "runtime.device=cuda"))
    assert training.train(config) == 0
    assert metrics_of(tmp_path / "run")[-1]["memory/peak_gb"] > 0

"""The loop and the command, run as a user runs them."""

import itertools
import json
import math
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, assert_one_line, final, metrics_of, read_video, refused, same, small, start_command, train
from PIL import Image

import quality
import training
import training_step
from checkpoints import load_checkpoint
from configuration import Config, config_from_dict, load_config
from generator import build_critic, build_generator
from image_data import open_images
from training_step import TrainingState, generator_objective


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A run of 150 steps, with clips and curves, that the tests below look at."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = ["training.steps=150", "output.log_every=10", "output.sample_every=100", "output.checkpoint_every=100",
                 "output.tensorboard=true", "training.lr_vae=3e-3", "training.lr_critic=3e-3"]  # fmt: skip
    assert train(*small(folder, image_folder, *arguments)) == 0
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


def test_metrics_hold_every_term(finished_run: Path) -> None:
    names = [
        *("critic/total", "critic/gap", "critic/penalty", "critic/drift", "score/real", "score/base", "score/updated"),
        *("generator/total", "generator/adversarial", "generator/adversarial_base", "generator/reconstruction"),
        *("generator/kl", "generator/update", "generator/video", "update/relative_size", "update/saturated_fraction"),
        *("gradient_norm/critic", "gradient_norm/vae", "gradient_norm/predictor"),
        *("images_seen", "speed/images_per_second", "speed/data_wait_fraction", "memory/peak_gb"),
    ]
    for line in metrics_of(finished_run):
        assert all(math.isfinite(line[name]) for name in names)
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
        with Image.open(finished_run / "samples" / f"step_{step:06d}.png") as image:
            assert min(image.size) > 200
        for ending in (".mp4", ".webp"):
            assert len(read_video(finished_run / "clips" / f"step_{step:06d}{ending}")) == 3
    assert Image.open(finished_run / "loss_curves.png").size[0] > 1000
    assert any((finished_run / "tensorboard").iterdir())
    assert not list(finished_run.rglob("*.part"))


def test_the_checkpoint_rebuilds_the_networks(finished_run: Path) -> None:
    state = load_checkpoint(finished_run / "checkpoints" / "latest.pt")
    assert (state["step"], state["images_seen"]) == (150, 150 * 8)
    config = config_from_dict(state["config"], "checkpoint")
    torch.manual_seed(123)
    generator, critic = build_generator(config), build_critic(config)
    generator.load_state_dict(state["generator_ema"])
    critic.load_state_dict(state["critic"])
    assert generator.spec.to_dict() == state["update_spec"]
    p = critic.probability(generator(torch.randn(3, 6), generator.sample_motion(3)).x_fake)
    assert ((p > 0) & (p < 1)).all()
    assert critic.calibration.slope != 0
    assert len(state["optimizers"]["generator"]["state"]) == len(list(generator.parameters()))  # moments
    name = "vae.decoder.stage1.weight"  # its average is neither the start nor the end
    start = training.build_networks(config)[0].state_dict()[name]
    end, average = state["generator"][name], state["generator_ema"][name]
    assert 0 < (average - end).norm() < 0.9 * (start - end).norm()


def test_the_same_seed_gives_the_same_run_bit_for_bit(tmp_path: Path, image_folder: Path) -> None:
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        arguments = ["training.steps=1", "output.samples=1", f"training.seed={seed}"]
        assert train(*small(tmp_path, image_folder, *arguments, name=name)) == 0
    first, second, other = (final(tmp_path / name) for name in ("first", "second", "other"))
    assert same(first, second)
    key = "vae.decoder.stage1.weight"
    assert not torch.equal(first["generator"][key], other["generator"][key])
    for file in ("samples/step_000001.png", "clips/step_000001.mp4"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.usefixtures("without_slow_outputs")
def test_every_batch_reaches_the_critic_once_and_the_last_one_the_vae(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {"critic_objective": [], "generator_objective": []}
    latents = []

    def recorded(name: str) -> Callable:
        function = getattr(training_step, name)
        return lambda generator, critic, x_real, noise, *rest: (
            seen[name].append(x_real) or latents.append(noise.z) or function(generator, critic, x_real, noise, *rest)
        )

    for name in seen:
        monkeypatch.setattr(training_step, name, recorded(name))
    config = load_config(None, small(tmp_path, image_folder, "training.steps=3"))
    assert training.train(config) == 0
    images = open_images(config.data, config.image, batch_size=4, seed=config.training.seed, device="cpu")
    expected = list(itertools.islice(images.batches(), 6))
    assert torch.equal(torch.stack(seen["critic_objective"]), torch.stack(expected))
    assert torch.equal(torch.stack(seen["generator_objective"]), torch.stack(expected[1::2]))
    assert len(torch.cat(latents).unique(dim=0)) == 9 * 4  # of each step its own


@pytest.mark.parametrize("overrides", [
    ["weight_predictor.head=per_channel", "weight_predictor.sharing=shared"],
    ["loss.lambda_video=0.1", "loss.adversarial_frame=random", "weight_predictor.sharing=shared"],
    ["training.diffaugment=[color,translation,cutout]", "loss.base_fake_fraction=0"],
    ["loss.base_fake_fraction=1", "video.detach=false", "data.mirror=true"],
    ["training.batch_size=30", "data.memory_gb=0", "data.workers=1"],
    ["training.batch_size=1", "training.n_critic=1", "video.frames=1"],
])  # fmt: skip
@pytest.mark.usefixtures("without_slow_outputs")
def test_every_way_of_training_runs(overrides: list[str], tmp_path: Path, image_folder: Path) -> None:
    assert train(*small(tmp_path, image_folder, "training.steps=2", *overrides)) == 0
    assert final(tmp_path / "run")["step"] == 2


def test_grey_images_and_videos_of_another_shape_make_clips_and_curves(tmp_path: Path, image_folder: Path) -> None:
    overrides = ["training.steps=2", "image.channels=1", "video.height=8", "video.width=5"]
    assert train(*small(tmp_path, image_folder, *overrides)) == 0
    assert len(read_video(tmp_path / "run" / "clips" / "step_000002.mp4")) == 3


def test_epochs_become_steps() -> None:
    config = load_config(None, ["training.epochs=3", "training.batch_size=10", "training.n_critic=2"])
    assert training.total_steps(config, 50) == 8  # 150 images at 20 a step, rounded up
    assert training.total_steps(config, 1) == 1


@pytest.mark.usefixtures("without_slow_outputs")
def test_clipping_shortens_the_gradient_and_reports_how_often(tmp_path: Path, image_folder: Path) -> None:
    arguments = ["training.steps=4", "output.log_every=4", "training.clip=1e-3"]
    assert train(*small(tmp_path, image_folder, *arguments)) == 0
    (line,) = metrics_of(tmp_path / "run")
    assert line["gradient_norm/vae"] > 1e-3
    assert line["clipped_fraction/vae"] == line["clipped_fraction/critic"] == 1
    optimizer = final(tmp_path / "run")["optimizers"]["generator"]
    vae_tensors = len(optimizer["param_groups"][0]["params"])
    squares = sum(optimizer["state"][index]["exp_avg_sq"].sum() for index in range(vae_tensors))
    assert "exp_avg" not in optimizer["state"][0]  # β₁ = 0: the gradient replaces it before it is read
    assert squares == pytest.approx(1e-6 * (1 - 0.99**4), rel=1e-2)  # β₂ = 0.99: a mean over the steps' gradients


@pytest.mark.parametrize(("log_every", "sample_every"), [(20, 50), (20, 1), (1, 50)])
@pytest.mark.usefixtures("without_slow_outputs")
def test_losses_that_are_not_finite_stop_the_run_and_keep_the_last_checkpoint(
    log_every: int, sample_every: int, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count(1)

    def poisoned(*arguments):
        loss, output = generator_objective(*arguments)
        if next(calls) == 5:
            loss = loss._replace(total=loss.total * math.nan, reconstruction=loss.reconstruction * math.nan)
        return loss, output

    monkeypatch.setattr(training_step, "generator_objective", poisoned)
    error = refused(*small(tmp_path, image_folder, "training.steps=30", f"output.log_every={log_every}",
                           f"output.sample_every={sample_every}", "output.checkpoint_every=2"))  # fmt: skip
    for words in ("generator/reconstruction", "not finite at step 5", "latest.pt", "training.lr_vae"):
        assert words in error
    state = final(tmp_path / "run")
    assert state["step"] == 4
    assert all(torch.isfinite(value).all() for value in state["generator"].values())


@pytest.mark.usefixtures("without_slow_outputs")
def test_weights_that_are_not_finite_never_reach_a_checkpoint(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_ema = TrainingState.update_ema

    def poisoned(state: TrainingState, step: int) -> None:
        update_ema(state, step)
        if step == 3:
            next(iter(state.generator.vae.decoder.parameters())).data[0] = math.inf

    monkeypatch.setattr(TrainingState, "update_ema", poisoned)
    error = refused(*small(tmp_path, image_folder, "training.steps=3", "output.checkpoint_every=2"))
    assert "a weight of the generator is not finite at step 3" in error
    assert final(tmp_path / "run")["step"] == 2


@pytest.mark.usefixtures("without_slow_outputs")
def test_the_default_settings_start_on_the_embedded_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 pixels, batch 16, as `python training.py` has them, for one critic step and one generator step."""
    monkeypatch.setattr(quality, "CALIBRATION_IMAGES", 16)  # 512 images of this size take half a minute
    config = load_config(ROOT / "config.yaml", [f"data.root={ROOT / 'data' / 'emoji'}", f"output.root={tmp_path}",
                                                "training.steps=1", "training.n_critic=1"])  # fmt: skip
    assert training.train(config) == 0
    assert (tmp_path / "default" / "samples" / "step_000001.png").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_run_on_the_gpu(tmp_path: Path, image_folder: Path) -> None:
    assert train(*small(tmp_path, image_folder, "training.steps=3", "runtime.device=cuda")) == 0
    assert metrics_of(tmp_path / "run")[-1]["memory/peak_gb"] > 0


# ---------------------------------------------------------------------------------------------------------- the command


def test_a_run_begins_with_what_fits_of_another(
    run_training, sample_run: Path, tmp_path: Path, image_folder: Path, without_slow_outputs
) -> None:
    def begin(source: Path, *options: str) -> Any:
        return run_training(*small(tmp_path, image_folder, f"training.init_from={source}", *options))

    fitting = ("training.steps=1", "video.height=8", "video.width=8", "vae.channels=[4,9]")
    for more in (["--dry-run"], []):
        done = begin(sample_run, *fitting, *more)
        assert done.returncode == 0, done.stderr
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"began with weights of {sample_run}"))
        numbers, new = re.fullmatch(r".*latest.pt: ([\d,]+ of [\d,]+); new are (.*) and \d+ more", line).groups()
        taken, whole = (int(number.replace(",", "")) for number in numbers.split(" of "))
        assert 0 < taken < whole
        assert new.startswith("generator.vae.encoder.stage2.conv.weight, ")
    other = ["output.name=other", "training.steps=1", "vae.channels=[5,9]", "critic.channels=[5,9]",
             "vae.latent_dim=7", "weight_predictor.hidden_size=9", "video.height=5"]  # fmt: skip
    for source, words in ((tmp_path / "nowhere.pt", "nowhere.pt: no such"), (image_folder, "holds no checkpoint"),
                          (sample_run, "latest.pt fits these networks")):  # fmt: skip
        assert_one_line(begin(source, *other), [words])
        assert re.search(f"^a run would be refused: .*{words}", begin(source, *other, "--dry-run").stdout, re.MULTILINE)
    assert not (tmp_path / "other").exists()


def test_print_config_prints_config_yaml(run_training: Callable[..., Any]) -> None:
    assert run_training("--print-config") == (0, (ROOT / "config.yaml").read_text(encoding="utf-8"), "")


def test_dry_run_shows_everything_and_writes_nothing(
    run_training: Callable[..., Any], tmp_path: Path, image_folder: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = run_training("--dry-run", *small(tmp_path, image_folder))
    assert done.returncode == 0, done.stderr
    generator, critic = training.build_networks(load_config(None, small(tmp_path, image_folder)))
    assert f"WEIGHT_UPDATE_SIZE {generator.head.update_size:,}" in done.stdout
    assert re.search(rf"critic\) +{sum(p.numel() for p in critic.parameters()):,}", done.stdout)
    for tensor in generator.spec.tensors:
        assert re.search(rf"{re.escape(tensor.name)} .* {tensor.size:,}", done.stdout)
    for words in ("24 images", "first batch (4, 3, 16, 16)", "  training.batch_size: 4   (default 16)\n"):
        assert words in done.stdout
    assert "loss.beta" not in done.stdout
    assert "  loss.beta: 1.0\n" in run_training("--dry-run", "-v", *small(tmp_path, image_folder)).stdout
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("old")
    done = run_training("--dry-run", *small(tmp_path, image_folder))
    assert done.returncode == 0, done.stderr  # where a run would be refused too
    for words in ("WEIGHT_UPDATE_SIZE", "would be refused", "output.name=run-2"):
        assert words in done.stdout


@pytest.mark.usefixtures("without_slow_outputs")
def test_dry_run_knows_a_run_that_is_there(run_training: Callable[..., Any], tmp_path: Path, image_folder: Path):
    images, run = Path(shutil.copytree(image_folder, tmp_path / "images")), tmp_path / "run"
    command = small(tmp_path, images, "training.steps=2", "output.checkpoint_every=1")
    assert train(*command) == 0
    (run / "checkpoints" / "step_000002.pt").write_bytes(b"damaged")
    (run / "run.lock").write_text("process 1 elsewhere")
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for arguments, words in ((["training.steps=9"], (" for 8 steps\n", "000002.pt: damaged", f"go on in {run}/")),
                             (["--accept-changes", "loss.beta=2"], ("changed setting: loss.beta 1.0 -> 2.0",)),
                             (["training.steps=1"], (f"{run} is finished: 1 steps",))):  # fmt: skip
        shown = run_training("--dry-run", *command, *arguments).stdout
        assert all(word in shown for word in words), shown
    refusals = {name: run_training("--dry-run", *command, name).stdout for name in ("vae.latent_dim=7", "loss.beta=2")}
    next(images.rglob("*.png")).unlink()
    refusals["loss.beta=1"] = run_training("--dry-run", *command).stdout  # as it was
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    for name, shown in refusals.items():
        assert f"a run would be refused: {refused(*command, name)}\n" in shown


@pytest.mark.parametrize("options", [["--dry-run"], ["training.steps=3", "output.log_every=1"]])
def test_a_closed_pipe_stops_nothing(options: list[str], tmp_path: Path, image_folder: Path) -> None:
    process = start_command("training.py", *small(tmp_path, image_folder, *options))
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    assert "--dry-run" in options or final(tmp_path / "run")["step"] == 3


def test_ctrl_c_saves_and_exits_with_130_and_lines_are_plain(tmp_path: Path, image_folder: Path) -> None:
    arguments = small(tmp_path, image_folder, "training.steps=1000000", "output.log_every=1")
    process = start_command("training.py", *arguments, stderr=subprocess.STDOUT,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    before = list(itertools.takewhile(lambda line: not line.startswith("step 3/"), process.stdout))
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(timeout=300) == 130
    assert re.match(r"step 2/1000000  .* images/s, .* left$", before[-1])
    assert "stopped by SIGINT after step" in rest
    assert "Traceback" not in rest
    assert "\r" not in "".join(before) + rest  # no bar where output is no terminal
    step = final(tmp_path / "run")["step"]
    assert step >= 3
    assert (tmp_path / "run" / "samples" / f"step_{step:06d}.png").exists()


@pytest.mark.parametrize("storage", ["data.memory_gb=4", "data.memory_gb=0"])
@pytest.mark.usefixtures("without_slow_outputs")
def test_a_broken_image_is_named_or_listed_once(
    storage: str, run_training: Callable[..., Any], tmp_path: Path, image_folder: Path
) -> None:
    for path in image_folder.rglob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "bad one.png").write_bytes(b"\x89PNG no image")
    arguments = ["training.steps=6", "output.log_every=1", storage]
    assert_one_line(run_training(*small(tmp_path, tmp_path, *arguments)), ["bad one.png", "data.on_broken=skip"])
    done = run_training(*small(tmp_path, tmp_path, *arguments, "data.on_broken=skip", name="other"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("skipped 1 broken images, 1 in all") == 1
    assert (tmp_path / "other" / "skipped.txt").read_text().count("bad one.png") == 1

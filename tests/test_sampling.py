"""Images and videos from a checkpoint: what a seed means, and every kind of video against its definition."""

import doctest
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import T, frames_of, same
from PIL import Image

import sampling
from checkpoints import load_checkpoint
from sampling import Sampler, catmull_rom, latent_path, load_sampler
from video_synth import MOTIONS, Motion


def test_the_documented_example_runs(sample_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").symlink_to(sample_run.parent)
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(sampling) == (0, 6)  # of 6 examples none fails
    assert Image.open("three.png").size == (3 * 64 + 8, 64)


def test_a_checkpoint_alone_rebuilds_everything(sample_run: Path, tmp_path: Path, sampler: Sampler) -> None:
    path = shutil.copyfile(sample_run / "checkpoints" / "latest.pt", tmp_path / "alone.pt")
    before = torch.random.get_rng_state()
    other = load_sampler(path)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's random state stays as it was
    saved = load_checkpoint(path)["generator_ema"]
    assert all(torch.equal(value.cpu(), saved[name]) for name, value in other.generator.state_dict().items())
    assert same(sampler.decode(sampler.inputs([3])), other.decode(other.inputs([3])))


def test_a_seed_means_the_same_image_wherever_it_stands(sampler: Sampler) -> None:
    many, one = sampler.inputs(range(20)), sampler.inputs([7])
    assert torch.equal(many.z[7], one.z[0])
    assert torch.equal(many.motion.phases[7], one.motion.phases[0])
    assert torch.equal(many.motion.noise[7], one.motion.noise[0])
    sampler.generator.double()  # where rounding cannot hide what the rest of a batch does
    x_many, x_one = (
        sampler.decode(some._replace(z=some.z.double(), motion=Motion(*(part.double() for part in some.motion))))
        for some in (many, one)
    )
    assert (x_many.x_fake[7] - x_one.x_fake[0]).abs().max() < 1e-10
    assert (x_many.x_fake[7] - x_many.x_fake[8]).abs().max() > 0.05
    assert (x_many.x_fake - x_many.x_base).abs().mean() > 0.01
    assert many.names[7] == "seed_000007"


def test_a_walk_through_latent_space_is_closed_smooth_and_typical(sampler: Sampler) -> None:
    for count in (2, 3, 4, 5):
        points = torch.randn(500, count, 200, generator=torch.Generator().manual_seed(count))
        path = torch.stack([latent_path(points, count * t / 60) for t in range(61)], dim=1)
        assert torch.allclose(path[:, 0], path[:, -1], atol=1e-5)
        for index in range(count):
            assert torch.allclose(latent_path(points, index), points[:, index], atol=1e-5)
        assert (path.norm(dim=2).mean(dim=0) / 200**0.5 - 1).abs().max() < 0.01  # no shrinking between the points
        speed = path.diff(dim=1).norm(dim=2).mean(dim=0)
        assert speed.max() < 3 * speed.mean()
    walk = list(sampler.latent_walk([4, 5], 21, keyframes=3))
    assert len(walk) == 21
    assert (walk[7].x_base - walk[14].x_base).abs().mean() > 0.01  # at keyframes
    assert torch.allclose(walk[0].x_fake, sampler.decode(sampler.inputs([4, 5])).x_fake, atol=1e-5)
    assert (walk[0].x_base - walk[10].x_base).abs().mean() > 0.01


def test_the_synthetic_video_is_the_one_that_the_gru_encodes(sampler: Sampler) -> None:
    inputs, generator = sampler.inputs(range(2)), sampler.generator
    x_base = sampler.decode(inputs).x_base
    expected = generator.synthesizer(x_base, inputs.motion, full_size=True)
    shown = frames_of(sampler.synthetic(inputs, 2 * T, noise=False))
    assert torch.allclose(shown[:, :T], expected, atol=1e-6)
    assert torch.allclose(shown[:, T:], expected, atol=1e-5)
    noise = (frames_of(sampler.synthetic(inputs, T)) - expected).std().item()
    assert 0.5 * 0.02 < noise < 1.2 * 0.02


def test_motion_can_be_set(sampler: Sampler) -> None:
    def video(frames: int = T, speed: float = 1, **strengths: float) -> torch.Tensor:
        sampler.set_motion(strengths, speed)
        return frames_of(sampler.synthetic(sampler.inputs([1]), frames))

    none = dict.fromkeys(MOTIONS, 0.0)
    still = video(**none)
    assert (still - still[:, :1]).abs().max() == 0
    changes = [(video(**none | {"brightness": value}) - still).abs().mean().item() for value in (0.1, 0.2)]
    assert 0 < 1.5 * changes[0] < changes[1]
    assert torch.allclose(video(T // 2, speed=2), video()[:, ::2], atol=1e-5)


def test_the_first_period_is_what_training_decodes(sampler: Sampler) -> None:
    inputs, generator = sampler.inputs(range(3)), sampler.generator
    with torch.no_grad():
        output = generator(inputs.z, inputs.motion)
        states = generator.continue_video(output, inputs.motion, 0, T)
        expected = generator.decode_frames(output.features, states, torch.arange(T + 1).expand(3, -1))
    video = frames_of(sampler.weight_driven(inputs, 3 * T))
    assert torch.allclose(video[:, : T + 1], expected, atol=1e-5)
    assert torch.allclose(video[:, 0], output.x_fake, atol=1e-5)
    assert video.shape[1] == 3 * T
    assert video.diff(dim=1).abs().mean(dim=(2, 3, 4)).min() > 1e-4  # it moves to the end


def test_a_rollout_encodes_its_own_frames(sampler: Sampler) -> None:
    inputs, generator = sampler.inputs(range(2)), sampler.generator
    driven, rollout = (frames_of(sampler.weight_driven(inputs, 12, rollout_after=k)) for k in (None, 5))
    assert torch.equal(driven[:, :5], rollout[:, :5])
    assert (driven[:, 5:] - rollout[:, 5:]).abs().mean() > 1e-4
    with torch.no_grad():  # by hand, from the frames themselves
        features = generator.features(inputs.z)
        x_base = generator.decode_base(features)
        first = torch.nn.functional.interpolate(x_base, size=(8, 8), mode="area")[:, None]
        # The image, one period of its video, 5 frames more; then the rollout's own frames from number 5 on.
        video = generator.synthesizer(x_base, inputs.motion, torch.arange(T + 5).expand(2, -1))
        fed_back = torch.nn.functional.interpolate(rollout[:, 5:-1].flatten(0, 1), size=(8, 8), mode="area")
        states, _ = generator.predictor.encode(torch.cat([first, video, fed_back.unflatten(0, (2, 6))], dim=1))
        expected = generator.decode_frames(features, states, torch.arange(T, T + 12).expand(2, -1))
        assert torch.allclose(rollout, expected, atol=1e-4)


@pytest.mark.parametrize("rollout_after", [None, 4])
def test_every_speed_follows_the_same_path_of_weights(sampler: Sampler, rollout_after: int | None) -> None:
    inputs = sampler.inputs(range(2))

    def video(speed: float, frames: int) -> torch.Tensor:
        sampler.set_motion(sampler.generator.synthesizer.strengths, speed)
        after = rollout_after and round(rollout_after / speed)
        return frames_of(sampler.weight_driven(inputs, frames, rollout_after=after))

    path = video(1, 4 * T)
    assert torch.allclose(video(2, 2 * T), path[:, ::2], atol=1e-6)
    slow, slower = video(0.5, 4 * T), video(0.1, 100)
    assert torch.allclose(slow[:, ::2], path[:, : 2 * T], atol=1e-6)
    assert torch.allclose(slower[:, ::10], path[:, :10], atol=1e-6)
    # Between two predictions the weights are interpolated: no frame stands still or jumps.
    steps, own = (frames.diff(dim=1).abs().mean(dim=(0, 2, 3, 4)) for frames in (slower, path[:, :11]))
    per_prediction = steps[:90].unflatten(0, (9, 10)).sum(dim=1)
    assert (per_prediction / own[:9] - 1).abs().max() < 0.3
    assert steps[:90].unflatten(0, (9, 10)).max() < 0.3 * own.max()


def test_catmull_rom_on_a_circle_and_a_line() -> None:
    def point(number: torch.Tensor) -> torch.Tensor:
        angle = number * 2 * math.pi / 8
        return torch.stack([angle.cos(), angle.sin()], dim=-1)

    four = list(point(torch.arange(-1.0, 3)).unbind(0))
    for fraction in (0.0, 0.25, 0.5, 0.9, 1.0):
        assert torch.allclose(catmull_rom(four, fraction), point(torch.tensor(fraction)), atol=0.01)
    assert torch.equal(catmull_rom(four, 0.0), four[1])
    assert torch.equal(catmull_rom(four, 1.0), four[2])
    line = [torch.tensor([float(value)]) for value in (2, 4, 6, 8)]
    assert catmull_rom(line, 0.25).item() == pytest.approx(4.5)


@pytest.mark.parametrize("frames", [3 * T, 10])
def test_a_loop_leads_from_its_last_frame_to_its_first(sampler: Sampler, frames: int) -> None:
    inputs = sampler.inputs(range(4))
    sampler.set_whole_periods(frames)
    assert frames % sampler.period == pytest.approx(0, abs=1e-9)
    video = frames_of(sampler.weight_driven(inputs, frames + 1, loop=True))
    step = video.diff(dim=1).abs().mean()
    assert (video[:, frames] - video[:, 0]).abs().mean() < 0.05 * step
    cold = frames_of(sampler.weight_driven(inputs, frames + 1))  # a GRU without warm-up doesn't close the loop
    assert (cold[:, frames] - cold[:, 0]).abs().mean() > 0.5 * step


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_rollout_of_2000_frames_takes_constant_memory(sampler: Sampler) -> None:
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    early = 0.0
    rollout = sampler.weight_driven(sampler.inputs(range(16)), 2000, rollout_after=T)
    for count, frame in enumerate(rollout, start=1):  # noqa: B007
        early = resident() if count == 200 else early
    assert count == 2000
    assert frame.isfinite().all()
    assert not frame.requires_grad
    assert resident() - early < 10  # MB; the frames themselves are 98

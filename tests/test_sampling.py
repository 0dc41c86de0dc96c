"""Pictures and videos from a checkpoint, in Python: each seed its own, every video as defined, rolled on or closed."""

import doctest
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import T, frames_of
from PIL import Image

import sampling
from checkpoints import load_checkpoint
from sampling import Sampler, between, latent_path, load_sampler, weight_driven_frames
from video_files import read_video
from video_synth import Motion, MotionStrengths

# ------------------------------------------------------------------------------------------------------------- pictures


def test_the_example_in_the_documentation_runs(
    drawing_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").symlink_to(drawing_run.parent)
    monkeypatch.chdir(tmp_path)
    failures, attempted = doctest.testmod(sampling)
    assert (failures, attempted) == (0, 8)
    assert Image.open("three.png").size == (3 * 64 + 8, 64)
    assert read_video("rolling.mp4").shape == (24, 128, 448, 3)


def test_a_checkpoint_alone_rebuilds_everything(drawing_run: Path, tmp_path: Path, sampler: Sampler) -> None:
    alone = shutil.copyfile(drawing_run / "checkpoints" / "latest.pt", tmp_path / "alone.pt")
    before = torch.random.get_rng_state()
    other = load_sampler(alone)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's random numbers are the caller's
    saved = load_checkpoint(alone)["generator_ema"]
    assert all(torch.equal(value, saved[name]) for name, value in other.generator.state_dict().items())
    for x, y in zip(sampler.draw(sampler.subjects([3])), other.draw(other.subjects([3])), strict=True):
        assert torch.equal(x, y)


def test_a_seed_means_the_same_picture_wherever_it_stands(sampler: Sampler) -> None:
    many, one = sampler.subjects(range(20)), sampler.subjects([7])
    assert torch.equal(many.z[7], one.z[0])
    assert torch.equal(many.motion.phases[7], one.motion.phases[0])
    assert torch.equal(many.motion.grain[7], one.motion.grain[0])
    sampler.generator.double()  # where rounding cannot hide what the rest of a batch does
    x_many, x_one = (
        sampler.draw(some._replace(z=some.z.double(), motion=Motion(*(part.double() for part in some.motion))))
        for some in (many, one)
    )
    assert (x_many.x_fake[7] - x_one.x_fake[0]).abs().max() < 1e-10
    assert (x_many.x_fake[7] - x_many.x_fake[8]).abs().max() > 0.05
    assert (x_many.x_fake - x_many.x_base).abs().mean() > 0.01
    assert many.names[7] == "seed_000007"


def test_a_walk_through_latent_space_is_closed_smooth_and_typical(sampler: Sampler) -> None:
    for stops in (2, 3, 4, 5):
        points = torch.randn(500, stops, 200, generator=torch.Generator().manual_seed(stops))
        path = torch.stack([latent_path(points, stops * t / 60) for t in range(61)], dim=1)
        assert torch.allclose(path[:, 0], path[:, -1], atol=1e-5)
        for stop in range(stops):
            assert torch.allclose(latent_path(points, stop), points[:, stop], atol=1e-5)
        assert (path.norm(dim=2).mean(dim=0) / 200**0.5 - 1).abs().max() < 0.01  # no shrinking between the points
        speed = (path[:, 1:] - path[:, :-1]).norm(dim=2).mean(dim=0)
        assert speed.max() < 3 * speed.mean()
    walk = list(sampler.latent_walk([4, 5], 20, stops=3))
    assert len(walk) == 20
    start = sampler.draw(sampler.subjects([4, 5]))
    assert torch.allclose(walk[0].x_fake, start.x_fake, atol=1e-5)
    assert (walk[0].x_base - walk[10].x_base).abs().mean() > 0.01


# ----------------------------------------------------------------------------------------------------- synthetic videos


def test_the_synthetic_video_is_the_one_that_is_watched(sampler: Sampler) -> None:
    subjects = sampler.subjects(range(2))
    generator = sampler.generator
    x_base = sampler.draw(subjects).x_base
    expected = generator.synthesizer(x_base, subjects.motion, full_size=True)
    shown = frames_of(sampler.synthetic(subjects, 2 * T, grain=False))
    assert torch.allclose(shown[:, :T], expected, atol=1e-6)
    assert torch.allclose(shown[:, T:], expected, atol=1e-5)
    grain = (frames_of(sampler.synthetic(subjects, T)) - expected).std().item()
    assert 0.5 * 0.02 < grain < 1.2 * 0.02


def test_motion_can_be_set(sampler: Sampler) -> None:
    def moved(**strengths: float) -> torch.Tensor:
        sampler.set_motion(MotionStrengths(**(dict.fromkeys(generate_kinds(), 0.0) | strengths)))
        return frames_of(sampler.synthetic(sampler.subjects([1]), T))

    def generate_kinds() -> list[str]:
        return ["shift", "zoom", "rotation", "brightness", "contrast", "noise"]

    still = moved()
    assert (still - still[:, :1]).abs().max() == 0
    changes = [(moved(brightness=strength) - still).abs().mean().item() for strength in (0.1, 0.2)]
    assert 0 < 1.5 * changes[0] < changes[1]
    sampler.set_motion(MotionStrengths(), speed=2)
    fast = frames_of(sampler.synthetic(sampler.subjects([1]), T // 2))
    sampler.set_motion(MotionStrengths(), speed=1)
    assert torch.allclose(fast, frames_of(sampler.synthetic(sampler.subjects([1]), T))[:, ::2], atol=1e-5)


# ------------------------------------------------------------------------------------------------- weight-driven videos


def test_the_period_after_the_video_is_what_training_draws(sampler: Sampler) -> None:
    subjects = sampler.subjects(range(3))
    generator = sampler.generator
    with torch.no_grad():
        output = generator(subjects.z, subjects.motion)
        states = generator.watch_on(output, subjects.motion, torch.arange(0), T)
        expected = generator.draw_frames(output.features, states)
    drawn = frames_of(sampler.weight_driven(subjects, 3 * T))
    assert torch.allclose(drawn[:, : T + 1], expected, atol=1e-5)
    assert torch.allclose(drawn[:, 0], output.x_fake, atol=1e-5)
    assert drawn.shape[1] == 3 * T
    assert (drawn[:, 1:] - drawn[:, :-1]).abs().mean(dim=(2, 3, 4)).min() > 1e-4  # alive to the end


def test_the_frame_loop_needs_no_sampler(sampler: Sampler) -> None:
    subjects = sampler.subjects([0])
    (frame,) = weight_driven_frames(sampler.generator, subjects.z, subjects.motion, 1)
    assert frame.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("warm_up", [0, -1])
def test_a_video_without_warm_up_is_refused_and_not_taken_for_the_default(sampler: Sampler, warm_up: int) -> None:
    subjects = sampler.subjects([0])
    with pytest.raises(ValueError, match=f"warm_up must be 1 or more, but is {warm_up}"):
        next(weight_driven_frames(sampler.generator, subjects.z, subjects.motion, 1, warm_up=warm_up))


def test_rolling_on_feeds_the_drawn_frames_back(sampler: Sampler) -> None:
    subjects, generator = sampler.subjects(range(2)), sampler.generator
    driven, rolled = (frames_of(sampler.weight_driven(subjects, 12, roll_after=k)) for k in (None, 5))
    assert torch.equal(driven[:, :5], rolled[:, :5])
    assert (driven[:, 5:] - rolled[:, 5:]).abs().mean() > 1e-4
    with torch.no_grad():  # by hand, from the frames themselves
        features = generator.features(subjects.z)
        x_base = generator.draw_base(features)
        picture = torch.nn.functional.interpolate(x_base, size=(8, 8), mode="area")[:, None]
        # The picture, one period of its video, 5 frames more; then its own frames from number 5 on.
        watched = generator.synthesizer(x_base, subjects.motion, torch.arange(T + 5).expand(2, -1))
        fed_back = torch.nn.functional.interpolate(rolled[:, 5:-1].flatten(0, 1), size=(8, 8), mode="area")
        states, _ = generator.predictor.watch(torch.cat([picture, watched, fed_back.unflatten(0, (2, 6))], dim=1))
        assert torch.allclose(rolled, generator.draw_frames(features, states[:, T:]), atol=1e-4)


@pytest.mark.parametrize("roll_after", [None, 4])
def test_another_speed_goes_along_the_same_path_of_weights(sampler: Sampler, roll_after: int | None) -> None:
    subjects = sampler.subjects(range(2))

    def video(speed: float, frames: int) -> torch.Tensor:
        sampler.set_motion(sampler.generator.synthesizer.strengths, speed)
        return frames_of(sampler.weight_driven(subjects, frames, roll_after=roll_after and round(roll_after / speed)))

    path = video(1, 4 * T)
    assert torch.allclose(video(2, 2 * T), path[:, ::2], atol=1e-6)
    slow, slower = video(0.5, 4 * T), video(0.1, 100)
    assert torch.allclose(slow[:, ::2], path[:, : 2 * T], atol=1e-6)
    assert torch.allclose(slower[:, ::10], path[:, :10], atol=1e-6)
    # Between two predictions the weights are, too: no frame stands still or leaps.
    steps, own = (frames.diff(dim=1).abs().mean(dim=(0, 2, 3, 4)) for frames in (slower, path[:, :11]))
    per_prediction = steps[:90].unflatten(0, (9, 10)).sum(dim=1)
    assert (per_prediction / own[:9] - 1).abs().max() < 0.3
    assert steps[:90].unflatten(0, (9, 10)).max() < 0.3 * own.max()


def test_between_points_of_a_circle() -> None:
    def point(place: torch.Tensor) -> torch.Tensor:
        angle = place * 2 * math.pi / 8
        return torch.stack([angle.cos(), angle.sin()], dim=-1)

    four = list(point(torch.arange(-1.0, 3)).unbind(0))
    for part in (0.0, 0.25, 0.5, 0.9, 1.0):
        assert torch.allclose(between(four, part), point(torch.tensor(part)), atol=0.01)
    assert torch.equal(between(four, 0.0), four[1])
    assert torch.equal(between(four, 1.0), four[2])
    line = [torch.tensor([float(place)]) for place in (2, 4, 6, 8)]
    assert between(line, 0.25).item() == pytest.approx(4.5)


@pytest.mark.parametrize("frames", [3 * T, 10])
def test_a_loop_leads_from_its_last_frame_to_its_first(sampler: Sampler, frames: int) -> None:
    subjects = sampler.subjects(range(4))
    sampler.set_whole_periods(frames)
    assert frames % sampler.period == pytest.approx(0, abs=1e-9)
    video = frames_of(sampler.weight_driven(subjects, frames + 1, loop=True))
    step = (video[:, 1:] - video[:, :-1]).abs().mean()
    assert (video[:, frames] - video[:, 0]).abs().mean() < 0.05 * step
    cold = frames_of(sampler.weight_driven(subjects, frames + 1))  # that of a GRU that has just begun doesn't
    assert (cold[:, frames] - cold[:, 0]).abs().mean() > 0.5 * step


def test_2000_rolled_frames_in_flat_memory(sampler: Sampler) -> None:
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here to read the process's memory from")
    early = 0.0
    rolled = sampler.weight_driven(sampler.subjects(range(16)), 2000, roll_after=T)
    for count, frame in enumerate(rolled, start=1):  # noqa: B007
        early = resident() if count == 200 else early
    assert count == 2000
    assert frame.isfinite().all()
    assert not frame.requires_grad
    assert resident() - early < 10  # MB; the frames themselves are 98

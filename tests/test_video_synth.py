"""The synthetic video: smooth, bounded, repeatable, differentiable, and off when told so."""

import dataclasses

import pytest
import torch
from conftest import run_command
from hypothesis import given, settings
from hypothesis import strategies as st

import video_synth
from video_files import read_video
from video_synth import MotionStrengths, VideoSynthesizer, synthesize_video

STILL = MotionStrengths(0, 0, 0, 0, 0, 0)
NAMES = [strength.name for strength in dataclasses.fields(MotionStrengths)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(batch: int = 3, side: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.rand(batch, channels, side, side, generator=seeded(5)) * 0.6 + 0.2


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    frames=st.integers(1, 6),
    channels=st.sampled_from([1, 3]),
    height=st.sampled_from([None, 4, 9, 16]),
    width=st.sampled_from([None, 5, 16]),
    values=st.lists(st.floats(0, 0.9), min_size=6, max_size=6),
)
def test_any_strengths_and_sizes_give_values_in_range(batch, frames, channels, height, width, values) -> None:
    strengths = MotionStrengths(*values[:2], values[2] * 200, *values[3:])
    video = synthesize_video(torch.rand(batch, channels, 16, 16), frames, strengths, seeded(), height, width)
    assert video.shape == (batch, frames, channels, height or 16, width or 16)
    assert video.min() >= 0
    assert video.max() <= 1


def test_no_motion_gives_exact_copies() -> None:
    x = pictures()
    video = synthesize_video(x, 5, STILL, seeded())
    assert torch.equal(video, x[:, None].expand(-1, 5, -1, -1, -1))


@pytest.mark.parametrize("name", NAMES)
def test_each_motion_alone_changes_the_picture_more_when_stronger(name: str) -> None:
    x = pictures()
    unit = {"rotation": 5.0}.get(name, 0.05)
    changes = []
    for factor in (1, 4):
        strengths = dataclasses.replace(STILL, **{name: unit * factor})
        changes.append((synthesize_video(x, 8, strengths, seeded()) - x[:, None]).square().mean().item())
    assert 0 < changes[0] < changes[1]


def test_the_same_seed_gives_the_same_video_and_another_another() -> None:
    x = pictures()
    assert torch.equal(synthesize_video(x, generator=seeded(1)), synthesize_video(x, generator=seeded(1)))
    assert not torch.equal(synthesize_video(x, generator=seeded(1)), synthesize_video(x, generator=seeded(2)))


def test_a_video_depends_on_its_own_picture_and_motion_alone() -> None:
    synthesizer = VideoSynthesizer(4)
    x = pictures(4)
    motion = synthesizer.draw_motion(x, seeded())
    alone = synthesizer(x[2:3], type(motion)(*(part[2:3] for part in motion)))
    assert torch.allclose(synthesizer(x, motion)[2:3], alone, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_paths_are_smooth_and_closed(name: str) -> None:
    """Neighbouring frames, the last and the first too, differ far less than frames drawn at random would."""
    strengths = dataclasses.replace(STILL, **{name: {"rotation": 20.0}.get(name, 0.2)})
    x = torch.nn.functional.interpolate(pictures(8, 8), size=(32, 32), mode="bilinear")
    video = synthesize_video(x, 32, strengths, seeded())
    step = (video - video.roll(1, dims=1)).square().mean(dim=(0, 2, 3, 4)).sqrt()
    far = (video - video.roll(16, dims=1)).square().mean().sqrt()
    assert step.max() < 0.4 * far
    assert step[0] < 1.5 * step[1:].max()  # from the last frame back to the first


def test_shift_moves_by_that_share_of_the_picture() -> None:
    """A bright square's centre stays within ± shift and comes near to it, in both directions."""
    x = torch.zeros(16, 1, 64, 64)
    x[:, :, 28:36, 28:36] = 1
    video = synthesize_video(x, 64, dataclasses.replace(STILL, shift=0.2), seeded())
    places = torch.arange(64) + 0.5
    mass = video.sum(dim=(2, 3, 4))
    for marginal in (video.sum(dim=(2, 3)), video.sum(dim=(2, 4))):  # along x, along y
        centre = (marginal * places).sum(-1) / mass / 64 - 0.5
        assert centre.abs().max() < 0.2 + 1e-3
        assert centre.max() > 0.14
        assert centre.min() < -0.14


def test_zoom_changes_the_area_by_its_square() -> None:
    x = torch.zeros(8, 1, 64, 64)
    x[:, :, 24:40, 24:40] = 1
    video = synthesize_video(x, 64, dataclasses.replace(STILL, zoom=0.3), seeded())
    scale = (video.sum(dim=(2, 3, 4)) / 16**2).sqrt()
    assert scale.min() > 0.7 - 0.02
    assert scale.max() < 1.3 + 0.02
    assert scale.max() > 1.2


def test_rotation_turns_by_degrees_and_keeps_the_shape_in_a_wide_video() -> None:
    """A bar's axis turns within ± rotation; in a half-height video the same turn is seen in squeezed pixels."""
    x = torch.zeros(8, 1, 64, 64)
    x[:, :, 30:34, 12:52] = 1

    def angles(height: int) -> torch.Tensor:
        video = synthesize_video(x, 48, dataclasses.replace(STILL, rotation=30), seeded(), height=height)
        rows = ((torch.arange(height) + 0.5) / height - 0.5)[:, None]
        columns = ((torch.arange(64) + 0.5) / 64 - 0.5)[None, :]
        weight = video[:, :, 0] / video[:, :, 0].sum(dim=(2, 3), keepdim=True)
        xx, yy, xy = ((weight * part).sum(dim=(2, 3)) for part in (columns**2, rows**2, rows * columns))
        return torch.rad2deg(0.5 * torch.atan2(2 * xy, xx - yy))

    square, wide = angles(64), angles(32)
    assert 24 < square.abs().max() < 30.5
    assert torch.allclose(square, wide, atol=2)


def test_rotation_of_a_wide_picture_keeps_lengths_in_pixels() -> None:
    """A bar of 12 by 4 pixels in a 32 x 64 picture: its second moments, in pixels, turn without being stretched."""
    x = torch.zeros(8, 1, 32, 64)
    x[:, :, 14:18, 26:38] = 1
    video = synthesize_video(x, 48, dataclasses.replace(STILL, rotation=90), seeded())
    rows, columns = (torch.arange(32) - 15.5)[:, None], (torch.arange(64) - 31.5)[None, :]
    weight = video[:, :, 0] / video[:, :, 0].sum(dim=(2, 3), keepdim=True)
    spread = (weight * (rows**2 + columns**2)).sum(dim=(2, 3))
    assert torch.allclose(spread, torch.full_like(spread, (12**2 + 4**2 - 2) / 12), rtol=0.1)
    assert (weight * rows**2).sum(dim=(2, 3)).max() > 8  # it does turn: lying flat this is 1.25


def test_brightness_and_contrast_follow_their_formulas() -> None:
    x = pictures()
    bright = synthesize_video(x, 16, dataclasses.replace(STILL, brightness=0.2), seeded())
    ratio = bright / x[:, None]
    assert torch.allclose(ratio, ratio.mean(dim=(2, 3, 4), keepdim=True).expand_as(ratio), atol=1e-5)
    assert (ratio - 1).abs().max() <= 0.2 + 1e-5
    hard = synthesize_video(x, 16, dataclasses.replace(STILL, contrast=0.2), seeded())
    assert torch.allclose(hard.mean(dim=(2, 3, 4)), x.mean(dim=(1, 2, 3))[:, None].expand(-1, 16), atol=1e-5)


def test_noise_has_its_strength_at_every_frame() -> None:
    x = torch.full((2, 3, 64, 64), 0.5)
    video = synthesize_video(x, 8, dataclasses.replace(STILL, noise=0.05), seeded())
    spread = (video - 0.5).std(dim=(2, 3, 4))
    assert torch.allclose(spread, torch.full_like(spread, 0.05), rtol=0.05)


def test_frames_at_given_times_are_the_videos_own() -> None:
    synthesizer = VideoSynthesizer(6)
    x = pictures()
    motion = synthesizer.draw_motion(x, seeded())
    whole = synthesizer(x, motion)
    times = torch.tensor([[0, 5], [3, 3], [1, 2]])
    some = synthesizer(x, motion, times)
    for row in range(3):
        assert torch.allclose(some[row], whole[row, times[row]], atol=1e-6)
    assert torch.allclose(synthesizer(x, motion, times + 6), some, atol=1e-4)  # once round the closed path


def test_gradients_match_finite_differences() -> None:
    # The clamp has kinks at 0 and 1; these pictures stay away from them.
    synthesizer = VideoSynthesizer(3, MotionStrengths(0.1, 0.1, 10, 0.1, 0.1, 0.01), 5, 4)
    x = (torch.rand(1, 1, 8, 8, generator=seeded(3), dtype=torch.float64) * 0.4 + 0.3).requires_grad_()
    motion = synthesizer.draw_motion(x, seeded())
    motion = type(motion)(*(part.double() for part in motion))
    assert torch.autograd.gradcheck(lambda x: synthesizer(x, motion), (x,))


# ----------------------------------------------------------------------------------------------- the preview command


def test_preview_writes_a_clip_of_any_picture(tmp_path, picture_folder) -> None:
    picture = next(picture_folder.rglob("*.png"))
    arguments = [str(picture), "clip.webp", "--size", "24", "--frames", "5", "--noise", "0"]
    done = run_command("video_synth.py", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "clip.webp: 5 frames" in done.stdout
    assert len(read_video(tmp_path / "clip.webp")) == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.png", "clip.mp4"], ["nowhere.png"]),
        ([__file__, "clip.mp4"], ["cannot read the image", "test_video_synth.py"]),
        (["{picture}", "clip.xyz"], ["clip.xyz", ".mp4"]),
        (["{picture}", "clip.mp4", "--zoom", "1.5"], ["--zoom", "below 1"]),
        (["{picture}", "clip.mp4", "--frames", "0"], ["--frames", "1 to"]),
    ],
)
def test_preview_answers_bad_input_in_one_line(arguments, words, tmp_path, picture_folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    picture = str(next(picture_folder.rglob("*.png")))
    assert video_synth.main([one.format(picture=picture) for one in arguments]) == 2
    told = capsys.readouterr().err
    assert len(told.strip().splitlines()) == 1, told
    for word in words:
        assert word in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "noise"])
def test_an_amplitude_of_zero_takes_a_motion_from_its_picture_alone(name: str) -> None:
    strengths = dataclasses.replace(STILL, **{name: {"rotation": 20.0}.get(name, 0.2)})
    synthesizer, x = VideoSynthesizer(4, strengths), pictures()
    motion = synthesizer.draw_motion(x, seeded())
    full = synthesizer(x, motion)
    paths = [index for index, path in enumerate(video_synth.PATHS) if path.startswith(name)]
    assert paths
    motion.amplitudes[1, paths] = 0
    found = synthesizer(x, motion)
    assert torch.allclose(found[1], x[1].expand(4, -1, -1, -1), atol=1e-6)
    assert torch.equal(found[[0, 2]], full[[0, 2]])
    assert (full - x[:, None]).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-3
    motion.amplitudes[1, paths] = 0.25
    moved = (synthesizer(x, motion)[1] - x[1]).square().mean()
    assert 0 < moved < 0.5 * (full[1] - x[1]).square().mean()


def test_amplitudes_vary_where_they_are_asked_to_and_are_full_elsewhere() -> None:
    synthesizer, x = VideoSynthesizer(4), pictures(200)
    varied, full = (synthesizer.draw_motion(x, seeded(), varied=kind) for kind in (True, False))
    assert torch.equal(full.amplitudes, torch.ones(200, len(video_synth.PATHS)))
    assert 0 <= varied.amplitudes.min() < 0.01
    assert 0.99 < varied.amplitudes.max() <= 1
    assert varied.amplitudes.mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(varied.phases, full.phases)
    assert torch.equal(varied.grain, full.grain)

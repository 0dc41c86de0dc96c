"""The synthetic video: smooth, bounded, repeatable, differentiable, and without motion where strengths are zero."""

import math

import pytest
import torch
from conftest import generator_of
from hypothesis import given, settings
from hypothesis import strategies as st

from generator import motion_rows
from video_synth import MOTIONS, Motion, MotionKind, VideoSynthesizer

STATIC = dict.fromkeys(MOTIONS, 0.0)


def only(name: str, strength: float) -> dict[str, float]:
    """The strengths of one motion without the others."""
    return STATIC | {name: strength}


def strong(name: str) -> dict[str, float]:
    return only(name, 20.0 if name == "rotation" else 0.2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(batch: int = 3, side: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.rand(batch, channels, side, side, generator=seeded(5)) * 0.6 + 0.2


def motion_of(synthesizer: VideoSynthesizer, x: torch.Tensor, **options: bool):
    return synthesizer.sample_motion(len(x), x.shape[1:], None, seeded(), **options)


def synthesize_video(images, frames=8, strengths=None, generator=None, height=None, width=None) -> torch.Tensor:
    """Images (B, C, H, W) to videos (B, T, C, height, width), of random motions."""
    synthesizer = VideoSynthesizer(frames, strengths, height, width)
    return synthesizer(images, synthesizer.sample_motion(len(images), images.shape[1:], images.device, generator))


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3), frames=st.integers(1, 6), channels=st.sampled_from([1, 3]),
    height=st.sampled_from([None, 4, 9, 16]), width=st.sampled_from([None, 5, 16]),
    values=st.lists(st.floats(0, 0.9), min_size=len(MOTIONS), max_size=len(MOTIONS)),
)  # fmt: skip
def test_any_strengths_and_sizes_give_values_in_range(batch, frames, channels, height, width, values) -> None:
    strengths = dict(zip(MOTIONS, values, strict=True)) | {"rotation": values[2] * 200}
    video = synthesize_video(torch.rand(batch, channels, 16, 16), frames, strengths, seeded(), height, width)
    assert video.shape == (batch, frames, channels, height or 16, width or 16)
    assert 0 <= video.min() <= video.max() <= 1


def test_no_motion_gives_exact_copies() -> None:
    x = some_images()
    video = synthesize_video(x, 5, STATIC, seeded())
    assert torch.equal(video, x[:, None].expand(-1, 5, -1, -1, -1))
    smaller = torch.nn.functional.avg_pool2d(x, (4, 2))[:, None].expand(-1, 5, -1, -1, -1)
    assert torch.allclose(synthesize_video(x, 5, STATIC, height=4, width=8), smaller, atol=1e-6)


def test_a_video_depends_on_its_own_image_and_motion_alone() -> None:
    synthesizer = VideoSynthesizer(4)
    x = some_images(4)
    motion = motion_of(synthesizer, x)
    alone = synthesizer(x[2:3], motion_rows(motion, slice(2, 3)))
    assert torch.allclose(synthesizer(x, motion)[2:3], alone, atol=1e-6)


@pytest.mark.parametrize("name", MOTIONS)
def test_paths_are_smooth_and_closed(name: str) -> None:
    """Neighbouring frames, the last and the first too, differ far less than frames sampled at random would."""
    x = torch.nn.functional.interpolate(some_images(8, 8), size=(32, 32), mode="bilinear")
    video = synthesize_video(x, 32, strong(name), seeded())
    step = (video - video.roll(1, dims=1)).square().mean(dim=(0, 2, 3, 4)).sqrt()
    far = (video - video.roll(16, dims=1)).square().mean().sqrt()
    assert step.max() < 0.4 * far
    assert step[0] < 1.5 * step[1:].max()  # from the last frame back to the first


def test_beyond_its_border_an_image_goes_on_as_its_edge() -> None:
    """One that grows brighter to the right and downwards does so in every frame, and has no other values."""
    ramp = torch.linspace(0.2, 0.8, 16).expand(8, 1, 16, 16)
    video = synthesize_video((ramp + ramp.mT) / 2, 8, only("shift", 0.4), seeded())
    assert min(video.diff(dim=dim).min() for dim in (-2, -1)) > -1e-6
    assert video.amin(dim=(2, 3, 4)).max() > 0.3  # some show little else than an edge


def test_rotation_turns_by_degrees_and_keeps_lengths_in_a_wide_image_and_a_squeezed_video() -> None:
    """A bar of 40 by 4 pixels in a 48 × 96 image: its axis turns within ± rotation, and its second moments stay."""
    x = torch.zeros(8, 1, 48, 96)
    x[:, :, 22:26, 28:68] = 1

    def axis(height: int) -> torch.Tensor:
        video = synthesize_video(x, 48, only("rotation", 30), seeded(), height=height)
        rows = (48 * ((torch.arange(height) + 0.5) / height - 0.5))[:, None]  # in the image's pixels
        columns = (torch.arange(96) - 47.5)[None, :]
        weight = video[:, :, 0] / video[:, :, 0].sum(dim=(2, 3), keepdim=True)
        xx, yy, xy = ((weight * part).sum(dim=(2, 3)) for part in (columns**2, rows**2, rows * columns))
        assert torch.allclose(xx + yy, torch.full_like(xx, (40**2 + 4**2 - 2) / 12), rtol=0.05)
        return torch.rad2deg(0.5 * torch.atan2(2 * xy, xx - yy))

    turned, squeezed = axis(48), axis(24)
    assert 24 < turned.abs().max() < 30.5
    assert torch.allclose(turned, squeezed, atol=2)


def paths_by_hand(synthesizer: VideoSynthesizer, motion: Motion) -> dict[str, torch.Tensor]:
    """Motion -> its path (B, T) in float64, as the module's docstring has it; of a shift's two the last."""
    s = torch.arange(synthesizer.frames).double() / synthesizer.frames
    phases = motion.phases.double()[..., None]  # (B, paths, 2, 1)
    first, second = (torch.sin(2 * math.pi * ((k + 1) * s + phases[:, :, k])) for k in (0, 1))
    paths = motion.amplitudes.double()[..., None] * (0.75 * first + 0.25 * second)
    return dict(zip(synthesizer.paths, paths.unbind(1), strict=True)) | {"shift x": paths[:, 0]}


def test_brightness_and_contrast_follow_their_formulas() -> None:
    x = some_images()
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    for name, start in (("brightness", torch.zeros_like(mean)), ("contrast", mean)):
        synthesizer = VideoSynthesizer(5, only(name, 0.2))
        motion = motion_of(synthesizer, x)
        motion.amplitudes[:] = torch.rand(motion.amplitudes.shape)
        factor = 1 + 0.2 * paths_by_hand(synthesizer, motion)[name][..., None, None, None]
        expected = start[:, None] + factor * (x - start)[:, None]
        assert torch.allclose(synthesizer(x, motion).double(), expected, atol=1e-6)


def test_shift_zoom_and_rotation_together_take_a_point_to_its_place() -> None:
    """In a wide image a square's centre, from the image's: turned and enlarged, then shifted."""
    x, centre = torch.zeros(8, 1, 64, 128), torch.tensor([[20.0], [8.0]]).double()  # x, y in pixels
    x[:, :, 36:44, 80:88] = 1
    synthesizer = VideoSynthesizer(6, STATIC | {"shift": 0.1, "zoom": 0.2, "rotation": 40.0})
    motion = motion_of(synthesizer, x)
    video, path = synthesizer(x, motion)[:, :, 0].double(), paths_by_hand(synthesizer, motion)
    angle, size = torch.deg2rad(40 * path["rotation"]), 1 + 0.2 * path["zoom"]
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)], -2)
    shift = torch.stack([12.8 * path["shift x"], 6.4 * path["shift"]], -1)
    expected = size[..., None] * (turn @ centre)[..., 0] + shift
    places = torch.stack(torch.meshgrid(torch.arange(128) - 63.5, torch.arange(64) - 31.5, indexing="xy"))
    found = torch.einsum("bthw,chw->btc", video, places.double()) / video.sum(dim=(2, 3))[..., None]
    assert (found - expected).abs().max() < 0.3  # pixels
    assert expected.std(dim=(0, 1)).min() > 4


def test_noise_has_its_strength_at_every_frame() -> None:
    x = torch.full((2, 3, 64, 64), 0.5)
    video = synthesize_video(x, 8, only("noise", 0.05), seeded())
    spread = (video - 0.5).std(dim=(2, 3, 4))
    assert torch.allclose(spread, torch.full_like(spread, 0.05), rtol=0.05)


def test_frames_at_given_times_are_the_videos_own() -> None:
    synthesizer = VideoSynthesizer(6)
    x = some_images()
    motion = motion_of(synthesizer, x)
    whole = synthesizer(x, motion)
    times = torch.tensor([[0, 5], [3, 3], [1, 2]])
    some = synthesizer(x, motion, times)
    for row in range(3):
        assert torch.allclose(some[row], whole[row, times[row]], atol=1e-6)
    assert torch.allclose(synthesizer(x, motion, times + 6), some, atol=1e-4)  # once round the closed path


def test_gradients_match_finite_differences() -> None:
    # The clamp has kinks at 0 and 1; these images stay away from them.
    synthesizer = VideoSynthesizer(3, {"brightness": 0.1, "noise": 0.01}, 5, 4)
    x = (torch.rand(1, 1, 8, 8, generator=seeded(3), dtype=torch.float64) * 0.4 + 0.3).requires_grad_()
    motion = motion_of(synthesizer, x)
    motion = type(motion)(*(part.double() for part in motion))
    assert torch.autograd.gradcheck(lambda x: synthesizer(x, motion), (x,))


@pytest.mark.parametrize("name", [name for name in MOTIONS if name != "noise"])
def test_an_amplitude_of_zero_takes_a_motion_from_its_image_alone(name: str) -> None:
    synthesizer, x = VideoSynthesizer(4, strong(name)), some_images()
    motion = motion_of(synthesizer, x)
    full = synthesizer(x, motion)
    paths = [index for index, path in enumerate(synthesizer.paths) if path == name]
    motion.amplitudes[1, paths] = 0
    video = synthesizer(x, motion)
    assert torch.allclose(video[1], x[1].expand(4, -1, -1, -1), atol=1e-6)
    assert torch.equal(video[[0, 2]], full[[0, 2]])
    assert (full - x[:, None]).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-3
    motion.amplitudes[1, paths] = 0.25
    moved = (synthesizer(x, motion)[1] - x[1]).square().mean()
    assert 0 < moved < 0.5 * (full[1] - x[1]).square().mean()


def test_a_new_motion_is_one_entry_in_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """It acts with its own default strength along its own path, can be switched off, and is in a generator's videos."""
    before = len(VideoSynthesizer().paths)
    fog = MotionKind(0.4, apply=lambda video, amount: video + (1 - video) * amount.abs())
    monkeypatch.setitem(MOTIONS, "fog", fog)
    synthesizer, x = VideoSynthesizer(4, STATIC), some_images()
    motion = motion_of(synthesizer, x)
    assert motion.phases.shape == (3, before + 1, 2)
    video = synthesizer(x, motion)
    amount = ((video - x[:, None]) / (1 - x[:, None])).flatten(2)
    assert torch.allclose(amount, amount[..., :1].expand_as(amount), atol=1e-5)
    assert 0 <= amount.min() < 0.3 < amount.max() <= 0.4
    motion.amplitudes[1, -1] = 0
    assert torch.equal(synthesizer(x, motion)[[0, 2]], video[[0, 2]])
    assert torch.equal(synthesizer(x, motion)[1], x[1].expand(4, -1, -1, -1))
    assert torch.equal(VideoSynthesizer(4, STATIC | {"fog": 0})(x, motion), x[:, None].expand_as(video))
    generator = generator_of(*(f"video.{name}=0" for name in STATIC))
    video = generator(torch.randn(2, 6), generator.sample_motion(2)).video
    assert (video[:, 0] - video[:, 1]).abs().amax(dim=(1, 2, 3)).min() > 0.01

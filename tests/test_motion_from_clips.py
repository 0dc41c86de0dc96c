"""What clips teach: motion fields that move any image, states that follow a clip, their losses, and whole videos."""

import numpy as np
import pytest
import torch
from conftest import SMALL, frames_of, generator_of, networks_and_noise, random_images
from torch.nn import functional

from configuration import Config, load_config
from distributed import World
from generator import Generator, build_synthesizer, motion_rows
from losses import clip_losses, vae_loss
from model_definitions import NORM_EPSILON, WeightPredictorRNN
from sampling import weight_driven_frames
from training_step import NoiseSampler, generator_objective
from video_synth import FIELD_FRAMES, FIELD_SIDE, MOTIONS, TrainingClips, VideoSynthesizer, fit_fields

CLIPS = ["data.clips=somewhere", "video.source=clips", "video.motions=5", "loss.rollout_frames=2",
         "loss.video_frames=3", "video.height=8", "video.width=8"]  # fmt: skip
"""Windows of 6 frames: an image, T = 3 and 2 more; two of them in a batch of 4."""
STILL = dict.fromkeys(MOTIONS, 0.0)


def windows(count: int = 2, frames: int = 6, seed: int = 3) -> torch.Tensor:
    return torch.rand(count, frames, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def smooth(count: int, size: int = 16) -> torch.Tensor:
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    return functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0, 1)


def moving(*fields: torch.Tensor, frames: int = FIELD_FRAMES) -> VideoSynthesizer:
    """Moves by these fields alone, of (FIELD_FRAMES, 2, FIELD_SIDE²) each."""
    synthesizer = VideoSynthesizer(frames, STILL, motions=len(fields))
    synthesizer.fields.copy_(torch.stack(fields))
    return synthesizer


def swing(x: float, y: float) -> torch.Tensor:
    """All of the image goes by so much, in units of half a side, and back."""
    amount = (1 - torch.linspace(0, 2 * torch.pi, FIELD_FRAMES + 1)[:-1].cos()) / 2
    return (amount[:, None] * torch.tensor([x, y]))[..., None].expand(-1, -1, FIELD_SIDE**2)


def test_a_constant_field_shifts_the_image_by_whole_pixels() -> None:
    x = torch.rand(2, 3, 16, 16)
    field = torch.zeros(FIELD_FRAMES, 2, FIELD_SIDE**2)
    field[1, 0], field[2, 1] = 2 * 3 / 16, -2 * 2 / 16  # from 3 pixels further right; from 2 further up
    synthesizer = moving(field)
    video = synthesizer(x, synthesizer.sample_motion(2, (3, 16, 16)), torch.tensor([[0.0, 1.0, 2.0]] * 2))
    assert torch.allclose(video[:, 0], x, atol=0.03)
    assert torch.allclose(video[:, 1, :, :, :13], x[..., 3:], atol=0.03)
    assert torch.allclose(video[:, 2, :, 2:], x[..., :14, :], atol=0.03)
    assert torch.allclose(video[:, 1, :, :, 13:], x[..., 15:].expand(-1, -1, -1, 3), atol=0.03)  # the edge goes on


def test_which_field_and_where_in_its_period() -> None:
    fields = torch.randn(3, FIELD_FRAMES, 2, FIELD_SIDE**2)
    synthesizer = moving(*fields, frames=6)  # four points of the field a frame
    motion = synthesizer.sample_motion(4, (3, 16, 16))
    motion = motion._replace(choice=torch.tensor([[0.0], [1 / 3 + 0.001], [2 / 3 + 1 / 6], [0.9999]]))
    times = torch.tensor([[0.0, 1.0, 1.125, 7.0]]).expand(4, -1)
    found = synthesizer.field(motion, times).flatten(3)
    assert torch.allclose(found[0], torch.stack([fields[0, 0], fields[0, 4], fields[0, 4:6].mean(0), fields[0, 4]]))
    assert torch.allclose(found[1, 0], torch.lerp(fields[1, 0], fields[1, 1], 0.003 * FIELD_FRAMES), atol=1e-4)
    assert torch.allclose(found[2, 0], fields[2, 12], atol=1e-3)
    assert torch.allclose(found[3, 0], fields[2, 0], atol=0.1)  # the end of the period leads to its beginning


def test_sampled_motions_are_all_of_them_and_begin_at_the_image() -> None:
    for count in (1, 3, 100, 128, 1000):
        synthesizer = VideoSynthesizer(8, STILL, motions=count)
        choice = synthesizer.sample_motion(40 * count, (3, 16, 16)).choice * count
        assert (choice - choice.floor()).max() < 0.001
        assert torch.equal(choice.long().unique(), torch.arange(count))


def test_fitted_fields_find_the_motion_that_clips_were_made_with() -> None:
    images = smooth(3)
    made = moving(swing(0.2, 0.0), swing(0.0, -0.3), swing(0.0, 0.0))
    motion = made.sample_motion(3, (3, 16, 16))._replace(choice=torch.tensor([[0.0], [0.34], [0.67]]))
    clips = made(images, motion)
    fields, share = fit_fields(clips)
    assert fields.shape == made.fields.shape
    assert not fields.requires_grad
    assert share > 0.9
    assert torch.equal(fields[:, 0], torch.zeros_like(fields[:, 0]))
    for row in (0, 1):
        middle, expected = fields[row, 12].mean(1), made.fields[row, 12].mean(1)
        assert torch.allclose(middle, expected, atol=0.08), row
    assert fields[2].abs().max() < 0.01
    other = moving(*fields)
    again = other(images, other.sample_motion(3, (3, 16, 16))._replace(choice=motion.choice))
    assert (again - clips).square().sum() < 0.15 * (clips[:, :1] - clips).square().sum()
    assert -1e9 < fit_fields(images[:, None].expand(-1, FIELD_FRAMES, -1, -1, -1))[1] <= 1  # nothing moves


def test_a_period_of_a_clip_that_repeats_or_not_is_short_or_long() -> None:
    def ramp(length: int) -> torch.Tensor:
        return torch.arange(length, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)

    frames = [ramp(length) for length in (24, 12, 7, 100, 60)]
    clips = TrainingClips(frames, [True, True, False, True, False], window=3, count=2, seed=0)
    periods = (255 * clips.periods(9)[:, :, 0, 0, 0]).round().int().numpy()
    forth_and_back = np.abs((np.arange(24) + 12) % 24 - 12)
    assert periods[0].tolist() == list(range(24))
    assert periods[1].tolist() == [k // 2 for k in range(24)]
    assert periods[2].tolist() == [min(k // 2, 12 - k // 2) for k in range(24)]
    assert (periods[3:] == forth_and_back).all()
    assert torch.equal(clips.periods(2)[1], clips.periods(9)[2])  # taken evenly


def test_images_move_as_clips_do_alone_or_in_the_six_ways_as_well() -> None:
    alone, synthesizer = (build_synthesizer(load_config(None, [*SMALL, *CLIPS, *more]))
                          for more in ([], ["video.source=both"]))  # fmt: skip
    assert (alone.strengths["shift"], synthesizer.strengths["shift"]) == (0, 0.1)
    other = synthesizer.with_strengths({"shift": 0.3})
    assert (other.strengths["shift"], synthesizer.strengths["shift"]) == (0.3, 0.1)
    assert other.fields is synthesizer.fields
    assert build_synthesizer(load_config(None, SMALL)).fields is None


def test_without_clips_a_seed_means_the_motion_that_it_did() -> None:
    samplers = [NoiseSampler(load_config(None, [*SMALL, *more]), torch.device("cpu"))
                for more in ([], ["data.clips=x", "video.source=both"])]  # fmt: skip
    for one, other in zip(*((x.critic(3, 0), x.generator(3)) for x in samplers), strict=True):
        assert all(map(torch.equal, one.motion._replace(choice=other.motion.choice), other.motion))
        assert len(other.motion.choice.unique()) == len(other.motion.choice) > 1


def test_changes_are_what_differs_from_the_first_frame_over_its_deviation() -> None:
    norm, frames = WeightPredictorRNN(12, 5, 4, 1, changes=True).norm, torch.rand(2, 3, 12)
    shown, _ = norm(frames, None)
    deviation = (frames[:, 0].var(1, correction=0) + NORM_EPSILON).sqrt()[:, None]
    assert torch.allclose(shown[:, 0], (frames[:, 0] - frames[:, 0].mean(1, keepdim=True)) / deviation, atol=1e-5)
    for t in (1, 2):
        assert torch.allclose(shown[:, t], (frames[:, t] - frames[:, 0]) / deviation, atol=1e-5)


def clip_noise(*overrides: str) -> tuple[Config, Generator, torch.nn.Module, NoiseSampler, torch.Tensor]:
    config, generator, critic, noise = networks_and_noise(*CLIPS, *overrides)
    return config, generator, critic, noise, windows(noise.clip_count, noise.window)


def test_losses_of_clips_are_those_of_each_clip_and_frame_by_itself() -> None:
    _, generator, _, sampler, frames = clip_noise("video.contrast=0")
    noise = sampler.generator(1, frames)
    clips, changes = noise.clips, generator.clip_changes
    assert changes.fields is None
    assert changes.strengths["shift"] > 0
    with torch.no_grad():
        found = clip_losses(generator, noise, clips)
        expected = []
        for row in range(2):
            motion = motion_rows(clips.motion, slice(row, row + 1))
            x = torch.cat([changes(one[None], motion, torch.zeros(1, 1), full_size=True)[0] for one in frames[row]])
            mu, logvar = generator.vae.encode(x[:1])
            z = mu + (0.5 * logvar).exp() * clips.posterior[row]
            reconstruction = (generator.vae.decode(z) - x[0]).square().sum()
            states, _ = generator.predictor.encode(generator.downscale(x)[None, :-1])
            features, times = generator.features(z), clips.times[row].tolist()
            base = generator.decode_base(features)
            drawn = [generator.decode(features, generator.predict(states[:, t])) for t in times]
            errors = [(frame - (base + x[t + 1] - x[0]).clamp(0, 1)).square().sum()
                      for t, frame in zip(times, drawn, strict=True)]  # fmt: skip
            kl = vae_loss(x[:1], x[:1], mu, logvar)[1]
            update = generator.predict(states[:, -1]).mean_square()
            expected.append(torch.stack([reconstruction, kl, torch.stack(errors).mean(), update]))
    assert (frames[0] - x).abs().max() > 0.05  # the clip was changed as a whole
    assert torch.allclose(torch.stack(found), torch.stack(expected).mean(0), rtol=1e-4)


@pytest.mark.parametrize("start", [0, 0.5])
def test_half_of_the_losses_is_of_clips_and_moving_costs_theta_nothing(start: float) -> None:
    config, generator, critic, sampler, frames = clip_noise(f"weight_predictor.start={start}", "training.steps=10")
    noise, weights = sampler.generator(1, frames), config.loss
    loss, _ = generator_objective(generator, critic, random_images(0), noise, config)
    total = (weights.lambda_adv * loss.adversarial + weights.lambda_base * loss.adversarial_base
             + 0.1 * (loss.reconstruction + weights.beta * loss.kl) + weights.lambda_update * loss.update
             + weights.lambda_video * loss.video)  # fmt: skip
    assert loss.total.item() == pytest.approx(total.item(), rel=1e-5)
    without, _ = generator_objective(generator, critic, random_images(0), noise._replace(clips=None), config)
    of_clips = clip_losses(generator, noise, noise.clips)
    for name in ("reconstruction", "kl", "video", "update"):
        mean = (getattr(without, name) + getattr(of_clips, name)) / 2
        assert getattr(loss, name).item() == pytest.approx(mean.item(), rel=1e-5), name
    if start:  # no update has begun
        assert loss.video == loss.update == 0
        return
    named = dict(generator.named_parameters())
    gradients = torch.autograd.grad(of_clips.video, [*named.values()], allow_unused=True)
    reached = {name for name, x in zip(named, gradients, strict=True) if x is not None and x.any()}
    assert "predictor.to_update.weight" in reached
    assert not [name for name in reached if name.startswith("vae.")]


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_clips_of_a_batch(size: int) -> None:
    config = load_config(None, [*SMALL, *CLIPS, "training.batch_size=6"])
    whole = NoiseSampler(config, torch.device("cpu"))
    frames = windows(3, whole.window)
    _, generator, _, _ = networks_and_noise(*CLIPS)
    noise = whole.generator(5, frames)
    with torch.no_grad():
        expected = torch.stack(clip_losses(generator, noise, noise.clips))
        parts = []
        for rank in range(size):
            sampler = NoiseSampler(config, torch.device("cpu"), World(rank, size))
            part = sampler.generator(5, frames[rank::size])
            assert torch.equal(part.clips.posterior, noise.clips.posterior[rank::size])
            parts.append(torch.stack(clip_losses(generator, part, part.clips)))
    assert torch.allclose(torch.stack(parts).mean(0), expected, rtol=1e-4)


def test_generated_videos_follow_the_learned_motion_of_their_seed() -> None:
    generator = generator_of(*CLIPS)
    generator.synthesizer.fields.copy_(torch.stack([swing(0.1 * k, 0.05) for k in range(5)]))
    z, motion = torch.randn(2, 6), generator.sample_motion(2)
    with torch.no_grad():
        frames = frames_of(weight_driven_frames(generator, z, motion, 6, warm_up=0))
        features = generator.features(z)
        x_base = generator.decode_base(features)
        shown = generator.downscale(x_base)[:, None]
        shown = torch.cat([shown, generator.synthesizer(x_base, motion, torch.arange(7.0).expand(2, -1))], dim=1)
        states, _ = generator.predictor.encode(shown)
        expected = generator.decode_frames(features, states, torch.arange(1, 7).expand(2, -1))
        others = motion._replace(choice=(motion.choice + 0.4) % 1)
        assert (frames_of(weight_driven_frames(generator, z, others, 6, warm_up=0)) - frames).abs().max() > 1e-4
    assert torch.allclose(frames, expected, atol=1e-5)

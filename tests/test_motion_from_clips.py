"""What clips teach: the GRU's motion code, the states that follow a clip, their losses, and rollouts from an image."""

import itertools

import pytest
import torch
from conftest import SMALL, frames_of, generator_of, networks_and_noise, new_state, random_images
from torch.distributions import Normal, kl_divergence

from configuration import Config, load_config
from distributed import World
from generator import Generator, motion_rows
from losses import clip_losses, gaussian_kl
from model_definitions import NORM_EPSILON, WeightPredictorRNN
from sampling import weight_driven_frames
from step_runners import EagerSteps
from training import iteration
from training_step import NoiseSampler, generator_objective

CLIPS = ["data.clips=somewhere", "video.source=clips", "video.motion_dim=2", "loss.rollout_frames=2",
         "loss.rollout_fraction=0.5", "loss.video_frames=3", "video.height=8", "video.width=8"]  # fmt: skip
"""Windows of 6 frames: an image, T = 3 and 2 more; two of them in a batch of 4."""


def windows(count: int = 2, frames: int = 6, seed: int = 3) -> torch.Tensor:
    return torch.rand(count, frames, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------- the predictor


@pytest.mark.parametrize("changes", [False, True])
def test_a_video_encoded_frame_by_frame_gives_the_same_states_with_its_code(changes: bool) -> None:
    torch.manual_seed(0)
    predictor, video, code = WeightPredictorRNN(12, 5, 4, 2, 3, changes), torch.rand(2, 4, 3, 2, 2), torch.randn(2, 3)
    states, last = predictor.encode(video, code=code)
    state, each = None, []
    for t in range(4):
        hidden, state = predictor.encode(video[:, t : t + 1], state, code=code if state is None else None)
        each.append(hidden)
    assert torch.allclose(torch.cat(each, 1), states, atol=1e-6)
    assert torch.allclose(last.hidden, state.hidden, atol=1e-6)
    others, _ = predictor.encode(video, code=code + 1)
    assert ((others - states).abs().amax((0, 2)) > 1e-3).all()  # at every frame
    assert torch.equal(predictor.encode(video)[0], predictor.encode(video, code=torch.zeros(2, 3))[0])


def test_changes_are_what_differs_from_the_first_frame_over_its_deviation() -> None:
    norm, frames = WeightPredictorRNN(12, 5, 4, 1, 0, changes=True).norm, torch.rand(2, 3, 12)
    shown, _ = norm(frames, None)
    deviation = (frames[:, 0].var(1, correction=0) + NORM_EPSILON).sqrt()[:, None]
    assert torch.allclose(shown[:, 0], (frames[:, 0] - frames[:, 0].mean(1, keepdim=True)) / deviation, atol=1e-5)
    for t in (1, 2):
        assert torch.allclose(shown[:, t], (frames[:, t] - frames[:, 0]) / deviation, atol=1e-5)


def test_the_code_has_a_length_and_without_one_nothing_is_new() -> None:
    plain, coded = WeightPredictorRNN(12, 5, 4), WeightPredictorRNN(12, 5, 4, motion_dim=3)
    assert coded.gru.input_size == plain.gru.input_size + 3
    assert not hasattr(plain, "to_motion")
    mu, logvar = coded.read_motion(torch.rand(2, 4))
    assert mu.shape == logvar.shape == (2, 3)


def test_kl_is_that_of_normal_distributions() -> None:
    mu, logvar = torch.randn(2, 5, 3)
    expected = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(1).mean()
    assert gaussian_kl(mu, logvar).item() == pytest.approx(expected.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------ following clips


def follow(generator: Generator, clips: torch.Tensor, count: int, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        features = generator.features(generator.vae.encode(clips[:, 0])[0])
        return features, *generator.follow_clips(features, clips, noise, count)


def test_states_that_follow_a_clip_know_no_later_frame_but_through_the_code() -> None:
    generator, clips, noise = generator_of(*CLIPS), windows(), torch.zeros(2, 2)
    torch.nn.init.zeros_(generator.predictor.to_motion.weight)  # no clip says anything
    _, states, _, _ = follow(generator, clips, 0, noise)
    assert states.shape == (2, 5, 8)
    for t in range(1, 6):
        changed = clips.clone()
        changed[:, t] = 1 - changed[:, t]
        others = follow(generator, changed, 0, noise)[1]
        assert torch.equal(others[:, :t], states[:, :t])
        assert t == 5 or (others[:, t] - states[:, t]).abs().max() > 1e-4
    torch.nn.init.normal_(generator.predictor.to_motion.weight, std=3)
    _, own, mu, _ = follow(generator, clips, 0, noise)
    clips[:, 5] = 1 - clips[:, 5]
    _, others, mu_changed, _ = follow(generator, clips, 0, noise)
    assert (mu - mu_changed).abs().max() > 1e-4
    assert (others[:, 0] - own[:, 0]).abs().max() > 1e-5


def test_rolled_out_clips_encode_their_own_frames_after_the_first() -> None:
    generator, clips, noise = generator_of(*CLIPS), windows(), torch.randn(2, 2)
    features, states, mu, logvar = follow(generator, clips, 1, noise)
    code = mu + (0.5 * logvar).exp() * noise
    with torch.no_grad():
        hidden, state = generator.predictor.encode(generator.downscale(clips[:1, 0])[:, None], code=code[:1])
        for t in range(5):
            assert torch.allclose(states[:1, t], hidden[:, 0], atol=1e-5)
            frame = generator.downscale(generator.decode(features[:1], generator.predict(hidden[:, 0])))
            hidden, state = generator.predictor.encode(frame[:, None], state)
        watched, _ = generator.predictor.encode(generator.downscale(clips[1, :-1])[None], code=code[1:])
    assert torch.allclose(states[1:], watched, atol=1e-6)


def clip_noise(*overrides: str) -> tuple[Config, Generator, torch.nn.Module, NoiseSampler, torch.Tensor]:
    config, generator, critic, noise = networks_and_noise(*CLIPS, *overrides)
    return config, generator, critic, noise, windows(noise.clip_count, noise.window)


def test_losses_of_clips_are_those_of_each_clip_and_frame_by_itself() -> None:
    _, generator, _, sampler, frames = clip_noise("loss.rollout_fraction=0", "video.contrast=0")
    noise = sampler.generator(1, frames)
    clips = noise.clips
    with torch.no_grad():
        found = clip_losses(generator, noise, clips)
        expected = []
        for row in range(2):
            motion = motion_rows(clips.motion, slice(row, row + 1))
            x = torch.cat([generator.synthesizer(one[None], motion, torch.zeros(1, 1), full_size=True)[0]
                           for one in frames[row]])  # fmt: skip
            mu, logvar = generator.vae.encode(x[:1])
            z = mu + (0.5 * logvar).exp() * clips.posterior[row]
            reconstruction = (generator.vae.decode(z) - x[0]).square().sum()
            small = generator.downscale(x)[None]
            code_mu, code_logvar = generator.predictor.read_motion(generator.predictor.encode(small)[0][:, -1])
            code = code_mu + (0.5 * code_logvar).exp() * clips.code[row]
            states, _ = generator.predictor.encode(small[:, :-1], code=code)
            features, times = generator.features(z), clips.times[row].tolist()
            drawn = [generator.decode(features, generator.predict(states[:, t])) for t in times]
            errors = [(frame - x[t + 1]).square().sum() for t, frame in zip(times, drawn, strict=True)]
            kl = [gaussian_kl(mu, logvar), gaussian_kl(code_mu, code_logvar)]
            update = generator.predict(states[:, -1]).mean_square()
            expected.append(torch.stack([reconstruction, kl[0], torch.stack(errors).mean(), kl[1], update]))
    assert (frames[0] - x).abs().max() > 0.05  # the clip was changed as a whole
    assert torch.allclose(torch.stack(found), torch.stack(expected).mean(0), rtol=1e-4)


def test_every_part_of_the_loss_reaches_the_total_and_its_networks() -> None:
    config, generator, critic, sampler, frames = clip_noise()
    loss, _ = generator_objective(generator, critic, random_images(0), sampler.generator(1, frames), config)
    assert loss.motion > 0
    weights = config.loss
    total = (weights.lambda_adv * loss.adversarial + weights.lambda_base * loss.adversarial_base
             + 0.1 * (loss.reconstruction + weights.beta * loss.kl) + weights.lambda_update * loss.update
             + weights.lambda_video * loss.video + weights.lambda_motion * loss.motion)  # fmt: skip
    assert loss.total.item() == pytest.approx(total.item(), rel=1e-5)
    named = dict(generator.named_parameters())
    for part, silent in ((loss.video, ["vae."]), (loss.motion, ["vae.", "head."])):
        gradients = torch.autograd.grad(part, [*named.values()], allow_unused=True, retain_graph=True)
        reached = {
            name for name, gradient in zip(named, gradients, strict=True) if gradient is not None and gradient.any()
        }
        assert "predictor.to_motion.weight" in reached
        assert not [name for name in reached if name.startswith(tuple(silent))]


def test_where_no_update_has_begun_clips_teach_the_vae_alone() -> None:
    config, generator, critic, sampler, frames = clip_noise("weight_predictor.start=0.5", "training.steps=10")
    noise = sampler.generator(1, frames)
    loss, _ = generator_objective(generator, critic, random_images(0), noise, config)
    assert loss.video == loss.motion == 0
    without, _ = generator_objective(generator, critic, random_images(0), noise._replace(clips=None), config)
    reconstruction, kl, *_ = clip_losses(generator, noise, noise.clips)
    assert loss.reconstruction.item() == pytest.approx((without.reconstruction + reconstruction).item() / 2, rel=1e-5)
    assert loss.kl.item() == pytest.approx((without.kl + kl).item() / 2, rel=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_clips_of_a_batch(size: int) -> None:
    config = load_config(None, [*SMALL, *CLIPS, "training.batch_size=6"])
    whole = NoiseSampler(config, torch.device("cpu"))
    frames = windows(3, whole.window)
    _, generator, _, _ = networks_and_noise(*CLIPS)
    noise = whole.generator(5, frames)
    with torch.no_grad():
        expected = torch.stack(clip_losses(generator, noise, noise.clips._replace(rollout_count=0)))
        parts = []
        for rank in range(size):
            sampler = NoiseSampler(config, torch.device("cpu"), World(rank, size))
            part = sampler.generator(5, frames[rank::size])
            assert torch.equal(part.clips.code, noise.clips.code[rank::size])
            parts.append(torch.stack(clip_losses(generator, part, part.clips._replace(rollout_count=0))))
    assert torch.allclose(torch.stack(parts).mean(0), expected, rtol=1e-4)


def test_an_iteration_takes_the_next_clips_and_all_networks_learn() -> None:
    config = load_config(None, [*SMALL, *CLIPS])
    state = new_state(config)
    before = {name: value.clone() for name, value in state.tensors().items()}
    noise, taken = NoiseSampler(config, state.device), itertools.count()
    clips = (windows(noise.clip_count, noise.window, next(taken)) for _ in range(9))
    for step in (1, 2, 3):
        metrics = iteration(EagerSteps(state), noise, itertools.repeat(random_images(step)), step, clips)
        state.step = step
    assert next(taken) == 3
    assert metrics["generator/motion"] > 0
    unchanged = [name for name, value in state.tensors().items() if torch.equal(value, before[name])]
    assert all("calibration" in name for name in unchanged), unchanged


# ------------------------------------------------------------------------------------------------------------- rollouts


def test_generated_videos_are_rolled_out_from_the_image_in_training_and_at_generation() -> None:
    generator = generator_of(*CLIPS)
    z, motion = torch.randn(2, 6), generator.sample_motion(2)
    with torch.no_grad():
        output = generator(z, motion)
        frames = frames_of(weight_driven_frames(generator, z, motion, 6))
        hidden, state = generator.predictor.encode(generator.downscale(output.x_base)[:, None], code=motion.code)
        expected = []
        for _ in range(7):
            expected.append(generator.decode(output.features, generator.predict(hidden[:, 0])))
            hidden, state = generator.predictor.encode(generator.downscale(expected[-1])[:, None], state)
        others = frames_of(weight_driven_frames(generator, z, motion._replace(code=motion.code + 1), 6))
    assert torch.allclose(frames, torch.stack(expected[1:], 1), atol=1e-5)
    small = generator.downscale(torch.cat(expected[:3]))
    assert torch.allclose(output.video, small.unflatten(0, (3, 2)).transpose(0, 1), atol=1e-5)
    assert torch.allclose(output.x_fake, expected[3], atol=1e-5)
    assert (others - frames).abs().max() > 1e-4

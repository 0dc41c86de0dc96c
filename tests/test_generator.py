"""The one path that makes images: its parts in order, gradients, the weight-driven video, and the controls."""

from pathlib import Path

import pytest
import torch
from conftest import OFF, SMALL, generator_of, metrics_of, moved, networks_and_noise, small, small_generator, train
from torch.func import functional_call

import weight_updates
from checkpoints import load_checkpoint
from configuration import load_config
from generator import Generator, GeneratorOutput, motion_rows, state_rows
from losses import weight_driven_video_loss
from sampling import load_sampler, weight_driven_frames
from training import build_networks
from training_step import critic_objective, generator_objective
from video_synth import Motion, VideoSynthesizer
from weight_updates import HEADS

CPU = torch.device("cpu")
VIDEO = ["loss.lambda_video=1", "loss.rollout_frames=3", "loss.rollout_fraction=0.5", "loss.video_frames=4"]
BOUND = "weight_predictor.bound=0.5"


def all_times(states: torch.Tensor) -> torch.Tensor:
    """The numbers of all states (B, T, hidden_size), for each image: (B, T)."""
    return torch.arange(states.shape[1]).expand(len(states), -1)


def path_of(generator: Generator, batch: int = 4) -> tuple[torch.Tensor, Motion, GeneratorOutput]:
    """Latents, motions, and what the generator makes of them, without gradients."""
    torch.manual_seed(2)
    z, motion = torch.randn(batch, 6), generator.sample_motion(batch)
    with torch.no_grad():
        return z, motion, generator(z, motion)


# --------------------------------------------------------------------------------------------------------- the path


@pytest.mark.parametrize("head", HEADS)
def test_the_updated_image_is_the_base_image_before_training(head: str) -> None:
    _, _, output = path_of(small_generator(f"weight_predictor.head={head}"))
    assert not output.update.dense().numbers.any()
    assert torch.allclose(output.x_fake, output.x_base, atol=1e-6)


@pytest.mark.parametrize("layers", ["decoder.stage1.*", "decoder.*.weight", "decoder.stage2.bias"])
@pytest.mark.parametrize("head", HEADS)
def test_an_updated_image_is_decoded_with_changed_weights_whatever_its_batch(head: str, layers: str) -> None:
    generator = moved(small_generator(f"weight_predictor.head={head}", f"weight_predictor.layers=[{layers}]"), size=3)
    z, motion, output = path_of(generator)
    weights = dict(generator.vae.decoder.named_parameters())
    deltas = output.update.dense().numbers * generator.spec.expand(generator.spec.scales(weights))
    for row in range(4):
        changed = weights | {name: weights[name] + d for name, d in generator.spec.split(deltas[row]).items()}
        alone = functional_call(generator.vae.decoder, changed, (z[row : row + 1],), strict=True)
        assert torch.allclose(output.x_fake[row : row + 1], alone, atol=1e-5)
    assert (output.x_fake - output.x_base).abs().max() > 1e-3
    assert torch.allclose(output.x_fake[1:3], generator(z[1:3], motion_rows(motion, slice(1, 3))).x_fake, atol=1e-5)


def test_a_shared_update_is_one_for_the_batch() -> None:
    generator = generator_of("weight_predictor.sharing=shared", "weight_predictor.head=full", BOUND)
    _, _, output = path_of(generator)
    assert output.update.numbers.shape == (1, generator.spec.total_size)
    mean = generator.predictor.to_update(output.states[:, -1]).mean(0)
    assert torch.allclose(output.update.numbers[0], 0.5 * torch.tanh(mean / 0.5), atol=1e-6)
    frames = generator.decode_frames(output.features, output.states, all_times(output.states))
    assert torch.allclose(frames[:, -1], output.x_fake, atol=1e-6)


def test_the_frame_chooses_the_update() -> None:
    generator = generator_of()
    z, motion, output = path_of(generator, 3)
    frames = generator.decode_frames(output.features, output.states, all_times(output.states))
    assert frames.shape == (3, 3, 3, 16, 16)
    chosen = generator(z, motion, torch.tensor([0, 2, 1])).x_fake
    for row, frame in enumerate([0, 2, 1]):
        assert torch.allclose(chosen[row], frames[row, frame], atol=1e-5)
    assert torch.allclose(output.x_fake, frames[:, -1], atol=1e-5)
    assert (frames[:, 0] - frames[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("head", HEADS)
def test_gradients_reach_theta_and_the_gru_and_match_finite_differences(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, along random directions, through predictor, bound, decoder and critic."""
    _, generator, critic, _ = networks_and_noise(f"weight_predictor.head={head}", BOUND)
    generator, critic, z = generator.double(), critic.double(), torch.randn(3, 6).double()
    motion = Motion(*(part.double() for part in generator.sample_motion(3)))
    # A unit of measure, held while θ is nudged, as its gradient is.
    scales = generator.spec.scales(dict(generator.vae.decoder.named_parameters()))
    monkeypatch.setattr(weight_updates.UpdateSpec, "scales", lambda *_: scales)
    # What the GRU encodes is detached from θ: it is held too.
    x_base, encode_video = generator.vae.decode(z).detach(), generator.encode_video
    monkeypatch.setattr(generator, "encode_video", lambda _, *others: encode_video(x_base, *others))

    def loss() -> torch.Tensor:
        output = generator(z, motion)
        return output.update.mean_square() - critic(torch.cat([output.x_fake, output.x_base])).mean()

    unreached = ("vae.encoder.", "vae.to_")
    named = {name: weight for name, weight in generator.named_parameters() if not name.startswith(unreached)}
    for (name, weight), gradient in zip(named.items(), torch.autograd.grad(loss(), list(named.values())), strict=True):
        assert gradient.abs().max() > 0, name
        direction, losses = torch.randn_like(weight), []
        with torch.no_grad():
            for step in (1e-6, -2e-6, 1e-6):
                weight.add_(direction, alpha=step)
                losses.append(loss().item())
        slope = (losses[0] - losses[1]) / 2e-6
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-8), name


@pytest.mark.parametrize("detach", [True, False])
def test_video_detach_decides_whether_theta_is_reached_through_the_video(detach: bool) -> None:
    generator = generator_of(f"video.detach={detach}")
    x_base = torch.rand(2, 3, 16, 16, requires_grad=True)
    _, states, _ = generator.encode_video(x_base, generator.sample_motion(2))
    assert states.requires_grad
    (gradient,) = torch.autograd.grad(states.sum(), x_base, allow_unused=True)
    assert (gradient is None) == detach


def test_the_image_is_encoded_first_and_no_state_knows_a_later_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = small_generator("video.frames=4")
    _, motion, output = path_of(generator)
    videos, encode = [], generator.predictor.encode
    monkeypatch.setattr(generator.predictor, "encode", lambda video, **_: videos.append(video) or encode(video))
    _, states, _ = generator.encode_video(output.x_base, motion)
    assert torch.equal(videos[0], torch.cat([output.x_base[:, None], output.video], dim=1))
    assert torch.equal(states, output.states)
    for t in range(3):
        changed = output.video.clone()
        changed[:, t + 1] = 1 - changed[:, t + 1]
        monkeypatch.setattr(generator.synthesizer, "forward", lambda *_, changed=changed: changed)
        _, others, _ = generator.encode_video(output.x_base, motion)
        assert torch.allclose(others[:, : t + 1], states[:, : t + 1], atol=1e-6)
        assert (others[:, t + 1] - states[:, t + 1]).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------- after the video


def test_rollout_images_encode_their_own_frames_and_the_others_more_of_the_video(monkeypatch) -> None:
    generator = generator_of("video.frames=4", "video.height=8", BOUND, "video.noise=0.5")
    _, motion, output = path_of(generator)
    count, frames = 2, 6
    with torch.no_grad():
        states = generator.continue_video(output, motion, count, frames)
        assert states.shape == (4, frames + 1, 8)
        assert torch.equal(states[:, 0], output.states[:, -1])
        # The others by hand, in one go: the image, its video, and more of it.
        image, times = generator.downscale(output.x_base)[:, None], torch.arange(4 + frames).expand(4, -1)
        video = generator.synthesizer(output.x_base, motion, times)
        expected, _ = generator.predictor.encode(torch.cat([image, video], dim=1))
        assert torch.allclose(states[2:], expected[2:, 4:], atol=1e-5)
        # Rollouts: each encodes what it has decoded, under the noise that its video would have had.
        rollout, state = [output.states[:2, -1]], state_rows(output.predictor_state, slice(2))
        noise = generator.synthesizer.noise(motion, times, (8, 16))[:2, 4:]
        for k in range(frames):
            decoded = generator.decode(output.features[:2], generator.predict(rollout[-1]))
            frame = (generator.downscale(decoded) + noise[:, k]).clamp(0, 1)
            hidden, state = generator.predictor.encode(frame[:, None], state)
            rollout.append(hidden[:, 0])
        assert torch.allclose(states[:2], torch.stack(rollout, dim=1), atol=1e-5)
        forward = VideoSynthesizer.forward
        monkeypatch.setattr(VideoSynthesizer, "forward", lambda *arguments: 1 - forward(*arguments))
        changed = generator.continue_video(output, motion, count, frames)
    assert torch.equal(changed[:2], states[:2])
    assert (changed[2:, 1:] - states[2:, 1:]).abs().amax(dim=2).min() > 1e-3


@pytest.mark.parametrize("head", HEADS)
def test_a_rollout_in_training_is_the_one_that_samples_show(head: str) -> None:
    generator = generator_of(f"weight_predictor.head={head}", "video.noise=0", BOUND)
    z, motion, output = path_of(generator)
    with torch.no_grad():
        states = generator.continue_video(output, motion, 4, 7)
        expected = generator.decode_frames(output.features, states, all_times(states))
    sampled = torch.stack(list(weight_driven_frames(generator, z, motion, 8, rollout_after=0)), dim=1)
    assert torch.allclose(sampled, expected, atol=1e-5)
    assert (sampled[:, 1:] - sampled[:, :-1]).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------- the video's loss


@pytest.mark.parametrize("fraction", [0, 0.5, 1])
@pytest.mark.parametrize("head", HEADS)
def test_the_video_loss_reaches_the_predictor_and_never_theta(head: str, fraction: float) -> None:
    layers = "weight_predictor.layers=[decoder.stage2.*, decoder.stage1.*]"  # behind one that makes the features
    overrides = [*VIDEO, layers, f"weight_predictor.head={head}", f"loss.rollout_fraction={fraction}"]
    config, generator, _, sampler = networks_and_noise(*overrides)
    noise = sampler.generator(1)
    loss = weight_driven_video_loss(generator, generator(noise.z, noise.motion), noise, config)
    named = dict(generator.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    for name, gradient in zip(named, gradients, strict=True):
        if name.startswith("vae."):
            assert gradient is None, name
        else:
            assert gradient.abs().max() > 0, name


ARMS = {"off": [OFF], "full": [], "shared": ["weight_predictor.sharing=shared"]}


@pytest.mark.parametrize("head", ["full", "low_rank"])
@pytest.mark.parametrize("arm", ARMS)
def test_the_video_loss_of_every_arm_by_hand(arm: str, head: str) -> None:
    overrides = [*ARMS[arm], *VIDEO, f"weight_predictor.head={head}"]
    config, generator, critic, sampler = networks_and_noise(*overrides)
    noise, x_real = sampler.generator(1), torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        loss, output = generator_objective(generator, critic, x_real, noise, config)
        if arm == "off":  # nothing that could follow
            assert (output, noise.motion, loss.video, loss.update) == (None, None, 0, 0)
            return
        states = generator.continue_video(output, noise.motion, noise.rollout_count, 3)
        distances = []
        for image in range(4):
            row = slice(image, image + 1)
            for time in noise.video_times[image].tolist():
                update = generator.predict(states[:, time]).dense()  # of one, where it is shared
                own = update._replace(numbers=update.numbers[row if len(update.numbers) > 1 else slice(1)])
                frame = generator.decode(output.features[row], own)
                times = torch.tensor([[time + 3]])
                target = generator.synthesizer(
                    output.x_base[row], motion_rows(noise.motion, row), times, full_size=True
                )
                distances.append((frame - target[:, 0]).square().sum())
        config.loss.lambda_video = 0
        without, _ = generator_objective(generator, critic, x_real, noise, config)
    assert without.video == 0
    assert loss.total.item() == pytest.approx((without.total + loss.video).item(), rel=1e-5)
    assert loss.video.item() == pytest.approx(torch.stack(distances).mean().item(), rel=1e-4)
    assert loss.video > 0.1


# ------------------------------------------------------------------------------------------------------ the controls


def test_without_a_predictor_no_video_is_made_and_no_gru_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    _, generator, _, sampler = networks_and_noise(OFF)
    assert not any(isinstance(module, torch.nn.GRU) for module in generator.modules())
    monkeypatch.setattr(VideoSynthesizer, "forward", lambda *_: pytest.fail("a video was made"))
    assert sampler.generator(1).motion is None
    assert sampler.critic(1, 0).motion.noise.numel() == 0
    output = generator(torch.randn(4, 6), generator.sample_motion(4))
    assert torch.equal(output.video, output.x_base[:, None].expand(-1, 3, -1, -1, -1))
    assert output.x_fake is output.x_base
    assert len(output.update.dense().numbers) == 1
    assert not output.update.dense().numbers.any()


def test_an_update_that_is_off_is_scored_once_with_the_weight_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    config, generator, critic, noise = networks_and_noise(OFF, "loss.lambda_adv=0.7", "loss.lambda_base=1.1")
    x_real, scored, score = torch.rand(4, 3, 16, 16), [], critic.forward
    monkeypatch.setattr(critic, "forward", lambda x: scored.append(x) or score(x))
    loss, _ = generator_objective(generator, critic, x_real, numbers := noise.generator(1), config)
    assert [len(x) for x in scored] == [4]
    vae = config.loss.lambda_vae * (loss.reconstruction + config.loss.beta * loss.kl)
    assert torch.allclose(loss.total - vae, -1.8 * critic(generator.vae.decode(numbers.z)).mean(), rtol=1e-4)
    numbers = noise.critic(1, 0)
    assert numbers.base_count == 4
    loss = critic_objective(generator, critic, x_real, numbers, config)
    assert torch.allclose(loss.score_fake, critic(generator.vae.decode(numbers.z)), atol=1e-6)


def test_runs_of_one_seed_begin_alike_and_sample_the_same_numbers_with_and_without_updates() -> None:
    (full, full_critic), full_noise = build_networks(load_config(None, SMALL)), networks_and_noise()[3]
    generator, critic = build_networks(load_config(None, [*SMALL, OFF]))
    for network, expected in ((generator.vae, full.vae), (critic, full_critic)):
        for key, value in network.state_dict().items():
            assert torch.equal(value, expected.state_dict()[key]), key
    noise = networks_and_noise(OFF)[3]
    assert torch.equal(noise.critic(5, 1).epsilon, full_noise.critic(5, 1).epsilon)
    assert torch.equal(noise.generator(5).posterior, full_noise.generator(5).posterior)
    _, another = build_networks(load_config(None, [*SMALL, "training.seed=1"]))
    assert not torch.equal(another.to_score.weight, full_critic.to_score.weight)


@pytest.mark.usefixtures("without_slow_outputs")
def test_a_run_without_updates_trains_samples_and_goes_on(tmp_path: Path, image_folder: Path) -> None:
    overrides = small(tmp_path, image_folder, "training.steps=2", "output.log_every=1", OFF, "training.clip=1")
    assert train(*overrides) == 0
    run = tmp_path / "run"
    assert metrics_of(run)[-1]["update/relative_size"] == 0
    sampler = load_sampler(run, "cpu")
    inputs = sampler.inputs([0, 1])
    base, updated = sampler.decode(inputs)
    assert torch.equal(base, updated)
    assert torch.allclose(next(sampler.weight_driven(inputs, 3)), updated, atol=1e-5)
    assert train(*overrides, "training.steps=3") == 0
    assert load_checkpoint(run / "checkpoints" / "latest.pt")["step"] == 3

"""The weight-driven video in training: what the GRU watches and when, its own frames, and what its loss reaches."""

import pytest
import torch
from conftest import SMALL
from test_control_arms import ARMS, generator_of
from test_model_definitions import HEADS, moved, small_generator

from augmentation import DiffAugment
from configuration import load_config
from generator_path import Generator, GeneratorOutput
from model_definitions import build_discriminator
from objectives import following_loss, generator_objective
from random_draws import Draws
from sampling import weight_driven_frames
from video_synth import Motion, MotionStrengths, VideoSynthesizer
from weight_predictor import NORM_EPSILON, FirstFrameNorm

CPU = torch.device("cpu")
VIDEO = ["loss.lambda_video=1", "loss.own_frames=3", "loss.own_share=0.5", "loss.video_frames=4"]


# --------------------------------------------------------------------------------------------------- normalised frames


def test_frames_are_normalised_by_the_first_ones_statistics() -> None:
    torch.manual_seed(0)
    norm, frames = FirstFrameNorm(12).double(), torch.rand(2, 4, 12).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    found, statistics = norm(frames, None)
    for row in range(2):
        first = frames[row, 0]
        mean = first.sum() / 12
        deviation = ((first - mean).square().sum() / 12 + NORM_EPSILON).sqrt()
        for t in range(4):
            assert torch.allclose(found[row, t], (frames[row, t] - mean) / deviation * norm.weight + norm.bias)
    brighter = torch.cat([frames[:, :1], 1.5 * frames[:, 1:]], dim=1)  # a LayerNorm of each frame would not see it
    assert torch.equal(norm(brighter, None)[0][:, 0], found[:, 0])
    assert (norm(brighter, None)[0][:, 1:] - found[:, 1:]).abs().mean() > 0.1
    assert torch.equal(norm(frames[:, 2:], statistics)[0], found[:, 2:])
    assert not torch.allclose(norm(frames[:, 2:], None)[0], found[:, 2:])
    assert norm(torch.full((1, 2, 12), 0.5).double(), None)[0].isfinite().all()  # a blank picture


def test_watching_in_parts_is_watching_at_once_for_some_of_the_videos_too() -> None:
    predictor, video = small_generator().double().predictor, torch.rand(3, 6, 3, 16, 16).double()
    whole, end = predictor.watch(video)
    first, memory = predictor.watch(video[:, :2])
    second, last = predictor.watch(video[1:, 2:], memory.rows(slice(1, None)))
    assert torch.allclose(first, whole[:, :2], atol=1e-12)
    assert torch.allclose(second, whole[1:, 2:], atol=1e-12)
    for ours, wanted in zip(last, end.rows(slice(1, None)), strict=True):
        assert torch.allclose(ours, wanted, atol=1e-12)


# -------------------------------------------------------------------------------------------- which state, which frame


def path_of(generator: Generator, batch: int = 4) -> tuple[torch.Tensor, Motion, GeneratorOutput]:
    torch.manual_seed(2)
    z = torch.randn(batch, generator.vae.latent_dim)
    motion = generator.draw_motion(batch)
    with torch.no_grad():
        return z, motion, generator(z, motion)


def test_the_picture_is_watched_first_and_each_state_knows_no_later_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = small_generator()
    _, motion, output = path_of(generator)
    seen, watch = [], generator.predictor.watch
    monkeypatch.setattr(generator.predictor, "watch", lambda video: seen.append(video) or watch(video))
    _, states, _ = generator.watch(output.x_base, motion)
    assert torch.equal(seen[0], torch.cat([output.x_base[:, None], output.video], dim=1))
    assert torch.equal(states, output.states)
    for t in range(3):
        changed = output.video.clone()
        changed[:, t + 1] = 1 - changed[:, t + 1]
        monkeypatch.setattr(generator.synthesizer, "forward", lambda *_, changed=changed: changed)
        _, found, _ = generator.watch(output.x_base, motion)
        assert torch.allclose(found[:, : t + 1], states[:, : t + 1], atol=1e-6)
        assert (found[:, t + 1] - states[:, t + 1]).abs().max() > 1e-3


def test_the_video_loss_compares_state_k_with_the_frame_k_after_the_video(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, [*SMALL, *VIDEO, "loss.own_frames=5"])
    generator = generator_of()
    numbers = Draws(config, CPU).generator(generator, 1)
    output = generator(numbers.z, numbers.motion)
    assert numbers.video_times.max() == 5
    period = generator.synthesizer.frames

    def draw_frames(features: torch.Tensor, states: torch.Tensor, frozen: bool) -> torch.Tensor:
        assert torch.equal(features, output.features)
        assert frozen
        return generator.synthesizer(output.x_base, numbers.motion, states[..., 0] + period, full_size=True)

    numbered = torch.arange(6.0).view(1, 6, 1).expand(4, -1, 1)
    monkeypatch.setattr(generator, "watch_on", lambda *_: numbered)
    monkeypatch.setattr(generator, "draw_frames", draw_frames)
    assert following_loss(generator, output, numbers, config) < 1e-6
    monkeypatch.setattr(generator, "watch_on", lambda *_: numbered + 1)
    assert following_loss(generator, output, numbers, config) > 1e-2


# ----------------------------------------------------------------------------------------------------- after the video


@pytest.mark.parametrize("watches", ["own", "other", "still"])
def test_some_pictures_roll_on_and_the_others_go_on_watching(watches: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = moved(small_generator(watches=watches))
    _, motion, output = path_of(generator)
    count, rolling = 6, torch.arange(2)
    states = generator.watch_on(output, motion, rolling, count)
    assert states.shape == (4, count + 1, 10)
    assert torch.equal(states[:, 0], output.states[:, -1])
    with torch.no_grad():  # the others by hand, in one go: the picture, its video, and more of it
        seen, times = generator.seen(output.x_base), torch.arange(4 + count).expand(4, -1)
        video = generator.synthesizer(seen, motion, 0 * times if watches == "still" else times)
        wanted, _ = generator.predictor.watch(torch.cat([seen[:, None], video], dim=1))
        assert torch.allclose(states[2:], wanted[2:, 4:], atol=1e-5)
        # Those that roll on: each watches what it has drawn, under the grain that its video would have had.
        own, memory = [output.states[:2, -1]], output.memory.rows(slice(2))
        for k in range(count):
            drawn = generator.draw_updated(output.features[:2], generator.predict_update(own[-1]))
            grain = generator.synthesizer.grain(motion, 0 * times if watches == "still" else times, (16, 16))[:2, k]
            state, memory = generator.predictor.watch((drawn + grain).clamp(0, 1)[:, None], memory)
            own.append(state[:, 0])
        assert torch.allclose(states[:2], torch.stack(own, dim=1), atol=1e-5)
    forward = VideoSynthesizer.forward
    monkeypatch.setattr(VideoSynthesizer, "forward", lambda *arguments: 1 - forward(*arguments))
    changed = generator.watch_on(output, motion, rolling, count)
    assert torch.equal(changed[:2], states[:2])
    assert (changed[2:, 1:] - states[2:, 1:]).abs().amax(dim=2).min() > 1e-3


@pytest.mark.parametrize("head", HEADS)
def test_pictures_that_roll_on_in_training_do_so_when_drawn(head: str) -> None:
    generator = moved(small_generator(head))
    generator.synthesizer.strengths = MotionStrengths(noise=0)
    z, motion, output = path_of(generator)
    with torch.no_grad():
        states = generator.watch_on(output, motion, torch.arange(4), 7)
        wanted = generator.draw_frames(output.features, states)
    drawn = torch.stack(list(weight_driven_frames(generator, z, motion, 8, roll_after=0)), dim=1)
    assert torch.allclose(drawn, wanted, atol=1e-5)
    assert (drawn[:, 1:] - drawn[:, :-1]).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------- gradients, settings


@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("head", HEADS)
def test_the_video_loss_reaches_the_predictor_and_never_theta(head: str, share: float) -> None:
    overrides = [*VIDEO, f"weight_predictor.head={head}", f"loss.own_share={share}"]
    generator = generator_of(*overrides)
    config = load_config(None, [*SMALL, *overrides])
    numbers = Draws(config, CPU).generator(generator, 1)
    loss = following_loss(generator, generator(numbers.z, numbers.motion), numbers, config)
    named = dict(generator.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))
    for name, gradient in gradients.items():
        if name.startswith("vae."):
            assert gradient is None, name
        else:
            assert gradient.abs().max() > 0, name


SHARED = {"shared": ["weight_predictor.sharing=shared"]}


@pytest.mark.parametrize("head", ["full", "low_rank"])
@pytest.mark.parametrize("arm", [*ARMS, *SHARED])
def test_the_video_loss_of_every_arm_by_hand(arm: str, head: str) -> None:
    overrides = [*(ARMS | SHARED)[arm], *VIDEO, f"weight_predictor.head={head}"]
    generator, config = generator_of(*overrides), load_config(None, [*SMALL, *overrides])
    torch.manual_seed(3)
    critic, numbers = build_discriminator(config), Draws(config, CPU).generator(generator, 1)
    with torch.no_grad():
        loss, output = generator_objective(
            generator, critic, torch.rand(4, 3, 16, 16), numbers, DiffAugment([]), config
        )
        states = generator.watch_on(output, numbers.motion, numbers.rolling, 3)
        distances = []
        for picture in range(4):
            for time in numbers.video_times[picture].tolist():
                update = generator.predict_update(states[:, time])  # of one, where it is shared or constant
                row = update[picture : picture + 1] if len(update) > 1 else update
                frame = generator.draw_updated(output.features[picture : picture + 1], row)
                one = Motion(*(part[picture : picture + 1] for part in numbers.motion))
                times = torch.tensor([[time + 3]])
                target = generator.synthesizer(output.x_base[picture : picture + 1], one, times, full_size=True)[:, 0]
                distances.append((frame - target).square().sum())
    if arm == "off":  # nothing that could follow
        assert loss.video == 0
    else:
        assert loss.video.item() == pytest.approx(torch.stack(distances).mean().item(), rel=1e-4)
        assert loss.video > 0.1
    without = config.loss.lambda_video * loss.video
    config.loss.lambda_video = 0
    with torch.no_grad():
        other, _ = generator_objective(generator, critic, torch.rand(4, 3, 16, 16), numbers, DiffAugment([]), config)
    assert other.video == 0
    assert (without > 0) == (arm != "off")


def test_how_long_and_how_many_roll_on_changes_the_loss() -> None:
    found = set()
    for overrides in ([], ["loss.own_frames=0"], ["loss.own_frames=6"], ["loss.own_share=1"], ["loss.video_frames=1"]):
        config = load_config(None, [*SMALL, *VIDEO, *overrides])
        generator = generator_of()
        numbers = Draws(config, CPU).generator(generator, 1)
        assert 0 <= numbers.video_times.min() <= numbers.video_times.max() <= config.loss.own_frames
        assert len(numbers.rolling) == 4 * config.loss.own_share
        with torch.no_grad():
            output = generator(numbers.z, numbers.motion)
            found.add(following_loss(generator, output, numbers, config).item())
    assert len(found) == 5

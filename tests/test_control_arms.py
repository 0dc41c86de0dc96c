"""The settings that take the method apart: each does what it says, wastes nothing, and works with everything else."""

from pathlib import Path

import pytest
import torch
from conftest import SMALL, metrics_of, small

import training
from augmentation import DiffAugment
from checkpoints import load_checkpoint
from configuration import UserError, config_to_dict, load_config
from generator_path import Generator, build_generator
from objectives import critic_objective, generator_objective
from random_draws import Draws
from resume import check_settings, differences
from sampling import load_sampler, weight_driven_frames
from step_runners import EagerSteps
from textbook import Textbook
from training_state import TrainingState
from video_synth import VideoSynthesizer
from weight_predictor import WeightPredictorRNN

CPU = torch.device("cpu")
ARMS = {
    "off": ["weight_predictor.update=off"],
    "constant": ["weight_predictor.update=constant"],
    "other": ["weight_predictor.watches=other"],
    "still": ["weight_predictor.watches=still"],
    "frozen": ["weight_predictor.train_gru=false"],
}


def generator_of(*overrides: str) -> Generator:
    """A generator whose updates are not zero, as after some training."""
    torch.manual_seed(0)
    generator = build_generator(load_config(None, [*SMALL, *overrides]))
    torch.manual_seed(1)
    with torch.no_grad():
        if isinstance(generator.predictor, WeightPredictorRNN):
            generator.predictor.to_update.weight.normal_(std=0.3)
        elif generator.update == "constant":
            generator.predictor.code.normal_(std=0.3)
    return generator


def drawn(generator: Generator, batch: int = 4):
    torch.manual_seed(2)
    return generator(torch.randn(batch, 6), generator.draw_motion(batch))


@pytest.mark.parametrize("head", ["full", "low_rank", "per_channel"])
def test_a_constant_update_is_the_same_for_every_picture_and_bounded(head: str) -> None:
    generator = generator_of(*ARMS["constant"], f"weight_predictor.head={head}", "weight_predictor.bound=0.2")
    output = drawn(generator)
    relative = generator.spec.flatten(dict(generator.vae.named_parameters())) / generator.scales()
    (expected,) = generator.head(generator.predictor.code[None], relative, 0.2)
    assert torch.equal(output.relative_update, expected[None])
    assert 0 < output.relative_update.abs().max() < 0.2
    # The same as a decoder whose weights were changed for good.
    with torch.no_grad():
        for name, delta in generator.spec.split(expected * generator.scales()).items():
            generator.vae.get_parameter(name).add_(delta)
    torch.manual_seed(2)
    assert torch.allclose(output.x_fake, generator.vae.decode(torch.randn(4, 6)), atol=1e-6)
    assert (output.x_fake - output.x_base).abs().max() > 1e-3


def test_an_update_that_is_off_draws_the_base_picture() -> None:
    output = drawn(generator_of(*ARMS["off"], "weight_predictor.head=low_rank"))
    assert output.x_fake is output.x_base
    assert output.relative_update.shape[0] == 1
    assert not output.relative_update.any()


@pytest.mark.parametrize("update", ["off", "constant"])
def test_without_a_predictor_no_video_is_made_and_no_gru_is_there(update: str, monkeypatch) -> None:
    generator = generator_of(f"weight_predictor.update={update}")
    assert not any(isinstance(module, torch.nn.GRU) for module in generator.modules())
    monkeypatch.setattr(VideoSynthesizer, "forward", lambda *_: pytest.fail("a video was made"))
    config = load_config(None, [*SMALL, *ARMS[update]])
    numbers = Draws(config, CPU).generator(generator, 1)
    assert numbers.motion.grain.numel() == 0
    watching = Draws(load_config(None, SMALL), CPU).generator(generator_of(), 1).motion
    assert torch.equal(numbers.motion.phases, watching.phases)  # of what the video loss compares with
    assert torch.equal(numbers.motion.amplitudes, watching.amplitudes)
    output = generator(numbers.z, numbers.motion)
    assert torch.equal(output.video, output.x_base[:, None].expand(-1, 3, -1, -1, -1))


def test_an_update_that_is_off_is_judged_once_with_the_weight_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, [*SMALL, *ARMS["off"], "loss.lambda_adv=0.7", "loss.lambda_base=1.1"])
    state, draws = TrainingState(config, CPU), Draws(config, CPU)
    x_real, numbers, seen = torch.rand(4, 3, 16, 16), draws.generator(state.generator, 1), []
    score = type(state.discriminator).forward
    monkeypatch.setattr(type(state.discriminator), "forward", lambda self, x: seen.append(x) or score(self, x))
    loss, output = generator_objective(
        state.generator, state.discriminator, x_real, numbers, DiffAugment([]), config
    )  # fmt: skip
    assert [len(x) for x in seen] == [4]
    vae = config.loss.lambda_vae * (loss.reconstruction + config.loss.beta * loss.kl)
    assert torch.allclose(loss.total - vae, -1.8 * state.discriminator(output.x_base).mean(), rtol=1e-4)
    textbook = Textbook(config, CPU)
    assert torch.allclose(loss.total, textbook.generator_loss(x_real, numbers).total, rtol=1e-5)
    numbers = draws.critic(state.generator, 1, 0)
    critic = critic_objective(state.generator, state.discriminator, x_real, numbers, DiffAugment([]), config)
    assert torch.equal(critic.score_fake, state.discriminator(state.generator.vae.decode(numbers.z)))


def test_whose_video_is_watched() -> None:
    own, other, still = (
        drawn(generator_of(f"weight_predictor.watches={whose}")) for whose in ("own", "other", "still")
    )
    assert torch.equal(own.x_base, other.x_base)
    generator = generator_of()
    torch.manual_seed(2)
    torch.randn(4, 6)  # the latents of `drawn`
    motion = generator.draw_motion(4)
    assert torch.equal(other.video, generator.synthesizer(own.x_base[[3, 0, 1, 2]], motion))
    assert torch.allclose(still.video, own.video[:, :1].expand_as(own.video), atol=1e-5)
    assert (own.video[:, 0] - own.video[:, 1]).abs().max() > 1e-3
    for output in (other, still):
        assert (output.x_fake - own.x_fake).abs().max() > 1e-5


@pytest.mark.parametrize("detach", ["true", "false"])
def test_a_frozen_gru_stays_and_the_rest_learns(detach: str) -> None:
    config = load_config(None, [*SMALL, *ARMS["frozen"], f"video.detach={detach}", "training.lr_predictor=0.01"])
    state, draws = TrainingState(config, CPU), Draws(config, CPU)
    before = {name: value.clone() for name, value in state.generator.named_parameters()}
    runner = EagerSteps(state, DiffAugment([]))
    for step in (1, 2):
        runner.generator_step(torch.rand(4, 3, 16, 16), draws.generator(state.generator, step))
    for name, value in state.generator.named_parameters():
        frozen = name.startswith(("predictor.gru.", "predictor.norm."))
        assert torch.equal(value, before[name]) == frozen, name


def test_arms_with_the_same_seed_begin_alike_and_draw_the_same_numbers() -> None:
    states = {name: TrainingState(load_config(None, [*SMALL, *arm]), CPU) for name, arm in {"full": [], **ARMS}.items()}
    full = states.pop("full")
    numbers = {name: Draws(state.config, CPU) for name, state in [("full", full), *states.items()]}
    for name, state in states.items():
        for mine, theirs in (
            (state.generator.vae, full.generator.vae), (state.discriminator, full.discriminator)
        ):  # fmt: skip
            for key, value in mine.state_dict().items():
                assert torch.equal(value, theirs.state_dict()[key]), (name, key)
        mine, theirs = (numbers[key].critic(states.get(key, full).generator, 5, 1) for key in (name, "full"))
        assert torch.equal(mine.z, theirs.z)
        assert torch.equal(mine.epsilon, theirs.epsilon)
        mine, theirs = (numbers[key].generator(states.get(key, full).generator, 5) for key in (name, "full"))
        assert torch.equal(mine.posterior, theirs.posterior)
    # Another seed is another start.
    another = TrainingState(load_config(None, [*SMALL, "training.seed=1"]), CPU)
    assert not torch.equal(another.discriminator.to_score.weight, full.discriminator.to_score.weight)


@pytest.mark.parametrize("arm", ["constant", "other", "still"])
def test_each_arm_learns_and_moves_as_it_was_trained(arm: str) -> None:
    config = load_config(None, [*SMALL, *ARMS[arm], "training.lr_predictor=0.01", "loss.lambda_video=0.1"])
    state, draws = TrainingState(config, CPU), Draws(config, CPU)
    runner = EagerSteps(state, DiffAugment([]))
    for step in (1, 2):
        metrics = runner.generator_step(torch.rand(4, 3, 16, 16), draws.generator(state.generator, step))
    assert metrics["gradient_norm/predictor"] > 0
    assert metrics["update/relative_size"] > 0
    generator = state.generator
    torch.manual_seed(0)
    z, motion = torch.randn(3, 6), generator.draw_motion(3)
    first, *_ = weight_driven_frames(generator, z, motion, 3)  # after T frames the GRU knows what it knew in training
    assert torch.allclose(first, generator(z, motion).x_fake, atol=1e-5)
    assert (first - generator.vae.decode(z)).abs().max() > 1e-4


@pytest.mark.parametrize("arm", ["off", "frozen"])
def test_a_run_of_each_arm_trains_draws_and_moves(arm: str, tmp_path: Path, picture_folder: Path) -> None:
    settings = small(tmp_path, picture_folder, "training.steps=2", "output.log_every=1", *ARMS[arm],
                     "training.clip_predictor=1", "training.lr_predictor=0.01")  # fmt: skip
    assert training.train(load_config(None, settings)) == 0
    run = tmp_path / "run"
    sizes = [line["update/relative_size"] for line in metrics_of(run)]
    assert (sizes[-1] > 0) == (arm != "off")
    sampler = load_sampler(run, "cpu")
    subjects = sampler.subjects([0, 1])
    base, updated = sampler.draw(subjects)
    assert torch.equal(base, updated) == (arm == "off")
    frames = list(sampler.weight_driven(subjects, 3))
    assert torch.allclose(frames[0], updated, atol=1e-5)
    assert load_checkpoint(run / "checkpoints" / "latest.pt")["step"] == 2
    assert training.train(load_config(None, [*settings, "training.steps=3"])) == 0


def test_another_kind_of_update_is_another_run() -> None:
    saved = {"config": config_to_dict(load_config(None, SMALL))}
    for change in ("weight_predictor.update=off", "weight_predictor.train_gru=false"):
        with pytest.raises(UserError, match=rf"{change.partition('=')[0]} .*the saved weights don't fit"):
            check_settings(differences(saved, load_config(None, [*SMALL, change]), "it"), "run", accept_changes=True)
    other = differences(saved, load_config(None, [*SMALL, "weight_predictor.watches=other"]), "it")
    with pytest.raises(UserError, match="watches own -> other: this changes what is learned"):
        check_settings(other, "run", accept_changes=False)

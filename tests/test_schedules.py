"""Settings that change during a run, and updates that begin later."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, networks_and_noise, new_state, random_images, same
from hypothesis import given
from hypothesis import strategies as st

import training
from configuration import UserError, config_to_yaml, load_config
from losses import value_at
from step_runners import CudaGraphSteps, EagerSteps
from training_step import NoiseSampler, generator_objective

FRACTIONS = st.floats(0, 1, width=32)
STAGES = ["training.steps=8", "weight_predictor.start=0.5", "weight_predictor.alone=0.75"]
"""Four steps without updates, two with them, and two of the predictor alone."""


@given(st.dictionaries(FRACTIONS, st.floats(0, 1e6), min_size=1, max_size=5), FRACTIONS)
def test_a_value_lies_on_the_line_between_its_neighbours(points: dict[float, float], fraction: float) -> None:
    """Whatever the order of the points; before the first and after the last it is constant."""
    keys, value = sorted(points), value_at(points, fraction)
    assert all(value_at(points, key) == points[key] for key in keys)
    assert value == pytest.approx(np.interp(fraction, keys, [points[key] for key in keys]))
    assert value_at(0.5, fraction) == 0.5


def test_a_schedule_survives_a_file_and_wrong_ones_get_one_line(tmp_path: Path) -> None:
    config = load_config(None, ["loss.lambda_vae={0.5: 0, 0: 0.25}", "training.lr_vae={0: 1e-3, 1: 1e-4}"])
    assert config.loss.lambda_vae == {0.0: 0.25, 0.5: 0.0}
    (file := tmp_path / "settings.yaml").write_text(config_to_yaml(config))
    assert "lambda_vae: {0.0: 0.25, 0.5: 0.0}" in file.read_text()
    assert load_config(file) == config
    points = dict.fromkeys(("{}", "{2: 1}", "{a: 1}"), "at fractions")
    for wrong, words in (points | dict.fromkeys(("{0: -1}", "{0: .nan}", "[1]", "null"), "a number")).items():
        with pytest.raises(UserError, match=f"loss.lambda_vae must .*{words}.*, but is") as error:
            load_config(None, [f"loss.lambda_vae={wrong}"])
        assert str(error.value).isprintable()


@pytest.mark.parametrize("head", ["low_rank", "per_channel"])
def test_alone_the_predictor_and_the_encoder_learn_and_theta_rests_at_its_average(head: str) -> None:
    """Whatever θ's momentum was, λ_vae is, or leads through the video and the weights' scale back to θ."""
    options = [*STAGES, "training.adam_betas=[0.5,0.9]", f"weight_predictor.head={head}", "video.detach=false"]
    config, generator, critic, sampler = networks_and_noise(*options)
    noise = sampler.generator(7)
    assert (noise.alone, sampler.generator(6).alone) == (True, False)
    loss, _ = generator_objective(generator, critic, random_images(1), noise, config)
    theta = [*generator.vae.decoder.parameters()]
    assert set(torch.autograd.grad(loss.total, theta, retain_graph=True, allow_unused=True)) == {None}
    assert torch.autograd.grad(loss.total, generator.predictor.to_update.weight)[0].abs().max() > 0

    state, saved = new_state(config), []
    for step in range(1, 9):
        training.iteration(EagerSteps(state), sampler, itertools.repeat(random_images(step)), step)
        state.step = step
        saved.append(copy.deepcopy(state.to_dict()))
    before, *alone = saved[5:]
    assert state.predictor_steps == 4
    for after in alone:
        assert same(after["critic"], before["critic"])
        assert same(after["optimizers"]["critic"], before["optimizers"]["critic"])
        for name, average in before["generator_ema"].items():
            rests = name.startswith("vae.decoder")
            assert same(after["generator"][name], average) == rests, name
            assert not rests or not same(average, before["generator"][name])
    for name, value in alone[0]["generator"].items():
        assert same(value, alone[1]["generator"][name]) == name.startswith("vae.decoder"), name


def test_before_the_start_the_decoder_learns_as_without_updates_and_the_predictor_not() -> None:
    states = []
    for setting in ("weight_predictor.start=0.5", "weight_predictor.update=off"):
        config = load_config(None, [*SMALL, setting, "training.steps=4", "training.diffaugment=[color]"])
        states.append(new_state(config))
        first = {name: value.clone() for name, value in states[-1].tensors().items()}
        runner, noise = EagerSteps(states[-1]), NoiseSampler(config, states[-1].device)
        for step in (1, 2, 3)[: 3 if setting.endswith("5") else 2]:
            before = {name: value.clone() for name, value in states[-1].tensors().items()}
            training.iteration(runner, noise, itertools.repeat(random_images(step)), step)
        if setting.endswith("5"):
            started, changed = before, {name for name, x in states[-1].tensors().items() if not x.equal(before[name])}
            still = [x for x in started if not x.removeprefix("generator").startswith((".vae", "_ema.vae", "critic"))]
            assert all(started[name].equal(first[name]) for name in still)
            assert states[-1].predictor_steps == 1
            assert "generator.predictor.to_update.weight" in changed
    theta = {name: value for name, value in states[1].tensors().items() if ".vae." in name or name.startswith("critic")}
    assert all(started[name].equal(value) for name, value in theta.items())


def test_the_encoder_learns_alike_while_lambda_vae_falls_to_0_and_theta_ever_less() -> None:
    options = ["training.steps=4", "weight_predictor.start=0.75", "weight_predictor.alone=0.75", "loss.lambda_adv=0"]
    found, falling, unscored = [], "{0: 0.25, 0.5: 0}", "loss.lambda_base=0"
    for value, step in (("0.25", 1), (falling, 1), (falling, 2), (falling, 3), ("0.25", 4)):
        config, generator, critic, noise = networks_and_noise(*options, unscored, f"loss.lambda_vae={value}")
        numbers = noise.generator(step)._replace(posterior=torch.ones(4, 6))
        loss, _ = generator_objective(generator, critic, random_images(1), numbers, config)
        weights = generator.vae.decoder.stage1.weight, generator.vae.to_mu.weight
        found.append(torch.autograd.grad(loss.total, weights, retain_graph=True, allow_unused=True))
    (theta, encoder), *others = found
    assert torch.allclose(encoder, torch.autograd.grad(0.25 * (loss.reconstruction + loss.kl), weights[1])[0])
    assert encoder.abs().max() > 0
    for (gradient, of_encoder), share in zip(others, (1, 0.5, 0, 0), strict=True):
        assert torch.allclose(of_encoder, encoder)
        assert torch.allclose(torch.zeros_like(theta) if gradient is None else gradient, share * theta)


def test_a_pass_is_recorded_anew_when_its_numbers_change_form_and_then_alone() -> None:
    made: list[str] = []

    class Recorded(CudaGraphSteps):
        def record(self, run, x_real, noise):
            assert run.__name__ not in self._recorded  # what was recorded before is free by now
            made.append(run.__name__)
            return run

    config = load_config(None, [*SMALL, *STAGES, "loss.lambda_vae={0: 0.25, 0.5: 0}"])
    runner, noise = Recorded(new_state(config), log=lambda _: None), NoiseSampler(config, torch.device("cpu"))
    for step, expected in zip(range(1, 9), (2, 2, 2, 2, 4, 4, 5, 5), strict=True):
        training.iteration(runner, noise, itertools.repeat(random_images(step)), step)
        assert len(made) == expected, step

"""Which tensors are updated, by which head, how far, and how the update decodes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import generator_of, moved, networks_and_noise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from configuration import UserError, WeightPredictorConfig
from generator import build_generator, motion_rows
from model_definitions import VAE
from step_runners import EagerSteps
from studies import evaluate
from training_step import TrainingState
from weight_updates import HEADS, DenseUpdate, UpdateHead, bounded_update, build_update_spec, check_update_size

LAYERS = {
    "last layer": ["decoder.stage1.*"], "last weight": ["decoder.stage1.weight"],
    "last two": ["decoder.stage2.*", "decoder.stage1.*"], "all weights": ["decoder.*.weight"],
    "projection": ["decoder.projection.*"],
}  # fmt: skip


@pytest.fixture(scope="module")
def vae() -> VAE:
    torch.manual_seed(0)
    return VAE(16, 3, 8, (4, 6))


def weights_of(vae: VAE) -> dict[str, Tensor]:
    return dict(vae.decoder.named_parameters())


# ---------------------------------------------------------------------------------------------------------- the spec


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_a_spec_counts_every_weight_once_in_decoder_order(vae: VAE, layers: list[str]) -> None:
    spec = build_update_spec(vae, layers)
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.named_parameters()}
    offset = 0
    for tensor in spec.tensors:
        assert tensor.shape == shapes[tensor.name]
        assert tensor.offset == offset
        offset += tensor.size
    assert spec.total_size == offset == sum(vae.get_parameter(tensor.name).numel() for tensor in spec.tensors)
    assert spec == build_update_spec(vae, layers[::-1])
    order = [name for name in shapes if name in {tensor.name for tensor in spec.tensors}]
    assert [tensor.name for tensor in spec.tensors] == order


def test_the_sources_sizes_by_hand() -> None:
    vae = VAE()
    assert build_update_spec(vae, ["decoder.stage1.*"]).total_size == 32 * 3 * 4 * 4 + 3
    both = build_update_spec(vae, ["decoder.stage1.*", "decoder.stage2.*"])
    assert both.total_size == 32 * 3 * 16 + 3 + 64 * 32 * 16 + 32
    assert HEADS["full"](both, 1, 4).update_size == 34339
    assert HEADS["per_channel"](both, 1, 4).update_size == 2 * 3 + 2 * 32
    # rank 3 is all that a tensor of 3 output channels can have
    assert HEADS["low_rank"](both, 1, 4).update_size == 3 * (3 + 32 * 16) + 3 + 4 * (32 + 64 * 16) + 32


def test_split_and_flatten_are_inverse(vae: VAE) -> None:
    spec = build_update_spec(vae, LAYERS["all weights"])
    named = weights_of(vae)
    pieces = spec.split(spec.flatten(named))
    assert list(pieces) == ["projection.weight", "stage2.weight", "stage1.weight"]
    for name, piece in pieces.items():
        assert torch.equal(piece, named[name])


def test_scales_are_each_tensors_rms_with_a_floor_for_zero_biases(vae: VAE) -> None:
    spec = build_update_spec(vae, ["decoder.stage1.*"])
    scales = spec.scales(weights_of(vae))
    pieces = spec.split(spec.expand(scales))
    rms = vae.get_parameter("decoder.stage1.weight").detach().double().square().mean().sqrt()
    assert torch.allclose(pieces["stage1.weight"].double(), rms.expand(4, 3, 4, 4))
    assert torch.allclose(pieces["stage1.bias"], torch.tensor(0.01))
    assert not scales.requires_grad


@pytest.mark.parametrize(("layers", "words"), [
    (["decoder.stage9.*"], ["decoder.stage9.*", "did you mean 'decoder.stage"]),
    (["decodr.stage1.weight"], ["decodr.stage1.weight", "did you mean 'decoder.stage1.weight'"]),
    (["encoder.*"], ["encoder.*", "decode no image"]),
    (["decoder.stage1.*", "decoder.stage1.weight"], ["decoder.stage1.weight", "remove it"]),
])  # fmt: skip
def test_wrong_patterns_name_themselves_and_the_nearest(layers: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        build_update_spec(VAE(16, 3, 8, (4, 6)), layers)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("kind", HEADS)
def test_a_wrong_update_size_is_answered_with_the_right_one(vae: VAE, kind: str) -> None:
    spec = build_update_spec(vae, ["decoder.stage1.*"])
    head = HEADS[kind](spec, 1, 2)
    assert check_update_size("auto", head) == check_update_size(head.update_size, head) == head.update_size
    for wrong in (1, 10**6):
        with pytest.raises(UserError, match=rf"'{kind}' head .* write {head.update_size} or auto"):
            check_update_size(wrong, head)


# ------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("kind", HEADS)
def test_heads_give_zero_for_a_zero_code_and_move_off_it(vae: VAE, kind: str, layers: list[str]) -> None:
    spec = build_update_spec(vae, layers)
    torch.manual_seed(0)
    head = HEADS[kind](spec, 0.5, 2)
    code = torch.zeros(5, head.update_size, requires_grad=True)
    update = head(code, head.prepare(weights_of(vae))).dense().numbers
    assert update.shape == (5, spec.total_size)
    assert not update.any()
    loss = update.square().sum() + (update * torch.randn_like(update)).sum()
    assert torch.autograd.grad(loss, code)[0].abs().sum() > 0  # or it would stay at zero for ever


def test_a_low_rank_update_has_that_rank_in_output_channels_by_the_rest(vae: VAE) -> None:
    spec = build_update_spec(vae, ["decoder.stage2.weight"])  # (in 6, out 4, 4, 4)
    torch.manual_seed(0)
    head = HEADS["low_rank"](spec, 0.3, 2)
    code = 3 * torch.randn(5, head.update_size)  # far into tanh, which would raise the rank if it came last
    update = spec.split(head(code, head.prepare(weights_of(vae))).dense().numbers)["stage2.weight"]
    by_output = update.transpose(1, 2).flatten(2)
    assert torch.linalg.matrix_rank(by_output).tolist() == [2] * 5
    a = code[:, : 4 * 2].view(5, 4, 2)
    v = (code[:, 4 * 2 :] + head.start_factors[0]).view(5, 6, 2, 16).transpose(1, 2).flatten(2)
    assert torch.allclose(by_output, a.tanh() @ v.tanh() * (0.3 / 2), atol=1e-6)


def test_a_per_channel_update_scales_whole_output_channels(vae: VAE) -> None:
    spec = build_update_spec(vae, ["decoder.stage2.weight"])
    weights, factors = weights_of(vae), torch.tensor([0.5, -1.0, 0.0, 2.0])
    head = HEADS["per_channel"](spec, 0.2, 4)
    update = head(factors[None], head.prepare(weights)).dense().numbers.view(6, 4, 4, 4)
    relative = weights["stage2.weight"] / weights["stage2.weight"].square().mean().sqrt()
    for channel, factor in enumerate(factors):
        assert torch.allclose(update[:, channel], 0.2 * torch.tanh(factor * relative[:, channel] / 0.2))


@pytest.mark.parametrize("kind", HEADS)
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.floats(-8, 8), st.floats(1e-3, 10), st.integers(1, 6))
def test_no_prediction_leaves_the_bound(kind: str, seed: int, size: float, bound: float, rank: int) -> None:
    vae = VAE(16, 3, 8, (4, 6)).double()
    spec = build_update_spec(vae, ["decoder.stage1.*", "decoder.projection.weight"])
    head, random = HEADS[kind](spec, bound, rank).double(), torch.Generator().manual_seed(seed)
    code = 10**size * torch.randn(2, head.update_size, generator=random, dtype=torch.float64)
    prepared = head.prepare(weights_of(vae))
    assert head(code, prepared).dense().numbers.abs().max() <= bound * (1 + 1e-6)  # which a head keeps in float32
    largest = head(torch.full_like(code, 1e9), prepared).dense().numbers
    assert torch.allclose(largest.abs(), torch.full_like(largest, bound))  # and it is reached everywhere


def test_the_bound_leaves_small_updates_and_every_sign_alone() -> None:
    u = torch.linspace(-1e-3, 1e-3, 11, dtype=torch.float64)
    assert torch.allclose(bounded_update(u, 0.5), u, rtol=1e-5)
    assert (bounded_update(1e6 * u, 0.5) * u >= 0).all()


class BrightnessHead(UpdateHead):
    """One predicted number for all weights, times a trained one."""

    update_size = 1

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, code: Tensor, prepared: Any) -> DenseUpdate:
        numbers = bounded_update(self.gain * code.expand(-1, self.spec.total_size), self.bound)
        return DenseUpdate(self.spec, numbers, prepared)


def test_a_new_head_is_one_class_in_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is built from the settings, decodes, learns with the predictor, and is named in errors."""
    assert WeightPredictorConfig.__dataclass_fields__["head"].metadata["choices"] == tuple(
        HEADS
    )  # what the setting takes
    monkeypatch.setitem(HEADS, "brightness", BrightnessHead)
    config, _, critic, noise = networks_and_noise()
    config.weight_predictor.head = "brightness"
    generator = moved(build_generator(config))
    state = TrainingState(generator, critic, config, torch.device("cpu"))
    x, numbers = torch.rand(4, 3, 16, 16), noise.generator(1)
    update = generator(numbers.z, numbers.motion).update.numbers
    assert update.shape == (4, generator.spec.total_size)
    assert (update == update[:, :1]).all()
    assert update[:, 0].abs().min() > 0
    metrics = EagerSteps(state).generator_step(x, numbers)
    assert metrics["update/relative_size"].item() == pytest.approx(update.square().mean().sqrt().item(), rel=1e-5)
    assert metrics["generator/video"] > 0
    assert generator.head.gain != 1
    assert any(parameter is generator.head.gain for parameter in state.parameters["predictor"])
    with pytest.raises(UserError, match=r"'brightness' head .* predicts 1; write 1 or auto"):
        check_update_size(2, generator.head)


# -------------------------------------------------------------------------------------------- decoding with factors


@pytest.mark.parametrize("layers", ["decoder.stage1.*, decoder.stage2.*", "decoder.*", "decoder.stage2.weight"])
def test_an_update_in_factors_is_the_dense_one(layers: str) -> None:
    """In float64: images, mean square and gradients with respect to the code, v₀, θ and the features."""
    generator = generator_of(f"weight_predictor.layers=[{layers}]", "weight_predictor.rank=3").double()
    features = generator.features(torch.randn(5, 6).double()).detach().requires_grad_()
    code = torch.randn(5, generator.head.update_size).double().requires_grad_()
    factored = generator.head(code, generator.head.prepare(weights_of(generator.vae)))
    assert not isinstance(factored, DenseUpdate)
    scores, results = torch.randn(5, 3, 16, 16).double(), []
    for update in (factored, factored.dense()):
        images = generator.decode(features, update)
        loss = (scores * images).sum() + 100 * update.mean_square()
        weights = [features, code, *generator.head.parameters(), *generator.vae.decoder.parameters()]
        gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        results.append((images, update.mean_square(), *gradients))
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() <= 1e-12 * expected.norm()
    assert results[0][3].abs().min() > 0  # every number of the code matters
    assert (results[0][0] - generator.decode_base(features)).abs().mean() > 1e-3


# ---------------------------------------------------------------------------------------- how much is at the bound


def test_mean_square_and_saturation_of_a_dense_update_by_hand(vae: VAE) -> None:
    spec = build_update_spec(vae, ["decoder.stage2.bias", "decoder.stage1.bias"])  # 4 and 3 numbers
    numbers = torch.tensor([[1.0, -2, 0, 0, 2, 0, 0], [0, 1.91, 1.89, 0, 0, 0, -1.0]])
    update = DenseUpdate(spec, numbers, UpdateHead(spec, 2, 0).prepare(weights_of(vae)))
    assert update.mean_square().item() == pytest.approx((1 + 4 + 4 + 1.91**2 + 1.89**2 + 1) / 14)
    assert update.saturated_fraction(2.0).item() == pytest.approx(3 / 14)  # from 1.9 on


def test_saturation_of_a_factored_update_counts_the_predicted_numbers(vae: VAE) -> None:
    """Of A, whose bound is 1, and of biases; V is v₀ at the start, and would count what nobody predicted."""
    spec = build_update_spec(vae, ["decoder.stage1.*"])  # A is (3, 1), V (1, 4 · 16), a bias of 3
    head = HEADS["low_rank"](spec, 0.3, 1)
    torch.nn.init.constant_(head.start_factors[0], 5)
    code = torch.zeros(2, head.update_size)
    code[0, :2] = torch.tensor([5.0, -5.0])  # two of A's three
    code[1, -1] = -5  # one bias
    update = head(code, head.prepare(weights_of(vae)))
    assert update.saturated_fraction(0.3).item() == pytest.approx(3 / 12)


@pytest.mark.parametrize("head", HEADS)
def test_training_and_evaluation_report_the_same_of_an_update(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mean square and what is saturated; the evaluation takes three of the updates, and then one."""
    config, generator, critic, noise = networks_and_noise(f"weight_predictor.head={head}", "weight_predictor.bound=0.3")
    moved(generator, 1.0)
    numbers = noise.generator(1)
    state = TrainingState(generator, critic, config, torch.device("cpu"))
    metrics, _ = EagerSteps(state).generator_pass(torch.rand(4, 3, 16, 16), numbers)

    def inputs(seeds: list[int]) -> SimpleNamespace:
        rows = slice(seeds[0], seeds[-1] + 1)
        return SimpleNamespace(z=numbers.z[rows], motion=motion_rows(numbers.motion, rows))

    sampler = evaluate.Sampler(generator, config, 1, Path())
    monkeypatch.setattr(sampler, "inputs", inputs)
    monkeypatch.setattr(evaluate, "seed_batches", lambda seeds: [seeds[:3], seeds[3:]])
    mean_square, fraction = sum(update for _, update in evaluate.decode_generators(sampler, range(4))) / 4
    assert 0.05 < fraction < 0.95
    assert fraction.item() == pytest.approx(metrics["update/saturated_fraction"].item(), rel=1e-6)
    assert mean_square.item() == pytest.approx(metrics["generator/update"].item(), rel=1e-5)

"""Which tensors are updated, by which head, and how far."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configuration import UserError
from generator_path import Generator
from model_definitions import VAE
from video_synth import VideoSynthesizer
from weight_updates import DenseUpdate, bounded_update, build_head, build_update_spec, check_update_size, weight_scales

LAYERS = {
    "last layer": ["decoder.stage1.*"],
    "last weight": ["decoder.stage1.weight"],
    "last two": ["decoder.stage2.*", "decoder.stage1.*"],
    "all weights": ["decoder.*.weight"],
    "projection": ["decoder.projection.*"],
}


@pytest.fixture(scope="module")
def vae() -> VAE:
    torch.manual_seed(0)
    return VAE(16, 3, 8, (4, 6))


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_spec_counts_every_weight_once_in_decoder_order(vae: VAE, layers: list[str]) -> None:
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


def test_the_source_sizes_by_hand() -> None:
    vae = VAE()
    last = build_update_spec(vae, ["decoder.stage1.*"])
    assert last.total_size == 32 * 3 * 4 * 4 + 3
    both = build_update_spec(vae, ["decoder.stage1.*", "decoder.stage2.*"])
    assert both.total_size == 32 * 3 * 16 + 3 + 64 * 32 * 16 + 32
    assert build_head("full", both).update_size == 34339
    assert build_head("per_channel", both).update_size == 2 * 3 + 2 * 32
    # rank 3 is all that a tensor of 3 output channels can have
    assert build_head("low_rank", both, rank=4).update_size == 3 * (3 + 32 * 16) + 3 + 4 * (32 + 64 * 16) + 32


def test_mean_square_and_share_at_the_bound_of_a_dense_update_by_hand() -> None:
    update = DenseUpdate(torch.tensor([[1.0, -2.0], [0.0, 1.0]]))
    assert update.mean_square().item() == pytest.approx(6 / 4)
    assert update.at_bound(2.0).item() == 0.25
    assert update.at_bound(2.2).item() == 0


def test_split_and_flatten_are_inverse(vae: VAE) -> None:
    spec = build_update_spec(vae, LAYERS["all weights"])
    named = dict(vae.named_parameters())
    flat = spec.flatten(named)
    for name, piece in spec.split(flat).items():
        assert torch.equal(piece, named[name])
    with pytest.raises(ValueError, match="not 3"):
        spec.split(torch.zeros(2, 3))


@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("kind", ["full", "low_rank", "per_channel"])
def test_heads_give_zero_for_a_zero_code_and_move_off_it(vae: VAE, kind: str, layers: list[str]) -> None:
    spec = build_update_spec(vae, layers)
    torch.manual_seed(0)
    head = build_head(kind, spec, rank=2)
    relative = torch.randn(spec.total_size)
    code = torch.zeros(5, head.update_size, requires_grad=True)
    u = head(code, relative, 0.5)
    assert u.shape == (5, spec.total_size)
    assert not u.any()
    gradient = torch.autograd.grad(u.square().sum() + (u * torch.randn_like(u)).sum(), code)[0]
    assert gradient.abs().sum() > 0  # or it would stay at zero for ever


def test_low_rank_update_has_that_rank_in_output_channels_by_the_rest(vae: VAE) -> None:
    spec = build_update_spec(vae, ["decoder.stage2.weight"])  # (in 6, out 4, 4, 4)
    torch.manual_seed(0)
    head = build_head("low_rank", spec, rank=2)
    code = 3 * torch.randn(
        5, head.update_size
    )  # far into tanh, which would raise the rank if it came after the product
    u = spec.split(head(code, torch.zeros(spec.total_size), 0.3))["decoder.stage2.weight"]
    by_output = u.transpose(1, 2).flatten(2)
    assert torch.linalg.matrix_rank(by_output).tolist() == [2] * 5
    a = code[:, : 4 * 2].view(5, 4, 2)
    v = code[:, 4 * 2 :].view(5, 2, 6 * 16)
    assert torch.allclose(by_output, a.tanh() @ (head.start_factors[0] + v).tanh() * (0.3 / 2), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.floats(-8, 8), st.floats(1e-3, 10), st.integers(1, 6))
def test_an_update_of_low_rank_stays_within_its_bound(seed: int, size: float, bound: float, rank: int) -> None:
    spec = build_update_spec(VAE(16, 3, 8, (4, 6)), ["decoder.stage1.*", "decoder.projection.weight"])
    head = build_head("low_rank", spec, rank).double()
    random = torch.Generator().manual_seed(seed)
    code = 10**size * torch.randn(2, head.update_size, generator=random, dtype=torch.float64)
    update = head(code, torch.zeros(spec.total_size), bound)
    assert update.abs().max() <= bound * (1 + 1e-12)
    as_large = head(torch.full((1, head.update_size), 1e3, dtype=torch.float64), torch.zeros(spec.total_size), bound)
    assert torch.allclose(as_large, torch.full_like(as_large, bound))  # and it can reach it everywhere


LOW_RANK_LAYERS = [("decoder.stage1.*", "decoder.stage2.*"), ("decoder.*",), ("decoder.stage2.weight",)]


@pytest.mark.parametrize("layers", LOW_RANK_LAYERS)
def test_an_update_in_factors_is_the_dense_one(layers: tuple[str, ...]) -> None:
    """In float64: pictures, mean square and gradients with respect to the code, v₀, θ and the features."""
    torch.manual_seed(0)
    generator = Generator(VAE(16, 3, 8, (4, 6)), VideoSynthesizer(2), list(layers), head="low_rank", rank=3, bound=0.4)
    generator.double()
    features = generator.features(torch.randn(5, 8).double()).detach().requires_grad_()
    code = torch.randn(5, generator.head.update_size).double().requires_grad_()
    factored = generator.head.factors(code, 0.4)
    dense = DenseUpdate(factored.relative())
    scores, found = torch.randn(5, 3, 16, 16).double(), []
    for update in (factored, dense):
        pictures = generator.draw(features, update)
        loss = (scores * pictures).sum() + 100 * update.mean_square()
        weights = [features, code, *generator.head.parameters(), *generator.vae.decoder.parameters()]
        gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
        found.append((pictures, update.mean_square(), *gradients))
    for ours, wanted in zip(*found, strict=True):
        assert (ours - wanted).norm() <= 1e-12 * wanted.norm()
    assert found[0][3].abs().min() > 0  # every number of the code matters
    assert (found[0][0] - generator.draw_base(features)).abs().mean() > 1e-3


def test_share_at_the_bound_counts_the_predicted_numbers(vae: VAE) -> None:
    spec = build_update_spec(vae, ["decoder.stage1.*"])  # A is (3, 1), V (1, 4 · 16), a bias of 3
    head = build_head("low_rank", spec, rank=1)
    code = torch.zeros(2, head.update_size)
    code[0, :2] = 5  # two of A's three
    code[1, -1] = -5  # one bias
    assert head.factors(code, 0.3).at_bound(0.3).item() == pytest.approx(3 / 12)


def test_per_channel_scales_whole_output_channels(vae: VAE) -> None:
    spec = build_update_spec(vae, ["decoder.stage2.weight"])
    head = build_head("per_channel", spec)
    weights = torch.randn(spec.total_size)
    factors = torch.tensor([0.5, -1.0, 0.0, 2.0])
    u = head(factors, weights, 0.2).view(6, 4, 4, 4)
    for channel, factor in enumerate(factors):
        wanted = factor * weights.view(6, 4, 4, 4)[:, channel]
        assert torch.allclose(u[:, channel], 0.2 * torch.tanh(wanted / 0.2))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.floats(1e-3, 10))
def test_bound_holds_for_any_prediction_and_keeps_its_sign(values: list[float], bound: float) -> None:
    u = torch.tensor(values, dtype=torch.float64)
    limited = bounded_update(u, bound)
    assert (limited.abs() <= bound * (1 + 1e-12)).all()
    assert (limited * u >= 0).all()


def test_bound_leaves_small_updates_alone() -> None:
    u = torch.linspace(-1e-3, 1e-3, 11, dtype=torch.float64)
    assert torch.allclose(bounded_update(u, 0.5), u, rtol=1e-5)


def test_scales_are_each_tensors_rms_with_a_floor_for_zero_biases(vae: VAE) -> None:
    spec = build_update_spec(vae, ["decoder.stage1.*"])
    named = dict(vae.named_parameters())
    pieces = spec.split(weight_scales(spec, named))
    rms = named["decoder.stage1.weight"].detach().double().square().mean().sqrt()
    assert torch.allclose(pieces["decoder.stage1.weight"].double(), rms.expand(4, 3, 4, 4))
    assert torch.allclose(pieces["decoder.stage1.bias"], torch.tensor(0.01))
    assert not weight_scales(spec, named).requires_grad


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (["decoder.stage9.*"], ["decoder.stage9.*", "did you mean 'decoder.stage"]),
        (["decodr.stage1.weight"], ["decodr.stage1.weight", "did you mean 'decoder.stage1.weight'"]),
        (["encoder.*"], ["encoder.*", "draw no picture"]),
        (["decoder.stage1.*", "decoder.stage1.weight"], ["decoder.stage1.weight", "remove it"]),
    ],
)
def test_wrong_patterns_name_themselves_and_the_nearest(vae: VAE, layers: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        build_update_spec(vae, layers)
    for word in words:
        assert word in str(error.value)


def test_frozen_tensors_are_refused() -> None:
    vae = VAE(16, 3, 8, (4, 6))
    vae.decoder.stage1.weight.requires_grad_(False)
    with pytest.raises(UserError, match=r"stage1\.weight, which is frozen"):
        build_update_spec(vae, ["decoder.stage1.*"])


@pytest.mark.parametrize(
    ("kind", "given_size"), list(itertools.product(["full", "low_rank", "per_channel"], [1, 10**6]))
)
def test_a_wrong_update_size_is_answered_with_the_right_one(vae: VAE, kind: str, given_size: int) -> None:
    spec = build_update_spec(vae, ["decoder.stage1.*"])
    head = build_head(kind, spec, rank=2)
    assert check_update_size("auto", head, spec) == check_update_size(head.update_size, head, spec) == head.update_size
    with pytest.raises(UserError, match=f"write {head.update_size} or auto"):
        check_update_size(given_size, head, spec)

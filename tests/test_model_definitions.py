"""The networks' shapes and ranges, and the generator's path: update, gradients, independence of the batch."""

import pytest
import torch
from torch.func import functional_call

import generator_path
import weight_updates
from configuration import UserError
from generator_path import Generator
from model_definitions import VAE, Discriminator
from score_calibration import ScoreCalibration
from video_synth import VideoSynthesizer
from weight_predictor import WeightPredictorRNN
from weight_updates import tensor_scale

HEADS = ["full", "low_rank", "per_channel"]


def small_generator(
    head: str = "full", layers: tuple[str, ...] = ("decoder.stage1.*", "decoder.stage2.*"), **options
) -> Generator:
    torch.manual_seed(0)
    vae = VAE(16, 3, 8, (4, 6))
    options = {"head": head, "rank": 2, "hidden_size": 10, "bound": 0.5} | options
    return Generator(vae, VideoSynthesizer(4), list(layers), **options)


def moved(generator: Generator, size: float = 0.3) -> Generator:
    """Gives the zero head weights, as after some training, so that updates are not zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        generator.predictor.to_update.weight.normal_(std=size)
    return generator


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "widths"), [(16, (4,)), (16, (4, 4, 4, 4)), (32, (4, 6, 8)), (64, (4, 6)), (128, (4, 4, 4, 4))]
)
def test_shapes_and_ranges(size: int, widths: tuple[int, ...], channels: int) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, channels, size, size)
    vae = VAE(size, channels, 5, widths)
    mu, logvar = vae.encode(x)
    assert mu.shape == logvar.shape == (2, 5)
    for picture in (vae.decode(torch.randn(2, 5)), vae(x)[0]):
        assert picture.shape == x.shape
        assert 0 <= picture.min() <= picture.max() <= 1
    discriminator = Discriminator(size, channels, widths)
    assert discriminator(x).shape == discriminator.probability(x).shape == (2,)
    codes = WeightPredictorRNN(channels * size * size, 7)(torch.rand(2, 3, channels, size, size))
    assert codes.shape == (2, 3, 7)


def test_the_source_networks_are_the_defaults() -> None:
    predictor = WeightPredictorRNN(3 * 8 * 8, 11)
    assert (predictor.gru.input_size, predictor.gru.hidden_size, predictor.gru.num_layers) == (192, 128, 2)
    vae, discriminator = VAE(), Discriminator()
    assert vae.image_shape == (3, 128, 128)
    kinds = {type(module).__name__ for module in vae.modules() if not list(module.children())}
    assert kinds == {"Conv2d", "ReLU", "MaxPool2d", "Linear", "Unflatten", "ConvTranspose2d", "Sigmoid"}
    kinds = {type(module).__name__ for module in discriminator.stages.modules() if not list(module.children())}
    assert kinds == {"Conv2d", "LeakyReLU", "MaxPool2d"}


def test_a_size_that_stages_cannot_halve_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be halved 5 times"):
        VAE(16, 3, 8, (4,) * 5)


def test_reconstruction_uses_the_given_noise() -> None:
    torch.manual_seed(0)
    vae, x, noise = VAE(16, 3, 8, (4, 6)), torch.rand(2, 3, 16, 16), torch.randn(2, 8)
    x_rec, mu, logvar = vae(x, noise)
    assert torch.equal(x_rec, vae.decode(mu + (0.5 * logvar).exp() * noise))
    assert not torch.equal(vae(x)[0], vae(x)[0])  # drawn anew without it


def test_signals_neither_die_nor_explode_at_the_start() -> None:
    torch.manual_seed(0)
    vae, discriminator = VAE(), Discriminator()
    x = vae.decode(torch.randn(8, 128))
    assert 0.02 < x.std() < 0.4
    assert 0.01 < discriminator(torch.rand(8, 3, 128, 128)).abs().mean() < 100


# --------------------------------------------------------------------------------------------------------- the path


@pytest.mark.parametrize("head", HEADS)
def test_updated_equals_base_at_step_zero(head: str) -> None:
    generator = small_generator(head)
    output = generator(torch.randn(3, 8), generator.draw_motion(3))
    assert not output.relative_update.any()
    assert torch.allclose(output.x_fake, output.x_base, atol=1e-6)


@pytest.mark.parametrize("layers", [("decoder.stage1.*",), ("decoder.*.weight",), ("decoder.stage2.bias",)])
@pytest.mark.parametrize("head", HEADS)
def test_vmap_equals_a_loop_over_changed_copies_of_the_decoder(head: str, layers: tuple[str, ...]) -> None:
    generator = moved(small_generator(head, layers))
    z = torch.randn(4, 8)
    output = generator(z, generator.draw_motion(4))
    scales = generator.scales()
    own = dict(generator.vae.named_parameters())
    for row in range(4):
        changed = dict(own)
        for name, delta in generator.spec.split(output.relative_update[row] * scales).items():
            changed[name] = own[name] + delta
        decoder = {
            name.removeprefix("decoder."): value for name, value in changed.items() if name.startswith("decoder.")
        }
        alone = functional_call(generator.vae.decoder, decoder, (z[row : row + 1],), strict=True)
        assert torch.allclose(output.x_fake[row : row + 1], alone, atol=1e-5)
    assert (output.x_fake - output.x_base).abs().max() > 1e-3


def test_a_picture_does_not_depend_on_its_batch() -> None:
    generator = moved(small_generator())
    z, motion = torch.randn(5, 8), generator.draw_motion(5)
    together = generator(z, motion).x_fake
    alone = generator(z[1:3], type(motion)(*(part[1:3] for part in motion))).x_fake
    assert torch.allclose(together[1:3], alone, atol=1e-5)


def test_a_shared_update_is_one_for_the_batch() -> None:
    generator = moved(small_generator(shared=True))
    z, motion = torch.randn(5, 8), generator.draw_motion(5)
    output = generator(z, motion)
    assert output.relative_update.shape == (1, generator.spec.total_size)
    separate = generator.predictor.to_update(output.states[:, -1]).mean(0)
    assert torch.allclose(output.relative_update[0], 0.5 * torch.tanh(separate / 0.5), atol=1e-6)
    frames = generator.draw_frames(generator.features(z), output.states)
    assert torch.allclose(frames[:, -1], output.x_fake, atol=1e-6)


def test_updates_stay_within_the_bound() -> None:
    generator = moved(small_generator(bound=0.2), size=50)
    output = generator(torch.randn(3, 8), generator.draw_motion(3))
    assert output.relative_update.abs().max() <= 0.2 + 1e-6
    assert output.relative_update.abs().max() > 0.19


def test_the_frame_chooses_the_update() -> None:
    generator = moved(small_generator())
    z, motion = torch.randn(3, 8), generator.draw_motion(3)
    frames = generator.draw_frames(generator.features(z), generator(z, motion).states)
    assert frames.shape == (3, 4, 3, 16, 16)
    chosen = generator(z, motion, torch.tensor([0, 2, 3])).x_fake
    for row, frame in enumerate([0, 2, 3]):
        assert torch.allclose(chosen[row], frames[row, frame], atol=1e-5)
    assert torch.allclose(generator(z, motion).x_fake, frames[:, -1], atol=1e-5)


def test_hidden_state_carries_over_a_cut_video() -> None:
    generator = moved(small_generator())
    video = torch.rand(2, 6, 3, 16, 16)
    whole, _ = generator.predictor.watch(video)
    first, hidden = generator.predictor.watch(video[:, :2])
    second, _ = generator.predictor.watch(video[:, 2:], hidden)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-5)
    assert torch.allclose(generator.predictor(video), generator.predictor.to_update(whole))


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("head", HEADS)
def test_generator_gradients_reach_theta_and_the_gru_and_match_finite_differences(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, along random directions, through predictor, bound, vmap and critic."""
    generator = moved(small_generator(head)).double()
    torch.manual_seed(2)
    discriminator = Discriminator(16, 3, (4, 6)).double()
    z = torch.randn(3, 8).double()
    motion = type(generator.draw_motion(3))(*(part.double() for part in generator.draw_motion(3)))
    # A unit of measure, held while θ is nudged, as its gradient is.
    scales = {parameter.shape: tensor_scale(parameter) for parameter in generator.vae.decoder.parameters()}
    for module in (generator_path, weight_updates):
        monkeypatch.setattr(module, "tensor_scale", lambda weight: scales[weight.shape])
    with torch.no_grad():
        x_base = generator.vae.decode(z)
        fixed_video = generator.synthesizer(x_base, motion)
    # What the GRU watches, the picture and its video, is detached from θ.
    generator.synthesizer.forward = lambda images, motion: fixed_video
    generator.reduced = lambda images: x_base

    def loss() -> torch.Tensor:
        output = generator(z, motion)
        score = discriminator(torch.cat([output.x_fake, output.x_base]))
        return -score.mean() + output.update.mean_square()

    named = dict(generator.named_parameters())
    gradients = torch.autograd.grad(loss(), list(named.values()), allow_unused=True)
    by_name = dict(zip(named, gradients, strict=True))
    for name in ("vae.decoder.projection.weight", "vae.decoder.stage1.weight", "vae.decoder.stage2.bias",
                 "predictor.gru.weight_ih_l0", "predictor.gru.weight_hh_l1", "predictor.norm.weight",
                 "predictor.to_update.weight"):  # fmt: skip
        assert by_name[name].abs().max() > 0, name
        direction = torch.randn_like(named[name])
        expected = (by_name[name] * direction).sum().item()
        step = 1e-6
        with torch.no_grad():
            named[name].add_(direction, alpha=step)
            above = loss().item()
            named[name].add_(direction, alpha=-2 * step)
            below = loss().item()
            named[name].add_(direction, alpha=step)
        assert (above - below) / (2 * step) == pytest.approx(expected, rel=1e-4, abs=1e-8), name


def test_detach_video_decides_whether_theta_is_reached_through_the_video() -> None:
    for detach in (True, False):
        generator = moved(small_generator(detach_video=detach))
        x_base = torch.rand(2, 3, 16, 16, requires_grad=True)
        _, states, _ = generator.watch(x_base, generator.draw_motion(2))
        assert states.requires_grad
        (gradient,) = torch.autograd.grad(states.sum(), x_base, allow_unused=True)
        assert (gradient is None) == detach


def test_update_size_given_by_hand_is_checked() -> None:
    size = small_generator().head.update_size
    assert small_generator(update_size=size).predictor.to_update.out_features == size
    with pytest.raises(UserError, match=f"write {size} or auto"):
        small_generator(update_size=size + 1)


# ------------------------------------------------------------------------------------------------------- calibration


def test_probability_is_one_half_before_any_score_was_seen() -> None:
    x = torch.rand(4, 3, 16, 16)
    assert torch.equal(Discriminator(16, 3, (4,)).probability(x), torch.full((4,), 0.5))


def test_calibration_recovers_the_true_probability_of_shifted_normals() -> None:
    """Scores N(7, 2²) and N(4, 2²): the true log-odds are linear, with slope 3 / 4 and zero at 5.5."""
    torch.manual_seed(0)
    calibration = ScoreCalibration()
    calibration.fit(7 + 2 * torch.randn(20_000), 4 + 2 * torch.randn(20_000))
    score = torch.linspace(0, 11, 12)
    truth = torch.sigmoid(0.75 * (score - 5.5))
    assert torch.allclose(calibration(score), truth, atol=0.02)


def test_calibration_forgets_old_scores_and_survives_separable_ones() -> None:
    calibration = ScoreCalibration()
    calibration.fit(torch.randn(64) - 100, torch.randn(64) + 100)  # an old critic, upside down
    calibration.fit(torch.linspace(1, 2, 64), torch.linspace(-2, -1, 64))
    assert torch.isfinite(calibration.slope)
    p = calibration(torch.tensor([-1.5, 0.0, 1.5]))
    assert p[0] < 0.1
    assert p[1] == pytest.approx(0.5, abs=0.05)
    assert p[2] > 0.9


def test_calibration_of_a_critic_that_sees_no_difference_is_one_half() -> None:
    calibration = ScoreCalibration()
    calibration.fit(torch.full((8,), 3.0), torch.full((8,), 3.0))
    assert calibration(torch.tensor([3.0])).item() == pytest.approx(0.5, abs=1e-6)


def test_checkpoints_that_remember_training_scores_are_read_still() -> None:
    calibration = ScoreCalibration()
    old = {
        "slope": torch.tensor(2.0),
        "intercept": torch.tensor(-1.0),
        "seen": torch.tensor(9),
        "recent": torch.ones(2, 4),
    }
    calibration.load_state_dict(old)
    assert (calibration.slope, calibration.intercept) == (2, -1)


def test_separable_scores_get_platts_cautious_probability() -> None:
    """Eight real scores at 1 and eight generated at -1: (8 + 1) / (8 + 2), not certainty."""
    calibration = ScoreCalibration()
    calibration.fit(torch.ones(8), -torch.ones(8))
    assert torch.allclose(calibration(torch.tensor([1.0, -1.0])), torch.tensor([0.9, 0.1]), atol=1e-4)

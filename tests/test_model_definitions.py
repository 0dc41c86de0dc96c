"""The three networks: what they take and give, how they begin, what the predictor keeps, and calibrated scores."""

import pytest
import torch
from conftest import small_generator

from generator import state_rows
from model_definitions import NORM_EPSILON, VAE, Discriminator, FirstFrameNorm, ScoreCalibration, WeightPredictorRNN


def test_the_three_networks_are_built_with_the_sources_arguments_sizes_and_layers() -> None:
    """What other code may rely on: `from model_definitions import VAE, Discriminator, WeightPredictorRNN`."""
    torch.manual_seed(0)
    vae, critic, predictor = VAE(), Discriminator(), WeightPredictorRNN(3 * 16 * 16, 10)
    x = vae.decode(torch.randn(2, 128))
    x_rec, mu, logvar = vae(x)
    assert x.shape == x_rec.shape == (2, 3, 128, 128)
    assert mu.shape == logvar.shape == (2, 128)
    for network in (vae.encoder, critic.stages):
        assert [stage.conv.weight.shape[:2] for stage in network] == [(32, 3), (64, 32), (128, 64), (256, 128)]
    assert vae.decoder.get_parameter("stage1.weight").shape == (32, 3, 4, 4)
    kinds = [{type(part).__name__ for part in net.modules() if not [*part.children()]} for net in (vae, critic.stages)]
    assert kinds[0] == {"Conv2d", "ReLU", "MaxPool2d", "Linear", "Unflatten", "ConvTranspose2d", "Sigmoid"}
    assert kinds[1] == {"Conv2d", "LeakyReLU", "MaxPool2d"}
    assert {stage.activation.negative_slope for stage in critic.stages} == {0.2}
    assert critic(x).shape == (2,)
    assert critic(torch.full((1, 3, 128, 128), 0.5)).item() == 0  # grey is the middle, and biases begin at 0
    assert torch.equal(critic.probability(x), torch.full((2,), 0.5))  # before any score was seen
    critic.calibration.fit(critic(x).detach(), critic(1 - x).detach())
    p = critic.probability(torch.cat([x, 1 - x]))
    assert p.shape == (4,)
    assert 0 <= p.min() < 0.5 < p.max() <= 1
    assert predictor(torch.rand(2, 5, 3, 16, 16)).shape == (2, 5, 10)
    assert (predictor.gru.input_size, predictor.gru.hidden_size, predictor.gru.num_layers) == (768, 128, 2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "widths"), [(16, (4,)), (16, (4, 4, 4, 4)), (32, (4, 6, 8)), (64, (4, 6)), (128, (4, 4, 4, 4))]
)
def test_other_sizes_keep_shapes_and_ranges(size: int, widths: tuple[int, ...], channels: int) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, channels, size, size)
    vae = VAE(size, channels, 5, widths)
    mu, logvar = vae.encode(x)
    assert mu.shape == logvar.shape == (2, 5)
    for image in (vae.decode(torch.randn(2, 5)), vae(x)[0]):
        assert image.shape == x.shape
        assert 0 <= image.min() <= image.max() <= 1
    critic = Discriminator(size, channels, widths)
    assert critic(x).shape == critic.probability(x).shape == (2,)


def test_a_size_that_stages_cannot_halve_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be halved 5 times"):
        VAE(16, 3, 8, (4,) * 5)


def test_a_reconstruction_uses_the_given_noise() -> None:
    torch.manual_seed(0)
    vae, x, noise = VAE(16, 3, 8, (4, 6)), torch.rand(2, 3, 16, 16), torch.randn(2, 8)
    x_rec, mu, logvar = vae(x, noise)
    assert torch.equal(x_rec, vae.decode(mu + (0.5 * logvar).exp() * noise))
    assert not torch.equal(vae(x)[0], vae(x)[0])  # sampled anew without it


def test_weights_begin_with_a_spread_by_the_number_of_terms_that_meet_in_an_output() -> None:
    torch.manual_seed(0)
    vae, critic, predictor = VAE(), Discriminator(), WeightPredictorRNN(3 * 64, 10)
    for weight, terms, gain in (  # He et al.'s gain is √2, and half of it before mu, logvar and Sigmoid
        (critic.stages.stage2.conv.weight, 9 * 32, 1), (vae.encoder.stage2.conv.weight, 9 * 32, 1),
        (vae.decoder.projection.weight, 128, 1), (vae.decoder.stage2.weight, 4 * 64, 1),
        (vae.decoder.stage1.weight, 4 * 32, 0.5), (vae.to_mu.weight, 256 * 64, 0.5),
        (predictor.gru.weight_ih_l0, 3 * 64, 0.5 / 2**0.5),
    ):  # fmt: skip
        assert weight.std().item() == pytest.approx(gain * (2 / terms) ** 0.5, rel=0.05)


# ----------------------------------------------------------------------------------------------------- the predictor


def test_frames_are_normalised_by_the_first_ones_statistics() -> None:
    torch.manual_seed(0)
    norm, frames = FirstFrameNorm(12).double(), torch.rand(2, 4, 12).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    normalised, statistics = norm(frames, None)
    for row in range(2):
        first = frames[row, 0]
        mean = first.sum() / 12
        deviation = ((first - mean).square().sum() / 12 + NORM_EPSILON).sqrt()
        for t in range(4):
            assert torch.allclose(normalised[row, t], (frames[row, t] - mean) / deviation * norm.weight + norm.bias)
    brighter = torch.cat([frames[:, :1], 1.5 * frames[:, 1:]], dim=1)  # a LayerNorm of each frame would not see it
    assert torch.equal(norm(brighter, None)[0][:, 0], normalised[:, 0])
    assert (norm(brighter, None)[0][:, 1:] - normalised[:, 1:]).abs().mean() > 0.1
    assert torch.equal(norm(frames[:, 2:], statistics)[0], normalised[:, 2:])
    assert not torch.allclose(norm(frames[:, 2:], None)[0], normalised[:, 2:])
    assert norm(torch.full((1, 2, 12), 0.5).double(), None)[0].isfinite().all()  # a blank image


def test_a_video_is_encoded_in_parts_as_in_one_go_and_some_of_the_videos_too() -> None:
    predictor, video = small_generator().double().predictor, torch.rand(3, 6, 3, 16, 16).double()
    whole, end = predictor.encode(video)
    first, state = predictor.encode(video[:, :2])
    second, last = predictor.encode(video[1:, 2:], state_rows(state, slice(1, None)))
    assert torch.allclose(first, whole[:, :2], atol=1e-12)
    assert torch.allclose(second, whole[1:, 2:], atol=1e-12)
    for part, expected in zip(last, state_rows(end, slice(1, None)), strict=True):
        assert torch.allclose(part, expected, atol=1e-12)
    torch.nn.init.normal_(predictor.to_update.weight)
    assert torch.allclose(predictor(video), whole @ predictor.to_update.weight.T)


# ------------------------------------------------------------------------------------------------------- calibration


def test_calibration_recovers_the_true_probability_of_shifted_normals() -> None:
    """Scores N(7, 2²) and N(4, 2²): the true log-odds are linear, with slope 3 / 4 and zero at 5.5."""
    torch.manual_seed(0)
    calibration = ScoreCalibration()
    calibration.fit(7 + 2 * torch.randn(20_000), 4 + 2 * torch.randn(20_000))
    score = torch.linspace(0, 11, 12)
    assert torch.allclose(calibration(score), torch.sigmoid(0.75 * (score - 5.5)), atol=0.02)


def test_separable_scores_get_platts_cautious_probability_whatever_was_fitted_before() -> None:
    """Eight real scores at 1 and eight generated at -1: (8 + 1) / (8 + 2), not certainty."""
    calibration = ScoreCalibration()
    calibration.fit(torch.randn(64) - 100, torch.randn(64) + 100)  # an old critic, upside down
    calibration.fit(torch.ones(8), -torch.ones(8))
    assert torch.allclose(calibration(torch.tensor([1.0, 0.0, -1.0])), torch.tensor([0.9, 0.5, 0.1]), atol=1e-4)
    calibration.fit(torch.full((8,), 3.0), torch.full((8,), 3.0))
    assert calibration(torch.tensor([3.0])).item() == pytest.approx(0.5, abs=1e-6)  # no difference between them

"""The networks that draw and judge pictures: `VAE`, whose decoder is the generator, and `Discriminator`, the critic.

`WeightPredictorRNN` stands in `weight_predictor.py`; the path through all of them is `generator_path.Generator`.
"""

import math
from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from configuration import Config
from score_calibration import ScoreCalibration

LEAKY_SLOPE = 0.2
STAGE_PADDING = 1


class VAE(nn.Module):
    """Variational autoencoder (Kingma & Welling 2013, https://arxiv.org/abs/1312.6114); its decoder is the generator.

    Stages are numbered from the picture inwards on both sides: `encoder.stage1` sees the picture and
    `decoder.stage1` draws it, whatever the depth.

    Args:
        image_size: H = W, a power of two.
        image_channels: C.
        latent_dim: length of z, mu and logvar.
        channels: width of each encoder stage, from the picture inwards; each stage halves the picture.
    """

    def __init__(
        self,
        image_size: int = 128,
        image_channels: int = 3,
        latent_dim: int = 128,
        channels: tuple[int, ...] | list[int] = (32, 64, 128, 256),
    ) -> None:
        super().__init__()
        self.image_shape = (image_channels, image_size, image_size)
        self.latent_dim = latent_dim
        widths = [image_channels, *channels]
        smallest = _smallest_side(image_size, channels)
        features = channels[-1] * smallest**2

        self.encoder = nn.Sequential(
            OrderedDict(  #                                                            (B, C, H, W)
                (f"stage{number}", _conv_stage(narrow, wide, nn.ReLU()))  #            (B, wide, H / 2^n, W / 2^n)
                for number, (narrow, wide) in enumerate(pairwise(widths), start=1)
            )
        )
        self.to_mu = nn.Linear(features, latent_dim)
        self.to_logvar = nn.Linear(features, latent_dim)

        decoder: OrderedDict[str, nn.Module] = OrderedDict()
        decoder["projection"] = nn.Linear(latent_dim, features)  #                     (B, features)
        decoder["unflatten"] = nn.Unflatten(
            1, (channels[-1], smallest, smallest)
        )  #  (B, channels[-1], smallest, smallest)
        decoder["relu"] = nn.ReLU()
        for number in range(len(channels), 0, -1):
            # Kernel 4 with stride 2 doubles the picture, and every pixel gets the same number of contributions.
            decoder[f"stage{number}"] = nn.ConvTranspose2d(widths[number], widths[number - 1], 4, stride=2, padding=1)
            decoder[f"relu{number}" if number > 1 else "sigmoid"] = nn.ReLU() if number > 1 else nn.Sigmoid()
        self.decoder = nn.Sequential(decoder)  #                                       (B, C, H, W)
        _initialise(self)
        # Half the usual spread on what becomes mu, logvar and pixels: KL and Sigmoid start in their calm range.
        for weight in (self.to_mu.weight, self.to_logvar.weight, self.decoder.get_parameter("stage1.weight")):
            with torch.no_grad():
                weight.mul_(0.5)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, C, H, W) in [0, 1] -> mu, logvar of q(z | x), each (B, latent_dim)."""
        features = self.encoder(_centred(x)).flatten(1)
        return self.to_mu(features), self.to_logvar(features)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, latent_dim), normally from N(0, I) -> pictures (B, C, H, W) in [0, 1]."""
        return self.decoder(z)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructs pictures through z = mu + e^(logvar / 2) · noise (Kingma & Welling 2013, section 2.4).

        Args:
            x: (B, C, H, W) in [0, 1].
            noise: (B, latent_dim) standard normal; drawn here if None.

        Returns:
            x_rec (B, C, H, W) in [0, 1], mu and logvar (B, latent_dim).
        """
        mu, logvar = self.encode(x)
        if noise is None:
            noise = torch.randn_like(mu)
        return self.decode(mu + (0.5 * logvar).exp() * noise), mu, logvar


class Discriminator(nn.Module):
    """Wasserstein critic with the encoder's stages and one unbounded score (Gulrajani et al. 2017, section 4).

    No BatchNorm: it would mix the pictures of a batch, and the gradient penalty is a property of each one.

    Args:
        image_size, image_channels, channels: as for the `VAE`.
    """

    def __init__(
        self, image_size: int = 128, image_channels: int = 3, channels: tuple[int, ...] | list[int] = (32, 64, 128, 256)
    ) -> None:
        super().__init__()
        widths = [image_channels, *channels]
        self.stages = nn.Sequential(
            OrderedDict(
                (f"stage{number}", _conv_stage(narrow, wide, nn.LeakyReLU(LEAKY_SLOPE)))
                for number, (narrow, wide) in enumerate(pairwise(widths), start=1)
            )
        )
        self.to_score = nn.Linear(channels[-1] * _smallest_side(image_size, channels) ** 2, 1)
        _initialise(self)
        self.calibration = ScoreCalibration()

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in [0, 1] -> scores (B,): higher is more real, without unit or zero."""
        return self.to_score(self.stages(_centred(x)).flatten(1)).squeeze(1)

    def input_gradient(self, x: Tensor) -> Tensor:
        """∇D(x) of each picture (B, C, H, W), as a differentiable function of the weights, in one ordinary pass.

        The critic is piecewise linear: which slope a LeakyReLU has and which pixel a MaxPool takes are constants almost
        everywhere, and with them fixed, D is linear and its gradient is the stages' transposes in reverse. So no double
        backward is needed. `torch.autograd` would give the same numbers, but it also sends a gradient that is zero all
        over through the forward pass once more: 6 convolutions' work for each layer instead of 4.
        """
        h, slopes, places = _centred(x), [], []
        convolutions = [stage.conv for stage in conv_stages(self.stages)]
        with torch.no_grad():
            for conv in convolutions:
                drawn = conv(h)
                h, index = functional.max_pool2d(drawn, 2, return_indices=True)
                slopes.append(torch.full_like(h, LEAKY_SLOPE).masked_fill(h > 0, 1))  # torch's choice where h = 0
                places.append((drawn, index))
                h = h * slopes[-1]
        gradient = self.to_score.weight.view(1, *h.shape[1:]).expand_as(h)
        for conv, slope, (drawn, index) in zip(reversed(convolutions), reversed(slopes), reversed(places), strict=True):
            gradient = _unpool(gradient * slope, drawn, index)
            gradient = functional.conv_transpose2d(gradient, conv.weight, padding=STAGE_PADDING)
        return 2 * gradient  # of _centred

    def probability(self, x: Tensor) -> Tensor:
        """Calibrated probability (B,) in [0, 1] that each picture (B, C, H, W) is real, were half of all pictures real.

        Fitted at each checkpoint to the scores of real pictures, held-out ones if there are any, and of fresh ones that
        the averaged networks draw with θ + Δ; 0.5 for all before the first checkpoint.
        """
        return self.calibration(self(x))


def build_discriminator(config: Config) -> Discriminator:
    """The critic that the settings describe, freshly initialised from torch's global random state."""
    return Discriminator(config.image.size, config.image.channels, config.discriminator.channels)


class ConvStage(nn.Sequential):
    """One stage of the encoder or the critic; it tells type checkers what its layers are."""

    conv: nn.Conv2d
    pool: nn.MaxPool2d
    activation: nn.Module


def conv_stages(network: nn.Sequential) -> list[ConvStage]:
    """The stages of an encoder or a critic, from the picture inwards."""
    return [stage for stage in network if isinstance(stage, ConvStage)]


def _conv_stage(narrow: int, wide: int, activation: nn.Module) -> ConvStage:
    """(B, narrow, H, W) -> (B, wide, H / 2, W / 2).

    The activation stands behind the pooling: it keeps the order of numbers, so the result is the same as the other way
    round, for a quarter of the work.
    """
    conv = nn.Conv2d(narrow, wide, 3, padding=STAGE_PADDING)
    return ConvStage(OrderedDict(conv=conv, pool=nn.MaxPool2d(2), activation=activation))


def _unpool(pooled: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """The transpose of `max_pool2d(x, 2)`: each value goes to the pixel that it came from, zeros elsewhere.

    The operation that autograd uses, since every runner has a fast version of it: `max_unpool2d` has none compiled.
    """
    return torch.ops.aten.max_pool2d_with_indices_backward(pooled, x, [2, 2], [2, 2], [0, 0], [1, 1], False, index)


def _centred(x: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1]: the first convolution sees differences, not a large common part (a white page, say)."""
    return 2 * x - 1


def _smallest_side(image_size: int, channels: tuple[int, ...] | list[int]) -> int:
    """Side of the picture after all stages.

    Raises:
        ValueError: sides that the stages cannot halve evenly.
    """
    side, rest = divmod(image_size, 2 ** len(channels))
    if rest or not side:
        raise ValueError(f"image_size {image_size} cannot be halved {len(channels)} times; give fewer channels")
    return side


def _initialise(network: nn.Module) -> None:
    """He et al. 2015 (https://arxiv.org/abs/1502.01852): keeps the signal's size through ReLU layers.

    torch's fan-in is wrong for ConvTranspose2d, where kernel² / stride² terms of each input channel meet in a pixel.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            fan_in = module.weight[0].numel()
            if isinstance(module, nn.ConvTranspose2d):
                fan_in = module.in_channels * math.prod(module.kernel_size) // math.prod(module.stride)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)

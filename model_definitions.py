"""The three networks: `VAE`, whose decoder makes images, `WeightPredictorRNN`, and `Discriminator`, the critic; and the
states that `animate.py` asks of the GRU.

`generator.Generator` is the path that leads through the first two.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from video_synth import Clip, Motion, VideoSynthesizer, catmull_rom

LEAKY_SLOPE = 0.2
STAGE_PADDING = 1
NORM_EPSILON = 1e-3  # added to the first frame's variance: a blank image has none
INPUT_GAIN = 0.5  # standard deviation of what the first frame sends to the GRU's gates at the start


class VAE(nn.Module):
    """Variational autoencoder (Kingma & Welling 2013, https://arxiv.org/abs/1312.6114); its decoder is the generator.

    Stages are numbered from the image inwards on both sides: `encoder.stage1` sees the image and
    `decoder.stage1` makes it, whatever the depth.

    Args:
        image_size: H = W, a power of two.
        image_channels: C.
        latent_dim: length of z, mu and logvar.
        channels: width of each encoder stage, from the image inwards; each stage halves the image.
    """

    def __init__(self, image_size: int = 128, image_channels: int = 3, latent_dim: int = 128,
                 channels: Sequence[int] = (32, 64, 128, 256)) -> None:  # fmt: skip
        super().__init__()
        self.image_shape = (image_channels, image_size, image_size)
        self.latent_dim = latent_dim
        widths = [image_channels, *channels]
        smallest = _smallest_side(image_size, channels)
        features = channels[-1] * smallest**2

        self.encoder = _build_stages(widths, nn.ReLU)  #                               (B, C, H, W)
        self.to_mu = nn.Linear(features, latent_dim)
        self.to_logvar = nn.Linear(features, latent_dim)

        decoder: OrderedDict[str, nn.Module] = OrderedDict()
        decoder["projection"] = nn.Linear(latent_dim, features)  #                     (B, features)
        decoder["unflatten"] = nn.Unflatten(1, (channels[-1], smallest, smallest))
        decoder["relu"] = nn.ReLU()
        for number in range(len(channels), 0, -1):
            # Kernel 4 with stride 2 doubles the image, and every pixel gets the same number of contributions.
            decoder[f"stage{number}"] = nn.ConvTranspose2d(widths[number], widths[number - 1], 4, stride=2, padding=1)
            decoder[f"relu{number}" if number > 1 else "sigmoid"] = nn.ReLU() if number > 1 else nn.Sigmoid()
        self.decoder = nn.Sequential(decoder)  #                                       (B, C, H, W)
        _initialise(self)
        # Half the usual spread on what becomes mu, logvar and pixels, so that KL and Sigmoid start far from saturation.
        for weight in (self.to_mu.weight, self.to_logvar.weight, self.decoder.get_parameter("stage1.weight")):
            with torch.no_grad():
                weight.mul_(0.5)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) in [0, 1] -> mu, logvar of q(z | x), each (B, latent_dim)."""
        features = self.encoder(_centred(x)).flatten(1)
        return self.to_mu(features), self.to_logvar(features)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, latent_dim), normally from N(0, I) -> images (B, C, H, W) in [0, 1]."""
        return self.decoder(z)

    def forward(
        self, x: Tensor, noise: Tensor | None = None, decoder_share: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructs images through z = mu + e^(logvar / 2) · noise (Kingma & Welling 2013, section 2.4).

        Images (B, C, H, W) in [0, 1] -> x_rec alike, mu and logvar (B, latent_dim). `noise` is (B, latent_dim) standard
        normal; sampled here if None. The decoder's weights get a share, 0 to 1, of their gradient, the encoder all.
        """
        mu, logvar = self.encode(x)
        if noise is None:
            noise = torch.randn_like(mu)
        z = mu + (0.5 * logvar).exp() * noise
        weights = {name: _with_share(weight, decoder_share) for name, weight in self.decoder.named_parameters()}
        return functional_call(self.decoder, weights, (z,), strict=True), mu, logvar


def _with_share(weight: Tensor, share: float | Tensor) -> Tensor:
    """The same values, whose gradient is a share of `weight`'s; at the numbers 0 and 1 nothing is computed for that."""
    if isinstance(share, Tensor) or 0 < share < 1:
        return weight.detach().lerp(weight, share)
    return weight if share else weight.detach()


class PredictorState(NamedTuple):
    """What the predictor keeps of the frames that it has encoded."""

    hidden: Tensor  # (num_layers, B, hidden_size), of the GRU
    scale: Tensor  # (B, 1, 1), 1 / standard deviation of the first frame's values
    offset: Tensor  # (B, 1, 1), -mean / standard deviation of the first frame's values; of changes (B, 1, input_size)


class FirstFrameNorm(nn.Module):
    """LayerNorm (Ba et al. 2016, https://arxiv.org/abs/1607.06450) of whole videos, by the first frame's statistics.

    (frame - mean of the first frame) / deviation of the first frame · gain + bias, gain and bias for each input. With
    statistics of their own, frames would lose what the motion does to brightness and contrast: a linear probe of the
    GRU's states then explained the brightness with R² = 0.65, and with the first frame's statistics 0.95.

    With `changes` the frames after the first are shown as what differs from it, (frame - first frame) / deviation: the
    GRU need not remember the first frame to see what moved, and understands the motion of images that it never saw.
    """

    def __init__(self, input_size: int, changes: bool = False) -> None:
        super().__init__()
        self.changes = changes
        self.weight = nn.Parameter(torch.ones(input_size))
        self.bias = nn.Parameter(torch.zeros(input_size))

    def forward(self, frames: Tensor, statistics: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Frames (B, T, input_size) and the state's scale and offset; None: take them from frame 0."""
        if statistics is None:
            variance, mean = torch.var_mean(frames[:, :1], dim=2, keepdim=True, correction=0)
            scale = (variance + NORM_EPSILON).rsqrt()
            statistics = scale, -(frames[:, :1] if self.changes else mean) * scale
            if self.changes:  # but for the first, which is shown as it is
                frames = torch.cat([2 * frames[:, :1] - mean, frames[:, 1:]], dim=1)
        scale, offset = statistics
        return torch.addcmul(self.bias, torch.addcmul(offset, frames, scale), self.weight), statistics


class WeightPredictorRNN(nn.Module):
    """Encodes a synthetic video, one frame a step, and predicts an update code at every frame.

    Normalisation, GRU, Linear. The Linear layer is zero and has no bias, so that θ + Δ = θ before training.

    Args:
        input_size: C · height · width of one video frame.
        update_size: length of the predicted code; for the head `full`, the number of updated weights.
        hidden_size, num_layers: of the GRU.
        changes: as for `FirstFrameNorm`.
    """

    def __init__(self, input_size: int, update_size: int, hidden_size: int = 128, num_layers: int = 2,
                 changes: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.norm = FirstFrameNorm(input_size, changes)
        self.gru = nn.GRU(input_size, hidden_size, num_layers, batch_first=True)
        self.to_update = nn.Linear(hidden_size, update_size, bias=False)
        nn.init.zeros_(self.to_update.weight)
        # torch's default depends on hidden_size only: the many pixels of a frame would saturate every gate.
        nn.init.normal_(self.gru.get_parameter("weight_ih_l0"), std=INPUT_GAIN / math.sqrt(input_size))

    def encode(self, video: Tensor, state: PredictorState | None = None) -> tuple[Tensor, PredictorState]:
        """Runs the GRU over (more of) a video (B, T, C, height, width) in [0, 1]: its states (B, T, hidden_size), one
        for each frame, and the state after the last. `state` is that after the frames before; None at the beginning,
        where frame 0 should be the image itself.
        """
        frames, statistics = self.norm(video.flatten(2), state and state[1:])
        states, hidden = self.gru(frames, state and state.hidden)
        return states, PredictorState(hidden, *statistics)

    def forward(self, video: Tensor) -> Tensor:
        """Video (B, T, C, height, width) in [0, 1] -> update codes (B, T, update_size); the last is the image's."""
        states, _ = self.encode(video)
        return self.to_update(states)


class NoUpdate(nn.Module):
    """In the predictor's place where nothing is updated: a code that stays at zero, so that θ + Δ = θ.

    It has `encode` and `to_update` as `WeightPredictorRNN` does, but ignores the video: its states are empty.
    """

    def __init__(self, update_size: int) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.zeros(update_size))

    def encode(self, video: Tensor, state: PredictorState | None = None) -> tuple[Tensor, None]:
        """Video (B, T, C, height, width) -> empty states (B, T, 0), and no state to go on from."""
        return video.new_empty(*video.shape[:2], 0), None

    def to_update(self, states: Tensor) -> Tensor:
        """States (B, 0) -> the one code for all of them, (1, update_size)."""
        return self.code[None]


class Discriminator(nn.Module):
    """Wasserstein critic with the encoder's stages and one unbounded score (Gulrajani et al. 2017, section 4).

    No BatchNorm: it would mix the images of a batch, and the gradient penalty is a property of each one. Its arguments
    are those of the `VAE`.
    """

    def __init__(self, image_size: int = 128, image_channels: int = 3,
                 channels: Sequence[int] = (32, 64, 128, 256)) -> None:  # fmt: skip
        super().__init__()
        self.stages = _build_stages([image_channels, *channels], partial(nn.LeakyReLU, LEAKY_SLOPE))
        self.to_score = nn.Linear(channels[-1] * _smallest_side(image_size, channels) ** 2, 1)
        _initialise(self)
        self.calibration = ScoreCalibration()

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> scores (B,): higher is more real, without unit or zero."""
        return self.to_score(self.stages(_centred(x)).flatten(1)).squeeze(1)

    def input_gradient(self, x: Tensor) -> Tensor:
        """∇D(x) of each image (B, C, H, W), as a differentiable function of the weights, in one ordinary pass.

        The critic is piecewise linear: which slope a LeakyReLU has and which pixel a MaxPool takes are constants almost
        everywhere, and with them fixed, D is linear and its gradient is the stages' transposes in reverse. So no double
        backward is needed. `torch.autograd` would give the same numbers, but it also sends a gradient that is zero all
        over through the forward pass once more: the work of 6 convolutions for each layer instead of 4.
        """
        h, places = _centred(x), []
        convolutions = [stage.conv for stage in conv_stages(self.stages)]
        with torch.no_grad():
            for conv in convolutions:
                features = conv(h)
                pooled, index = functional.max_pool2d(features, 2, return_indices=True)
                places.append((features, index, pooled))
                h = functional.leaky_relu(pooled, LEAKY_SLOPE)
        gradient = self.to_score.weight.view(1, *h.shape[1:]).expand_as(h)
        for conv, (features, index, pooled) in zip(reversed(convolutions), reversed(places), strict=True):
            gradient = torch.ops.aten.leaky_relu_backward(gradient, pooled, LEAKY_SLOPE, False)
            # The transpose of max_pool2d: each value goes to the pixel that it came from, as autograd does it.
            gradient = torch.ops.aten.max_pool2d_with_indices_backward(
                gradient, features, [2, 2], [2, 2], [0, 0], [1, 1], False, index)  # fmt: skip
            gradient = functional.conv_transpose2d(gradient, conv.weight, padding=STAGE_PADDING)
        return 2 * gradient  # of _centred

    def probability(self, x: Tensor) -> Tensor:
        """Calibrated probability (B,) in [0, 1] that each image (B, C, H, W) is real, were half of all images real.

        Fitted at each checkpoint to the scores of real images, held-out ones if there are any, and of new ones decoded
        by the averaged networks with θ + Δ; 0.5 for all before the first checkpoint.
        """
        return self.calibration(self(x))


class ScoreCalibration(nn.Module):
    """Turns critic scores into probabilities: p = sigmoid(slope · score + intercept), fitted by logistic regression.

    Platt 1999, "Probabilistic outputs for support vector machines". A Wasserstein score has neither zero nor unit, so a
    plain sigmoid of it means nothing; `quality.calibrate` fits this one at each checkpoint. Slope and intercept are
    buffers, and so part of the checkpoint.
    """

    slope: Tensor
    intercept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slope", torch.zeros(()))
        self.register_buffer("intercept", torch.zeros(()))

    def forward(self, score: Tensor) -> Tensor:
        """Scores (B,) -> probabilities (B,) in [0, 1]."""
        return torch.sigmoid(self.slope * score.float() + self.intercept)

    @torch.no_grad()
    def fit(self, score_real: Tensor, score_fake: Tensor) -> None:
        """Fits slope and intercept to scores (N,) of real and of generated images. Stays on the device.

        Newton's method, in float64. Targets are Platt's (n + 1) / (n + 2) instead of 1, which keeps separable scores
        from an infinite slope.
        """
        scores = torch.stack([score_real, score_fake]).double()
        count = scores.shape[1]
        centre, spread = scores.mean(), scores.std(correction=0).clamp_min(1e-12)
        x = ((scores - centre) / spread).flatten()
        high = (count + 1) / (count + 2)
        target = torch.cat([torch.full_like(x[:count], high), torch.full_like(x[count:], 1 - high)])
        design = torch.stack([x, torch.ones_like(x)], dim=1)  # (2 N, 2)
        ridge = 1e-6 * torch.eye(2, dtype=torch.float64, device=x.device)
        solution = torch.zeros(2, dtype=torch.float64, device=x.device)
        for _ in range(25):
            p = torch.sigmoid(design @ solution)
            gradient = design.T @ (p - target) / count + ridge @ solution
            hessian = (design * (p * (1 - p))[:, None]).T @ design / count + ridge
            solution = solution - torch.linalg.solve(hessian, gradient)
        self.slope.copy_(solution[0] / spread)
        self.intercept.copy_(solution[1] - solution[0] * centre / spread)


# ------------------------------------------------------------------------------ videos to be tuned to, and their states

Streams = tuple[Tensor, ...]
"""Videos in training: which image or clip each shows (B,), and of a synthetic video the numbers of its `Motion`."""


class ImageTarget(nn.Module):
    """Images and their synthetic videos. The state that draws a frame is a function of where its motions are, so that
    it holds for any phase of the motion: a small network, needed only while the GRU learns to be in these states.
    """

    ASKED = 0.8  # fraction of the training videos that move as the seeds say; the others move in other phases

    def __init__(self, synthesizer: VideoSynthesizer, hidden_size: int, images: Tensor, motion: Motion,
                 drive: Clip | None, random: torch.Generator) -> None:  # fmt: skip
        super().__init__()
        self.synthesizer, self.images, self.motion, self.drive = synthesizer, images, motion, drive
        layers: list[nn.Module] = []
        for wide, narrow in pairwise((len(synthesizer.paths), 128, 128, hidden_size)):
            layers += [layer := nn.Linear(wide, narrow), nn.ReLU()]
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=random)
            nn.init.zeros_(layer.bias)
        layers[-1] = nn.Tanh()
        self.to_state = nn.Sequential(*layers)
        # One frame doesn't tell how an image will move: before it has seen more, the GRU isn't judged, but at rest.
        self.seen_first, self.blind = synthesizer.frames, 0 if drive else 2
        self.pace = 0.5 if drive else 1.0  # of training videos; clips are slower than synthetic ones

    def begin(self, count: int, random: torch.Generator) -> Streams:
        """Streams of random images, most with the motion of their seeds."""
        rows = torch.randint(len(self.images), (count,), generator=random)
        motion = self.synthesizer.sample_motion(count, self.images.shape[1:], None, random)
        if self.drive:  # motions that begin at rest, of any strength: what a clip's first frame shows is the image
            phases = (2 * motion.phases).floor() / 2
            motion = motion._replace(phases=phases, amplitudes=torch.rand(motion.amplitudes.shape, generator=random))
        else:
            asked = torch.rand(count, 1, 1, generator=random) < self.ASKED
            motion = motion._replace(phases=torch.where(asked, self.motion.phases.cpu()[rows], motion.phases))
        return tuple(x.to(self.images.device) for x in (rows, *motion))

    def video(self, streams: Streams, times: Tensor, full_size: bool = False) -> Tensor:
        """Frames at `times` (B, K): those to be drawn, at full size, or those that the GRU watches."""
        images = self.images[streams[0]]
        if self.drive and not full_size:
            images = self.first_frames(streams)
        return self.synthesizer(images, Motion(*streams[1:]), times, full_size)

    def first_frames(self, streams: Streams) -> Tensor:
        """What the GRU sees before the video: (B, C, H, W)."""
        return self.drive.frames[streams[0] % len(self.drive.frames), 0] if self.drive else self.images[streams[0]]

    def states(self, streams: Streams, times: Tensor) -> Tensor:
        """The states at which the frames at `times` (B, K) are drawn: (B, K, hidden_size) in [-1, 1]."""
        return self.to_state(self.synthesizer.path(Motion(*streams[1:]), times))

    def noise(self, streams: Streams, times: Tensor, size: tuple[int, int]) -> Tensor:
        """What is added to frames at `times` (B, K) that the GRU watches: (B, K, C, *size), or of a shape alike."""
        return self.synthesizer.noise(Motion(*streams[1:]), times, size)

    def times(self, streams: Streams, random: torch.Generator) -> Tensor:
        """Random times, (B, 1)."""
        return self.synthesizer.frames * torch.rand(len(streams[0]), 1, generator=random).to(self.images.device)


class ClipTarget(nn.Module):
    """Clips that repeat: each frame that a prediction draws has a state of its own, free numbers at first. Frames
    between are drawn from states on the curve through these, as they are when a video is shown. Its methods do what
    those of `ImageTarget` do.
    """

    seen_first, blind, pace, drive = 1, 0, 1.0, None

    def __init__(
        self, hidden_size: int, frames: Tensor, lengths: Tensor, between: int, random: torch.Generator
    ) -> None:
        super().__init__()
        self.frames, self.lengths, self.between, self.images = frames, lengths, between, frames[:, 0]
        self.free = nn.Parameter(0.5 * torch.randn(len(frames), int(lengths.max()), hidden_size, generator=random))

    def begin(self, count: int, random: torch.Generator) -> Streams:
        return (torch.randint(len(self.images), (count,), generator=random).to(self.images.device),)

    def video(self, streams: Streams, times: Tensor, full_size: bool = False) -> Tensor:
        places = (times * self.between).round().long() % (self.between * self.lengths[streams[0], None])
        return self.frames[streams[0][:, None], places]

    def first_frames(self, streams: Streams) -> Tensor:
        return self.images[streams[0]]

    def noise(self, streams: Streams, times: Tensor, size: tuple[int, int]) -> Tensor:
        return times.new_zeros(*times.shape, 1, 1, 1)

    def states(self, streams: Streams, times: Tensor) -> Tensor:
        whole, rows, lengths = times.floor(), streams[0][:, None], self.lengths[streams[0], None]
        points = [self.free[rows, (whole.long() + k) % lengths].tanh() for k in (-1, 0, 1, 2)]
        return catmull_rom(points, (times - whole)[..., None])

    def times(self, streams: Streams, random: torch.Generator) -> Tensor:
        times = torch.rand(len(streams[0]), 1, generator=random).to(self.images.device)
        return (times * self.between * self.lengths[streams[0], None]).floor() / self.between


# ----------------------------------------------------------------------------------------------------------- building


class ConvStage(nn.Sequential):
    """One stage of the encoder or the critic, with typed names for its layers."""

    conv: nn.Conv2d
    pool: nn.MaxPool2d
    activation: nn.Module


def conv_stages(network: nn.Sequential) -> list[ConvStage]:
    """The stages of an encoder or a critic, from the image inwards."""
    return [stage for stage in network if isinstance(stage, ConvStage)]


def _build_stages(widths: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """`stage1`, `stage2`, ..., each (B, narrow, H, W) -> (B, wide, H / 2, W / 2).

    The activation stands behind the pooling: it keeps the order of numbers, so the result is the same as the other way
    round, for a quarter of the work.
    """
    stages = nn.Sequential()
    for number, (narrow, wide) in enumerate(pairwise(widths), start=1):
        conv = nn.Conv2d(narrow, wide, 3, padding=STAGE_PADDING)
        stage = ConvStage(OrderedDict(conv=conv, pool=nn.MaxPool2d(2), activation=activation()))
        stages.add_module(f"stage{number}", stage)
    return stages


def _centred(x: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1], so that a large constant part of the input (a white page, say) doesn't dominate."""
    return 2 * x - 1


def _smallest_side(image_size: int, channels: Sequence[int]) -> int:
    """Side of the image after all stages. Raises ValueError: sides that the stages cannot halve evenly."""
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

"""The networks, and the one path that draws pictures with them.

    z --VAE decoder θ--> x_base --VideoSynthesizer--> video --WeightPredictorRNN--> Δ --VAE decoder θ + Δ--> x_fake

`VAE`, `Discriminator` and `WeightPredictorRNN` are plain modules; `Generator` owns the first and the last, the video
synthesis and the update head. Training, samples and every other command draw through it.
"""

import math
from collections import OrderedDict
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from configuration import Config
from losses import at_least_fp32
from score_calibration import ScoreCalibration
from video_synth import Motion, MotionStrengths, VideoSynthesizer
from weight_predictor import ConstantUpdate, Memory, WeightPredictorRNN
from weight_updates import (
    DenseUpdate,
    FactoredUpdate,
    LowRankHead,
    Update,
    UpdateSpec,
    build_head,
    build_update_spec,
    check_update_size,
    draw_factored,
    tensor_scale,
    weight_scales,
)

LEAKY_SLOPE = 0.2
STAGE_PADDING = 1
WATCHED_SIZE = 64
"""Side of the frames that the GRU watches, unless the settings say otherwise: motion shows in small frames too."""


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


class GeneratorOutput(NamedTuple):
    """What one pass through the generator makes."""

    features: Tensor
    """(B, ...), z behind the decoder layers that no update changes."""
    x_base: Tensor
    """(B, C, H, W) in [0, 1], drawn with θ."""
    video: Tensor
    """(B, T, C, height, width) in [0, 1], the synthetic video that the GRU watched; without a GRU x_base, T times."""
    states: Tensor
    """(B, T, hidden_size), the GRU's state at each frame; (B, T, 0) without a GRU."""
    memory: Memory | None
    """What the GRU keeps of the video; None without a GRU."""
    update: Update
    """Δ of B pictures; of one where it is shared, constant or off (zeros)."""
    x_fake: Tensor
    """(B, C, H, W) in [0, 1], drawn with θ + Δ; x_base itself where the update is off."""

    @property
    def relative_update(self) -> Tensor:
        """(B or 1, total_size), Δ in units of each tensor's RMS, every weight written out."""
        return self.update.relative()


class Generator(nn.Module):
    """The whole generator: VAE, synthetic video, weight predictor and update head, with the one path through them.

    Args:
        vae: its decoder draws.
        synthesizer: makes the video that the predictor watches.
        layers: patterns of the decoder tensors that are updated.
        head, rank: how the predicted code becomes an update; see `weight_updates`.
        update_size: "auto" or the code's length, which is checked.
        hidden_size, num_layers: of the GRU.
        bound: α, the largest update of a weight in units of its tensor's RMS.
        shared: average the update over the batch, instead of one for each picture.
        detach_video: keep gradients from flowing through the video into x_base.
        update: "predicted" by the GRU; "constant", a learned code that is the same for every picture; or "off": x_fake
            is x_base. The latter two make no video and run no GRU.
        watches: whose video the GRU watches: the picture's "own", that of the "other" picture before it in the batch,
            or "still", the first frame of its own repeated.
        train_gru: False leaves normalisation and GRU as they were drawn at first; only `to_update` and the head learn.

    Raises:
        UserError: a pattern or an `update_size` that doesn't fit.
    """

    def __init__(
        self,
        vae: VAE,
        synthesizer: VideoSynthesizer,
        layers: list[str],
        *,
        head: str = "full",
        rank: int = 4,
        update_size: int | str = "auto",
        hidden_size: int = 128,
        num_layers: int = 2,
        bound: float = 0.2,
        shared: bool = False,
        detach_video: bool = True,
        update: str = "predicted",
        watches: str = "own",
        train_gru: bool = True,
    ) -> None:
        super().__init__()
        self.vae = vae
        self.synthesizer = synthesizer
        self.spec: UpdateSpec = build_update_spec(vae, layers)
        self.head = build_head(head, self.spec, rank)
        channels = vae.image_shape[0]
        height, width = synthesizer.video_size(torch.empty(0, *vae.image_shape))
        code_size = check_update_size(update_size, self.head, self.spec)
        self.predictor: WeightPredictorRNN | ConstantUpdate
        if update == "predicted":
            self.predictor = WeightPredictorRNN(channels * height * width, code_size, hidden_size, num_layers)
            self.predictor.norm.requires_grad_(train_gru)
            self.predictor.gru.requires_grad_(train_gru)
        else:
            self.predictor = ConstantUpdate(code_size)
        if update == "off":  # a constant that stays at zero
            self.predictor.requires_grad_(False)
            self.head.requires_grad_(False)
        self.update = update
        self.watches = watches
        self.bound = bound
        self.shared = shared
        self.detach_video = detach_video
        # Decoder layers before the first updated one draw the same with θ and θ + Δ: they run once for both.
        updated_layers = {tensor.name.split(".")[1] for tensor in self.spec.tensors}
        order = list(vae.decoder._modules)
        self._split = min(order.index(name) for name in updated_layers)

    def forward(self, z: Tensor, motion: Motion, frame: Tensor | None = None) -> GeneratorOutput:
        """One pass: base picture, its video, the update predicted at `frame`, and the picture drawn with it.

        Args:
            z: (B, latent_dim) from N(0, I).
            motion: of the synthetic video, from `draw_motion`.
            frame: (B,) frame number whose update draws x_fake; None takes the last frame's.
        """
        features = self.features(z)
        x_base = self.draw_base(features)
        video, states, memory = self.watch(x_base, motion)
        update = self.predict(states_at(states, frame))
        x_fake = x_base if self.update == "off" else self.draw(features, update)
        return GeneratorOutput(features, x_base, video, states, memory, update, x_fake)

    def draw_motion(self, batch: int, generator: torch.Generator | None = None, **how: bool) -> Motion:
        """The random numbers of the synthetic videos of `batch` pictures, on the generator's device.

        Args:
            how: `grain` and `varied` of `VideoSynthesizer.draw_motion`.
        """
        device = self.vae.to_mu.weight.device
        images = torch.empty(batch, *self.vae.image_shape, device=device)
        return self.synthesizer.draw_motion(images, generator, **how)

    # The steps of the path, for those who need only some of them.

    def features(self, z: Tensor) -> Tensor:
        """z (B, latent_dim) through the decoder layers that no update changes."""
        return self.vae.decoder[: self._split](z)

    def draw_base(self, features: Tensor) -> Tensor:
        """`features` -> x_base (B, C, H, W), drawn with θ."""
        return self.vae.decoder[self._split :](features)

    def watch(self, x_base: Tensor, motion: Motion) -> tuple[Tensor, Tensor, Memory | None]:
        """The GRU watches the picture itself, then its video: what moves is seen against what does not.

        Args:
            x_base: (B, C, H, W).

        Returns:
            The video (B, T, C, height, width), the GRU's states at its frames (B, T, hidden_size), and its memory. The
            state at frame t predicts the update that draws frame t + 1; at the last, T, which is frame 0 again.
        """
        x_base = x_base.detach() if self.detach_video else x_base
        x_watched = self.seen(x_base)
        frames = self.synthesizer.frames
        if self.update != "predicted":
            video = x_watched[:, None].expand(-1, frames, -1, -1, -1)
            return video, *self.predictor.watch(video)
        if self.watches == "still":
            first = torch.zeros(len(x_watched), 1, device=x_watched.device)
            video = self.synthesizer(x_watched, motion, first).expand(-1, frames, -1, -1, -1)
        else:
            video = self.synthesizer(x_watched, motion)
        states, memory = self.predictor.watch(torch.cat([self.reduced(x_watched)[:, None], video], dim=1))
        return video, states[:, 1:], memory

    def watch_on(self, output: GeneratorOutput, motion: Motion, rolling: Tensor, count: int) -> Tensor:
        """The GRU's states (B, count + 1, hidden_size) while it goes on watching for `count` frames after the video.

        Some pictures roll on: for them it watches its own drawn frames instead of the synthetic video (scheduled
        sampling, Bengio et al. 2015, https://arxiv.org/abs/1506.03099), since at generation it may have nothing else.

        Args:
            output: of `forward` for the same `motion`.
            rolling: (R,) the numbers of the pictures that roll on, which stand before all others: 0 to R - 1.

        Returns:
            State number k predicts the update that draws frame T + k; the first is the one at the video's end.
        """
        if self.update != "predicted" or not count:
            return output.states[:, -1:].expand(-1, count + 1, -1)
        assert output.memory is not None
        first = self.synthesizer.frames
        times = torch.arange(first, first + count, device=rolling.device).expand(len(output.states), -1)
        if self.watches == "still":
            times = torch.zeros_like(times)
        states, rolled = [], len(rolling)
        if rolled:
            states.append(self._roll_on(output, motion, times[:rolled], rolled))
        if rolled < len(output.states):
            rest = slice(rolled, None)
            video = self.synthesizer(
                self.seen(output.x_base.detach())[rest], Motion(*(part[rest] for part in motion)), times[rest]
            )
            watched, _ = self.predictor.watch(video, output.memory.rows(rest))
            states.append(torch.cat([output.states[rest, -1:], watched], dim=1))
        return torch.cat(states)

    def _roll_on(self, output: GeneratorOutput, motion: Motion, times: Tensor, rolled: int) -> Tensor:
        """`watch_on` of the first `rolled` pictures: (rolled, count + 1, hidden_size)."""
        assert output.memory is not None
        states = [output.states[:rolled, -1]]
        memory: Memory | None = output.memory.rows(slice(rolled))
        features = output.features[:rolled].detach()
        with torch.no_grad():
            grain = self.synthesizer.grain(
                Motion(*(part[:rolled] for part in motion)), times, self.synthesizer.video_size(output.x_base)
            )
        for k in range(times.shape[1]):
            with torch.no_grad():
                drawn = self.draw(features, self.predict(states[-1]))
                watched = (self.reduced(drawn) + grain[:, k]).clamp(0, 1)
            state, memory = self.predictor.watch(watched[:, None], memory)
            states.append(state[:, 0])
        return torch.stack(states, dim=1)

    def seen(self, x_base: Tensor) -> Tensor:
        """x_base (B, C, H, W) -> the pictures whose videos the GRU watches for them: rolled by one for `other`."""
        return x_base.roll(1, 0) if self.watches == "other" else x_base

    def reduced(self, images: Tensor) -> Tensor:
        """Pictures (B, C, H, W) -> (B, C, height, width), the size that the GRU watches."""
        size = self.synthesizer.video_size(images)
        return images if size == images.shape[-2:] else functional.interpolate(images, size=size, mode="area")

    def predict(self, states: Tensor, frozen: bool = False) -> Update:
        """GRU states (B, hidden_size) -> updates Δ of B pictures; with a shared update of one, the batch's mean.

        Args:
            frozen: keep gradients from θ, to which a head may have related the update.
        """
        code = at_least_fp32(self.predictor.to_update(states))
        if self.shared:
            code = code.mean(dim=0, keepdim=True)
        if isinstance(self.head, LowRankHead):
            return self.head.factors(code, self.bound)
        relative_weights = self.spec.flatten(self._decoder_parameters()) / self.scales()
        relative_weights = relative_weights.detach() if frozen else relative_weights
        return DenseUpdate(self.head(code, relative_weights, self.bound))

    def predict_update(self, states: Tensor) -> Tensor:
        """As `predict`, with every weight written out: (B or 1, total_size), Δ in units of each tensor's RMS."""
        return self.predict(states).relative()

    def draw(self, features: Tensor, update: Update, frozen: bool = False) -> Tensor:
        """`features` (B, ...) and updates of B pictures, or one for all -> x_fake (B, C, H, W), drawn with θ + Δ.

        A picture depends on its own z and update alone, never on the rest of the batch.

        Args:
            frozen: keep gradients from θ: they reach the update alone.
        """
        suffix = self.vae.decoder[self._split :]
        weights = {name: weight.detach() if frozen else weight for name, weight in suffix.named_parameters()}
        if isinstance(update, FactoredUpdate) and len(update.v[0]) == len(features):
            scales = {
                tensor.name.removeprefix("decoder."): tensor_scale(weights[tensor.name.removeprefix("decoder.")])
                for tensor in update.tensors
            }
            return draw_factored(suffix, features, update, weights, scales)
        return self._draw_dense(features, update.relative(), weights)

    def draw_updated(self, features: Tensor, relative_update: Tensor) -> Tensor:
        """As `draw`, from every weight's update, in units of its tensor's RMS: (B or 1, total_size)."""
        return self.draw(features, DenseUpdate(relative_update))

    def _draw_dense(self, features: Tensor, relative_update: Tensor, own: dict[str, Tensor]) -> Tensor:
        suffix = self.vae.decoder[self._split :]
        update = self.spec.split(relative_update * self.scales())

        def draw(features: Tensor, update: dict[str, Tensor]) -> Tensor:
            updated = own | {name: own[name] + delta for name, delta in update.items()}
            # Autocast doesn't reach convolutions inside vmap: the weights follow what it made of the features.
            updated = {name: weight.to(features.dtype) for name, weight in updated.items()}
            return functional_call(suffix, updated, (features,), strict=True)

        update = {name.removeprefix("decoder."): delta for name, delta in update.items()}
        if len(relative_update) == 1:  # one update for all (or one picture): an ordinary pass
            return draw(features, {name: delta[0] for name, delta in update.items()})
        return vmap(lambda one, delta: draw(one[None], delta)[0])(features, update)

    def draw_frames(self, features: Tensor, states: Tensor, frozen: bool = False) -> Tensor:
        """The weight-driven video: `features` (B, ...) and GRU states (B, K, hidden_size) -> (B, K, C, H, W)."""
        count = states.shape[1]
        if self.shared:
            drawn = [self.draw(features, self.predict(state, frozen), frozen) for state in states.unbind(1)]
            return torch.stack(drawn, 1)
        frames = self.draw(features.repeat_interleave(count, 0), self.predict(states.flatten(0, 1), frozen), frozen)
        return frames.unflatten(0, (-1, count))

    def scales(self) -> Tensor:
        """The unit of the relative update for every updated weight, (total_size,): see `weight_scales`."""
        return weight_scales(self.spec, self._decoder_parameters())

    def _decoder_parameters(self) -> dict[str, Tensor]:
        return {f"decoder.{name}": parameter for name, parameter in self.vae.decoder.named_parameters()}


def states_at(states: Tensor, times: Tensor | None) -> Tensor:
    """Picks GRU states (B, T, hidden_size) of each picture's own times.

    Args:
        times: (B,) or (B, K) frame numbers; None takes the last frame's.

    Returns:
        (B, hidden_size) for (B,) or None, (B, K, hidden_size) for (B, K).
    """
    if times is None:
        return states[:, -1]
    rows = torch.arange(len(states), device=states.device)
    return states[rows.view(-1, *[1] * (times.dim() - 1)), times]


def build_generator(config: Config) -> Generator:
    """The generator that the settings describe, freshly initialised from torch's global random state.

    Raises:
        UserError: `weight_predictor` settings that don't fit the VAE.
    """
    video, predictor = config.video, config.weight_predictor
    strengths = MotionStrengths(
        video.shift, video.zoom, video.rotation, video.brightness, video.contrast, video.noise
    )  # fmt: skip
    return Generator(
        VAE(config.image.size, config.image.channels, config.vae.latent_dim, config.vae.channels),
        VideoSynthesizer(
            video.frames,
            strengths,
            video.height or min(config.image.size, WATCHED_SIZE),
            video.width or min(config.image.size, WATCHED_SIZE),
        ),
        predictor.layers,
        head=predictor.head,
        rank=predictor.rank,
        update_size=predictor.update_size,
        hidden_size=predictor.hidden_size,
        num_layers=predictor.num_layers,
        bound=predictor.bound,
        shared=predictor.sharing == "shared",
        detach_video=video.detach,
        update=predictor.update,
        watches=predictor.watches,
        train_gru=predictor.train_gru,
    )


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

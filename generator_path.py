"""The one path that draws pictures: training, samples and every other command draw through it.

    z --VAE decoder θ--> x_base --VideoSynthesizer--> video --WeightPredictorRNN--> Δ --VAE decoder θ + Δ--> x_fake

`Generator` owns the VAE, the video synthesis, the predictor and the update head.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from configuration import Config
from losses import at_least_fp32
from model_definitions import VAE
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

WATCHED_SIZE = 64
"""Side of the frames that the GRU watches, unless the settings say otherwise: motion shows in small frames too."""


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

"""The path from z to images: training, samples and every command decode through it.

    z --VAE decoder θ--> x_base --VideoSynthesizer--> video --WeightPredictorRNN--> Δ --VAE decoder θ + Δ--> x_fake

`Generator` owns the VAE, the video synthesis, the predictor and the update head; the `build_*` functions make these
parts, and the critic, as the settings describe them.
"""

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from configuration import Config
from model_definitions import VAE, Discriminator, NoUpdate, PredictorState, WeightPredictorRNN
from video_synth import MOTIONS, Motion, VideoSynthesizer
from weight_updates import (
    HEADS,
    DenseUpdate,
    Factors,
    Prepared,
    Update,
    UpdateHead,
    build_update_spec,
    check_update_size,
)

VIDEO_SIZE = 64
"""Side of the GRU's video frames, unless the settings say otherwise: motion can be seen in small frames too."""


class GeneratorOutput(NamedTuple):
    """What one pass through the generator makes."""

    features: Tensor  # (B, ...), z after the decoder layers before the first updated one
    x_base: Tensor  # (B, C, H, W) in [0, 1], decoded with θ
    video: Tensor  # (B, T, C, height, width) in [0, 1], that the GRU encoded; without a GRU x_base, T times
    states: Tensor  # (B, T, hidden_size), the GRU's hidden state at each frame; (B, T, 0) without a GRU
    predictor_state: PredictorState | None  # what the predictor keeps of the video; None without a GRU
    update: Update  # Δ of B images; of one where it is shared or off (zeros)
    x_fake: Tensor  # (B, C, H, W) in [0, 1], decoded with θ + Δ; x_base itself where the update is off


class Generator(nn.Module):
    """VAE, synthetic video, weight predictor and update head, with the one path through them.

    Args:
        vae: its decoder makes the images.
        synthesizer: makes the video that the predictor encodes.
        predictor: a GRU, or what stands in its place where updates are off.
        head: turns the predicted code into an update.
        config: `weight_predictor` (update, sharing) and `video` are read.
    """

    def __init__(self, vae: VAE, synthesizer: VideoSynthesizer, predictor: WeightPredictorRNN | NoUpdate,
                 head: UpdateHead, config: Config) -> None:  # fmt: skip
        super().__init__()
        settings = config.weight_predictor
        self.vae = vae
        self.synthesizer = synthesizer
        self.head = head
        self.predictor = predictor
        self.spec = head.spec
        self.update_kind = settings.update
        self.shared = settings.sharing == "shared"
        self.clip_changes = build_synthesizer(config, learned=False)
        self.detach_video = config.video.detach
        self.video_size = synthesizer.video_size(vae.image_shape)
        if self.update_kind == "off":
            self.predictor.requires_grad_(False)
            self.head.requires_grad_(False)
        # Decoder layers before the first updated one give the same with θ and θ + Δ: they run once for both.
        updated_layers = {tensor.decoder_name.split(".")[0] for tensor in self.spec.tensors}
        order = list(vae.decoder._modules)
        self._split = min(order.index(name) for name in updated_layers)

    def forward(
        self, z: Tensor, motion: Motion, frame: Tensor | None = None, predictor_alone: bool = False
    ) -> GeneratorOutput:
        """One pass: base image, its video, the update predicted at `frame`, and the image decoded with it.

        Args:
            z: (B, latent_dim) from N(0, I).
            motion: of the synthetic video, from `sample_motion`.
            frame: (B,) number of the GRU's state that predicts the update of x_fake; None takes the last.
            predictor_alone: keep gradients from θ, and decode no x_fake: it is x_base.
        """
        features = self.features(z)
        x_base = self.decode_base(features)
        if predictor_alone:
            features, x_base = features.detach(), x_base.detach()
        video, states, predictor_state = self.encode_video(x_base, motion)
        update = self.predict(states_at(states, frame), frozen=predictor_alone)
        x_fake = x_base if self.update_kind == "off" or predictor_alone else self.decode(features, update)
        return GeneratorOutput(features, x_base, video, states, predictor_state, update, x_fake)

    def fakes(self, z: Tensor, motion: Motion, frame: Tensor | None, n_base: int) -> Tensor:
        """Images for the critic, (B, C, H, W): the first `n_base` decoded with θ, the others with θ + Δ.

        Args:
            z: (B, latent_dim) from N(0, I).
            motion: of the synthetic videos of the B - n_base updated images.
            frame: (B - n_base,) as for `forward`.
        """
        features = self.features(z)
        x_base = self.decode_base(features)
        if n_base == len(x_base):
            return x_base
        _, states, _ = self.encode_video(x_base[n_base:], motion)
        x_updated = self.decode(features[n_base:], self.predict(states_at(states, frame)))
        return torch.cat([x_base[:n_base], x_updated])

    # The steps of the path, for callers that need only some of them.

    def features(self, z: Tensor) -> Tensor:
        """z (B, latent_dim) through the decoder layers before the first updated one; by default there are none."""
        return self.vae.decoder[: self._split](z)

    def decode_base(self, features: Tensor) -> Tensor:
        """`features` -> x_base (B, C, H, W), decoded with θ."""
        return self.vae.decoder[self._split :](features)

    def encode_video(self, x_base: Tensor, motion: Motion) -> tuple[Tensor, Tensor, PredictorState | None]:
        """The GRU encodes the image itself, x_base (B, C, H, W), and then its synthetic video, to compare motion with
        the still image.

        Returns the video (B, T, C, height, width), the GRU's hidden states at its frames (B, T, hidden_size), and the
        predictor's state. The hidden state at frame t predicts the update that decodes frame t + 1; the last one, at
        T - 1, that of frame T, which equals frame 0.
        """
        images = x_base.detach() if self.detach_video else x_base
        if self.update_kind == "off":
            video = images[:, None].expand(-1, self.synthesizer.frames, -1, -1, -1)
            return video, *self.predictor.encode(video)
        video = self.synthesizer(images, motion)
        states, state = self.predictor.encode(torch.cat([self.downscale(images)[:, None], video], dim=1))
        return video, states[:, 1:], state

    def watch(self, clips: Tensor) -> Tensor:
        """The GRU's states (N, L - 1, hidden_size) at frames of clips (N, L, C, H, W); number t predicts the update
        that decodes frame t + 1.
        """
        return self.predictor.encode(self.downscale(clips[:, :-1].flatten(0, 1)).unflatten(0, (len(clips), -1)))[0]

    def continue_video(self, output: GeneratorOutput, motion: Motion, rollout_count: int, frames: int) -> Tensor:
        """The GRU's hidden states (B, frames + 1, hidden_size) while it encodes `frames` more frames after the video.

        For the first `rollout_count` images these are decoded from its own predictions, instead of the synthetic
        video (scheduled sampling, Bengio et al. 2015, https://arxiv.org/abs/1506.03099): at generation there may be no
        others. `output` is `forward`'s for the same `motion`.

        State number k predicts the update that decodes frame T + k; the first is the one at the video's end.
        """
        if self.update_kind == "off" or not frames:
            return output.states[:, -1:].expand(-1, frames + 1, -1)
        assert output.predictor_state is not None
        begin = self.synthesizer.frames
        times = torch.arange(begin, begin + frames, device=output.states.device).expand(len(output.states), -1)
        parts = []
        if rollout_count:
            first = slice(rollout_count)
            noise = self.synthesizer.noise(motion_rows(motion, first), times[first], self.video_size)
            state = state_rows(output.predictor_state, first)
            begin_at = output.features[first], output.states[first], state
            parts.append(self.rollout(*begin_at, frames, noise, output.update.prepared))
        if rollout_count < len(output.states):
            rest = slice(rollout_count, None)
            images = output.x_base[rest].detach()
            parts.append(self.synthesizer(images, motion_rows(motion, rest), times[rest]))
        encoded, _ = self.predictor.encode(torch.cat(parts), output.predictor_state)
        return torch.cat([output.states[:, -1:], encoded], dim=1)

    @torch.no_grad()
    def rollout(
        self, features: Tensor, states: Tensor, state: PredictorState | None, count: int, noise: Tensor,
        prepared: Prepared | None = None,
    ) -> Tensor:  # fmt: skip
        """The next `count` frames of images (R, ...), each decoded with the update predicted from those before it:
        (R, count, C, height, width). `states` (R, T, hidden_size) end with `state`. Without gradients, which go back
        through the GRU's states, not through its input; with `noise`, as the frames of a synthetic video.
        """
        hidden, prepared = states[:, -1], self.prepare() if prepared is None else prepared
        frames: list[Tensor] = []
        for k in range(count):
            if k:
                encoded, state = self.predictor.encode(frames[-1], state)
                hidden = encoded[:, 0]
            frame = self.downscale(self.decode(features, self.predict(hidden, prepared=prepared)))
            frames.append((frame + noise[:, k]).clamp(0, 1)[:, None])
        return torch.cat(frames, dim=1)

    def downscale(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, C, height, width), the size of the video."""
        size = self.video_size
        return images if size == images.shape[-2:] else functional.interpolate(images, size=size, mode="area")

    def predict(self, states: Tensor, frozen: bool = False, prepared: Prepared | None = None) -> Update:
        """The GRU's hidden states (B, hidden_size) -> updates Δ of B images; a shared one is the batch's mean.
        `frozen` keeps gradients from θ, which the head `per_channel` scales; who predicts several times may give what
        is `prepared`.
        """
        code = self.predictor.to_update(states)
        if self.shared:
            code = code.mean(dim=0, keepdim=True)
        return self.head(code, self.prepare(frozen) if prepared is None else prepared)

    def prepare(self, frozen: bool = False) -> Prepared:
        """What all updates of the present θ share. `frozen`: as for `predict`."""
        return self.head.prepare(self._weights(self.vae.decoder, frozen))

    def decode(self, features: Tensor, update: Update, frozen: bool = False) -> Tensor:
        """`features` (B, ...) and updates of B images, or one for all -> x_fake (B, C, H, W), decoded with θ + Δ.

        An image depends on its own z and update alone, never on the rest of the batch. `frozen` keeps gradients from θ:
        only Δ gets them.
        """
        layers = self.vae.decoder[self._split :]
        return decode_updated(layers, features, update, self._weights(layers, frozen))

    def decode_frames(self, features: Tensor, states: Tensor, times: Tensor, frozen: bool = False) -> Tensor:
        """Frames of the weight-driven video: (B, K, C, H, W).

        Args:
            features: (B, ...).
            states: hidden states (B, T, hidden_size).
            times: (B, K), which of an image's T states decode its K frames.
            frozen: as for `decode`.
        """
        states, count = states_at(states, times), times.shape[1]
        if self.shared:
            frames = [self.decode(features, self.predict(state, frozen), frozen) for state in states.unbind(1)]
            return torch.stack(frames, 1)
        update = self.predict(states.flatten(0, 1), frozen)
        return self.decode(features.repeat_interleave(count, 0), update, frozen).unflatten(0, (-1, count))

    def sample_motion(self, batch: int, generator: torch.Generator | None = None) -> Motion:
        """The motion of `batch` synthetic videos at full strength, on the generator's device."""
        return self.synthesizer.sample_motion(batch, self.vae.image_shape, self.vae.to_mu.weight.device, generator)

    @staticmethod
    def _weights(layers: nn.Module, frozen: bool) -> dict[str, Tensor]:
        """The parameters of `layers` by name; without gradient where `frozen`."""
        return {name: weight.detach() if frozen else weight for name, weight in layers.named_parameters()}


def motion_rows(motion: Motion, rows: slice) -> Motion:
    """The motion of some of the videos."""
    return Motion(*(numbers[rows] for numbers in motion))


def state_rows(state: PredictorState, rows: slice | Tensor) -> PredictorState:
    """The predictor's state of some of the videos."""
    hidden, *others = state
    return PredictorState(hidden[:, rows].contiguous(), *(numbers[rows] for numbers in others))


def states_at(states: Tensor, times: Tensor | None) -> Tensor:
    """Picks hidden states (B, T, hidden_size) at times of each image's own: frame numbers (B,), or None for the last,
    -> (B, hidden_size); (B, K) -> (B, K, hidden_size).
    """
    if times is None:
        return states[:, -1]
    index = times.view(len(states), -1, 1).expand(-1, -1, states.shape[-1])
    return states.gather(1, index).view(*times.shape, -1)


# ---------------------------------------------------------------------------------------------- decoding with θ + Δ


def decode_updated(decoder: nn.Sequential, features: Tensor, update: Update, theta: Mapping[str, Tensor]) -> Tensor:
    """Decodes each image with weights of its own, θ + Δ, in one pass over the batch.

    A layer is linear in its weights. With Δ = A V, its output is θ's, the same work for the whole batch, and Δ's, which
    passes through `rank` channels: A (V x); no image's weights are written out. A transposed convolution is a product
    of matrices followed by `fold`, which adds up overlapping patches.

    Args:
        decoder: Linear, ConvTranspose2d, and layers without weights.
        features: (B, ...), the input.
        update: of B images, or one for all.
        theta: name of a parameter of `decoder` -> weights.
    """
    if len(update.numbers) < len(features) or (len(features) == 1 and isinstance(update, DenseUpdate)):
        updated = {name: weight[0] for name, weight in update.dense().weights.items()}  # one for all: an ordinary pass
        return functional_call(decoder, {**theta, **updated}, (features,), strict=True)
    h, own = features, update.weights
    for name, layer in decoder.named_children():
        if isinstance(layer, nn.Linear | nn.ConvTranspose2d):
            weight, bias = (theta[f"{name}.{kind}"] for kind in ("weight", "bias"))
            own_weight, own_bias = (own.get(f"{name}.{kind}") for kind in ("weight", "bias"))
            assert not isinstance(own_bias, tuple)  # only weights have factors
            decode = _linear if isinstance(layer, nn.Linear) else partial(_transposed_convolution, layer)
            h = decode(h, weight, bias if own_bias is None else own_bias, own_weight)
        else:
            h = layer(h)
    return h


def _linear(x: Tensor, weight: Tensor, bias: Tensor, own: Tensor | Factors | None) -> Tensor:
    """x (B, in), weight (out, in) or `own` of each image, bias (out,) or (B, out) -> (B, out)."""
    if isinstance(own, Tensor):
        return torch.baddbmm(bias.expand(len(x), -1)[:, :, None], own, x[:, :, None])[:, :, 0]
    if own:
        a, v = own
        bias = torch.baddbmm(bias.expand(len(x), -1)[:, :, None], a, v @ x[:, :, None])[:, :, 0]
    return torch.addmm(bias, x, weight.T)


def _transposed_convolution(
    layer: nn.ConvTranspose2d, x: Tensor, weight: Tensor, bias: Tensor, own: Tensor | Factors | None
) -> Tensor:
    """x (B, in, H, W), weight (in, out, kernel) or `own` of each, bias (out,) or (B, out) -> (B, out, H', W')."""
    if isinstance(own, Tensor):
        h = OwnTransposedConvolution.apply(x, own, layer)
    else:
        shared_bias = bias if bias.dim() == 1 else None
        h = functional.conv_transpose2d(x, weight, shared_bias, layer.stride, layer.padding)  # type: ignore[arg-type]
        if own:
            a, v = own
            thin = OwnTransposedConvolution.apply(x, v, layer)
            # With channels last, as θ's output lies in memory.
            h = torch.baddbmm(h.flatten(2).mT, thin.flatten(2).mT, a.mT).mT.unflatten(2, h.shape[2:])
        if shared_bias is not None:
            return h
    return h + bias.to(h.dtype).view(-1, bias.shape[-1], 1, 1)


class OwnTransposedConvolution(torch.autograd.Function):
    """x (B, in, H, W), each image with weights of its own, (B, in, out, kernel) -> (B, out, H', W').

    It has a backward pass of its own for two reasons: that of `fold` takes a kernel for each image on a GPU, where one
    copy of a strided view gives the same numbers; and x's gradient comes with channels last, as all else does.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, layer: nn.ConvTranspose2d) -> Tensor:
        kernel, padding, stride = ctx.geometry = layer.kernel_size, layer.padding, layer.stride
        assert not isinstance(padding, str)  # only other convolutions take it by name
        ctx.save_for_backward(x, weights)
        size = tuple((x.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + kernel[d] for d in (0, 1))
        patches = weights.flatten(2).mT @ x.flatten(2)  # (B, out · kernel, H · W)
        return functional.fold(patches, size, kernel, padding=padding, stride=stride)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (kernel, padding, stride), (x, weights), gradient = ctx.geometry, ctx.saved_tensors, gradients[0]
        windows = functional.pad(gradient, (padding[1], padding[1], padding[0], padding[0]))
        windows = windows.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])  # (B, out, H, W, kernel)
        patches = windows.permute(0, 1, 4, 5, 2, 3).flatten(4).flatten(1, 3)  # (B, out · kernel, H · W)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (patches.mT @ weights.flatten(2).mT).mT.unflatten(2, x.shape[2:])
        return x_gradient, (x.flatten(2) @ patches.mT).view_as(weights), None


# ------------------------------------------------------------------------------------- the parts, from the settings


def build_vae(config: Config) -> VAE:
    """The VAE, freshly initialised from torch's global random state, as are all other parts."""
    return VAE(config.image.size, config.image.channels, config.vae.latent_dim, config.vae.channels)


def build_synthesizer(config: Config, learned: bool = True) -> VideoSynthesizer:
    """What makes the synthetic video, with the motions that are `learned` from clips, if any, or without."""
    video, side = config.video, min(config.image.size, VIDEO_SIZE)
    learned = learned and video.source != "synthetic"
    on = 0.0 if learned and video.source == "clips" else 1.0  # then images move in no other way
    strengths = {name: on * getattr(video, name) for name in MOTIONS if hasattr(video, name)}
    size = video.height or side, video.width or side
    return VideoSynthesizer(video.frames, strengths, *size, video.motions if learned else 0)


def build_head(config: Config, vae: VAE) -> UpdateHead:
    """The update head for the decoder tensors that `weight_predictor.layers` names. Raises UserError: patterns that
    don't fit the VAE.
    """
    settings = config.weight_predictor
    return HEADS[settings.head](build_update_spec(vae, settings.layers), settings.bound, settings.rank)


def build_predictor(config: Config, synthesizer: VideoSynthesizer, head: UpdateHead) -> WeightPredictorRNN | NoUpdate:
    """The GRU that predicts the head's code from a video, or what stands in its place. Raises UserError: an
    `update_size` that isn't the head's.
    """
    settings, image = config.weight_predictor, config.image
    update_size = check_update_size(settings.update_size, head)
    if settings.update == "off":
        return NoUpdate(update_size)
    height, width = synthesizer.video_size((image.size, image.size))
    frame_size = image.channels * height * width
    changes = config.video.input == "changes"
    return WeightPredictorRNN(frame_size, update_size, settings.hidden_size, settings.num_layers, changes)


def build_generator(config: Config) -> Generator:
    """The whole generator that the settings describe. Raises UserError: `weight_predictor` settings that don't fit the
    VAE.
    """
    vae, synthesizer = build_vae(config), build_synthesizer(config)
    head = build_head(config, vae)
    return Generator(vae, synthesizer, build_predictor(config, synthesizer, head), head, config)


def build_critic(config: Config) -> Discriminator:
    """The critic that the settings describe."""
    return Discriminator(config.image.size, config.image.channels, config.critic.channels)


def stable_seed(*parts: object) -> int:
    """A seed that depends on `parts` alone, the same on every machine and in every version of Python."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes 63 bits

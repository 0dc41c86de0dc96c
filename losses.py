"""The loss terms, each a pure function with its equation, the two objectives that they make up, and DiffAugment.
Nothing here samples random numbers.

Squared errors are *sums* over the values of an image and means over the batch. This matches the critic, whose gradient
penalty uses the same Euclidean norm of an image.

Papers: Kingma & Welling 2013 (VAE, https://arxiv.org/abs/1312.6114), Gulrajani et al. 2017 (WGAN-GP,
https://arxiv.org/abs/1704.00028), Larsen et al. 2016 (VAE/GAN, https://arxiv.org/abs/1512.09300), Zhao et al. 2020
(DiffAugment, https://arxiv.org/abs/2006.10738).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from configuration import LossConfig, Schedule


class CriticLoss(NamedTuple):
    """The critic's objective and its parts: scalars, and the scores it came from, (B,) each."""

    total: Tensor  # rest + weighted_penalty
    rest: Tensor
    weighted_penalty: Tensor
    wasserstein: Tensor
    penalty: Tensor
    drift: Tensor
    score_real: Tensor
    score_fake: Tensor


def critic_loss(critic: Callable[[Tensor], Tensor], x_real: Tensor, x_fake: Tensor, epsilon: Tensor,
                weights: LossConfig,
                penalty_context: AbstractContextManager[None] | None = None) -> CriticLoss:  # fmt: skip
    """L_D = mean D(x_fake) - mean D(x_real) + λ_gp · penalty + ε_drift · mean D(x_real)²  (Gulrajani et al., eq. 3).

    The drift term (Karras et al. 2017, section A.1) keeps the scores, whose zero is arbitrary, from wandering off.

    Args:
        x_real, x_fake: (B, C, H, W) in [0, 1]; `x_fake` without gradient.
        epsilon: (B,) in [0, 1], the place of x_hat on the line between a fake and a real image.
        weights: `lambda_gp` and `epsilon_drift` are read.
        penalty_context: what the penalty is computed in: it may need more precision than the rest.
    """
    # Without BatchNorm a score depends on its own image alone, so both halves go through in one pass.
    score_real, score_fake = critic(torch.cat([x_real, x_fake])).chunk(2)
    wasserstein = score_fake.mean() - score_real.mean()
    with penalty_context or nullcontext():
        penalty = gradient_penalty(critic, x_real, x_fake, epsilon)
    drift, weighted_penalty = score_real.square().mean(), weights.lambda_gp * penalty
    rest = wasserstein + weights.epsilon_drift * drift
    total = rest + weighted_penalty
    return CriticLoss(total, rest, weighted_penalty, wasserstein, penalty, drift, score_real, score_fake)


def gradient_penalty(critic: Callable[[Tensor], Tensor], x_real: Tensor, x_fake: Tensor, epsilon: Tensor) -> Tensor:
    """mean (‖∇D(x_hat)‖₂ - 1)² at x_hat = ε · x_real + (1 - ε) · x_fake, one ε and one norm per image.

    Gulrajani et al. 2017, algorithm 1. Our critic has an `input_gradient` that needs no double backward. For any
    other it is taken with `torch.func.grad`. An ordinary `.backward()` goes through both. Images are (B, C, H, W),
    `epsilon` (B,).
    """
    epsilon = epsilon.view(-1, 1, 1, 1)
    x_hat = (epsilon * x_real + (1 - epsilon) * x_fake).detach()
    if hasattr(critic, "input_gradient"):
        gradient = critic.input_gradient(x_hat)
    else:  # scores of different images don't mix, so the gradient of their sum is each image's own gradient
        gradient = torch.func.grad(lambda x: critic(x).sum())(x_hat)
    # The small number inside the root keeps its derivative finite where the gradient vanishes.
    norm = (gradient.square().sum(dim=(1, 2, 3)) + 1e-12).sqrt()
    return (norm - 1).square().mean()


class GeneratorLoss(NamedTuple):
    """The objective of θ and the GRU, and its parts before their factors λ. Scalars."""

    total: Tensor
    adversarial: Tensor
    adversarial_base: Tensor
    reconstruction: Tensor
    kl: Tensor
    update: Tensor
    video: Tensor


def generator_loss(*, score_fake: Tensor, score_base: Tensor, reconstruction: Tensor, kl: Tensor, update: Tensor,
                   video: Tensor, lambda_vae: float, weights: LossConfig) -> GeneratorLoss:  # fmt: skip
    """L = λ_adv · adversarial + λ_base · adversarial_base + λ_vae · (rec + β · KL) + λ_Δ · update + λ_video · video.

    The adversarial terms are -mean D(x_fake) and -mean D(x_base) (Gulrajani et al. 2017); together with the VAE's own
    terms this is the VAE/GAN of Larsen et al. 2016.

    Args:
        score_fake, score_base: (B,) scores of the images decoded with θ + Δ and with θ.
        reconstruction, kl: from `vae_loss`.
        update: mean (Δ / rms θ)², the mean square size of the update relative to the weights it changes.
        video: from `video_loss`, or zero if λ_video is.
        lambda_vae: a constant, the setting's largest value; as it falls, θ gets a smaller share of the gradient.
        weights: the other factors λ, and β.
    """
    adversarial, adversarial_base = -score_fake.mean(), -score_base.mean()
    total = (
        weights.lambda_adv * adversarial
        + weights.lambda_base * adversarial_base
        + lambda_vae * (reconstruction + weights.beta * kl)
        + weights.lambda_update * update
        + weights.lambda_video * video
    )
    return GeneratorLoss(total, adversarial, adversarial_base, reconstruction, kl, update, video)


def vae_loss(x: Tensor, x_rec: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction ‖x - x_rec‖² and KL(N(mu, e^logvar) ‖ N(0, 1)), summed over values, means over the batch.

    Kingma & Welling 2013, eq. 10, with a Gaussian decoder: KL = ½ Σ (mu² + e^logvar - 1 - logvar). Images are
    (B, C, H, W), mu and logvar (B, latent_dim).
    """
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=1)
    return squared_distance(x, x_rec).mean(), kl.mean()


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """‖a - b‖² of each image, two tensors (B, C, H, W) -> (B,)."""
    return (a - b).square().flatten(1).sum(dim=1)


def video_loss(frames: Tensor, video: Tensor) -> Tensor:
    """mean ‖decode(z; θ + Δ_t) - video_t‖² over images and frames: the weight-driven video follows the synthetic one.
    Both (B, K, C, H, W), at the same times.
    """
    return squared_distance(frames.flatten(0, 1), video.flatten(0, 1)).mean()


# -------------------------------------------------------------------------------------------------------- augmentation


AUGMENTATION_NUMBERS = 7
"""Uniform random numbers per image: three for colour, two coordinates each for translation and cutout."""


def diffaugment(x: Tensor, kinds: Sequence[str], numbers: Tensor) -> Tensor:
    """The same kinds of random change to real and generated images, with gradients through it (Zhao et al. 2020).

    With few images the critic learns them by heart. If it only ever sees changed images, real and generated alike, it
    cannot, and the generator isn't taught to make the changes.

    `color` is brightness ±0.25, saturation 0 to 2, contrast 0.5 to 1.5; `translation` is by up to 1/8 of the side, in
    whole pixels, grey moving in; `cutout` is a grey square of half the side. Grey is 0.5, the paper's 0 in [-1, 1].

    x (B, C, H, W) in [0, 1] and `numbers` (B, `AUGMENTATION_NUMBERS`), uniform in [0, 1) -> (B, C, H, W); colours may
    leave [0, 1]. Without kinds it is `x` itself.
    """
    if "color" in kinds:
        x = _color(x, numbers[:, :3])
    if "translation" in kinds:
        x = _translation(x, numbers[:, 3:5])
    if "cutout" in kinds:
        x = _cutout(x, numbers[:, 5:7])
    return x


def _color(x: Tensor, numbers: Tensor) -> Tensor:
    brightness, saturation, contrast = numbers.view(-1, 3, 1, 1, 1).unbind(dim=1)
    x = x + (brightness - 0.5) / 2  # the paper's ±0.5, where values span 2 instead of 1
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def _translation(x: Tensor, numbers: Tensor) -> Tensor:
    (batch, _, height, width), device = x.shape, x.device
    reach_y, reach_x = height // 8, width // 8
    # Row r of the result is row r + offset of the image, or a row of the grey border that padding adds.
    offset_y = (numbers[:, 0] * (2 * reach_y + 1)).long()
    offset_x = (numbers[:, 1] * (2 * reach_x + 1)).long()
    padded = functional.pad(x, (reach_x, reach_x, reach_y, reach_y), value=0.5)
    rows = torch.arange(height, device=device) + offset_y[:, None]
    columns = torch.arange(width, device=device) + offset_x[:, None]
    index = torch.arange(batch, device=device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cutout(x: Tensor, numbers: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    centre_y, centre_x = numbers[:, 0, None] * height, numbers[:, 1, None] * width
    near_y = (torch.arange(height, device=x.device) + 0.5 - centre_y).abs() < height / 4
    near_x = (torch.arange(width, device=x.device) + 0.5 - centre_x).abs() < width / 4
    hole = (near_y[:, None, :, None] & near_x[:, None, None, :]).to(x.dtype)
    return x * (1 - hole) + 0.5 * hole


# ------------------------------------------------------------------------------------------------------ the objectives

# `generator`, `critic` and `noise` are a `Generator`, a `Discriminator`, and a `CriticNoise` or `GeneratorNoise`, which
# are defined where this module may not look.


def critic_objective(
    generator: Any, critic: Any, x_real: Tensor, noise: Any, config: Any,
    penalty_context: AbstractContextManager[None] | None = None,
) -> CriticLoss:  # fmt: skip
    """The critic's loss on real images (B, C, H, W) and as many generated ones: first base, then updated images.

    A critic that never sees base images as fakes doesn't judge them, and they turn grey.
    """
    with torch.no_grad():  # this loss trains the critic alone
        x_fake = generator.fakes(noise.z, noise.motion, noise.frame, noise.base_count)
    if kinds := config.training.diffaugment:
        x_real, x_fake = diffaugment(x_real, kinds, noise.augment_real), diffaugment(x_fake, kinds, noise.augment_fake)
    return critic_loss(critic, x_real, x_fake, noise.epsilon, config.loss, penalty_context)


def generator_objective(
    generator: Any, critic: Any, x_real: Tensor, noise: Any, config: Any
) -> tuple[GeneratorLoss, Any]:
    """The loss of θ and the GRU together, on real images (B, C, H, W) and as many generated ones.

    Also what the generator made; None while nothing is updated.
    """
    of_clips = clip_losses(generator, noise, noise.clips) if noise.clips is not None else None
    if noise.motion is None:  # x_fake is x_base: scored once, with the weight of both
        output, update, video = None, *x_real.new_zeros(2).unbind()
        x_generated = generator.decode_base(generator.features(noise.z))
    else:  # z -> x_base -> synthetic video -> Δ -> x_fake, decoded with θ + Δ
        output = generator(noise.z, noise.motion, noise.frame, noise.alone)
        update, video = output.update.mean_square(), weight_driven_video_loss(generator, output, noise, config)
        x_generated = torch.cat([output.x_fake, output.x_base])
    if (kinds := config.training.diffaugment) and not noise.alone:
        x_generated = diffaugment(x_generated, kinds, noise.augment[: len(x_generated)])
    scores = x_generated.new_zeros(2) if noise.alone else critic(x_generated)
    score_fake, score_base = scores.chunk(2) if output else (scores, scores)
    x_vae = x_real[: len(noise.posterior)]
    terms = vae_loss(x_vae, *generator.vae(x_vae, noise.posterior, noise.decoder_share))
    reconstruction, kl = terms if noise.vae_share == 1 else (noise.vae_share * term for term in terms)
    if of_clips:  # half of the VAE's loss is theirs
        reconstruction, kl = (reconstruction + of_clips.reconstruction) / 2, (kl + of_clips.kl) / 2
        video, update = (video + of_clips.video) / 2, (update + of_clips.update) / 2
    loss = generator_loss(
        score_fake=score_fake, score_base=score_base, reconstruction=reconstruction, kl=kl, update=update, video=video,
        lambda_vae=noise.lambda_vae, weights=config.loss,
    )  # fmt: skip
    return loss, output


class ClipLosses(NamedTuple):
    """What clips add to the terms of `GeneratorLoss`. Scalars."""

    reconstruction: Tensor  # of their first frames, as is
    kl: Tensor
    video: Tensor  # of frames after the first, decoded with its z and predicted updates
    update: Tensor  # of the last frame


def clip_losses(generator: Any, noise: Any, clips: Any) -> ClipLosses:
    """The losses of a step's clips. Before updates start, the last two are 0."""
    still = torch.zeros_like(clips.times[:, :1])
    x = generator.clip_changes(clips.frames.flatten(1, 2), clips.motion, still, full_size=True)[:, 0]
    x = x.unflatten(1, clips.frames.shape[1:3])
    x_rec, mu, logvar = generator.vae(x[:, 0], clips.posterior, noise.decoder_share)
    reconstruction, kl = vae_loss(x[:, 0], x_rec, mu, logvar)
    video, update = kl.new_zeros(2).unbind()
    if noise.motion is not None:
        features = generator.features(mu + (0.5 * logvar).exp() * clips.posterior).detach()
        states = generator.watch(x)
        drawn = generator.decode_frames(features, states, clips.times, frozen=True)
        index = (1 + clips.times)[:, :, None, None, None].expand_as(drawn)
        # It is to move the image as it is decoded: what the VAE cannot draw, the update isn't to draw for it.
        x_base = generator.decode_base(features).detach()
        video = video_loss(drawn, (x_base[:, None] + x.gather(1, index) - x[:, :1]).clamp(0, 1))
        update = generator.predict(states[:, -1], frozen=True).mean_square()
    return ClipLosses(*(clips.share * loss for loss in (reconstruction, kl, video, update)))


def weight_driven_video_loss(generator: Any, output: Any, noise: Any, config: Any) -> Tensor:
    """How far the weight-driven video is from the synthetic one, at sampled frames from T on; a scalar.

    Each frame is decoded with the update predicted one frame before. Zero if λ_video is or nothing is updated.
    """
    if not config.loss.lambda_video or noise.motion is None:
        return output.x_base.new_zeros(())
    states = generator.continue_video(output, noise.motion, noise.rollout_count, config.loss.rollout_frames)
    # θ decodes, but does not learn here: moving an image must not cost the image's own quality.
    frames = generator.decode_frames(output.features.detach(), states, noise.video_times, frozen=True)
    times = generator.synthesizer.frames + noise.video_times
    target = generator.synthesizer(output.x_base.detach(), noise.motion, times, full_size=True)
    return video_loss(frames, target)


# ----------------------------------------------------------------------------------------------------------- schedules


def value_at(setting: Schedule, fraction: float) -> float:
    """A setting's value at a fraction of the run, 0 to 1; before its first and after its last point it is constant."""
    if not isinstance(setting, dict):
        return setting
    points = np.array(sorted(setting.items()))
    return float(np.interp(fraction, points[:, 0], points[:, 1]))


def largest(setting: Schedule) -> float:
    """A setting's largest value in a run, or 1 if that is 0."""
    return (max(setting.values()) if isinstance(setting, dict) else setting) or 1.0

"""The objectives, each a pure function with its equation. Nothing here draws random numbers or touches a device.

Squared errors are *sums* over the values of a picture and means over the batch. That is the scale the critic lives on:
its gradient has norm 1 with respect to the same Euclidean distance between pictures.

Papers: Kingma & Welling 2013 (VAE, https://arxiv.org/abs/1312.6114), Gulrajani et al. 2017 (WGAN-GP,
https://arxiv.org/abs/1704.00028), Larsen et al. 2016 (VAE/GAN, https://arxiv.org/abs/1512.09300).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class CriticLoss(NamedTuple):
    """The critic's objective and its parts: scalars, and the scores it came from, (B,) each."""

    total: Tensor
    wasserstein: Tensor
    penalty: Tensor
    drift: Tensor
    score_real: Tensor
    score_fake: Tensor


def critic_loss(
    discriminator: Callable[[Tensor], Tensor],
    x_real: Tensor,
    x_fake: Tensor,
    epsilon: Tensor,
    *,
    lambda_gp: float = 10.0,
    epsilon_drift: float = 0.0,
) -> CriticLoss:
    """L_D = mean D(x_fake) - mean D(x_real) + λ_gp · penalty + ε_drift · mean D(x_real)²  (Gulrajani et al., eq. 3).

    The drift term (Karras et al. 2017, section A.1) keeps the scores, whose zero is arbitrary, from wandering off.

    Args:
        x_real, x_fake: (B, C, H, W) in [0, 1]; `x_fake` without gradient.
        epsilon: (B,) in [0, 1], where on the line between a fake and a real picture the penalty looks.
    """
    # Without BatchNorm a score depends on its own picture alone, so both halves go through in one pass.
    score_real, score_fake = at_least_fp32(discriminator(torch.cat([x_real, x_fake]))).chunk(2)
    wasserstein = score_fake.mean() - score_real.mean()
    penalty = gradient_penalty(discriminator, x_real, x_fake, epsilon)
    drift = score_real.square().mean()
    total = wasserstein + lambda_gp * penalty + epsilon_drift * drift
    return CriticLoss(total, wasserstein, penalty, drift, score_real, score_fake)


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor], x_real: Tensor, x_fake: Tensor, epsilon: Tensor
) -> Tensor:
    """mean (‖∇D(x_hat)‖₂ - 1)² at x_hat = ε · x_real + (1 - ε) · x_fake, one ε and one norm per picture, in fp32.

    Gulrajani et al. 2017, algorithm 1. Our critic knows its own `input_gradient`, without double backward. For any
    other it is taken with `torch.func.grad`, which `torch.compile` can follow (unlike `torch.autograd.grad` with
    `create_graph=True`). An ordinary `.backward()` goes through both.

    Args:
        x_real, x_fake: (B, C, H, W).
        epsilon: (B,) in [0, 1].
    """
    with torch.autocast(x_real.device.type, enabled=False):
        epsilon = at_least_fp32(epsilon).view(-1, 1, 1, 1)
        x_hat = (epsilon * at_least_fp32(x_real) + (1 - epsilon) * at_least_fp32(x_fake)).detach()

        def total_score(x: Tensor) -> Tensor:
            return discriminator(x).sum()

        # Scores of different pictures don't mix, so the gradient of their sum is each picture's own gradient.
        if hasattr(discriminator, "input_gradient"):  # torch.compile of torch 2.11 cannot trace `method or other`
            gradient = discriminator.input_gradient(x_hat)
        else:
            gradient = torch.func.grad(total_score)(x_hat)
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


def generator_loss(
    *,
    score_fake: Tensor,
    score_base: Tensor,
    reconstruction: Tensor,
    kl: Tensor,
    update: Tensor,
    video: Tensor,
    lambda_adv: float = 1.0,
    lambda_base: float = 1.0,
    lambda_vae: float = 1.0,
    beta: float = 1.0,
    lambda_update: float = 0.0,
    lambda_video: float = 0.0,
) -> GeneratorLoss:
    """L = λ_adv · adversarial + λ_base · adversarial_base + λ_vae · (rec + β · KL) + λ_Δ · update + λ_video · video.

    The adversarial terms are -mean D(x_fake) and -mean D(x_base) (Gulrajani et al. 2017); together with the VAE's own
    terms this is the VAE/GAN of Larsen et al. 2016.

    Args:
        score_fake, score_base: (B,) scores of the pictures drawn with θ + Δ and with θ.
        reconstruction, kl: from `vae_loss`.
        update: mean (Δ / rms θ)², the mean square size of the update relative to the weights it changes.
        video: from `video_loss`, or zero when λ_video is.
    """
    adversarial, adversarial_base = -at_least_fp32(score_fake).mean(), -at_least_fp32(score_base).mean()
    total = (
        lambda_adv * adversarial
        + lambda_base * adversarial_base
        + lambda_vae * (reconstruction + beta * kl)
        + lambda_update * update
        + lambda_video * video
    )
    return GeneratorLoss(total, adversarial, adversarial_base, reconstruction, kl, update, video)


def vae_loss(x: Tensor, x_rec: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction ‖x - x_rec‖² and KL(N(mu, e^logvar) ‖ N(0, 1)), summed over values, means over the batch.

    Kingma & Welling 2013, eq. 10, with a Gaussian decoder: KL = ½ Σ (mu² + e^logvar - 1 - logvar).

    Args:
        x, x_rec: (B, C, H, W).
        mu, logvar: (B, latent_dim).
    """
    reconstruction = squared_distance(x, x_rec).mean()
    mu, logvar = at_least_fp32(mu), at_least_fp32(logvar)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=1).mean()
    return reconstruction, kl


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """‖a - b‖² of each picture: (B, C, H, W) twice -> (B,), at least in fp32."""
    return (at_least_fp32(a) - at_least_fp32(b)).square().flatten(1).sum(dim=1)


def at_least_fp32(x: Tensor) -> Tensor:
    """bf16, as autocast leaves it, becomes fp32; fp64, for a check in double precision, stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def video_loss(frames: Tensor, video: Tensor) -> Tensor:
    """mean ‖decode(z; θ + Δ_t) - video_t‖² over pictures and frames: the weight-driven video follows the synthetic one.

    Args:
        frames, video: (B, K, C, H, W), the drawn frames and the synthetic video's frames at the same times.
    """
    return squared_distance(frames.flatten(0, 1), video.flatten(0, 1)).mean()

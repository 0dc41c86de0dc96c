"""The two objectives of a training step, and what its metrics tell. Pure functions of weights, pictures and draws."""

import torch
from torch import Tensor

from augmentation import DiffAugment
from configuration import Config
from generator_path import Generator, GeneratorOutput, states_at
from losses import CriticLoss, GeneratorLoss, at_least_fp32, critic_loss, generator_loss, vae_loss, video_loss
from model_definitions import Discriminator
from random_draws import CriticDraws, GeneratorDraws, base_fakes, own_base_fakes


def critic_objective(
    generator: Generator,
    discriminator: Discriminator,
    x_real: Tensor,
    draws: CriticDraws,
    augment: DiffAugment,
    config: Config,
) -> CriticLoss:
    """The critic's loss on real pictures (B, C, H, W) and as many generated ones: first base, then updated pictures.

    A critic that never sees base pictures as fakes has no opinion of them, and lets them go grey.
    """
    with torch.no_grad():  # the critic's loss reaches the critic alone
        n_base = own_base_fakes(draws)
        features = generator.features(draws.z)
        x_base = generator.draw_base(features)
        if n_base < len(x_base):
            _, states, _ = generator.watch(x_base[n_base:], draws.motion)
            update = generator.predict(states_at(states, draws.frame))
            x_fake = torch.cat([x_base[:n_base], generator.draw(features[n_base:], update)])
        else:
            x_fake = x_base
    return critic_loss(
        discriminator,
        augment(x_real, draws.augment_real),
        augment(x_fake, draws.augment_fake),
        draws.epsilon,
        lambda_gp=config.loss.lambda_gp,
        epsilon_drift=config.loss.epsilon_drift,
    )


def generator_objective(
    generator: Generator,
    discriminator: Discriminator,
    x_real: Tensor,
    draws: GeneratorDraws,
    augment: DiffAugment,
    config: Config,
) -> tuple[GeneratorLoss, GeneratorOutput]:
    """The loss of θ and the GRU together, numbered as in the README's picture of one iteration."""
    loss = config.loss
    output = generator(draws.z, draws.motion, draws.frame)  #                                  1 to 4
    if generator.update == "off":  # x_fake is x_base: scored once, it has the weight of both
        score_fake = score_base = discriminator(augment(output.x_base, draws.augment[: len(x_real)]))
    else:
        x_judged = augment(torch.cat([output.x_fake, output.x_base]), draws.augment)
        score_fake, score_base = discriminator(x_judged).chunk(2)  #                           5
    x_rec, mu, logvar = generator.vae(x_real, draws.posterior)
    reconstruction, kl = vae_loss(x_real, x_rec, mu, logvar)
    video = following_loss(generator, output, draws, config)
    return generator_loss(  #                                                                  6
        score_fake=score_fake,
        score_base=score_base,
        reconstruction=reconstruction,
        kl=kl,
        update=at_least_fp32(output.update.mean_square()),
        video=video,
        lambda_adv=loss.lambda_adv,
        lambda_base=loss.lambda_base,
        lambda_vae=loss.lambda_vae,
        beta=loss.beta,
        lambda_update=loss.lambda_update,
        lambda_video=loss.lambda_video,
    ), output


def following_loss(generator: Generator, output: GeneratorOutput, draws: GeneratorDraws, config: Config) -> Tensor:
    """How far the weight-driven video is from the synthetic one, at a few frames after it; zero where λ_video is, or
    where nothing moves the weights.

    Each frame is drawn by what the GRU knew one frame before it.
    """
    if not config.loss.lambda_video or generator.update == "off":
        return output.x_base.new_zeros(())
    states = generator.watch_on(output, draws.motion, draws.rolling, config.loss.own_frames)
    # θ draws, but does not learn here: what moves a picture must not cost the picture itself.
    features, states = output.features.detach(), states_at(states, draws.video_times)
    frames = generator.draw_frames(features, states, frozen=True)
    times = generator.synthesizer.frames + draws.video_times
    target = generator.synthesizer(output.x_base.detach(), draws.motion, times, full_size=True)
    return video_loss(frames, target)


def critic_metrics(critic: CriticLoss, draws: CriticDraws, config: Config) -> dict[str, Tensor]:
    """What `metrics.jsonl` tells of a critic step, as scalars on the device.

    Of a process's share of the batch they are such that the mean over all processes tells of the whole batch, which may
    have base pictures where this share has none.
    """
    all_base, own_base = base_fakes(config), own_base_fakes(draws)
    all_updated = config.training.batch_size - all_base
    processes = config.training.batch_size // len(critic.score_fake)
    metrics = {
        "critic/total": critic.total,
        "critic/gap": -critic.wasserstein,
        "critic/penalty": critic.penalty,
        "critic/drift": critic.drift,
        "score/real": critic.score_real.mean(),
    }
    if all_base:
        metrics["score/base"] = critic.score_fake[:own_base].sum() * processes / all_base
    if all_updated:
        metrics["score/updated"] = critic.score_fake[own_base:].sum() * processes / all_updated
    return {name: value.detach() for name, value in metrics.items()}


def generator_metrics(loss: GeneratorLoss, output: GeneratorOutput, bound: float) -> dict[str, Tensor]:
    """What `metrics.jsonl` tells of a generator step, as scalars on the device: means over the pictures.

    Only means can be averaged over processes. What is a function of means is added by `finished_metrics`.
    """
    metrics = {f"generator/{name}": value.detach() for name, value in loss._asdict().items()}
    metrics["update/saturated_share"] = output.update.at_bound(bound).detach()
    return metrics


def finished_metrics(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds to a generator step's means over the whole batch what is made of them."""
    return metrics | {"update/relative_size": metrics["generator/update"].sqrt()}  # the root of the mean square

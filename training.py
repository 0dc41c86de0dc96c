"""Trains the generator: VAE decoder θ, weight predictor (GRU) and Wasserstein critic, in one loop.

python training.py                                      the default settings of config.yaml
python training.py --config config_quick.yaml           small pictures, a few minutes on a laptop
python training.py data.root=my_pictures output.name=my-run training.steps=50000
python training.py --dry-run                            check everything, show what would run, and stop
"""

import argparse
import copy
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# torch's threads wait for each other by spinning, long by default: on 2 cores at a load near 4 a critic step took 887
# ms instead of 34. Asleep after 1,000 turns they took 98 ms beside two busy processes, and 45 ms alone.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported

import torch
from torch import Tensor, nn

from augmentation import DiffAugment
from configuration import Config, UserError, config_to_dict, config_to_yaml, load_config
from image_data import TrainingImages, open_images
from losses import CriticLoss, GeneratorLoss, critic_loss, generator_loss, update_penalty, vae_loss, video_loss
from model_definitions import (
    Discriminator,
    Generator,
    GeneratorOutput,
    build_discriminator,
    build_generator,
    states_at,
)
from random_draws import CriticDraws, Draws, GeneratorDraws, base_fakes
from run_directory import RunDirectory
from training_log import FixedSamples, Log, StopRequest

# ------------------------------------------------------------------------------------------------ the two objectives


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
    with torch.no_grad():  # also keeps the penalty's double backward away from the GRU: cuDNN has none
        n_base = base_fakes(config)
        features = generator.features(draws.z)
        x_base = generator.draw_base(features)
        if n_base < len(x_base):
            _, states = generator.watch(x_base[n_base:], draws.motion)
            update = generator.predict_update(states_at(states, draws.frame))
            x_fake = torch.cat([x_base[:n_base], generator.draw_updated(features[n_base:], update)])
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
    x_judged = augment(torch.cat([output.x_fake, output.x_base]), draws.augment)
    score_fake, score_base = discriminator(x_judged).chunk(2)  #                               5
    x_rec, mu, logvar = generator.vae(x_real, draws.posterior)
    reconstruction, kl = vae_loss(x_real, x_rec, mu, logvar)
    video = x_real.new_zeros(())
    if loss.lambda_video:
        states = states_at(output.states, draws.video_times)
        frames = generator.draw_frames(generator.features(draws.z), states)
        target = generator.synthesizer(output.x_base.detach(), draws.motion, draws.video_times, full_size=True)
        video = video_loss(frames, target)
    return generator_loss(  #                                                                  6
        score_fake=score_fake,
        score_base=score_base,
        reconstruction=reconstruction,
        kl=kl,
        update=update_penalty(output.relative_update),
        video=video,
        lambda_adv=loss.lambda_adv,
        lambda_base=loss.lambda_base,
        lambda_vae=loss.lambda_vae,
        beta=loss.beta,
        lambda_update=loss.lambda_update,
        lambda_video=loss.lambda_video,
    ), output


# ---------------------------------------------------------------------------------------------------------- the loop


def train(config: Config) -> int:
    """Runs the whole training that the settings describe. Returns the exit status."""
    RunDirectory.check_free(config)
    device = choose_device(config.runtime.device)
    prepare_device(device)
    torch.manual_seed(config.training.seed)
    generator = build_generator(config).to(device)
    discriminator = build_discriminator(config).to(device)
    generator_ema = copy.deepcopy(generator).requires_grad_(False)
    generator_ema.predictor.gru.flatten_parameters()  # a copy's weights lie apart, which cuDNN would mend at every call
    images = open_images(
        config.data, config.image, batch_size=config.training.batch_size, seed=config.training.seed, device=device
    )
    steps = total_steps(config, images.count)
    optimizers = build_optimizers(config, generator, discriminator)
    # Reads images, so that a broken one shows before the run's folder is made.
    fixed = FixedSamples(config, generator, images)
    run = RunDirectory(config)
    log = Log(run, steps, config)
    log.line(images.description)
    log.line(describe_device(device))
    log.line(f"{describe_update(generator)}; {describe_length(config, steps, images.count)}")
    log.line(f"writing to {run.path}/")
    log.skipped(images.skipped)
    draws = Draws(config, device)
    batches = images.batches()
    critic_parameters = list(discriminator.parameters())
    generator_parameters = list(generator.parameters())
    with StopRequest() as stop:
        with log.pause():
            log.line(f"first pictures, untrained: {fixed.save(run, 0, generator_ema)}")
        for step in range(1, steps + 1):
            for repeat in range(config.training.n_critic):
                x_real = next(batches)
                numbers = draws.critic(generator, step, repeat)
                critic = critic_objective(generator, discriminator, x_real, numbers, draws.augment, config)
                set_gradients(critic.total, critic_parameters)
                optimizers["discriminator"].step()
                discriminator.calibration.observe(critic.score_real.detach(), critic.score_fake.detach())

            numbers = draws.generator(generator, step)
            loss, output = generator_objective(generator, discriminator, x_real, numbers, draws.augment, config)
            set_gradients(loss.total, generator_parameters)
            optimizers["generator"].step()
            update_ema(generator_ema, generator, config.training.ema_decay, step)
            log.collect(step, metrics_on_device(critic, loss, output, generator, discriminator, config))

            done = step == steps or stop.requested
            sample_due = done or step % config.output.sample_every == 0
            checkpoint_due = done or step % config.output.checkpoint_every == 0
            if done or step % config.output.log_every == 0:
                log.write(step)  # here, and below where something is due, the device is waited for; nowhere else
                log.skipped(images.skipped)
            if sample_due or checkpoint_due:
                with log.pause():
                    log.check({"generator": generator, "discriminator": discriminator})
                    if sample_due:
                        fixed.save(run, step, generator_ema)
                    if checkpoint_due:
                        discriminator.calibration.fit()
                        state = checkpoint(config, step, generator, generator_ema, discriminator, optimizers)
                        run.save_checkpoint(state)
            if done:
                break
    run.close()
    log.finish(step, stop.signal_number)
    return 128 + stop.signal_number if stop.requested and step < steps else 0


def set_gradients(loss: Tensor, parameters: list[nn.Parameter]) -> None:
    """Sets `.grad` of `parameters`, and of nothing else, to the gradient of `loss`; zero for those it doesn't reach."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def build_optimizers(config: Config, generator: Generator, discriminator: Discriminator) -> dict[str, torch.optim.Adam]:
    """Adam for the critic, and one for the generator with a learning rate for the VAE and one for the predictor.

    The predictor's rate is its own: at the VAE's, its first step would move the weights several times further than the
    VAE's own step does, since every weight's update sums a step of each GRU unit.
    """
    training = config.training
    vae = list(generator.vae.parameters())
    predictor = [*generator.predictor.parameters(), *generator.head.parameters()]
    groups = [{"params": vae, "lr": training.lr_vae}, {"params": predictor, "lr": training.lr_predictor}]
    betas = (training.adam_betas[0], training.adam_betas[1])
    return {
        "generator": torch.optim.Adam(groups, betas=betas, fused=True),
        "discriminator": torch.optim.Adam(
            discriminator.parameters(), lr=training.lr_discriminator, betas=betas, fused=True
        ),
    }  # fmt: skip


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Moves the exponential moving average towards the network: average += (1 - decay) · (network - average).

    Early on the decay is smaller, (1 + step) / (10 + step), so that the average doesn't remember the initial weights.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), weight)


def checkpoint(
    config: Config,
    step: int,
    generator: Generator,
    generator_ema: Generator,
    discriminator: Discriminator,
    optimizers: dict[str, torch.optim.Adam],
) -> dict[str, Any]:
    """Everything that rebuilds the networks and goes on: plain dicts, numbers, texts and tensors."""
    return {
        "step": step,
        "images_seen": step * config.training.n_critic * config.training.batch_size,
        "config": config_to_dict(config),
        "update_spec": generator.spec.to_dict(),
        "generator": generator.state_dict(),
        "generator_ema": generator_ema.state_dict(),
        "discriminator": discriminator.state_dict(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
    }


def metrics_on_device(
    critic: CriticLoss,
    loss: GeneratorLoss,
    output: GeneratorOutput,
    generator: Generator,
    discriminator: Discriminator,
    config: Config,
) -> dict[str, Tensor]:
    """What `metrics.jsonl` tells of a step, as scalars on the device; the log reads them once an interval."""

    def norm(network: nn.Module) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])

    n_base = base_fakes(config)
    relative = output.relative_update.detach()
    metrics = {
        "critic/total": critic.total,
        "critic/gap": -critic.wasserstein,
        "critic/penalty": critic.penalty,
        "critic/drift": critic.drift,
        "score/real": critic.score_real.mean(),
        "generator/total": loss.total,
        "generator/adversarial": loss.adversarial,
        "generator/adversarial_base": loss.adversarial_base,
        "generator/reconstruction": loss.reconstruction,
        "generator/kl": loss.kl,
        "generator/update": loss.update,
        "generator/video": loss.video,
        "update/relative_size": relative.square().mean().sqrt(),
        "update/saturated_share": (relative.abs() > 0.95 * generator.bound).float().mean(),
        "gradient_norm/discriminator": norm(discriminator),
        "gradient_norm/vae": norm(generator.vae),
        "gradient_norm/predictor": norm(generator.predictor),
    }
    if n_base:
        metrics["score/base"] = critic.score_fake[:n_base].mean()
    if n_base < len(critic.score_fake):
        metrics["score/updated"] = critic.score_fake[n_base:].mean()
    return {name: value.detach() for name, value in metrics.items()}


# ------------------------------------------------------------------------------------------------------ small helpers


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` to a device that exists.

    Raises:
        UserError: an unknown name, or a GPU that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"runtime.device must be auto, cpu, cuda or cuda:<number>, but is '{name}'") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"runtime.device must be auto, cpu, cuda or cuda:<number>, but is '{name}'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} GPU(s)" if torch.cuda.is_available() else "no CUDA GPU"
        raise UserError(f"runtime.device is {name}, but PyTorch sees {found} here; use auto or cpu")
    return device


def prepare_device(device: torch.device) -> None:
    """Makes `device` the current one, with convolutions in true fp32, as the gradient penalty wants them."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # on by default: a mantissa of 10 bits instead of 23


def total_steps(config: Config, image_count: int) -> int:
    """`training.steps`, or the iterations that `training.epochs` passes over the pictures take."""
    if config.training.steps is not None:
        return config.training.steps
    assert config.training.epochs is not None  # load_config demands one of them
    per_step = config.training.batch_size * config.training.n_critic
    return max(1, math.ceil(config.training.epochs * image_count / per_step))


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"device: {device}, {torch.cuda.get_device_name(device)}"
    return f"device: CPU, {torch.get_num_threads()} threads"


def describe_update(generator: Generator) -> str:
    return (
        f"WEIGHT_UPDATE_SIZE {generator.head.update_size:,} for {generator.spec.total_size:,} weights "
        f"in {len(generator.spec.tensors)} tensors"
    )


def describe_length(config: Config, steps: int, image_count: int) -> str:
    epochs = steps * config.training.batch_size * config.training.n_critic / image_count
    return f"{steps:,} steps = {epochs:,.1f} passes over the pictures"


# ---------------------------------------------------------------------------------------------------------- commands


def dry_run(config: Config) -> int:
    """Checks everything, loads one batch, and prints what would run. Writes nothing."""
    device = choose_device(config.runtime.device)
    prepare_device(device)
    torch.manual_seed(config.training.seed)
    generator, discriminator = build_generator(config).to(device), build_discriminator(config).to(device)
    images = open_images(
        config.data, config.image, batch_size=config.training.batch_size, seed=config.training.seed, device=device
    )
    batch = next(images.batches())
    try:
        for line in dry_run_report(config, device, generator, discriminator, images, batch):
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; what is left goes nowhere, without a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def dry_run_report(
    config: Config,
    device: torch.device,
    generator: Generator,
    discriminator: Discriminator,
    images: TrainingImages,
    batch: Tensor,
) -> Iterator[str]:
    yield "# settings"
    yield config_to_yaml(config)
    yield "# data"
    yield images.description
    for name, count in images.class_counts.items():
        yield f"  {name:<24} {count:>8,}"
    yield f"  first batch {tuple(batch.shape)}, values {batch.min():.3f} to {batch.max():.3f}, mean {batch.mean():.3f}"
    yield ""
    yield "# networks                             parameters"
    networks = {
        "VAE encoder": [generator.vae.encoder, generator.vae.to_mu, generator.vae.to_logvar],
        "VAE decoder θ": [generator.vae.decoder],
        "WeightPredictorRNN and update head": [generator.predictor, generator.head],
        "Discriminator": [discriminator],
    }
    for name, modules in networks.items():
        yield f"  {name:<36} {sum(p.numel() for module in modules for p in module.parameters()):>12,}"
    yield ""
    yield "# updated tensors                      shape                  weights"
    for tensor in generator.spec.tensors:
        yield f"  {tensor.name:<36} {' x '.join(map(str, tensor.shape)):<20} {tensor.size:>9,}"
    yield f"  head {config.weight_predictor.head}: {describe_update(generator)}"
    yield ""
    yield f"{describe_device(device)}; {describe_length(config, total_steps(config, images.count), images.count)}"
    try:
        RunDirectory.check_free(config)
        yield f"a run would write to {Path(config.output.root) / config.output.name}/; nothing was written"
    except UserError as error:  # no reason not to look
        yield f"a run would be refused: {error}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train a VAE decoder, the GRU that predicts updates to its weights, and a WGAN-GP critic.",
        epilog="examples:\n"
        "  python training.py --config config_quick.yaml\n"
        "  python training.py data.root=my_pictures output.name=my-run\n"
        "  python training.py image.size=64 training.epochs=200 weight_predictor.head=low_rank output.name=low-rank\n"
        "  python training.py --dry-run weight_predictor.layers='[decoder.*.weight]'\n\n"
        "config.yaml explains every setting.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Path(__file__).with_name("config.yaml")
    parser.add_argument("--config", metavar="FILE", default=default, help="YAML file with settings (config.yaml)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        return dry_run(config) if options.dry_run else train(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before training began; from then on Ctrl-C saves first
        return 130
    except (torch.OutOfMemoryError, MemoryError) as error:
        return out_of_memory(error)
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        return out_of_memory(error)


def out_of_memory(error: BaseException) -> int:
    """One line for a device or a machine that is too small; exit status 2."""
    hint = "try a smaller training.batch_size, video.height and video.width, or weight_predictor.head=low_rank"
    print(f"error: out of memory ({' '.join(str(error).split())[:100]}); {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

"""Trains the generator: VAE decoder θ, weight predictor (GRU) and Wasserstein critic, in one loop.

    python training.py                                      the default settings of config.yaml
    python training.py --config config_quick.yaml           small pictures, a few minutes on a laptop
    python training.py data.root=my_pictures output.name=my-run training.steps=50000
    python training.py --dry-run                            check everything, show what would run, and stop
"""

import argparse
import copy
import hashlib
import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from augmentation import DiffAugment
from configuration import Config, UserError, config_to_dict, config_to_yaml, load_config
from image_data import TrainingImages, open_images
from losses import CriticLoss, GeneratorLoss, critic_loss, generator_loss, update_penalty, vae_loss, video_loss
from model_definitions import Discriminator, Generator, GeneratorOutput, build_discriminator, build_generator
from run_directory import RunDirectory
from video_synth import Motion

# ------------------------------------------------------------------------------------------------------- randomness
# A training step draws all its random numbers before it computes, each draw from a generator that is seeded by (seed,
# step, part). What happens at step k therefore depends on k alone: not on the steps before, nor on how a step is run.


class CriticDraws(NamedTuple):
    """The random numbers of one critic step."""

    z: Tensor  #                (B, latent_dim)
    motion: Motion  #           for the B - n_base pictures that are updated
    frame: Tensor | None  #     (B - n_base,) whose update draws the picture; None: the last
    epsilon: Tensor  #          (B,)
    augment_real: Tensor  #     (B, 7)
    augment_fake: Tensor  #     (B, 7)


class GeneratorDraws(NamedTuple):
    """The random numbers of one generator step."""

    z: Tensor  #                (B, latent_dim)
    motion: Motion
    frame: Tensor | None  #     (B,)
    posterior: Tensor  #        (B, latent_dim), the VAE's reparameterisation noise
    video_times: Tensor  #      (B, K) the frames that the video loss looks at
    augment: Tensor  #          (2 B, 7), for updated and base pictures


class Draws:
    """Draws what a step needs, on the device, as a pure function of (seed, step, part)."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.random = torch.Generator(device)
        self.augment = DiffAugment(config.training.diffaugment)

    def critic(self, generator: Generator, step: int, repeat: int) -> CriticDraws:
        """For critic step number `repeat` of iteration `step`."""
        batch = self.config.training.batch_size
        updated = batch - base_fakes(self.config)
        self.random.manual_seed(stable_seed(self.config.training.seed, step, "critic", repeat))
        return CriticDraws(
            z=self._normal(batch, self.config.vae.latent_dim),
            motion=generator.draw_motion(updated, self.random),
            frame=self._judged_frame(updated),
            epsilon=torch.rand(batch, device=self.device, generator=self.random),
            augment_real=self.augment.draw(batch, self.device, self.random),
            augment_fake=self.augment.draw(batch, self.device, self.random),
        )

    def generator(self, generator: Generator, step: int) -> GeneratorDraws:
        """For the generator step of iteration `step`."""
        batch, video_frames = self.config.training.batch_size, self.config.loss.video_frames
        self.random.manual_seed(stable_seed(self.config.training.seed, step, "generator"))
        return GeneratorDraws(
            z=self._normal(batch, self.config.vae.latent_dim),
            motion=generator.draw_motion(batch, self.random),
            frame=self._judged_frame(batch),
            posterior=self._normal(batch, self.config.vae.latent_dim),
            video_times=self._frames(batch, video_frames),
            augment=self.augment.draw(2 * batch, self.device, self.random),
        )

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.random)

    def _frames(self, *shape: int) -> Tensor:
        return torch.randint(self.config.video.frames, shape, device=self.device, generator=self.random)

    def _judged_frame(self, batch: int) -> Tensor | None:
        return self._frames(batch) if self.config.loss.judged_frame == "random" else None


def stable_seed(*parts: object) -> int:
    """A seed that depends on `parts` alone, the same on every machine and in every version of Python."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes 63 bits


def base_fakes(config: Config) -> int:
    """How many of the critic's generated pictures are base pictures, drawn with θ alone."""
    return round(config.loss.base_fake_share * config.training.batch_size)


# ------------------------------------------------------------------------------------------------ the two objectives


def critic_objective(
    generator: Generator, discriminator: Discriminator, x_real: Tensor, draws: CriticDraws, augment: DiffAugment, config: Config
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
            update = generator.predict_update(pick_frame(states, draws.frame))
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
    generator: Generator, discriminator: Discriminator, x_real: Tensor, draws: GeneratorDraws, augment: DiffAugment, config: Config
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
        rows = torch.arange(len(draws.z), device=x_real.device)[:, None]
        frames = generator.draw_frames(generator.features(draws.z), output.states[rows, draws.video_times])
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


def pick_frame(states: Tensor, frame: Tensor | None) -> Tensor:
    """GRU states (B, T, hidden) -> the state at `frame` (B,), or the last: (B, hidden)."""
    return states[:, -1] if frame is None else states[torch.arange(len(states), device=states.device), frame]


# ---------------------------------------------------------------------------------------------------------- the loop


def train(config: Config) -> int:
    """Runs the whole training that the settings describe. Returns the exit status."""
    RunDirectory.check_free(config)
    device = choose_device(config.runtime.device)
    torch.manual_seed(config.training.seed)
    generator = build_generator(config).to(device)
    discriminator = build_discriminator(config).to(device)
    generator_ema = copy.deepcopy(generator).requires_grad_(False)
    images = open_images(
        config.data, config.image, batch_size=config.training.batch_size, seed=config.training.seed, device=device
    )
    steps = total_steps(config, images.count)
    optimizers = build_optimizers(config, generator, discriminator)
    run = RunDirectory(config)
    log = Log(run, steps, config)
    log.line(images.description)
    log.line(describe_device(device))
    log.line(f"{describe_update(generator)}; {describe_length(config, steps, images.count)}")
    log.line(f"writing to {run.path}/")
    fixed = FixedSamples(config, generator, images)
    draws = Draws(config, device)
    batches = images.batches()
    critic_parameters = list(discriminator.parameters())
    generator_parameters = list(generator.parameters())
    with StopRequest() as stop:
        fixed.save(run, log, 0, generator_ema)
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
            if done or step % config.output.log_every == 0:
                log.write(step)  # the one place where the device is waited for
            if done or step % config.output.sample_every == 0:
                fixed.save(run, log, step, generator_ema)
            if done or step % config.output.checkpoint_every == 0:
                discriminator.calibration.fit()
                run.save_checkpoint(checkpoint(config, step, generator, generator_ema, discriminator, optimizers))
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
    critic: CriticLoss, loss: GeneratorLoss, output: GeneratorOutput, generator: Generator, discriminator: Discriminator, config: Config
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


# ---------------------------------------------------------------------------------------- what the user sees meanwhile


class Log:
    """Averages each interval's metrics, writes them, shows progress, and stops a run whose losses are no numbers.

    Steps hand over scalars that stay on the device; only `write` waits for it.
    """

    def __init__(self, run: RunDirectory, steps: int, config: Config) -> None:
        self.run, self.steps = run, steps
        self.images_per_step = config.training.n_critic * config.training.batch_size
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.first_bad: Tensor | None = None
        self.since_step, self.since_time = 0, time.perf_counter()
        self.started = self.since_time
        self.is_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=steps,
            unit="step",
            disable=not self.is_terminal,
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )

    def line(self, text: str) -> None:
        """Prints one line, above the bar where there is one."""
        tqdm.write(text) if self.is_terminal else print(text, flush=True)

    def collect(self, step: int, metrics: dict[str, Tensor]) -> None:
        """Adds one step's scalars, without waiting for the device."""
        values = torch.stack([value.float() for value in metrics.values()])
        if self.sums is None or self.first_bad is None:
            self.names = list(metrics)
            self.sums = torch.zeros_like(values)
            self.first_bad = torch.full(values.shape, math.inf, device=values.device, dtype=torch.float64)
        self.sums += values
        self.first_bad = torch.where(values.isfinite(), self.first_bad, self.first_bad.clamp_max(step))
        self.bar.update()

    def write(self, step: int) -> None:
        """Reads the averages since the last call, writes them and shows them.

        Raises:
            UserError: a loss, score or gradient stopped being a number; the message names the first.
        """
        if self.sums is None or self.first_bad is None or step == self.since_step:
            return
        averages = (self.sums / (step - self.since_step)).tolist()
        bad = self.first_bad.min().item()
        if bad < math.inf:
            names = [name for name, first in zip(self.names, self.first_bad.tolist(), strict=True) if first == bad]
            kept = self.run.path / "checkpoints" / "latest.pt"
            self.close()
            raise UserError(
                f"training stopped: {', '.join(names)} not finite at step {int(bad)}; "
                + (f"the last good checkpoint is {kept}" if kept.exists() else "no checkpoint was written yet")
                + "; try smaller training.lr_vae, training.lr_predictor and training.lr_discriminator"
            )
        seconds = time.perf_counter() - self.since_time
        metrics = dict(zip(self.names, averages, strict=True))
        metrics["images_seen"] = step * self.images_per_step
        metrics["speed/images_per_second"] = (step - self.since_step) * self.images_per_step / seconds
        metrics["speed/seconds_per_step"] = seconds / (step - self.since_step)
        metrics["memory/peak_gb"] = peak_memory_gb(self.sums.device)
        metrics["seconds"] = time.perf_counter() - self.started
        self.run.log_metrics(step, metrics)
        self.show(step, metrics)
        self.sums.zero_()
        self.since_step, self.since_time = step, time.perf_counter()

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """The bar's tail, or a plain line where output goes to a file."""
        summary = (
            f"gap {metrics['critic/gap']:.2f}, rec {metrics['generator/reconstruction']:.1f}, kl {metrics['generator/kl']:.1f}, "
            f"update {metrics['update/relative_size']:.1%}, {metrics['speed/images_per_second']:.0f} images/s"
        )
        if self.is_terminal:
            self.bar.set_postfix_str(summary)
        else:
            left = (self.steps - step) * metrics["speed/seconds_per_step"]
            print(f"step {step}/{self.steps}  {summary}, {duration(left)} left", flush=True)

    def pause(self) -> "_Pause":
        """A context whose time is not counted as training time: drawing samples, say."""
        return _Pause(self)

    def finish(self, step: int, signal_number: int) -> None:
        """The last words of a run."""
        self.close()
        elapsed = duration(time.perf_counter() - self.started)
        if signal_number and step < self.steps:
            self.line(f"stopped by {signal.Signals(signal_number).name} after step {step}; everything is saved in {self.run.path}/")
            return
        self.line(f"finished {step} steps in {elapsed}. Look at:")
        for what, where in (
            ("pictures", f"samples/step_{step:06d}.png"),
            ("videos", f"clips/step_{step:06d}.mp4"),
            ("curves", "loss_curves.png"),
            ("checkpoint", "checkpoints/latest.pt"),
        ):
            self.line(f"  {what:<11}{self.run.path / where}")

    def close(self) -> None:
        self.bar.close()


class _Pause:
    def __init__(self, log: Log) -> None:
        self.log = log

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.log.since_time += time.perf_counter() - self.started


class FixedSamples:
    """The same latents, motions and real pictures through the whole run, drawn by the averaged networks."""

    def __init__(self, config: Config, generator: Generator, images: TrainingImages) -> None:
        device = generator.vae.to_mu.weight.device
        random = torch.Generator(device).manual_seed(stable_seed(config.training.seed, "samples"))
        count = config.output.samples
        self.z = torch.randn(count, config.vae.latent_dim, device=device, generator=random)
        self.motion = generator.draw_motion(count, random)
        self.x_real = images.fixed_sample(count)

    @torch.no_grad()
    def save(self, run: RunDirectory, log: Log, step: int, generator: Generator) -> None:
        """Writes the sample grid, the clips and the curves of this moment."""
        with log.pause():
            output = generator(self.z, self.motion)
            mu, _ = generator.vae.encode(self.x_real)
            path = run.save_samples(
                step,
                {
                    "real": self.x_real,
                    "reconstruction": generator.vae.decode(mu),
                    "base image θ": output.x_base,
                    "updated image θ + Δ": output.x_fake,
                },
            )
            count = min(4, len(self.z))
            frames = generator.draw_frames(generator.features(self.z), output.states)
            run.save_clip(step, {"synthetic video": output.video[:count], "weight-driven video": frames[:count]})
            if step:
                run.plot_losses()
        if step == 0:
            log.line(f"first pictures: {path}")


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal_number = 0
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal_number != 0

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: object) -> None:
        self.signal_number = number
        print("\nstopping after this step and saving; press Ctrl-C again to leave at once", file=sys.stderr)
        for other in self._before:
            signal.signal(other, signal.SIG_DFL)


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


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far, of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on every platform, and needed only here

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def duration(seconds: float) -> str:
    """93 -> `1:33`, 4000 -> `1:06:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# ---------------------------------------------------------------------------------------------------------- commands


def dry_run(config: Config) -> int:
    """Checks everything, loads one batch, and prints what would run. Writes nothing."""
    device = choose_device(config.runtime.device)
    RunDirectory.check_free(config)
    torch.manual_seed(config.training.seed)
    generator, discriminator = build_generator(config).to(device), build_discriminator(config).to(device)
    images = open_images(
        config.data, config.image, batch_size=config.training.batch_size, seed=config.training.seed, device=device
    )
    batch = next(images.batches())
    for line in dry_run_report(config, device, generator, discriminator, images, batch):
        print(line)
    return 0


def dry_run_report(
    config: Config, device: torch.device, generator: Generator, discriminator: Discriminator, images: TrainingImages, batch: Tensor
) -> Iterator[str]:
    yield "# settings"
    yield config_to_yaml(config)
    yield "# data"
    yield images.description
    for name, count in zip(images.class_names, images.class_counts, strict=True):
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
    yield f"a run would write to {Path(config.output.root) / config.output.name}/; nothing was written"


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


if __name__ == "__main__":
    sys.exit(main())

"""One iteration in the order in which it happens: random numbers, the critic's step, the generator's step.

A step is a *pass*, a pure function from images and random numbers to metrics and gradients, and what changes the state
after it: averaging over processes, clipping, Adam, the moving average. `EagerSteps` runs the passes as written here;
`step_runners.py` records them.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import losses
from configuration import Config, UserError
from distributed import SINGLE_PROCESS, World
from generator import Generator, build_synthesizer, stable_seed
from losses import AUGMENTATION_NUMBERS, critic_objective, generator_objective
from model_definitions import Discriminator, WeightPredictorRNN
from util import channels_last_on, products_in_tf32
from video_synth import Motion, TrainingClips, fit_fields


class CriticNoise(NamedTuple):
    """The random numbers of one critic step, for a batch or a process's shard of it: B images."""

    z: Tensor  #                (B, latent_dim)
    motion: Motion  #           of the B - n_base images that are updated; without noise where there is no GRU
    frame: Tensor | None  #     (B - n_base,) number of the GRU's state that predicts Δ; None: the last
    base_images: int  #         of the whole batch
    epsilon: Tensor  #          (B,)
    augment_real: Tensor  #     (B, AUGMENTATION_NUMBERS)
    augment_fake: Tensor  #     (B, AUGMENTATION_NUMBERS)

    @property
    def base_count(self) -> int:
        """How many of these images are base images: a process's shard may hold one more than another's."""
        return len(self.z) - len(self.motion.phases)


class ClipNoise(NamedTuple):
    """The clips of a generator step, N windows of L frames, and their random numbers."""

    frames: Tensor  #           (N, L, C, H, W) in [0, 1]; the first is the image that moves
    motion: Motion  #           changes each clip as a whole, as one moment of a synthetic video would, for variety
    posterior: Tensor  #        (N, latent_dim), reparameterisation noise of z
    times: Tensor  #            (N, K) frames that the video loss compares, counted from frame 1 on
    share: float  #             what their means count; not 1 where processes have different numbers of them


class GeneratorNoise(NamedTuple):
    """The random numbers of one generator step."""

    z: Tensor  #                (B, latent_dim)
    motion: Motion | None  #    without noise where there is no GRU; None: nothing is updated
    frame: Tensor | None  #     (B,)
    posterior: Tensor  #        (V, latent_dim), reparameterisation noise of the V images that the VAE's loss takes
    vae_share: float  #         what their mean counts; not 1 where processes have different numbers of them
    lambda_vae: float  #        its largest value in the run, the same in all steps
    decoder_share: Tensor | float  # λ_vae now, over that; filled, not copied, where it changes; 0: the encoder alone
    rollout_count: int  #       the first `rollout_count` images are rolled out on their own frames after the video
    video_times: Tensor  #      (B, K) frames that the video loss compares, counted from frame T on
    augment: Tensor  #          (2 B, AUGMENTATION_NUMBERS), for updated and base images
    alone: bool  #              the predictor and the encoder learn, θ stands still, and nothing is scored
    clips: ClipNoise | None  #  None where no clips teach motion


class NoiseSampler:
    """Samples what a step needs, on the device, as a pure function of (seed, step, part).

    So the random numbers of step k depend on the seed and k alone: not on the steps before it, nor on how a step is
    run. Several processes each sample the numbers of the whole batch and keep the rows of their own images, so that a
    step doesn't depend on their number either.
    """

    def __init__(self, config: Config, device: torch.device, world: World = SINGLE_PROCESS, steps: int = 0) -> None:
        settings, image, batch = config.weight_predictor, config.image, config.training.batch_size
        self.config, self.device, self.world = config, device, world
        self.steps = steps or config.training.steps or 1  # of the whole run
        self.start = math.inf if settings.update == "off" else settings.start  # nothing is updated before
        self.alone = max(self.start, settings.alone)  # from there on nothing is scored
        self.rows, self.lambda_vae = slice(world.rank, None, world.size), losses.largest(config.loss.lambda_vae)
        self.base_images = round(config.loss.base_fake_fraction * batch)  # of the critic's fakes, with updates
        self.random, self.latent = torch.Generator(device), (batch, config.vae.latent_dim)
        synthesizer, shape = build_synthesizer(config), (image.channels, image.size, image.size)
        counts = {0, batch - self.base_images, batch, batch // 2}
        self.motion_shapes = {n: synthesizer.motion_shapes(n, shape) for n in counts}
        self.clip_count = batch // 2 if config.video.source != "synthetic" else 0  # of the whole batch
        self.window = 1 + config.video.frames + config.loss.rollout_frames  # frames of each

    def fraction(self, step: int) -> float:
        """The fraction of the run that is done when iteration `step` begins: where schedules are read."""
        return min(1.0, (step - 1) / self.steps)

    def is_alone(self, step: int) -> bool:
        """Whether the predictor learns alone in this iteration."""
        return self.fraction(step) >= self.alone

    # Numbers of a kind are sampled together: a GPU takes as long for few as for many. Their order is part of what a
    # seed means. What only some settings need comes last: others share what is before it, and those of other kinds.

    def critic(self, step: int, repeat: int) -> CriticNoise:
        """For critic step number `repeat` of iteration `step`."""
        batch, rows = self.config.training.batch_size, self.rows
        base = self.base_images if self.fraction(step) >= self.start else batch
        # Images from number `base` on are updated; of these this process has every world.size-th.
        updated = slice((self.world.rank - base) % self.world.size, None, self.world.size)
        self._seed = stable_seed(self.config.training.seed, step, "critic", repeat)
        *shapes, noise_shape = self.motion_shapes[batch - base]
        z, noise = self._sample(torch.randn, self.latent, noise_shape)
        augment = [(batch, AUGMENTATION_NUMBERS)] * 2
        epsilon, augment_real, augment_fake, *path = self._sample(torch.rand, (batch,), *augment, *shapes)
        motion = Motion(*(numbers[updated] for numbers in (*path, noise)))
        frame = self._adversarial_frame(batch - base, updated)
        return CriticNoise(z[rows], motion, frame, base, epsilon[rows], augment_real[rows], augment_fake[rows])

    def generator(self, step: int, clips: Tensor | None = None) -> GeneratorNoise:
        """For the generator step of iteration `step`, with this process's windows of clips."""
        batch, loss, rows = self.config.training.batch_size, self.config.loss, self.rows
        updating = self.fraction(step) >= self.start
        *shapes, noise_shape = self.motion_shapes[batch if updating else 0]
        self._seed = stable_seed(self.config.training.seed, step, "generator")
        z, posterior, noise = self._sample(torch.randn, self.latent, self.latent, noise_shape)
        augment, *path = self._sample(torch.rand, (2, batch, AUGMENTATION_NUMBERS), *shapes)
        motion = Motion(*(numbers[rows] for numbers in (*path, noise))) if updating else None
        frame = self._adversarial_frame(batch, rows)
        times = self._integers(loss.rollout_frames + 1, batch, loss.video_frames)[rows]
        augment = augment[:, rows].flatten(0, 1)
        rollouts = losses.value_at(loss.rollout_fraction, self.fraction(step))
        rollout_count = len(range(round(rollouts * batch))[rows])
        vae_count = math.ceil(loss.vae_fraction * batch)  # of the whole batch
        own = len(range(vae_count)[rows])
        posterior, share = posterior[rows][: max(1, own)], own * self.world.size / vae_count
        now = losses.value_at(loss.lambda_vae, self.fraction(step)) / self.lambda_vae
        now = 0.0 if (alone := self.is_alone(step)) else now
        decoder_share = torch.full((), now, device=self.device) if now and isinstance(loss.lambda_vae, dict) else now
        return GeneratorNoise(z[rows], motion, frame, posterior, share, self.lambda_vae, decoder_share, rollout_count,
                              times, augment, alone, None if clips is None else self._clips(step, clips))  # fmt: skip

    def _clips(self, step: int, clips: Tensor) -> ClipNoise:
        """The clips with their random numbers, whose seed is of their own."""
        config, rows, count, frames = self.config, self.rows, self.clip_count, self.window - 1
        self._seed = stable_seed(config.training.seed, step, "clips")
        [posterior] = self._sample(torch.randn, (count, config.vae.latent_dim))
        path = self._sample(torch.rand, *self.motion_shapes[count][:2])
        motion = Motion(*(numbers[rows] for numbers in (*path, posterior[:, :0], posterior[:, :0])))
        times = self._integers(frames, count, min(config.loss.video_frames, frames))[rows]
        share = len(clips) * self.world.size / count
        return ClipNoise(clips, motion, posterior[rows], times, share)

    def _sample(self, distribution: Callable[..., Tensor], *shapes: tuple[int, ...]) -> list[Tensor]:
        """Tensors of these shapes, views of one: `distribution` is torch.rand or torch.randn."""
        sizes = [math.prod(shape) for shape in shapes]
        self.random.manual_seed(self._seed + (distribution is torch.rand))
        numbers = distribution(sum(sizes), device=self.device, generator=self.random)
        return [piece.view(shape) for piece, shape in zip(numbers.split(sizes), shapes, strict=True)]

    def _integers(self, end: int, *shape: int) -> Tensor:
        """0 to end - 1. A shared update is the mean over the batch at one time, so all rows are then the same."""
        self._seed += 2  # those of `_sample` are this one and the next
        self.random.manual_seed(self._seed)
        numbers = torch.randint(end, shape, device=self.device, generator=self.random)
        return numbers[:1].expand_as(numbers) if self.config.weight_predictor.sharing == "shared" else numbers

    def _adversarial_frame(self, count: int, rows: slice) -> Tensor | None:
        is_random = self.config.loss.adversarial_frame == "random"
        return self._integers(self.config.video.frames, count)[rows] if is_random else None


# ----------------------------------------------------------------------------------------------------------- the state


class TrainingState:
    """Networks, average and optimizers of a run, on `device`: all that training changes.

    Attributes:
        step: iterations done; `predictor_steps`: those in which the predictor learnt; `is_resting`: whether θ rests.
        generator: θ, the GRU and its head, as they train.
        generator_ema: their exponential moving average, which makes samples.
        critic: with the calibration of its probability.
        parameters: network ("vae", "predictor", "critic") -> its trained parameters.
        optimizers: "generator" (a group of parameters for the VAE, one for the predictor) and "critic".
    """

    def __init__(self, generator: Generator, critic: Discriminator, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.step, self.predictor_steps, self.is_resting = 0, 0, False
        self.generator = channels_last_on(device, generator)
        self.critic = channels_last_on(device, critic)
        self.generator_ema = copy.deepcopy(self.generator).requires_grad_(False)
        if isinstance(self.generator_ema.predictor, WeightPredictorRNN):
            # A copy's weights are no longer one block of memory, and cuDNN would rearrange them at every call.
            self.generator_ema.predictor.gru.flatten_parameters()
        predictor_parameters = [*self.generator.predictor.parameters(), *self.generator.head.parameters()]
        self.parameters: dict[str, list[nn.Parameter]] = {
            "vae": list(self.generator.vae.parameters()),
            "predictor": [parameter for parameter in predictor_parameters if parameter.requires_grad],
            "critic": list(self.critic.parameters()),
        }
        # The predictor has a learning rate of its own: at the same rate its first step moves the weights several times
        # further than the VAE's step does, since every weight's update sums a step of each GRU unit.
        groups = [{"params": parameters} for parameters in self.parameters.values()]
        self.optimizers = {"generator": torch.optim.Adam(groups[:2], fused=True)}
        self.optimizers["critic"] = torch.optim.Adam(groups[2:], fused=True)
        self.set_rates()

    def learn_motions(self, clips: TrainingClips) -> str:
        """Fits the motion fields of the synthetic video to the clips, and says how well they explain how these move."""
        began, count = time.monotonic(), self.config.video.motions
        learned, share = fit_fields(clips.periods(count))
        for generator in (self.generator, self.generator_ema):
            generator.synthesizer.get_buffer("fields").copy_(learned[torch.arange(count) % len(learned)])
        return (f"learned the motions of {len(learned)} clips in {time.monotonic() - began:.0f} s: a first frame "
                f"warped by its clip's motion explains {share:.0%} of how it moves")  # fmt: skip

    def set_rates(self, noise: NoiseSampler | None = None, step: int = 1) -> None:
        """Gives Adam its decay rates, and the learning rates of iteration `step`."""
        training, fraction = self.config.training, noise.fraction(step) if noise else 0.0
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        for network, group in zip(self.parameters, groups, strict=True):
            group["lr"] = losses.value_at(getattr(training, f"lr_{network}"), fraction)
            group["betas"] = tuple(training.adam_betas_predictor if network == "predictor" else training.adam_betas)

    def by_network(self, optimizer: str, gradients: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
        """Gradients of the "critic", or of the "generator", whose first are the VAE's, by network."""
        count = len(self.parameters["vae"])
        both = {"vae": gradients[:count], "predictor": gradients[count:]}
        return both if optimizer == "generator" else {"critic": gradients}

    def apply_gradients(
        self, optimizer: str, gradients: Sequence[Tensor], metrics: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """One step of the "generator" or the "critic"; a network's gradient longer than `training.clip` is first scaled
        down to it. `gradients` are in the order of `parameters`; of the metrics `gradient_norm/<network>` is read.
        Where clipping is on, returns `clipped_fraction/<network>`, 0 or 1, on the device.
        """
        clipped, networks = {}, self.by_network(optimizer, gradients)
        for network, values in networks.items():
            # Before the predictor starts, it has no gradients.
            for parameter, gradient in zip(self.parameters[network], values, strict=bool(values)):
                parameter.grad = _laid_out_like(parameter, gradient)
            longest, norm = self.config.training.clip, metrics[f"gradient_norm/{network}"]
            if longest is not None:
                # A NaN norm turns every gradient into NaN; the log stops the run before the next checkpoint.
                clip_grads_with_norm_(self.parameters[network], longest, norm)
                clipped[f"clipped_fraction/{network}"] = (norm > longest).float()
        self.optimizers[optimizer].step()
        for network in networks:
            for parameter in self.parameters[network]:
                parameter.grad = None  # frees the predictor's large gradients during the critic steps
        return clipped

    @torch.no_grad()
    def rest_at_average(self) -> None:
        """Moves θ to its average, where it stands still without gradients: Adam's momentum ends. Again: no change."""
        decoder, moments, self.is_resting = self.generator.vae.decoder, self.optimizers["generator"].state, True
        decoder.load_state_dict(self.generator_ema.vae.decoder.state_dict())
        for parameter in decoder.parameters():
            if parameter in moments:
                moments[parameter]["exp_avg"].zero_()

    @torch.no_grad()
    def update_ema(self, step: int) -> None:
        """Moves the average towards the generator: average += (1 - decay) · (network - average).

        Early on the decay is smaller, (1 + step) / (10 + step), counted from a network's start: it forgets the first.
        """
        later = self.predictor_steps if self.config.weight_predictor.start else step
        average, network, steps = self.generator_ema, self.generator, {"vae": step, "predictor": later, "head": later}
        for done in {step, later}:
            parts = [part for part in steps if steps[part] == done]
            old, new = ([*chain(*(net.get_submodule(x).parameters() for x in parts))] for net in (average, network))
            torch._foreach_lerp_([*old], [*new], 1 - min(self.config.training.ema_decay, (1 + done) / (10 + done)))

    def networks(self) -> dict[str, nn.Module]:
        """The networks that train, and the average, by the names that they have in a checkpoint."""
        return {"generator": self.generator, "generator_ema": self.generator_ema, "critic": self.critic}

    def tensors(self) -> dict[str, Tensor]:
        """All that the networks hold, by name."""
        return {f"{part}.{name}": x for part, net in self.networks().items() for name, x in net.state_dict().items()}

    def to_dict(self) -> dict[str, Any]:
        """The state as plain dicts, numbers, strings and tensors; the tensors are the training ones, not copies. Where
        β₁ = 0 there is no `exp_avg`: Adam replaces it by the gradient before it reads it.
        """
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        for saved in optimizers.values():
            unused = [index for group in saved["param_groups"] if not group["betas"][0] for index in group["params"]]
            for index in saved["state"].keys() & unused:
                saved["state"][index] = {k: value for k, value in saved["state"][index].items() if k != "exp_avg"}
        networks = {name: network.state_dict() for name, network in self.networks().items()}
        return {"step": self.step, "predictor_steps": self.predictor_steps, **networks, "optimizers": optimizers}

    def restore(self, saved: dict[str, Any]) -> None:
        """Takes over what `to_dict` gave. Raises RuntimeError, KeyError, ValueError: `saved` is of other networks."""
        for name, network in self.networks().items():
            network.load_state_dict(saved[name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
            for parameter, moments in optimizer.state.items():
                moments.setdefault("exp_avg", torch.zeros_like(parameter))
                for moment in ("exp_avg", "exp_avg_sq"):
                    moments[moment] = _laid_out_like(parameter, moments[moment])
        self.step, self.predictor_steps = saved["step"], saved["predictor_steps"]


def _laid_out_like(parameter: Tensor, values: Tensor) -> Tensor:
    """`values` in the parameter's memory layout: fused Adam reads both in the order of memory, without a check."""
    if values.stride() == parameter.stride():
        return values
    return torch.empty_like(parameter).copy_(values)


# ----------------------------------------------------------------------------------------------------------- the steps


class Pass(NamedTuple):
    """What a pass gives."""

    metrics: dict[str, Tensor]  # scalars on the device; means over images, so that processes can average them
    gradients: Sequence[Tensor]  # in the order of `state.parameters`: of the critic, or of VAE and then predictor


class EagerSteps:
    """The two steps of an iteration, run eagerly.

    Args:
        state: whose weights the steps change.
        world: the processes that share a batch.
        log: takes lines for the user.
    """

    is_new = False  # whether the next steps record something first, which takes time

    def __init__(self, state: TrainingState, world: World = SINGLE_PROCESS, log: Callable[[str], None] = print) -> None:
        self.state, self.config, self.world, self.log = state, state.config, world, log

    def critic_step(self, x_real: Tensor, noise: CriticNoise) -> dict[str, Tensor]:
        """One critic step on real images (B, C, H, W) in [0, 1]; returns its metrics, scalars on the device."""
        return self._step("critic", x_real, noise)

    def generator_step(self, x_real: Tensor, noise: GeneratorNoise) -> dict[str, Tensor]:
        """One step of θ, the GRU and their average; returns its metrics, scalars on the device."""
        metrics = self._step("generator", x_real, noise)
        self.state.predictor_steps += noise.motion is not None
        self.state.update_ema(self.state.step + 1)
        return metrics

    def _step(self, name: str, x_real: Tensor, noise: CriticNoise | GeneratorNoise) -> dict[str, Tensor]:
        try:
            output = self.run_pass(f"{name}_pass", x_real, noise)
        except torch.OutOfMemoryError:
            output = None
        if output is None:  # asked here, where the error no longer holds on to what was computed
            self.release()
            raise UserError(out_of_memory(self.state, self.world))
        metrics, gradients = output
        if self.world.size > 1:
            gradients, metrics = self.world.average(name, gradients, metrics)
            metrics |= self._batch_metrics(name, gradients, metrics)
        return metrics | self.state.apply_gradients(name, gradients, metrics)

    def _pass(self, name: str, metrics: dict[str, Tensor], weights: list[Any], gradients: Sequence[Tensor]) -> Pass:
        """The gradients laid out as their weights: here a copy is part of a recorded pass."""
        gradients = [_laid_out_like(weight, gradient) for weight, gradient in zip(weights, gradients, strict=True)]
        metrics = {key: value.detach() for key, value in metrics.items()}
        if self.world.size == 1:
            metrics |= self._batch_metrics(name, gradients, metrics)
        return Pass(metrics, gradients)

    def _batch_metrics(self, name: str, gradients: Sequence[Tensor], metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Metrics that aren't means over images, so that several processes' are of what they have averaged."""
        found = {} if name == "critic" else {"update/relative_size": metrics["generator/update"].sqrt()}
        for network, values in self.state.by_network(name, gradients).items():
            norm = get_total_norm(values) if values else torch.zeros((), device=self.state.device)
            found[f"gradient_norm/{network}"] = norm  # 0 without a predictor
        return found

    def _products(self, tf32: bool) -> AbstractContextManager[None]:
        """For `runtime.precision=tf32`: products in TF32, or, in the gradient penalty, all bits of fp32."""
        return products_in_tf32(tf32) if self.config.runtime.precision == "tf32" else nullcontext()

    def release(self) -> None:
        """Frees the memory of what was recorded."""

    def run_pass(self, name: str, x_real: Tensor, noise: CriticNoise | GeneratorNoise) -> Pass:
        """Runs `critic_pass` or `generator_pass`, as this runner does."""
        return getattr(self, name)(x_real, noise)

    def critic_pass(self, x_real: Tensor, noise: CriticNoise) -> Pass:
        """The critic's loss, its gradients and metrics. Changes nothing."""
        state, config, weights = self.state, self.config, self.state.parameters["critic"]
        with self._products(tf32=True):
            exact = self._products(tf32=False)
            loss = critic_objective(state.generator, state.critic, x_real, noise, config, exact)
            is_tf32 = config.runtime.precision == "tf32"  # then the penalty's backward pass is run apart
            gradients = torch.autograd.grad(loss.rest if is_tf32 else loss.total, weights)
        if is_tf32:
            unused: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}  # biases have none
            gradients = torch._foreach_add(gradients, torch.autograd.grad(loss.weighted_penalty, weights, **unused))
        metrics = {"critic/total": loss.total, "critic/gap": -loss.wasserstein, "critic/penalty": loss.penalty,
                   "critic/drift": loss.drift, "score/real": loss.score_real.mean()}  # fmt: skip
        # Shards may hold different numbers of base images: divided by the mean number, they average to the batch mean.
        batch, base, processes = config.training.batch_size, noise.base_images, self.world.size
        if base:
            metrics["score/base"] = loss.score_fake[: noise.base_count].sum() * processes / base
        if batch > base:
            metrics["score/updated"] = loss.score_fake[noise.base_count :].sum() * processes / (batch - base)
        return self._pass("critic", metrics, weights, gradients)

    def generator_pass(self, x_real: Tensor, noise: GeneratorNoise) -> Pass:
        """The loss of θ and the GRU, its gradients and metrics. Changes nothing."""
        state, config = self.state, self.config
        weights = [*state.parameters["vae"], *(state.parameters["predictor"] if noise.motion is not None else [])]
        with self._products(tf32=True):
            loss, output = generator_objective(state.generator, state.critic, x_real, noise, config)
            # Only these: the critic's weights get no gradient here. Zero where the loss doesn't reach (a λ is 0).
            gradients = torch.autograd.grad(loss.total, weights, allow_unused=True, materialize_grads=True)
        metrics = {f"generator/{name}": value for name, value in loss._asdict().items()}
        bound = state.generator.head.bound  # without an output there is no update, and this is 0
        metrics["update/saturated_fraction"] = output.update.saturated_fraction(bound) if output else loss.update
        return self._pass("generator", metrics, weights, gradients)


def out_of_memory(state: TrainingState, world: World) -> str:
    """What to say when a step's batch doesn't fit: the largest half, quarter, ... that does, by trying its passes."""
    size = state.config.training.batch_size
    text = f"out of memory on {state.device}: training.batch_size is {size}"
    while size := size // 2 // world.size * world.size:
        config = replace(state.config, training=replace(state.config.training, batch_size=size))
        runner, noise = EagerSteps(state), NoiseSampler(config, state.device, world)
        noise.alone = math.inf  # a late step, and all networks learn: that takes most memory
        runner.config = config
        x_real = torch.zeros(size // world.size, *state.generator.vae.image_shape, device=state.device)
        try:
            runner.critic_pass(x_real, noise.critic(2**62, 0))
            shape = noise.clip_count // world.size, noise.window, *x_real.shape[1:]
            clips = torch.zeros(shape, device=state.device) if noise.clip_count else None
            runner.generator_pass(x_real, noise.generator(2**62, clips))
        except torch.OutOfMemoryError:
            continue
        return f"{text}, and {size} would fit (tried)"
    return f"{text}, and no batch fits; use smaller networks, image.size, or weight_predictor.head=low_rank"

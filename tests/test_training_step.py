"""A step's random numbers, both objectives, the state they change, and what one iteration does."""

import copy
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import FrameType

import pytest
import torch
from conftest import ROOT, SMALL, VARIED, networks_and_noise, new_state, random_images, run_iterations, training_images
from torch.nn.utils import get_total_norm

import losses
import training
from configuration import UserError, load_config
from distributed import World
from generator import Generator, stable_seed
from model_definitions import Discriminator
from step_runners import EagerSteps
from training_step import NoiseSampler, TrainingState, critic_objective, generator_objective

CPU = torch.device("cpu")


def assert_equal(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(weights) == list(expected)
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name


# ----------------------------------------------------------------------------------------------------- random numbers


def test_random_numbers_depend_on_seed_step_and_repeat_alone() -> None:
    _, _, _, noise = networks_and_noise()
    _, _, _, other_seed = networks_and_noise("training.seed=1")
    first, expected = noise.critic(7, 1), noise.generator(7)
    different = [first, expected, noise.critic(7, 0), noise.critic(8, 1), noise.generator(8)]
    different += [other_seed.critic(7, 1), other_seed.generator(7)]
    assert len({tuple(numbers.z.flatten().tolist()) for numbers in different}) == len(different)
    assert not torch.equal(expected.z, expected.posterior)
    for again, numbers in ((noise.critic(7, 1), first), (noise.generator(7), expected)):
        assert torch.equal(again.z, numbers.z)
        assert torch.equal(again.motion.phases, numbers.motion.phases)
    assert stable_seed(0, 1, "critic", 2) != stable_seed(0, 12, "critic")
    assert stable_seed(0, 1, "critic", 2) == 5730188251129072798  # on any machine


@pytest.mark.parametrize(("sharing", "kinds"), [("shared", 1), ("per_sample", 4)])
def test_a_shared_update_is_of_one_time_for_all_images(sharing: str, kinds: int) -> None:
    _, _, _, noise = networks_and_noise(f"weight_predictor.sharing={sharing}", "loss.adversarial_frame=random",
                                        "video.frames=1000", "loss.rollout_frames=1000")  # fmt: skip
    numbers = noise.generator(1)
    assert len(numbers.frame.unique()) == len(numbers.video_times.unique(dim=0)) == kinds
    assert not torch.equal(numbers.frame, noise.generator(2).frame)


def test_every_frame_of_the_video_and_after_it_can_be_sampled() -> None:
    _, _, _, noise = networks_and_noise("loss.adversarial_frame=random", "loss.rollout_frames=4", "video.frames=3",
                                        "training.batch_size=64")  # fmt: skip
    assert noise.generator(1).video_times.unique().tolist() == [0, 1, 2, 3, 4]
    assert noise.generator(1).frame.unique().tolist() == noise.critic(1, 0).frame.unique().tolist() == [0, 1, 2]


def test_motions_are_of_every_phase_and_in_training_of_every_strength() -> None:
    _, generator, _, noise = networks_and_noise("training.batch_size=256")
    for motion in (noise.generator(1).motion, noise.critic(1, 0).motion):
        for numbers in (motion.phases, motion.amplitudes):
            assert 0 <= numbers.min() < 0.01 < 0.99 < numbers.max() < 1
            assert numbers.mean().item() == pytest.approx(0.5, abs=0.03)
        assert motion.noise.std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(generator.sample_motion(3).amplitudes, torch.ones(3, len(generator.synthesizer.paths)))


def numbers_of(noise: tuple) -> dict[str, torch.Tensor]:
    """All random numbers of a step by name, the motion's among them and `augment`'s two halves apart."""
    numbers = noise._asdict()
    numbers |= numbers.pop("motion")._asdict()
    if "augment" in numbers:
        numbers["augment updated"], numbers["augment base"] = numbers.pop("augment").chunk(2)
    return {name: value for name, value in numbers.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_numbers_of_all_processes_are_the_whole_batchs(size: int) -> None:
    options = ["training.batch_size=8", "loss.base_fake_fraction=0.35", "loss.vae_fraction=0.5"]  # 3 and 4 of 8
    config = load_config(None, [*SMALL, *VARIED, *options, "data.clips=x", "video.source=both"])
    alone = NoiseSampler(config, CPU)
    shards = [NoiseSampler(config, CPU, World(rank, size)) for rank in range(size)]
    assert [noise.critic(5, 1).base_count for noise in shards] == [len(range(rank, 3, size)) for rank in range(size)]
    for kind, arguments in (("critic", (5, 1)), ("generator", (5,))):
        parts = [numbers_of(getattr(noise, kind)(*arguments)) for noise in shards]
        for name, expected in numbers_of(getattr(alone, kind)(*arguments)).items():
            only_updated = kind == "critic" and name in ("phases", "amplitudes", "choice", "noise", "frame")
            if name == "decoder_share":
                assert all(torch.equal(part[name], expected) for part in parts)
                continue
            rows = torch.full_like(expected, -1)
            for rank, part in enumerate(parts):  # in the batch's order; row 0 of the updated images is its row 3
                rows[(rank - (3 if only_updated else 0)) % size :: size] = part[name]
            assert torch.equal(rows, expected), (kind, name)
            assert len(expected.unique(dim=0)) > 1, (kind, name)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_the_same_images_roll_out_however_many_processes_share_them(size: int, count: int) -> None:
    config = load_config(None, [*SMALL, "training.batch_size=6", f"loss.rollout_fraction={max(0, count - 0.3) / 6}"])
    rows: list[int] = []
    for world in (World(rank, size) for rank in range(size)):
        own = NoiseSampler(config, CPU, world).generator(1).rollout_count
        rows += world.shard(torch.arange(6))[:own].tolist()
    assert sorted(rows) == list(range(count))


# ------------------------------------------------------------------------------------------------------ the objectives


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_the_critic_sees_that_fraction_of_base_images(fraction: float) -> None:
    config, generator, critic, noise = networks_and_noise(f"loss.base_fake_fraction={fraction}")
    numbers = noise.critic(1, 0)
    loss = critic_objective(generator, critic, random_images(1), numbers, config)
    assert (n_base := numbers.base_count) == 4 * fraction
    base = critic(generator.vae.decode(numbers.z))
    assert torch.allclose(loss.score_fake[:n_base], base[:n_base], atol=1e-5)
    assert ((loss.score_fake[n_base:] - base[n_base:]).abs() > 1e-5).all()


@pytest.mark.parametrize("kinds", [[], ["color", "translation", "cutout"]])
def test_both_objectives_by_hand_each_image_changed_by_numbers_of_its_own(kinds: list[str]) -> None:
    config, generator, critic, noise = networks_and_noise(f"training.diffaugment={kinds}", "loss.vae_fraction=0.25",
                                                          "loss.adversarial_frame=random")  # fmt: skip
    numbers, x_real = noise.critic(1, 0), random_images(1)
    loss, n_base = critic_objective(generator, critic, x_real, numbers, config), numbers.base_count
    updated = generator(numbers.z[n_base:], numbers.motion, numbers.frame).x_fake
    x_fake = torch.cat([generator.vae.decode(numbers.z[:n_base]), updated])
    scored = [(x_real, numbers.augment_real, loss.score_real), (x_fake, numbers.augment_fake, loss.score_fake)]
    numbers = noise.generator(1)
    loss, _ = generator_objective(generator, critic, x_real, numbers, config)
    output, (augment_fake, augment_base) = generator(*numbers[:3]), numbers.augment.chunk(2)
    scored += [(output.x_fake, augment_fake, -loss.adversarial), (output.x_base, augment_base, -loss.adversarial_base)]
    for x, augment, score in scored:
        by_hand = critic(losses.diffaugment(x, kinds, augment)).mean().item()
        assert by_hand == pytest.approx(score.mean().item(), rel=1e-4)
    assert len({round(score.mean().item(), 3) for _, _, score in scored}) == 4
    assert len(torch.cat([augment for _, augment, _ in scored]).unique(dim=0)) == 16
    x_vae = x_real[: len(numbers.posterior)]
    assert len(x_vae) == 1  # a quarter of the batch
    terms = losses.vae_loss(x_vae, *generator.vae(x_vae, numbers.posterior))
    assert [term.item() for term in terms] == pytest.approx([loss.reconstruction.item(), loss.kl.item()])


def test_the_critic_step_leaves_the_generator_alone_and_the_other_way_round() -> None:
    config, generator, critic, noise = networks_and_noise()
    weights = list(generator.parameters())
    loss = critic_objective(generator, critic, random_images(1), noise.critic(1, 0), config)
    assert set(torch.autograd.grad(loss.total, weights, allow_unused=True)) == {None}
    state = new_state(config)
    for step, numbers, network in (("critic_step", noise.critic(1, 0), "critic"),
                                   ("generator_step", noise.generator(1), "generator")):  # fmt: skip
        before = {name: value.clone() for name, value in state.tensors().items()}
        getattr(EagerSteps(state), step)(random_images(1), numbers)
        changed = {
            name.partition(".")[0] for name, value in state.tensors().items() if not torch.equal(value, before[name])
        }
        assert changed == {"critic": {"critic"}, "generator": {"generator", "generator_ema"}}[network]


# ------------------------------------------------------------------------------------------------ the penalty and tf32


def test_the_critics_own_input_gradient_equals_autograds() -> None:
    """In float64, also where every pixel of a window ties since areas have one colour, and where a feature is 0."""
    torch.manual_seed(0)
    critic = Discriminator(16, 3, (4, 8)).double()
    critic.stages.stage2.conv.weight.data[1] = 0
    x_real, x_fake, epsilon = (torch.rand(3, *shape).double() for shape in ((3, 16, 16), (3, 16, 16), ()))
    x_real[:, :, :9] = x_fake[:, :, :9] = 1
    own = losses.gradient_penalty(critic, x_real, x_fake, epsilon)
    general = losses.gradient_penalty(lambda x: critic(x), x_real, x_fake, epsilon)
    assert own.item() == pytest.approx(general.item(), rel=1e-12)
    weights = [parameter for name, parameter in critic.named_parameters() if name.endswith("weight")]
    for one, other in zip(torch.autograd.grad(own, weights), torch.autograd.grad(general, weights), strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)


def test_tf32_is_for_all_but_the_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which products are in TF32, forward and back, by the library's switches; and on a CPU nothing else changes."""
    exact, mixed = (
        EagerSteps(new_state(load_config(None, [*SMALL, f"runtime.precision={kind}"]))) for kind in ("fp32", "tf32")
    )
    noise, seen = NoiseSampler(exact.config, CPU), dict[str, set[tuple[bool, bool]]]()

    def note(name: str, value: torch.Tensor) -> torch.Tensor:
        switches = lambda: (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)  # noqa: E731
        seen.setdefault(name, set()).add(switches())
        value.register_hook(lambda _: seen.setdefault(f"{name}, back", set()).add(switches()))
        return value

    for name in ("input_gradient", "forward"):
        run = getattr(mixed.state.critic, name)
        monkeypatch.setattr(mixed.state.critic, name, lambda x, name=name, run=run: note(name, run(x)))
    torch.backends.cudnn.allow_tf32 = False
    for name, numbers in (("critic_pass", noise.critic(1, 0)), ("generator_pass", noise.generator(1))):
        expected, found = (
            torch.cat([part.flatten() for part in runner.run_pass(name, random_images(1), numbers).gradients])
            for runner in (exact, mixed)
        )
        assert (found - expected).norm() < 1e-6 * expected.norm()
    assert seen == {
        "forward": {(True, True)}, "forward, back": {(True, True)},
        "input_gradient": {(False, False)}, "input_gradient, back": {(False, False)},
    }  # fmt: skip
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("fits", "words"), [(3, "and 2 would fit"), (0, "and no batch fits; use smaller")])
def test_out_of_memory_names_the_batch_that_fits(fits: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, decode = EagerSteps(new_state(load_config(None, [*SMALL, "training.batch_size=8"]))), Generator.decode_base

    def decode_few(generator: Generator, features: torch.Tensor) -> torch.Tensor:
        if len(features) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(generator, features)

    monkeypatch.setattr(Generator, "decode_base", decode_few)
    with pytest.raises(UserError, match=f"out of memory on cpu: training.batch_size is 8, {words}"):
        steps.critic_step(random_images(1), NoiseSampler(steps.config, CPU).critic(1, 0))


# ----------------------------------------------------------------------------------------------------------- the state


@pytest.mark.parametrize(("done", "decay"), [(0, 2 / 11), (40, 42 / 51), (10**6, 0.9)])
def test_the_average_moves_towards_all_weights_as_the_step_leaves_them(done: int, decay: float) -> None:
    config, generator, critic, noise = networks_and_noise("training.ema_decay=0.9", "training.lr_vae=0.01",
                                                          "training.lr_predictor=0.01")  # fmt: skip
    state = TrainingState(generator, critic, config, CPU)
    state.step = state.predictor_steps = done
    torch._foreach_add_(list(state.generator_ema.parameters()), 0.01)
    before = {name: value.double() for name, value in state.generator_ema.named_parameters()}
    EagerSteps(state).generator_step(random_images(1), noise.generator(1))
    average = dict(state.generator_ema.named_parameters())
    for name, weight in state.generator.named_parameters():
        expected = decay * before[name] + (1 - decay) * weight.double()
        assert torch.allclose(average[name].double(), expected, rtol=0, atol=1e-6), name
        assert (expected - before[name]).abs().max() > 1e-4, name


def test_a_checkpoint_of_another_memory_layout_goes_on_the_same() -> None:
    """Fused Adam reads moments in the order of memory; those of an NCHW checkpoint must be laid out anew."""
    runner = EagerSteps(new_state(load_config(None, SMALL)))
    run_iterations(runner, 3)
    saved = copy.deepcopy(runner.state.to_dict())
    expected = run_iterations(runner, 2)
    for optimizer in saved["optimizers"].values():
        for moments in optimizer["state"].values():
            moments |= {name: moments[name].contiguous() for name in moments if name != "step"}
    runner.state.restore(saved)
    assert_equal(run_iterations(runner, 2), expected)


def test_gradients_of_another_memory_layout_are_applied_the_same() -> None:
    weights = []
    for layout in (torch.channels_last, torch.contiguous_format):
        state = new_state(load_config(None, SMALL))
        torch.manual_seed(1)
        gradients = [torch.randn(parameter.shape) for parameter in state.parameters["critic"]]
        gradients = [g.contiguous(memory_format=layout) if g.dim() == 4 else g for g in gradients]
        state.apply_gradients("critic", gradients, {"gradient_norm/critic": get_total_norm(gradients)})
        weights.append(state.tensors())
    assert_equal(*weights)


# ------------------------------------------------------------------------------------------------------- one iteration


def test_one_iteration_touches_at_most_8_files_and_changes_file_at_most_112_times(image_folder: Path) -> None:
    """So that a reader can follow it. With the default head and the video loss, and one critic step."""
    config = load_config(None, [*SMALL, "training.n_critic=1"])
    runner, noise = EagerSteps(new_state(config)), NoiseSampler(config, CPU)
    batches = training_images(image_folder).batches()
    training.iteration(runner, noise, batches, 1)  # what is only done once
    stack: list[str] = []
    files = ["training"]  # one after another, as functions are called and return

    def follow(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if path.parent != ROOT or event not in ("call", "return") or frame.f_code.co_name == "backward":
            return  # autograd calls what stands beside a forward pass
        stack.append(path.stem) if event == "call" else stack.pop()
        if stack and stack[-1] != files[-1]:
            files.append(stack[-1])

    sys.setprofile(follow)
    try:
        training.iteration(runner, noise, batches, 2)
    finally:
        sys.setprofile(None)
    assert {"training_step", "generator", "weight_updates", "losses", "image_data"} <= set(files)
    assert len(set(files)) <= 8, set(files)
    assert len(files) - 1 <= 112, Counter(pairwise(files)).most_common(9)


def test_the_time_of_each_of_three_stages_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, _, noise = networks_and_noise("weight_predictor.start=0.5", "weight_predictor.alone=0.9")
    runner, clock, tried = EagerSteps(new_state(noise.config)), [0.0], list[int]()

    def iteration(*arguments: object) -> dict[str, torch.Tensor]:
        step = arguments[3]
        clock[0] += (3 if step > 90 else 4 if step > 50 else 1) * (1 if step in tried else 2)  # the first warms up
        tried.append(step)
        return {"x": torch.zeros(())}

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(training, "iteration", iteration)
    assert training.estimate_time(runner, noise, iter([]), 20, 100) == 30 * 1 + 40 * 4 + 10 * 3
    assert tried == [50] * 9 + [90] * 2 + [100] * 3  # some 10 s each


def test_the_size_of_a_checkpoint_is_known_before_the_first(tmp_path: Path) -> None:
    state = new_state(load_config(None, [*SMALL, "vae.latent_dim=999"]))  # only the predictor has a β₁ above 0
    size = training.checkpoint_bytes(state)
    run_iterations(EagerSteps(state), 1)
    torch.save(state.to_dict(), tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size == pytest.approx(size, rel=0.03)

"""Runners against each other: the same parameters, however a step is run."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, VARIED, Done
from torch.utils._python_dispatch import TorchDispatchMode

import losses
import step_runners
from augmentation import DiffAugment
from configuration import UserError, load_config
from model_definitions import Discriminator
from random_draws import Draws
from step_runners import CompiledSteps, CudaGraphSteps, EagerSteps, build_steps, choose_step
from training_state import TrainingState

CPU = torch.device("cpu")
TINY = [
    *SMALL, "vae.channels=[4]", "discriminator.channels=[4]", "weight_predictor.layers=[decoder.stage1.*]",
    "weight_predictor.num_layers=1", "video.frames=2", "video.height=4", "video.width=4",
    *(f"video.{motion}=0" for motion in ("shift", "zoom", "rotation", "contrast", "noise")),
    "weight_predictor.head=low_rank", "weight_predictor.rank=2",
    "loss.lambda_video=0.1", "loss.own_frames=1", "loss.own_share=0.5",
]  # fmt: skip
"""Few operations, since each of them takes the compiler time."""


def pictures(step: int, device: torch.device = CPU) -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(step)).to(device)


def train(runner: EagerSteps, steps: int) -> None:
    """Takes the iterations after the state's own step, two critic steps each."""
    state = runner.state
    draws = Draws(state.config, state.device)
    for step in range(state.step + 1, state.step + steps + 1):
        x_real = pictures(step, state.device)
        for repeat in range(2):
            metrics = runner.critic_step(x_real, draws.critic(state.generator, step, repeat))
        metrics |= runner.generator_step(x_real, draws.generator(state.generator, step))
        assert all(value.isfinite() for value in metrics.values())
        state.step = step


def weights(state: TrainingState) -> dict[str, torch.Tensor]:
    parts = ("generator", "generator_ema", "discriminator")
    return {f"{part}.{name}": value for part in parts for name, value in state.to_dict()[part].items()}


def assert_close(ours: TrainingState, theirs: TrainingState) -> None:
    start = weights(TrainingState(ours.config, ours.device))
    for name, value in weights(ours).items():
        other = weights(theirs)[name].cpu()
        assert torch.allclose(value.cpu(), other, rtol=1e-3, atol=2e-5), name
    assert any(not torch.equal(value, start[name]) for name, value in weights(ours).items())


def assert_same_gradients(eager: EagerSteps, other: EagerSteps) -> None:
    """At the same weights: Adam hides a gradient's length, so the parameters alone would not show it."""
    other.state.restore(eager.state.to_dict())
    draws, state = Draws(eager.state.config, eager.state.device), eager.state
    for name, numbers in (
        ("critic_pass", draws.critic(state.generator, 99, 0)),
        ("generator_pass", draws.generator(state.generator, 99)),
    ):
        x_real = pictures(99, state.device)
        found, wanted = (
            torch.cat([part.flatten() for part in runner.run_pass(name, x_real, numbers).gradients])
            for runner in (other, eager)
        )
        assert (found - wanted).norm() < 1e-4 * wanted.norm(), name


# ------------------------------------------------------------------------------------------------------ same results

needs_compiler = pytest.mark.skipif(not step_runners.has_compiler(CPU), reason="torch.compile needs a C++ compiler")


@needs_compiler
def test_compiled_steps_give_the_same_parameters_and_resume_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_fully = torch.compile

    def compile_one(run, **options):  # the compiler takes half a minute for each: the other is only traced
        return compile_fully(run, backend="inductor" if run.__name__ == "critic_pass" else "aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile_one)
    config = load_config(None, TINY)
    eager = EagerSteps(TrainingState(config, CPU), DiffAugment([]))
    compiled = CompiledSteps(TrainingState(config, CPU), DiffAugment([]))
    train(eager, 20)
    train(compiled, 10)
    saved = copy.deepcopy(compiled.state.to_dict())
    train(compiled, 10)
    assert_close(eager.state, compiled.state)

    whole = copy.deepcopy(weights(compiled.state))
    train(compiled, 1)  # away from the saved state, so that restoring has something to do
    compiled.state.restore(saved)
    train(compiled, 10)
    for name, value in weights(compiled.state).items():
        assert torch.equal(value, whole[name]), name
    assert_same_gradients(eager, compiled)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("options", [[], ["runtime.precision=bf16"], ["loss.judged_frame=random"]])
def test_cuda_graphs_give_the_same_parameters(options: list[str]) -> None:
    config, device = load_config(None, [*SMALL, *options]), torch.device("cuda")
    eager, recorded = (
        kind(TrainingState(config, device), DiffAugment(["color"])) for kind in (EagerSteps, CudaGraphSteps)
    )
    train(eager, 20)
    train(recorded, 20)
    assert_close(eager.state, recorded.state)
    if not options:
        assert_same_gradients(eager, recorded)


def test_pictures_and_draws_reach_a_recorded_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs no GPU: fixed inputs that are filled before every replay, and metrics that outlive the next one."""
    config = load_config(None, [*SMALL, "loss.judged_frame=random"])
    eager, recorded = (kind(TrainingState(config, CPU), DiffAugment([])) for kind in (EagerSteps, CudaGraphSteps))

    class Graph:
        def __init__(self, run, static) -> None:
            self.run, self.static, self.output = run, static, run(*static)

        def replay(self) -> None:
            for old, new in zip(
                step_runners._tensors(tuple(self.output)[1:]),
                step_runners._tensors(tuple(self.run(*self.static))[1:]),
                strict=True,
            ):
                old.copy_(new)

    def record(self, run, x_real, draws):
        static = step_runners._clone((x_real, draws))
        graph = Graph(run, static)
        return graph, step_runners._tensors(static), graph.output

    monkeypatch.setattr(CudaGraphSteps, "_record", record)
    train(eager, 5)
    train(recorded, 5)
    assert_close(eager.state, recorded.state)
    assert_same_gradients(eager, recorded)


def test_a_checkpoint_of_another_memory_layout_goes_on_the_same() -> None:
    """Fused Adam reads moments in the order of memory; those of an NCHW checkpoint must be laid out anew."""
    config = load_config(None, SMALL)
    runner = EagerSteps(TrainingState(config, CPU), DiffAugment([]))
    train(runner, 3)
    saved = copy.deepcopy(runner.state.to_dict())
    train(runner, 2)
    whole = copy.deepcopy(weights(runner.state))
    for optimizer in saved["optimizers"].values():
        for moments in optimizer["state"].values():
            moments.update({name: moments[name].contiguous() for name in ("exp_avg", "exp_avg_sq")})
    runner.state.restore(saved)
    train(runner, 2)
    for name, value in weights(runner.state).items():
        assert torch.equal(value, whole[name]), name


def test_gradients_of_another_memory_layout_are_applied_the_same() -> None:
    states = []
    for layout in (torch.channels_last, torch.contiguous_format):
        state = TrainingState(load_config(None, SMALL), CPU)
        torch.manual_seed(1)
        gradients = [torch.randn(parameter.shape) for parameter in state.parameters["discriminator"]]
        gradients = [g.contiguous(memory_format=layout) if g.dim() == 4 else g for g in gradients]
        state.apply_gradients("discriminator", {"discriminator": gradients})
        states.append(weights(state))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


# --------------------------------------------------------------------------------------------------- the penalty, bf16


def test_the_critics_own_input_gradient_equals_autograds() -> None:
    """In float64, also where whole areas have one colour and every pixel of a window ties."""
    torch.manual_seed(0)
    critic = Discriminator(16, 3, (4, 8)).double()
    x_real, x_fake, epsilon = (torch.rand(3, *shape).double() for shape in ((3, 16, 16), (3, 16, 16), ()))
    x_real[:, :, :9] = x_fake[:, :, :9] = 1
    own = losses.gradient_penalty(critic, x_real, x_fake, epsilon)
    general = losses.gradient_penalty(lambda x: critic(x), x_real, x_fake, epsilon)
    assert own.item() == pytest.approx(general.item(), rel=1e-12)
    weights = [parameter for name, parameter in critic.named_parameters() if name.endswith("weight")]
    for ours, theirs in zip(torch.autograd.grad(own, weights), torch.autograd.grad(general, weights), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-14)


def test_bf16_leaves_the_penalty_in_fp32_and_changes_the_rest() -> None:
    torch.manual_seed(0)
    critic, x = Discriminator(16, 3, (4, 8)), torch.rand(3, 4, 3, 16, 16)
    epsilon = torch.rand(4)
    found = {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            critic(x[0])  # fills autocast's cache of bf16 weights, which the penalty must not use
            loss = losses.critic_loss(critic, x[1], x[2], epsilon)
        assert {part.dtype for part in loss} == {torch.float32}
        penalty = torch.autograd.grad(loss.penalty, critic.to_score.weight, retain_graph=True)[0]
        rest = torch.autograd.grad(loss.wasserstein, critic.to_score.weight)[0]
        found[enabled] = loss.penalty, penalty, rest
    assert torch.equal(found[False][0], found[True][0])
    assert torch.equal(found[False][1], found[True][1])
    error = (found[True][2] - found[False][2]).norm() / found[False][2].norm()
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["weight_predictor.sharing=shared"],
        ["loss.lambda_video=0.1"],
        ["loss.lambda_video=0.1", "weight_predictor.head=low_rank"],
    ],
)
def test_bf16_steps_learn_almost_the_same(options: list[str]) -> None:
    single, mixed = (
        EagerSteps(
            TrainingState(load_config(None, [*SMALL, *options, f"runtime.precision={kind}"]), CPU), DiffAugment([])
        )
        for kind in ("fp32", "bf16")
    )
    train(mixed, 1)
    mixed.state.restore(single.state.to_dict())  # the same weights again
    draws = Draws(single.state.config, CPU)
    for name, numbers in (
        ("critic_pass", draws.critic(single.state.generator, 2, 0)),
        ("generator_pass", draws.generator(single.state.generator, 2)),
    ):
        gradients = [
            torch.cat([part.flatten() for part in runner.run_pass(name, pictures(2), numbers).gradients])
            for runner in (single, mixed)
        ]
        assert gradients[1].dtype == torch.float32
        error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
        assert 1e-4 < error < 0.1, name
    assert all(value.dtype in (torch.float32, torch.int64) for value in weights(mixed.state).values())


# ------------------------------------------------------------------------------------------------------------ choosing


def choice(*overrides: str, steps: int = 1000, device: str = "cpu") -> tuple[str, str]:
    return choose_step(load_config(None, overrides), torch.device(device), steps)


def test_auto_takes_cuda_graphs_on_a_gpu() -> None:
    kind, why = choice(device="cuda")
    assert kind == "cuda_graph"
    assert "steps: cuda_graph" in why


def test_auto_compiles_on_a_cpu_only_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_runners, "has_compiler", lambda device: True)
    quick = load_config(ROOT / "config_quick.yaml")
    assert choose_step(quick, CPU, quick.training.steps)[0] == "eager"
    monkeypatch.setattr(step_runners, "SAVED_SECONDS_PER_MEGAPIXEL", 0.5)  # on another machine
    kind, why = choice(steps=30_000)
    assert kind == "compiled"
    assert tells_the_cost(why)
    kind, why = choice(steps=100)
    assert kind == "eager"
    assert tells_the_cost(why)
    monkeypatch.setattr(step_runners, "has_compiler", lambda device: False)
    kind, why = choice(steps=30_000)
    assert kind == "eager"
    assert "no C++ compiler" in why


def tells_the_cost(why: str) -> bool:
    return "would save about" in why and "s of 128 x 128 pixels" in why


def test_a_request_that_cannot_be_met_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cuda_graph, but the device is a CPU"):
        choice("runtime.step=cuda_graph")
    monkeypatch.setattr(step_runners, "has_compiler", lambda device: False)
    with pytest.raises(UserError, match=r"compiled, which needs a C\+\+ compiler"):
        choice("runtime.step=compiled")


@pytest.mark.parametrize("required", [True, False])
def test_a_compiler_that_fails_is_told(required: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_, **__):
        def fail(*_):
            raise RuntimeError("g++: internal compiler error\nand a long story")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    runner = CompiledSteps(TrainingState(load_config(None, SMALL), CPU), DiffAugment([]), required=required)
    said: list[str] = []
    runner.say = said.append
    if required:
        with pytest.raises(UserError, match="internal compiler error"):
            train(runner, 1)
        return
    train(runner, 2)
    assert [line.startswith("WARNING: torch.compile of the") for line in said] == [True, True]
    eager = EagerSteps(TrainingState(load_config(None, SMALL), CPU), DiffAugment([]))
    train(eager, 2)
    assert_close(eager.state, runner.state)


@pytest.mark.parametrize("required", [True, False])
def test_a_recording_that_fails_is_told(required: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand a long story")

    monkeypatch.setattr(CudaGraphSteps, "_record", fail)
    config = load_config(None, SMALL)
    runner = CudaGraphSteps(TrainingState(config, CPU), DiffAugment([]), required=required)
    said: list[str] = []
    runner.say = said.append
    if required:
        with pytest.raises(UserError, match=r"not permitted when stream is capturing.*runtime\.step=eager"):
            train(runner, 1)
        return
    train(runner, 2)
    assert [line.startswith("WARNING: recording a CUDA graph of the") for line in said] == [True, True]
    eager = EagerSteps(TrainingState(config, CPU), DiffAugment([]))
    train(eager, 2)
    assert_close(eager.state, runner.state)


class HostReads(TorchDispatchMode):
    """Notes the operations for which a GPU would stop the host, or which a CUDA graph cannot hold."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        by_mask = name.startswith(("index", "_index")) and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool
            for part in args if isinstance(part, list | tuple) for one in part
        )  # fmt: skip
        if name.startswith(self.WAITING) or by_mask:
            self.met.append(name)
        return function(*args, **(kwargs or {}))


def test_no_pass_waits_for_the_device() -> None:
    """None of both passes, which a CUDA graph has to hold."""
    for more in (["weight_predictor.head=low_rank"], ["weight_predictor.head=per_channel", "video.height=8"],
                 ["weight_predictor.sharing=shared", "training.diffaugment=[]"]):  # fmt: skip
        config = load_config(None, [*SMALL, *VARIED, *more])
        runner = EagerSteps(TrainingState(config, CPU), DiffAugment(config.training.diffaugment))
        draws, state, x_real = Draws(config, CPU), runner.state, pictures(1)
        critic, generator = draws.critic(state.generator, 1, 0), draws.generator(state.generator, 1)
        with HostReads() as reads:
            runner.run_pass("critic_pass", x_real, critic)
            runner.run_pass("generator_pass", x_real, generator)
        assert reads.met == []
    with HostReads() as reads:  # what would be met
        x_real[x_real > 0.5].sum().item()
        torch.tensor(1.0)
    assert set(reads.met) >= {"index", "_local_scalar_dense", "lift_fresh"}


def test_bf16_on_a_device_without_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, [*SMALL, "runtime.precision=bf16"])
    state = TrainingState(config, CPU)
    monkeypatch.setattr(step_runners, "has_bf16", lambda device: False)
    assert "WARNING" in build_steps(config, state, DiffAugment([]), 10)[1]
    monkeypatch.setattr(step_runners, "has_bf16", lambda device: True)
    assert "WARNING" not in build_steps(config, state, DiffAugment([]), 10)[1]


def test_cuda_graph_on_a_cpu_is_one_line(
    run_training: Callable[..., Done], tmp_path: Path, picture_folder: Path
) -> None:
    done = run_training(*SMALL, f"data.root={picture_folder}", "runtime.step=cuda_graph")
    assert done.returncode == 2
    assert done.stderr.startswith("error: runtime.step is cuda_graph")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_profile_leaves_a_trace(run_training: Callable[..., Done], tmp_path: Path, picture_folder: Path) -> None:
    done = run_training(
        "--profile", *SMALL, f"data.root={picture_folder}", "training.steps=6", "output.log_every=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trace = tmp_path / "runs" / "default" / "trace.json"
    assert f"trace: runs/default/{trace.name}" in done.stdout
    assert '"traceEvents"' in trace.read_text()
    assert "aten::convolution_backward" in done.stdout
    assert "steps: eager" in done.stdout

"""Recorded steps against eager ones: the same parameters, however a step is run; and the choice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import SMALL, Done, new_state, random_images, run_iterations
from torch.utils._pytree import tree_leaves

from configuration import UserError, load_config
from step_runners import CudaGraphSteps, EagerSteps, build_steps, choose_step
from training_step import NoiseSampler

CPU = torch.device("cpu")


def assert_same_steps(eager: EagerSteps, other: EagerSteps, steps: int) -> None:
    """The same parameters after some steps, and the same gradients at the same weights: Adam hides their length."""
    start = {name: value.clone() for name, value in eager.state.tensors().items()}
    expected = run_iterations(eager, steps)
    assert any(not torch.equal(value, start[name]) for name, value in expected.items())
    for name, value in run_iterations(other, steps).items():
        assert torch.allclose(value, expected[name], rtol=1e-3, atol=2e-5), name
    other.state.restore(eager.state.to_dict())
    noise, x_real = NoiseSampler(eager.config, eager.state.device), random_images(99, eager.state.device)
    for name, numbers in (("critic_pass", noise.critic(99, 0)), ("generator_pass", noise.generator(99))):
        gradient, reference = (
            torch.cat([part.flatten() for part in runner.run_pass(name, x_real, numbers).gradients])
            for runner in (other, eager)
        )
        assert (gradient - reference).norm() < 1e-4 * reference.norm(), name


# ------------------------------------------------------------------------------------------------------- same results


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("options", [[], ["loss.adversarial_frame=random"]])
def test_cuda_graphs_give_the_same_parameters(options: list[str]) -> None:
    config, device = load_config(None, [*SMALL, "training.diffaugment=[color]", *options]), torch.device("cuda")
    assert_same_steps(EagerSteps(new_state(config, device)), CudaGraphSteps(new_state(config, device)), 20)


def test_images_and_random_numbers_reach_a_recorded_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs no GPU: fixed inputs that are filled before every replay, and metrics that outlive the next one."""
    calls: list[tuple[Callable, Any]] = []  # of a pass: the same call again, and its output
    stacks: list[tuple[list[torch.Tensor], torch.Tensor]] = []  # what a recording stacks, and where
    stack = torch.stack

    class Graph:
        """Replays by calling the pass with its inputs again, into the tensors that the recorded call returned."""

        pool = replay = Mock()

        def record(self) -> None:
            (again, output), (stacked, kept) = calls[-1], stacks[-1]

            def replay() -> None:
                for old, new in zip(tree_leaves(output), tree_leaves(again()), strict=True):
                    old.copy_(new)
                stack(stacked, out=kept)

            self.replay = replay

    def noted_stack(tensors: list[torch.Tensor], **options: torch.Tensor) -> torch.Tensor:
        if "out" in options:
            stacks.append((tensors, options["out"]))
        return stack(tensors, **options)

    @contextmanager
    def record(graph: Graph, **_: Any) -> Iterator[None]:
        yield
        graph.record()

    def noted(run: Callable) -> Callable:
        def call(*inputs: Any) -> Any:
            calls.append((partial(run, *inputs), run(*inputs)))
            return calls[-1][1]

        return call

    fakes = {"CUDAGraph": Graph, "graph": record, "stream": nullcontext, "Stream": Mock, "current_stream": Mock}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "stack", noted_stack)
    config = load_config(None, [*SMALL, "loss.adversarial_frame=random"])
    recorded = CudaGraphSteps(new_state(config))
    for name in ("critic_pass", "generator_pass"):
        monkeypatch.setattr(recorded, name, noted(getattr(recorded, name)))
    assert_same_steps(EagerSteps(new_state(config)), recorded, 5)
    noise = NoiseSampler(config, CPU)
    metrics = recorded.run_pass("critic_pass", random_images(1), noise.critic(1, 0)).metrics
    expected = EagerSteps(recorded.state).critic_pass(random_images(1), noise.critic(1, 0)).metrics
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-5
    )
    before = {name: value.clone() for name, value in metrics.items()}
    recorded.run_pass("generator_pass", random_images(2), noise.generator(2))
    assert all(torch.equal(value, before[name]) for name, value in metrics.items())
    assert len(calls) == 2 * 4  # of each pass three warm-up calls and the recorded one: all else were replays


def test_a_recording_that_fails_is_an_error_or_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    config, what = load_config(None, SMALL), "recording a CUDA graph"
    fails = Mock(side_effect=RuntimeError("\ninternal error\nand a long story"))
    monkeypatch.setattr(CudaGraphSteps, "record", fails)
    with pytest.raises(UserError, match=rf"^{what} failed \(internal error\); use runtime.step=eager$"):
        run_iterations(CudaGraphSteps(new_state(config)), 1)
    lines: list[str] = []
    weights = run_iterations(CudaGraphSteps(new_state(config), log=lines.append, required=False), 2)
    assert lines == [
        f"WARNING: {what} of the {step} pass failed; it now runs eagerly: internal error"
        for step in ("critic", "generator")
    ]
    for name, value in run_iterations(EagerSteps(new_state(config)), 2).items():
        assert torch.equal(value, weights[name]), name


def test_a_recording_that_fails_tells_its_first_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving the context raises a second error, as CUDA's does."""

    def record(*_: Any) -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise torch.AcceleratorError("operation failed due to a previous error during capture")

    monkeypatch.setattr(CudaGraphSteps, "record", record)
    with pytest.raises(UserError, match=r"graph failed \(operation not permitted when stream is capturing\); use"):
        run_iterations(CudaGraphSteps(new_state(load_config(None, SMALL))), 1)


# ------------------------------------------------------------------------------------------------------------ choosing


def choice(device: str, *overrides: str) -> tuple[str, str]:
    return choose_step(load_config(None, overrides), torch.device(device))


def test_auto_takes_cuda_graphs_on_a_gpu_and_eager_steps_on_a_cpu() -> None:
    for device, kind in (("cuda", "cuda_graph"), ("cpu", "eager")):
        chosen, line = choice(device)
        assert chosen == kind
        assert line.startswith(f"steps: {kind}, since ")


def test_a_request_that_cannot_be_met_is_an_error() -> None:
    with pytest.raises(UserError, match="cuda_graph, but the device is a CPU"):
        choice("cpu", "runtime.step=cuda_graph")


def test_the_runner_is_the_one_that_was_chosen_and_required_where_the_user_asked_for_it() -> None:
    for step in ("auto", "cuda_graph"):
        state = new_state(load_config(None, [*SMALL, f"runtime.step={step}"]))
        eager, recorded = (build_steps(kind, state) for kind in ("eager", "cuda_graph"))
        assert (type(eager), type(recorded)) == (EagerSteps, CudaGraphSteps)
        assert recorded.required == (step == "cuda_graph")
        assert eager.state is recorded.state is state
    assert choice("cuda", "runtime.step=eager") == ("eager", "steps: eager, as runtime.step says")


@pytest.mark.usefixtures("without_slow_outputs")
def test_profile_leaves_a_trace(run_training: Callable[..., Done], tmp_path: Path, image_folder: Path) -> None:
    done = run_training(  # on a CPU: a recorded graph hides its operations
        "--profile", *SMALL, "runtime.device=cpu", f"data.root={image_folder}", "training.steps=6",
        "output.log_every=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trace = tmp_path / "runs" / "default" / "trace.json"
    assert f"trace: runs/default/{trace.name}" in done.stdout
    assert '"traceEvents"' in trace.read_text()
    assert "aten::convolution_backward" in done.stdout
    assert "steps: eager" in done.stdout

"""An iteration on a GPU that isn't there: what it would not do or would wait for, and how many kernels it launches."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import image_data
import training_step
from configuration import load_config
from studies import fake_cuda
from studies.fake_cuda import AUGMENTED, FULL, OFF, PER_CHANNEL, QUICK, SHARED, TF32, look_at, main, part_launches

SMALL = f"{QUICK} training.n_critic=2"


@pytest.mark.parametrize("settings", [
    TF32, FULL, PER_CHANNEL, SHARED, OFF, AUGMENTED,
    "video.detach=false loss.adversarial_frame=random data.mirror=true",
    "training.clip=1", f"{fake_cuda.CLIPS} video.input=frames", f"{fake_cuda.CLIPS} video.source=both",
])  # fmt: skip
def test_an_iteration_stays_on_the_gpu_and_never_waits(settings: str) -> None:
    watch = look_at(load_config(None, f"{SMALL} {settings}".split()))
    assert watch.mistakes == []
    assert {part for part, *_ in watch.launches} == {
        "critic noise", "critic pass", "critic step", "data", "generator noise", "generator pass", "generator step",
        "log",
    }  # fmt: skip


@pytest.mark.parametrize(("stage", "inside", "outside"), [
    ("", 554, 23), (fake_cuda.JOINT, 1_750, 24), (fake_cuda.ALONE, 1_114, 18)
])  # fmt: skip
def test_a_default_iteration_launches_no_more_kernels_than_it_did(stage: str, inside: int, outside: int) -> None:
    watch = look_at(load_config(None, stage.split()))
    assert watch.mistakes == []
    parts = part_launches(watch, n_critic=1)
    assert parts["in the passes"] <= inside
    assert parts["outside"] <= outside


@pytest.mark.parametrize(("plant", "words"), [
    (lambda x: x.sum().item(), "DataDependentOutputException"),
    (lambda x: x + torch.empty(x.shape), "Device"),
    (lambda x: torch.ones(x.shape), "ones on the CPU"),
    (lambda x: x[x > 0.5], "DynamicOutputShapeException"),
    (lambda x: torch.tensor([1.0], device=x.device), "torch.tensor(...)"),
    (lambda x: torch.empty(3).to(x.device), "_to_copy from cpu to cuda"),
    (lambda x: x.cpu(), "_to_copy from cuda to cpu"),
])  # fmt: skip
def test_what_a_gpu_would_not_do_is_found_with_its_line(plant: Callable, words: str, monkeypatch, capsys) -> None:
    def planted(*arguments: Any) -> Any:
        plant(next(x for x in arguments if isinstance(x, torch.Tensor)))
        raise RuntimeError("the rest is not needed")

    monkeypatch.setattr(training_step, "critic_objective", planted)
    assert main(SMALL.split()) == 1
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("    MISTAKE in critic pass: ")
    assert words in line
    assert " at training_step.py:" in line


def test_random_numbers_and_torch_stay_as_they_were() -> None:
    def state() -> list[Any]:
        places = (torch, torch.cuda, torch.autograd, torch.Tensor, torch.nn.Module, torch.nn.GRU, torch.nn.RNNBase,
                  torch.nn.utils.clip_grad, image_data.TrainingImages)  # fmt: skip
        return [torch.get_rng_state().tolist(), random.getstate(), [*vars(FakeTensorMode)],
                torch._C._dispatch_has_kernel_for_dispatch_key("aten::_cudnn_rnn_backward", "Meta"),
                *({name: id(x) for name, x in vars(place).items() if callable(x)} for place in places)]  # fmt: skip

    FakeTensorMode()  # imports some of torch
    before = state()
    look_at(load_config(None, SMALL.split()))
    assert state() == before

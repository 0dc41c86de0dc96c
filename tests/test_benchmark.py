"""The textbook computes what we compute, and the benchmark reports what it promises."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL

from configuration import UserError, load_config
from studies import benchmark
from studies.benchmark_worker import Variant
from training import iteration

CPU = torch.device("cpu")


def relative_error(vector: torch.Tensor, reference: torch.Tensor) -> float:
    return float((vector - reference).norm() / reference.norm())


OPTIONS = [[], ["weight_predictor.head=low_rank", "loss.adversarial_frame=random", "loss.base_fake_fraction=0.5"]]


@pytest.mark.parametrize("options", OPTIONS)
def test_in_float64_ours_and_the_textbook_compute_the_same_gradients(options: list[str]) -> None:
    config = load_config(None, [*SMALL, *options])
    reference = Variant(config, CPU, "reference").gradients(1)
    double, single = (Variant(config, CPU, "eager", dtype) for dtype in (torch.float64, torch.float32))
    for part, vector in double.gradients(1).items():
        assert vector.dtype == torch.float64
        assert (vector != 0).float().mean() > 0.5
        assert relative_error(vector, reference[part]) < 1e-13
        assert relative_error(single.gradients(1)[part], reference[part]) < 1e-5


def test_the_textbook_learns_the_same_weights() -> None:
    config = load_config(None, SMALL)
    x_real = [torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(number)) for number in range(10)]
    textbook, ours = (Variant(config, CPU, runner) for runner in ("textbook", "eager"))
    for variant in (textbook, ours):
        before = variant.generator.predictor.to_update.weight.clone()
        batches = iter(x_real)
        for step in range(1, 6):
            metrics = iteration(variant.steps, variant.noise, batches, step)
        assert "generator/reconstruction" in metrics
        assert not torch.allclose(before, variant.generator.predictor.to_update.weight, atol=1e-4)
    for weight, reference in zip(ours.generator.parameters(), textbook.generator.parameters(), strict=True):
        assert torch.allclose(weight, reference, rtol=1e-3, atol=2e-5)


def test_the_floor_is_the_time_at_the_best_rate() -> None:
    known = {"case": "a", "precision": "fp32"}
    eager = known | {"runner": "eager", "seconds_per_iteration": 2.0, "flops": 8e9, "rate": 8e9}
    graph = known | {"runner": "cuda_graph", "seconds_per_iteration": 1.5}
    assert benchmark.complete([eager, graph]) == {"fp32": 8e9}
    assert [line["fraction_of_floor"] for line in (eager, graph)] == [0.5, pytest.approx(2 / 3)]


def test_a_process_that_was_killed_was_out_of_memory() -> None:
    settings = {"runner": "eager", "overrides": SMALL, "device": "cpu", "gradients": 1, "folder": ""}
    worker = benchmark.Worker(settings)
    worker.process.kill()
    with pytest.raises(UserError, match="out of memory"):
        worker.ask("iteration")
    worker.close()


def test_quick_writes_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "GRADIENTS", 1)
    assert benchmark.main(["--quick", "--rounds=1", "--device=cpu", "--json=new/q.json", "--out=out"]) == 0
    results = json.loads((tmp_path / "new" / "q.json").read_text())["results"]
    assert [line["runner"] for line in results][:2] == ["textbook", "eager"]
    for line in results:
        assert (line["device"], line["image_size"], line["batch_size"]) == ("cpu", 32, 8)
        for key in ("seconds_per_iteration", "speedup", "critic_seconds", "generator_seconds", "fraction_of_floor"):
            assert 0 < line[key] < float("inf"), key
        assert 0.1 < line["peak_memory_gb"] < 4
        assert 0 < line["gradient_error"] < 1e-4
    assert results[0]["speedup"] == 1
    assert "| quick | eager | fp32 |" in capsys.readouterr().out
    assert "| quick | eager | fp32 |" in (tmp_path / "out" / "benchmark.md").read_text()

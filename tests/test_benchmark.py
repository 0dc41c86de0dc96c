"""The textbook computes what we compute, and the benchmark reports what it promises."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import SMALL, run_command

import benchmark
from benchmark_worker import MatrixWork, Variant
from configuration import load_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("options", [[], ["weight_predictor.head=low_rank", "loss.judged_frame=random"]])
def test_textbook_and_ours_compute_the_same_gradients(options: list[str]) -> None:
    config = load_config(None, [*SMALL, *options])
    exact, textbook, ours = (Variant(config, CPU, kind).gradients(1) for kind in ("reference", "textbook", "eager"))
    assert exact["critic"].dtype == torch.float64
    for part, wanted in exact.items():
        assert (wanted != 0).float().mean() > 0.5
        for found in (textbook[part], ours[part]):
            assert (found.double() - wanted).norm() < 1e-5 * wanted.norm(), part


def test_the_textbook_learns_the_same_weights() -> None:
    config = load_config(None, SMALL)
    textbook, ours = Variant(config, CPU, "textbook"), Variant(config, CPU, "eager")
    for step in range(1, 6):
        x_real = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        for variant in (textbook, ours):
            critic, generator = variant.pass_draws(step)
            variant.steps.critic_step(x_real, critic)
            variant.steps.generator_step(x_real, generator)
    for found, wanted in zip(ours.generator.parameters(), textbook.generator.parameters(), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-3, atol=2e-5)


def test_matrix_work_counts_by_hand() -> None:
    with MatrixWork() as work:
        torch.relu(torch.rand(8, 16) @ torch.rand(16, 4))
        torch.nn.functional.conv2d(torch.rand(2, 3, 8, 8), torch.rand(5, 3, 3, 3), padding=1)
    flops = 2 * 8 * 16 * 4 + 2 * (2 * 8 * 8) * 5 * (3 * 9)
    values = (8 * 16 + 16 * 4 + 8 * 4) + (2 * 3 * 64 + 5 * 27 + 2 * 5 * 64)
    assert work.by_precision == {"fp32": {"flops": flops, "bytes": 4 * values}}


def test_break_even_and_floor() -> None:
    def line(runner: str, seconds: float, first: float) -> dict:
        return {
            "case": "a", "runner": runner, "precision": "fp32", "seconds_per_iteration": seconds,
            "first_seconds": first, "work": {"fp32": {"flops": 4e9, "bytes": 1e9}},
        }  # fmt: skip

    lines = [line("eager", 2.0, 3.0), line("compiled", 1.5, 63.0)]
    benchmark.complete(lines, {"fp32": 8e9, "bf16": 1.0, "copy": 1e9})
    assert [one["share_of_floor"] for one in lines] == [0.5, pytest.approx(2 / 3)]  # 1 s to copy, 0.5 s to compute
    assert lines[1]["break_even_steps"] == 120
    lines[1]["seconds_per_iteration"] = 2.5
    benchmark.complete(lines, {"fp32": 8e9, "bf16": 1.0, "copy": 1e9})
    assert lines[1]["break_even_steps"] is None


def test_quick_writes_table_plot_and_json(tmp_path: Path) -> None:
    done = run_command("benchmark.py", "--quick", "--rounds=2", "--json=new/q.json", "--out=out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "new" / "q.json").read_text())["results"]
    assert [line["runner"] for line in results][:2] == ["textbook", "eager"]
    for line in results:
        assert (line["device"], line["precision"]) in {
            ("cpu", "fp32"),
            ("cpu", "bf16"),
            ("cuda", "fp32"),
            ("cuda", "bf16"),
        }
        assert (line["image_size"], line["batch_size"]) == (32, 8)
        for key in ("seconds_per_iteration", "speedup", "gradient_error", "peak_memory_bytes", "share_of_floor"):
            assert math.isfinite(line[key]), key
            assert line[key] > 0, key
        assert line["precision"] == "bf16" or line["gradient_error"] < 1e-4
        assert line["peak_memory_bytes"] < 4e9
    assert results[0]["speedup"] == 1
    assert "| quick | eager | fp32 |" in done.stdout
    assert "| quick | eager | fp32 |" in (tmp_path / "out" / "benchmark.md").read_text()
    assert (tmp_path / "out" / "benchmark.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds=0"], ["--rounds", "1 or more"]),
        (["--device=cuda:99"], ["cuda:99"]),
        (["--quick", "image.size=33"], ["image.size"]),
        (["--quick", "data.root=nowhere"], ["nowhere"]),
        (["loss.lambda_video=1"], ["loss.lambda_video"]),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words)


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    assert "python benchmark.py --quick --json" in capsys.readouterr().out

"""The textbook computes what we compute, and the benchmark reports what it promises."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import SMALL

import benchmark
from benchmark_checks import Choices, relative_error, same_choices, tensor_peak
from benchmark_plan import Case, fitted
from benchmark_worker import MatrixWork, Variant
from configuration import load_config
from losses import gradient_penalty
from model_definitions import Discriminator
from textbook import TextbookCritic

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


def test_in_float64_ours_and_the_textbook_agree() -> None:
    config = load_config(None, SMALL)
    wanted = Variant(config, CPU, "reference").gradients(1)
    ours = Variant(config, CPU, "eager", torch.float64).gradients(1)
    assert relative_error(ours["critic"], wanted["critic"]) < 1e-13
    assert relative_error(ours["generator"], wanted["generator"]) < 1e-13


def penalty_gradient(ours: bool, x: torch.Tensor) -> torch.Tensor:
    """Of all weights of a critic in the precision of `x`, as ours computes it or by double backward."""
    torch.manual_seed(0)
    critic = Discriminator(16, 3, (4, 8)).to(x.dtype)
    judge = critic if ours else TextbookCritic(critic)
    epsilon = torch.ones(len(x), dtype=x.dtype)
    if ours:
        loss = gradient_penalty(judge, x, x, epsilon) + judge(x).sum()
    else:
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(judge(x).sum(), x, create_graph=True)
        loss = (gradient.flatten(1).norm(dim=1) - 1).square().mean() + judge(x).sum()
    weights = [parameter for name, parameter in critic.named_parameters() if name.endswith("weight")]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])


@pytest.mark.parametrize("ours", [True, False])
def test_ties_that_rounding_makes_are_told_from_errors(ours: bool) -> None:
    """A picture of one colour in fp32, and of 768 colours in float64: every maximum is a tie in one of them only."""
    x = 0.3 - 1e-12 * torch.randperm(768, generator=torch.Generator().manual_seed(0)).double().view(1, 3, 16, 16)
    with Choices() as recorded:
        found = penalty_gradient(ours, x.float())
    plain = penalty_gradient(ours, x)
    with Choices(recorded.taken) as replayed:
        same = penalty_gradient(ours, x)
    assert relative_error(found, plain) > 1e-3
    assert relative_error(found, same) < 2e-6
    assert 10 < replayed.flipped < replayed.of / 2
    assert 0 < replayed.widest_gap < 1e-6


def test_slopes_that_rounding_changes_are_told_from_errors() -> None:
    """1e-9 above 1 in float64, and 1 in fp32, with a slope behind it."""
    x = torch.full((4,), 1 + 1e-9, dtype=torch.float64)

    def slopes(x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        value = (torch.relu(x - 1) + torch.nn.functional.leaky_relu(x - 1, 0.2)) * x
        return torch.autograd.grad(value.sum(), x)[0] + (x.detach() - 1 > 0)

    with Choices() as recorded:
        found = slopes(x.float())
    assert found.tolist() == pytest.approx([0.2] * 4)
    assert slopes(x).tolist() == pytest.approx([3] * 4)
    with Choices(recorded.taken) as replayed:
        assert slopes(x).tolist() == pytest.approx([0.2] * 4)
    assert (replayed.flipped, replayed.of) == (16, 20)  # ReLU's backward looks at its result, which was replayed


def test_choices_of_another_pass_are_refused() -> None:
    with Choices() as recorded:
        torch.relu(torch.rand(3))
    with pytest.raises(ValueError, match="other operations"), Choices(recorded.taken):
        torch.relu(torch.rand(4))


@pytest.mark.parametrize("runner", ["textbook", "eager"])
@pytest.mark.parametrize("head", ["full", "low_rank"])
def test_with_the_same_choices_gradients_are_exact_to_rounding(runner: str, head: str) -> None:
    (line,) = same_choices(load_config(None, [*SMALL, f"weight_predictor.head={head}"]), CPU, runner, [1])
    assert 1e-9 < line["critic"] < 2e-6
    assert 1e-9 < line["generator"] < 2e-6
    assert line["of"] > 10_000


def test_peak_of_tensors_counts_by_hand() -> None:
    class Stub:
        def batches(self):
            self.kept = torch.empty(1000)
            return iter(())

        def iteration(self, batches, step, synchronize):
            first = torch.empty(2000)
            second = torch.empty(3000)
            del first
            third = torch.empty(500)  # with the second still less than the first two together
            del second, third

    assert tensor_peak(Stub)[2] == 4 * (1000 + 2000 + 3000)


def test_what_does_not_fit_is_left_out() -> None:
    case = Case("batch 64", ["training.batch_size=64"], [("textbook", "fp32"), ("eager", "fp32")])
    known = {"precision": "fp32", "image_size": 128}
    seen = [
        known | {"runner": "textbook", "batch_size": 16, "seconds_per_iteration": 6.0, "peak_memory_bytes": 2e9},
        known | {"runner": "eager", "batch_size": 16, "seconds_per_iteration": 4.0, "peak_memory_bytes": 2e9},
        known | {"runner": "eager", "batch_size": 8, "seconds_per_iteration": 2.5, "peak_memory_bytes": 1.5e9},
    ]

    def fit(seconds: float, room: float) -> tuple[Case, int] | str:
        return fitted(case, 5, [], seen, seconds, room)

    # Four times the pixels: 40 s a round of both, 16 of ours; 8 GB + (2 + 6 · 0.5) GB.
    assert fit(1000, 14e9) == (case, 5)
    assert fit(150, 14e9) == (case, 1)
    ours = case._replace(variants=[("eager", "fp32")])
    assert fit(111, 14e9) == (ours, 5)
    assert fit(50, 14e9) == (ours, 1)
    assert fit(1000, 12e9) == (ours, 5)
    assert fit(30, 14e9) == "it would take about 46 s, and its share of --minutes is 30 s"
    assert fit(1000, 4e9) == "it would take about 5 GB, and 4 GB are free"
    assert fitted(case, 5, [], [], 0, 0) == (case, 5)  # the first one, of which nothing is known


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


def test_quick_writes_table_plot_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "GRADIENTS", 1)
    assert benchmark.main(["--quick", "--rounds=2", "--json=new/q.json", "--out=out"]) == 0
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
        if line["precision"] == "fp32":
            assert line["gradient_error"] < 1e-4
            assert 0 < line["gradient_error_same_choices"] < 1e-5
            assert 1e6 < line["peak_tensor_bytes"] < line["peak_memory_bytes"]
            assert sum(line["time_shares"].values()) == pytest.approx(1)
            assert line["time_shares"]["convolutions backward"] > 0.01
        assert line["peak_memory_bytes"] < 4e9
    assert results[0]["speedup"] == 1
    assert "| quick | eager | fp32 |" in capsys.readouterr().out
    assert "| quick | eager | fp32 |" in (tmp_path / "out" / "benchmark.md").read_text()
    assert (tmp_path / "out" / "benchmark.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds=0"], ["--rounds", "1 to"]),
        (["--minutes=0"], ["--minutes", "above 0"]),
        (["--device=cuda:99"], ["cuda:99"]),
        (["--quick", "image.size=33"], ["image.size"]),
        (["--quick", "data.root=nowhere"], ["nowhere"]),
        (["training.diffaugment=[color]"], ["training.diffaugment"]),
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

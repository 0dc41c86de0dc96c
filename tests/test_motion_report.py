"""How well videos move: known figures for videos that are perfect, still, fading or another's; and the command."""

from pathlib import Path

import pytest
from conftest import T, frames_of

from sampling import Sampler
from studies import motion_report


def test_the_report_of_a_run(sample_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    arguments = [str(sample_run), "--json", str(file), "--videos", "3", "--rollout-frames", "101", "--device", "cpu"]
    assert motion_report.main(arguments) == 0
    out, _ = capsys.readouterr()
    for part in ("| all, as trained |", "| shift alone |", "| contrast alone × 2 |", "| sharpness |", "of 3 |"):
        assert part in out
    assert file.read_text().startswith("{")
    assert motion_report.main([str(sample_run), "--rollout-frames", "5"]) == 2
    assert "--rollout-frames must be 0 or at least 101" in capsys.readouterr().err


def test_the_report_knows_a_perfect_and_a_still_video(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    def perfect(self, inputs, frames, **_):
        return self.synthetic(inputs, frames, noise=False)

    def still(self, inputs, frames, **_):
        return (self.decode(inputs).x_base for _ in range(frames))

    def half_as_far(self, inputs, frames, **_):
        x_base = self.decode(inputs).x_base
        return ((x_base + x) / 2 for x in self.synthetic(inputs, frames, noise=False))

    for video, gain, motion, agreement in ((perfect, 50, 1, 1), (still, 0, 0, 0), (half_as_far, 6.02, 0.5, 1)):
        monkeypatch.setattr(Sampler, "weight_driven", video)
        figures = motion_report.follow(sampler, 5, T)
        assert figures["gain_db"] > 50 if gain == 50 else figures["gain_db"] == pytest.approx(gain, abs=0.01)
        assert figures["motion"] == pytest.approx(motion, abs=1e-5)
        assert figures["agreement"] == pytest.approx(agreement, abs=1e-4)
    # the definition, by hand: mean squared error over a video's values, dB, mean over videos
    inputs = sampler.inputs(range(motion_report.FIRST_SEED, motion_report.FIRST_SEED + 5))
    target = frames_of(sampler.synthetic(inputs, T, noise=False))
    error = (target - sampler.decode(inputs).x_base[:, None]).square().mean(dim=(1, 2, 3, 4))
    assert figures["still_db"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)


def test_the_report_knows_a_rollout_that_forgets_or_fades(sampler: Sampler, monkeypatch) -> None:
    def fading(self, inputs, frames, **_):
        x_base = self.decode(inputs).x_base
        return (x_base * (1 if t < 100 else 0.5) for t in range(frames))

    def another(self, inputs, frames, **_):
        return (self.decode(inputs).x_base.roll(1, dims=0) for _ in range(frames))

    monkeypatch.setattr(Sampler, "weight_driven", fading)
    figures = motion_report.rollout(sampler, 4, 200)
    for name in ("brightness", "contrast", "sharpness"):
        assert figures["drift"][name] == pytest.approx(-0.5, abs=1e-4)
    monkeypatch.setattr(Sampler, "weight_driven", another)
    figures = motion_report.rollout(sampler, 4, 120)
    assert figures["identity"] == 0
    assert figures["drift"]["brightness"] == pytest.approx(0, abs=1e-6)

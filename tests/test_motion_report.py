"""How well videos move: known figures for videos that are perfect, still, fading or another's; and the command."""

from pathlib import Path

import pytest
from conftest import T, frames_of

import motion_report
from sampling import Sampler


def test_the_report_of_a_run(drawing_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    arguments = [str(drawing_run), "--json", str(file), "--videos", "3", "--roll-frames", "101", "--device", "cpu"]
    assert motion_report.main(arguments) == 0
    out, _ = capsys.readouterr()
    for wanted in ("| all, as trained |", "| shift alone |", "| contrast alone × 2 |", "| sharpness |", "of 3 |"):
        assert wanted in out
    assert file.read_text().startswith("{")
    assert motion_report.main([str(drawing_run), "--roll-frames", "5"]) == 2
    assert "--roll-frames must be 0 or at least 101" in capsys.readouterr().err


def test_the_report_knows_a_perfect_and_a_still_video(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    def perfect(self, subjects, frames, **_):
        return self.synthetic(subjects, frames, grain=False)

    def still(self, subjects, frames, **_):
        return (self.draw(subjects).x_base for _ in range(frames))

    def half_as_far(self, subjects, frames, **_):
        x_base = self.draw(subjects).x_base
        return ((x_base + x) / 2 for x in self.synthetic(subjects, frames, grain=False))

    for video, gain, motion, agreement in ((perfect, 50, 1, 1), (still, 0, 0, 0), (half_as_far, 6.02, 0.5, 1)):
        monkeypatch.setattr(Sampler, "weight_driven", video)
        figures = motion_report.follow(sampler, 5, T)
        assert figures["gain_db"] > 50 if gain == 50 else figures["gain_db"] == pytest.approx(gain, abs=0.01)
        assert figures["motion"] == pytest.approx(motion, abs=1e-5)
        assert figures["agreement"] == pytest.approx(agreement, abs=1e-4)
    # the definition, by hand: mean squared error over a video's values, dB, mean over videos
    subjects = sampler.subjects(range(motion_report.FIRST_SEED, motion_report.FIRST_SEED + 5))
    target = frames_of(sampler.synthetic(subjects, T, grain=False))
    error = (target - sampler.draw(subjects).x_base[:, None]).square().mean(dim=(1, 2, 3, 4))
    assert figures["still_db"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)


def test_the_report_knows_a_rolled_video_that_forgets_or_fades(sampler: Sampler, monkeypatch) -> None:
    def fading(self, subjects, frames, **_):
        x_base = self.draw(subjects).x_base
        return (x_base * (1 if t < 100 else 0.5) for t in range(frames))

    def another(self, subjects, frames, **_):
        return (self.draw(subjects).x_base.roll(1, dims=0) for _ in range(frames))

    monkeypatch.setattr(Sampler, "weight_driven", fading)
    figures = motion_report.roll_on(sampler, 4, 200)
    for look in ("brightness", "contrast", "sharpness"):
        assert figures["drift"][look] == pytest.approx(-0.5, abs=1e-4)
    monkeypatch.setattr(Sampler, "weight_driven", another)
    figures = motion_report.roll_on(sampler, 4, 120)
    assert figures["identity"] == 0
    assert figures["drift"]["brightness"] == pytest.approx(0, abs=1e-6)

"""The measures of motion from clips: known figures, and the command from beginning to end."""

from pathlib import Path

import pytest
import torch
from conftest import Colours, fast_outputs, moving_square, small, train, write_clip

import quality
from studies import clip_motion


def test_motion_drawn_of_frames_that_are_right_half_as_far_still_and_opposite() -> None:
    clips = torch.rand(2, 5, 3, 8, 8)
    still = torch.rand(2, 3, 8, 8)  # another image: what is drawn counts by how it moves
    moved = clips[:, 1:] - clips[:, :1]
    for factor, expected in ((1, 1.0), (0.5, 0.75), (0, 0.0), (-1, -3.0)):
        share = clip_motion.drawn_share(still[:, None] + factor * moved, still, clips)
        assert torch.allclose(share, torch.full((2,), expected), atol=1e-5)


def test_step_size_is_the_root_mean_square_of_neighbouring_differences() -> None:
    levels = torch.tensor([0.0, 0.3, 0.1, 0.1])
    frames = levels[None, :, None, None, None].expand(2, 4, 3, 4, 4)
    expected = ((0.3**2 + 0.2**2) / 3) ** 0.5
    assert torch.allclose(clip_motion.step_size(frames), torch.full((2,), expected))


def test_the_ends_of_a_video() -> None:
    first, last = clip_motion.ends(torch.full((1, 1, 1, 1), float(t)) for t in range(50))
    assert first.flatten().tolist() == list(range(24))
    assert last.flatten().tolist() == list(range(26, 50))


@pytest.mark.parametrize("source", ["clips", "synthetic"])
def test_the_report_of_a_run(tmp_path: Path, image_folder: Path, monkeypatch, capsys, source: str) -> None:
    (tmp_path / "clips").mkdir()
    for number in range(29):
        write_clip(tmp_path / "clips" / f"{number}.webp", moving_square(4 + number))
    clips = [f"data.clips={tmp_path / 'clips'}", "video.source=clips", "video.motions=2", "data.holdout=0.2"]
    with fast_outputs():
        assert train(*small(tmp_path, image_folder, "training.steps=2", *(clips if source == "clips" else []))) == 0
    monkeypatch.setattr(quality, "load_features", Colours)
    monkeypatch.setattr(clip_motion, "ROLLED", 60)
    run = [str(tmp_path / "run"), "--videos", "24", "--device", "cpu"]
    if source == "synthetic":
        assert clip_motion.main(run) == 2
        assert "has not learned from clips" in capsys.readouterr().err
        run += ["--clips", str(tmp_path / "clips"), "--reference", str(tmp_path / "clips")]
    assert clip_motion.main(run) == 0
    out, _ = capsys.readouterr()
    assert ("6 clips kept apart, 23" if source == "clips" else "29 clips kept apart, 29") + " compared with" in out
    for row in (
        "motion drawn, watching",
        "the same, drawn by predicted weights",
        "KID x 1000 of frames",
        "motion distance (Fréchet)",
    ):
        assert f"| {row} |" in out

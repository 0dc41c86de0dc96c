"""Labelled pictures: every sample in its place, words that fit, and a file that is written whole or not at all."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from test_video_files import leftovers, patches

import pictures
from configuration import UserError
from pictures import labelled_frames, labelled_grid, save_picture, to_pixels
from video_files import read_video, write_video


def test_a_grid_has_a_column_for_each_label_and_a_row_for_each_sample() -> None:
    columns = {"real": torch.rand(3, 3, 32, 32), "grey pictures of one channel": torch.rand(3, 1, 32, 32)}
    pixels = np.asarray(labelled_grid(columns, title="title"))
    background = pixels[0, 0]
    _, corners = pictures._blank_sheet(list(columns), 3, 128, 128, "title")
    outside = np.ones(pixels.shape[:2], dtype=bool)
    for column, source in zip(corners, columns.values(), strict=True):
        for (y, x), sample in zip(column, source, strict=True):
            assert (pixels[y : y + 128, x : x + 128] == to_pixels(sample).repeat(4, 0).repeat(4, 1)).all()
            outside[y : y + 128, x : x + 128] = False
    top, left = corners[0][0]
    words = outside & (pixels != background).any(-1)
    assert not words[top:].any(), "words stand above the pictures"
    for column in corners:
        x = column[0][1]
        assert pixels[top - 28 : top, x : x + 128].min() < 90, "each column has dark words right above it"
    assert pixels.shape[0] - corners[0][-1][0] - 128 == left, "the margins are equal"
    assert pixels.shape[1] - corners[1][0][1] - 128 == left


def test_long_labels_and_titles_fit() -> None:
    cell = torch.zeros(1, 3, 16, 16)
    for title in (None, "short", "a title of many words that is wider than the two columns below", "x" * 80):
        pixels = np.asarray(labelled_grid({"supercalifragilisticexpialidocious": cell, "b c": cell}, title=title))
        ys, xs = np.nonzero((pixels != pixels[0, 0]).any(-1))
        assert min(ys.min(), xs.min()) >= 15
        assert pixels.shape[1] - xs.max() > 15, "words are cut off at the right"
    font = ImageFont.load_default(16)
    lines = pictures._wrapped("a label of several words", font, 80)
    assert " ".join(lines) == "a label of several words"
    assert all(font.getlength(line) <= 80 for line in lines)
    assert 1 < len(lines) < 5
    assert pictures._wrapped("", font, 80) == [""]


@pytest.mark.parametrize(("size", "cell"), [(16, 128), (32, 128), (100, 200), (128, 128), (256, 256)])
def test_cells_are_large_enough_to_look_at(size: int, cell: int) -> None:
    image = labelled_grid({"a": torch.zeros(1, 3, size, size)})
    black = (np.asarray(image)[-30 - cell // 2] == 0).all(-1)
    assert black.sum() == cell


def test_columns_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a: .*b: "):
        labelled_grid({"a": torch.rand(2, 3, 16, 16), "b": torch.rand(3, 3, 16, 16)})
    with pytest.raises(ValueError, match="none"):
        labelled_grid({})


def test_labelled_frames_are_grids_in_time(tmp_path: Path) -> None:
    columns = {"synthetic": torch.rand(2, 5, 3, 16, 16), "weight-driven": torch.rand(2, 5, 3, 16, 16)}
    frames = list(labelled_frames(columns, scale=8, title="step 100"))
    assert len(frames) == 5
    for t, frame in enumerate(frames):
        grid = labelled_grid({label: video[:, t] for label, video in columns.items()}, scale=8, title="step 100")
        assert (frame == np.asarray(grid)).all()
    write_video(tmp_path / "clip.png", labelled_frames(columns, scale=8, title="step 100"), fps=8)
    assert (read_video(tmp_path / "clip.png") == np.stack(frames)).all()


def test_a_picture_is_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "one.png"
    save_picture(path, patches())
    save_picture(tmp_path / "tensor.png", torch.zeros(1, 4, 4))
    assert (np.asarray(Image.open(path)) == patches()).all()
    umask = os.umask(0o022)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask, "readable as any other file"
    with pytest.raises(UserError, match=r"as \.png, not as '\.jpg'"):
        save_picture(tmp_path / "one.jpg", patches())

    def full(self: Image.Image, file: Path, format: str) -> None:
        file.write_bytes(b"half a pic")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*one\.png: No space left on device"):
        save_picture(path, patches())
    assert (np.asarray(Image.open(path)) == patches()).all()
    assert leftovers(path.parent) == ["one.png"]

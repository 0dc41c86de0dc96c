"""Checkpoint files: what was written is what is read, or it is not read at all."""

import gc
import os
import pickle
import re
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import CHECKPOINT_FORMAT, Checkpoints, load_checkpoint
from configuration import UserError


def content(step: int, best: dict | None = None) -> dict:
    random = torch.Generator().manual_seed(step)
    weights = {"a": torch.randn(7, 5, generator=random), "b": torch.tensor(3), "c": torch.zeros(0)}
    return {"step": step, "generator": weights, "config": {"x": [1, 2.5, "three", None, True]}, "best": best}


@pytest.fixture
def folder(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path, keep=2)


def names(folder: Checkpoints) -> list[str]:
    return sorted(path.name for path in folder.folder.iterdir())


# ----------------------------------------------------------------------------------------------------- saving, keeping


def test_the_last_few_and_the_best_are_kept_and_latest_is_the_newest(folder: Checkpoints) -> None:
    for step in (5, 10, 15, 1_000_000):
        folder.save(content(step, {"metric": "m", "value": 0.5, "step": 5}))
    (folder.folder / ".step_2000000.pt.0badcafe.part").write_bytes(b"left by a killed save")
    assert names(folder)[1:] == ["best.pt", "latest.pt", "step_000015.pt", "step_1000000.pt"]
    assert load_checkpoint(folder.folder / "best.pt")["step"] == 5
    assert load_checkpoint(folder.folder / "latest.pt")["step"] == folder.newest()[0]["step"] == 1_000_000


def test_latest_is_a_copy_where_there_are_no_hard_links(folder: Checkpoints, monkeypatch) -> None:
    def link(*_: object) -> None:
        raise OSError(1, "no hard links here")

    monkeypatch.setattr(os, "link", link)
    for step in (1, 2):
        folder.save(content(step))
    assert load_checkpoint(folder.folder / "latest.pt")["step"] == 2


@pytest.mark.parametrize("largest", [0, 1000, 300_000])
def test_a_disk_that_fills_up_leaves_what_was_there(folder: Checkpoints, largest: int) -> None:
    folder.save(content(1))
    before = {path.name: path.read_bytes() for path in folder.folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))  # bytes; more is refused as a full disk does it
        with pytest.raises(UserError, match=r"cannot write .*step_000002.pt: File too large"):
            folder.save(content(2) | {"large": [torch.rand(50_000) for _ in range(3)]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()  # must not crash: what is left of the save that failed
    assert {path.name: path.read_bytes() for path in folder.folder.iterdir()} == before


# ------------------------------------------------------------------------------------------------------------- damage


def test_with_no_whole_file_left_there_is_an_error_and_no_new_start(folder: Checkpoints) -> None:
    assert folder.newest() == (None, None, [])
    folder.save(content(1)).write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        folder.newest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Checkpoints(tmp_path_factory.mktemp("whole"), keep=1).save(content(7))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7) | st.none())
def test_a_flipped_bit_or_a_missing_end_is_noticed_or_harmless(
    whole: Path, tmp_path: Path, place: float, bit: int | None
) -> None:
    path, data = tmp_path / "damaged.pt", bytearray(whole.read_bytes())
    index = int(place * len(data))
    if bit is None:
        del data[index:]
    else:
        data[index] ^= 1 << bit
    path.write_bytes(data)
    try:
        assert same(load_checkpoint(path), content(7))
    except UserError as error:
        assert re.fullmatch(r".*damaged\.pt: .+", str(error))  # noqa: PT017


class Exploit:
    """What a pickle of it would do when it is loaded without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["torch", "pickle", "zip"])
def test_a_pickle_that_runs_code_does_not_run(tmp_path: Path, kind: str) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "evil.pt"
    if kind == "torch":
        torch.save({"format": CHECKPOINT_FORMAT, "step": Exploit(mark)}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Exploit(mark)))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Exploit(mark)))
            archive.writestr("archive/version", "3\n")
    with pytest.raises(UserError, match=r"evil\.pt"):
        load_checkpoint(path)
    assert not mark.exists()
    if kind == "torch":  # the trap works: without the care taken it would have run
        torch.load(path, weights_only=False)
        assert mark.exists()


@pytest.mark.parametrize(("stored", "words"), [
    ({"format": 6}, r"by a newer version of this project \(format 6, here 5\); update this one$"),
    ({"format": 3}, r"by an older version of this project \(format 3, here 5\); read it with that one$"),
    ({"weights": torch.zeros(2)}, "no checkpoint of this project"),
    ([1, 2], "no checkpoint of this project"),
    ({"format": CHECKPOINT_FORMAT, "step": 3}, "SHA-256"),
])  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, stored: object, words: str) -> None:
    torch.save(stored, tmp_path / "other.pt")
    with pytest.raises(UserError, match=words):
        load_checkpoint(tmp_path / "other.pt")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for name, words in (("nowhere.pt", "no such checkpoint"), ("", r"cannot be read|damaged")):
        with pytest.raises(UserError, match=words):
            load_checkpoint(tmp_path / name)

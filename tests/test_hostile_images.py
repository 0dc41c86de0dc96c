"""Image files as bad as `hostile_images.py` writes them: a picture, or one line; never another exception or a hang."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import SMALL, run_command
from PIL import Image

import training
from configuration import UserError
from image_files import background_colour, find_images, shown_path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The corpus, and what its own command told while it read every file, in a process of its own."""
    if os.name == "nt":
        pytest.skip("pipes, sockets and such names need a POSIX system")
    folder = tmp_path_factory.mktemp("hostile") / "corpus"
    return folder, run_command("tests/hostile_images.py", str(folder), folder=folder.parent, timeout=90)


def broken_lines(told: str) -> list[str]:
    return [line for line in told.splitlines() if "  broken: " in line]


def test_every_hostile_file_is_a_picture_or_broken(corpus) -> None:
    _, done = corpus
    assert done.returncode == 0, (
        "\n".join(line for line in done.stdout.splitlines() if "SURPRISE" in line) + done.stderr
    )
    assert done.stderr == ""  # no warning, no log
    *_, last = done.stdout.splitlines()
    entries, megabytes = int(re.match(r"\d+", last)[0]), int(re.search(r"(\d+) MB more memory", last)[1])
    assert entries > 250
    assert len(broken_lines(done.stdout)) > 150
    assert megabytes < 600


def test_a_run_leaves_out_the_hostile_files_and_lists_each_in_a_line(corpus, tmp_path: Path) -> None:
    folder, done = corpus
    arguments = [*SMALL, f"data.root={folder}", "data.on_broken=skip", f"output.root={tmp_path}", "training.steps=1"]
    run = run_command("training.py", *arguments, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    skipped = (tmp_path / "default" / "skipped.txt").read_text(encoding="utf-8").splitlines()
    assert len(skipped) == len(broken_lines(done.stdout))
    assert all(re.fullmatch(r"(['\"]).*\1\t[^\t]+", line) and line.replace("\t", "").isprintable() for line in skipped)


@pytest.mark.filterwarnings("ignore")  # pytest takes the module's own filter away
def test_the_command_names_a_broken_file_in_one_line(corpus, tmp_path: Path, capsys) -> None:
    folder, _ = corpus
    files = [Path(path) for path in find_images(folder)]
    bad = [path for path in files if path.parent.name != "truncated" and path.name != "16_bits.png"]
    named = 0
    for number, path in enumerate(bad):
        root = tmp_path / str(number)
        root.mkdir()
        (root / path.name).symlink_to(path)
        status = training.main([*SMALL, f"data.root={root}", f"output.root={tmp_path / 'runs'}", "--dry-run"])
        told = capsys.readouterr().err
        if status:
            assert status == 2
            assert told.startswith("error: broken image ")
            assert told.endswith("replace or remove it, or set data.on_broken=skip\n")
            assert told[:-1].isprintable()
            assert shown_path(root / path.name) in told
            named += 1
    assert named > 40
    assert not (tmp_path / "runs").exists()


def test_class_folders_with_odd_names_are_shown(tmp_path: Path, capsys) -> None:
    for name in (os.fsdecode(b"\xff"), "two\nlines", "plain"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / name / "a.png")
    assert training.main([*SMALL, f"data.root={tmp_path}", "--dry-run"]) == 0
    told = capsys.readouterr().out
    for shown in (r"'\udcff'", r"'two\nlines'", "plain"):
        assert re.search(rf"^  {re.escape(shown)} +1$", told, re.MULTILINE)


@pytest.mark.parametrize("root", ["x" * 300, "a/" * 3000, "nul\0", "\udcff", "line\nbreak"])
def test_an_impossible_folder_of_images_is_named(root: str, capsys) -> None:
    assert training.main([*SMALL, f"data.root={root}", "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: data.root: ")
    assert told[:-1].isprintable()


@pytest.mark.parametrize("colour", ["rgb(999,0,0)", f"rgb({10**20},0,0)", "rgb(200%,0%,0%)", "hsl(0,500%,500%)"])
def test_colours_out_of_range_are_refused(colour: str) -> None:
    with pytest.raises(UserError, match=r"data\.background") as error:
        background_colour(colour)
    assert colour in str(error.value)

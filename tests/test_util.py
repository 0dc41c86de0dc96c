"""How a command ends; files that are written whole or not at all, and errors of one line."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch

from configuration import UserError
from step_runners import describe_device
from util import (
    CommandParser,
    absolute,
    atomic_write,
    choose_device,
    expanded,
    os_errors_as_user_errors,
    prepare_device,
    run_command,
)  # fmt: skip

ENDS = [  # (what the work of a command returns or raises, exit status, standard output, the line of an error)
    ("wrote x.png", 0, "wrote x.png\n", ""),
    (7, 7, "", ""),
    (UserError("--out x:\nno"), 2, "", "--out x:\\nno"),
    (KeyboardInterrupt(), 130, "", ""),
    *((error, 2, "", f"out of memory ({type(error).__name__}: {' '.join(str(error).split())}); make fewer")
      for error in (MemoryError("8 GB"), torch.OutOfMemoryError("CUDA out of\nmemory"), ImportError("failed to map "
                    "segment"), RuntimeError("DefaultCPUAllocator: no"), RuntimeError("could not create a primitive"))),
    (OSError(errno.EMFILE, "Too many open files", "x"), 2, "", "the system allows no more open files (OSError: [Errno "
     "24] Too many open files: 'x'); use data.workers=0, or raise it: ulimit -n 4096"),
    (RuntimeError("unable to allocate shared memory(shm)"), 2, "", "shared memory is full (RuntimeError: unable to "
     "allocate shared memory(shm)); use data.workers=0, or give more of it (docker run --shm-size=2g)"),
    (ModuleNotFoundError("no", name="av"), 2, "", "the package av is missing; pip install -r requirements.txt"),
    (PermissionError(errno.EACCES, "Permission denied", "a\nb"), 2, "", "'a\\nb': Permission denied"),
]  # fmt: skip


@pytest.mark.parametrize(("end", "status", "output", "error"), ENDS)
def test_a_command_ends_with_its_status_and_one_line(end, status: int, output: str, error: str, capsys) -> None:
    def work() -> str | int:
        if isinstance(end, BaseException):
            raise end
        return end

    assert run_command(work, memory_hint="make fewer") == status
    assert capsys.readouterr() == (output, f"error: {error}\n" if error else "")
    reported = []
    run_command(work, lambda *report: reported.append(report) or 5, "make fewer")
    assert reported == ([(error, 2)] if error else [])


def test_a_path_is_expanded_as_a_shell_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$there").mkdir()
    for path, text in (("~/x/", "/home/me/x/"), ("a/~", "a/~"), ("~x", "~x"), ("a$b", "a$b"), ("$there", "$there")):
        assert expanded(path, "--out") == text
    parser = CommandParser()
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument_group("more").add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args(["~/a", "--json", "~/b", "c"])
    assert (options.runs, options.json) == (["/home/me/a", "c"], Path("/home/me/b"))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where there is no home
    for path in ("~/x", "a/$missing/x", "${a.b:c}"):
        with pytest.raises(UserError, match=r"^data.root: .* stands for nothing here"):
            absolute(path, "data.root")


def test_other_errors_are_bugs_and_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_sigterm_unwinds_a_command_and_its_handler_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def work() -> int:
        with atomic_write(tmp_path / "file") as part:
            part.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
        return 0

    with pytest.raises(SystemExit) as end:
        run_command(work)
    assert end.value.code == 143
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_the_old_one_when_all_of_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / ("n" * 250)
    for content in ("old", "new"):
        with atomic_write(path) as part:
            part.write_text(content)
            assert part.parent == path.parent, "written beside its place: a move from elsewhere would be a copy"
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == content
        assert names(path.parent) == [path.name]
    umask = os.umask(0o022)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask, "readable as any other file"
    with path.open() as reader, atomic_write(path) as part:
        part.write_text("newest")
        assert reader.read() == "new"


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("exception", [OSError, KeyboardInterrupt])
def test_an_exception_leaves_what_was_there(tmp_path: Path, folder: bool, exception: type[BaseException]) -> None:
    if not folder:
        (tmp_path / "name").write_text("old")
    with pytest.raises(exception), atomic_write(tmp_path / "name", folder=folder) as part:  # noqa: PT012
        (part / "inside" if folder else part).write_text("half")
        raise exception
    assert names(tmp_path) == ([] if folder else ["name"])
    assert folder or (tmp_path / "name").read_text() == "old"


def test_a_link_keeps_pointing_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    with atomic_write(tmp_path / "link") as part:
        part.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"


def test_a_folder_is_only_written_where_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic_write(tmp_path / "empty", folder=True) as part:
        (part / "inside").touch()
    assert names(tmp_path / "empty") == ["inside"]
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for path, folder, message in (
        ("empty", True, "already holds files"),
        ("file", True, "is a file, not a folder"),
        ("empty", False, "is a folder: name a file"),
        ("pipe", False, "is not a plain file"),
        ("file/new", False, r"cannot write .*new: .*file is a file, not a folder"),
        ("n" * 300, False, os.strerror(errno.ENAMETOOLONG)),
    ):
        with pytest.raises(UserError, match=message), atomic_write(tmp_path / path, folder=folder):
            pytest.fail("the block began")
    assert names(tmp_path) == ["empty", "file", "pipe"]
    assert names(tmp_path / "empty") == ["inside"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), ValueError("No space left")])
def test_errors_of_writing_name_the_file_and_other_errors_pass(error: Exception) -> None:
    with pytest.raises(UserError, match=r"^cannot write a: No space left$"), os_errors_as_user_errors("a", ValueError):
        raise error
    with pytest.raises(KeyError), os_errors_as_user_errors("a", ValueError):
        raise KeyError("a")


@pytest.mark.parametrize(("asked", "visible", "words"), [
    ("auto", None, "\nWARNING: PyTorch cannot use this machine's GPU: "), ("cpu", None, ""),
    ("auto", "", "; CUDA_VISIBLE_DEVICES hides the GPU"),
])  # fmt: skip
def test_the_log_tells_why_auto_took_no_gpu(asked: str, visible: str | None, words: str, monkeypatch) -> None:
    """Where a driver is installed."""
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/proc/driver/nvidia/version")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    line = describe_device(torch.device("cpu"), asked)
    _, threads, rest = line.partition(f"device: CPU, {torch.get_num_threads()} threads")
    assert threads
    assert rest.startswith(words)
    assert bool(rest) == bool(words)


@pytest.mark.parametrize(("name", "number"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_made_the_current_one_by_its_number(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's `set_device` refuses one without a number; of a device that a caller gives so, it is left as it is."""
    made_current: list[int] = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", made_current.append, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    prepare_device(choose_device(name))
    prepare_device(torch.device("cuda"))
    assert made_current == [number]

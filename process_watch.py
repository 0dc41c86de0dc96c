"""Several processes that train one run watch each other: none waits for ever, and the one to blame is named.

Each has a thread that tells the launcher's key-value store every second that it lives, and how often its training has
met the others. Where a process waits for the others, this thread finds out why:

    the others told a reason     a broken image, a full disk, no memory: all leave, and the reason is told once
    one gives no sign of life    killed, frozen or unplugged: told after `SILENCE` seconds
    one never comes              it lives, but hangs: told after `runtime.timeout_minutes`

The store lives with the launcher on the first machine. When even that cannot be reached, all leave as well.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore, Store

PERIOD = 1.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which a process counts as dead, where others wait for it
PATIENCE = 3.0  # seconds that a process has to leave by itself, after it has seen or told that the run has failed


class PeerLostError(Exception):
    """The others cannot be reached: one of them has ended or told a reason to end."""


def meet(store: Store, rank: int, size: int, timeout: float) -> Store:
    """Waits until all processes of this session are there; returns a part of the store that is theirs alone.

    torchrun's store outlives its processes, so what those of before a restart have written is still in it. Process 0
    opens a new part for its session, and answers everybody who asks where to go, each by the number that it drew.

    Raises:
        TimeoutError: says which processes have not come within `timeout` seconds.
    """
    ends = time.monotonic() + timeout
    answered: set[bytes] = set()
    own = os.urandom(8).hex()
    if rank:
        store.set(f"asks/{rank}", own)
        while not store.check([f"answer/{own}"]):
            if time.monotonic() > ends:
                raise TimeoutError("process 0 is missing")
            time.sleep(0.02)
        session = PrefixStore(store.get(f"answer/{own}").decode(), store)
        session.set(f"here/{rank}", "")
        others = [f"here/{other}" for other in range(size)]
    else:
        name = f"session {store.add('sessions', 1)}"
        session = PrefixStore(name, store)
        others = [f"here/{other}" for other in range(1, size)]
    while not session.check(others):
        missing = [int(key[5:]) for key in others if not session.check([key])]
        if time.monotonic() > ends:
            raise TimeoutError("missing processes: " + ", ".join(map(str, missing)))
        if rank == 0:
            for other in missing:
                if store.check([f"asks/{other}"]) and (asks := store.get(f"asks/{other}")) not in answered:
                    store.set(f"answer/{asks.decode()}", name)
                    answered.add(asks)
        time.sleep(0.02)
    if rank == 0:
        session.set("here/0", "")
    return session


class ProcessWatch:
    """The thread of one process, process `rank` of `size`.

    Args:
        store: the launcher's; a connection of its own is made, since one that waits cannot be used by two threads.
        timeout: seconds that the others may be waited for.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.silence, self.period = min(SILENCE, timeout), min(PERIOD, SILENCE / 4)
        self.place = "start"  # where the training is, in words
        self.meetings = 0  # how often this process has come to meet the others
        self.waits_since: float | None = None
        self._store = store.clone()
        self._lock = threading.Lock()  # the main thread speaks to the store too, when something has gone wrong
        self._beats = 0
        self._seen: dict[int, tuple[bytes, float]] = {}  # rank -> its newest sign of life, and when it was first seen
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="process watch", daemon=True)
        self._beat()
        self._thread.start()

    @contextmanager
    def meeting(self, count: bool = True) -> Iterator[None]:
        """To be entered where this process waits for the others; not to `count`: for a meeting that has begun already.

        Raises:
            PeerLostError: one of them has gone.
        """
        self.meetings += count
        self.waits_since = time.monotonic()
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch's own errors of lost connections have no type in common below this
            raise PeerLostError(" ".join(str(error).split())) from error
        finally:
            self.waits_since = None

    def close(self) -> None:
        """Ends the watch: this process has nothing to do with the others any more."""
        self._over.set()
        self._thread.join(timeout=PATIENCE)

    # ------------------------------------------------------------------------------------------- telling and hearing

    def tell(self, line: str, status: int) -> bool:
        """Lets all processes know that the run has failed, and leave; whether this is the first to say so.

        Whatever keeps this process from ending by itself, it is gone `PATIENCE` seconds later.
        """
        ends = time.monotonic() + (1.0 if self.rank else 0.0)  # where all fail alike, process 0 is to speak
        try:
            while time.monotonic() < ends and self._failure() is None:
                time.sleep(0.05)
            with self._lock:
                first = self._store.add("failures", 1) == 1
                if first:
                    told = {"rank": self.rank, "host": socket.gethostname(), "line": line, "status": status}
                    self._store.set("failure", json.dumps(told))
        except RuntimeError:  # no store, no others to be silent for
            first = True
        if first:
            note_for_torchrun(line)
        threading.Thread(target=_leave, args=(status, 2 * PATIENCE), daemon=True).start()
        return first

    def why(self, error: PeerLostError) -> tuple[str | None, int]:
        """After `PeerLostError`: which process has gone, in words (None if it has told it), and the exit status."""
        ends = time.monotonic() + PATIENCE
        try:
            before = self._signs()
            while time.monotonic() < ends:
                if (failure := self._failure()) is not None:
                    return None, failure["status"]
                time.sleep(self.period / 4)
            now = self._signs()
        except RuntimeError:
            return f"the launcher's store and the other processes were lost at {self.place}; was torchrun stopped?", 1
        silent = [rank for rank in now if rank != self.rank and now[rank] == before.get(rank)]
        if silent:
            return f"{self._named(silent)} ended without a word at {self.place}; was it killed, for want of memory?", 1
        return f"the connection to the other processes was lost at {self.place}: {str(error)[:160]}", 1

    # ---------------------------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        reached = time.monotonic()
        while not self._over.wait(self.period):
            try:
                self._beat()
                self._look()
                reached = time.monotonic()
            except RuntimeError:
                if self._over.is_set():
                    return
                if time.monotonic() - reached > self.silence:
                    self._say("error: the launcher's store cannot be reached any more; was torchrun stopped?")
                    _leave(1)

    def _look(self) -> None:
        if (failure := self._failure()) is not None:
            if self.rank == 0 and failure["host"] != socket.gethostname():  # else it stands on this screen already
                self._say(f"error: process {failure['rank']} on {failure['host']} stopped the run: {failure['line']}")
            _leave(failure["status"], PATIENCE)  # if the main thread has not left before
        since = self.waits_since
        waited = 0.0 if since is None else time.monotonic() - since
        if waited < self.silence / 2:
            self._seen.clear()
            return
        now = time.monotonic()
        signs = self._signs()
        for rank, sign in signs.items():
            if self._seen.get(rank, (b"", 0.0))[0] != sign:
                self._seen[rank] = (sign, now)
        silent = [rank for rank, (_, first) in self._seen.items() if now - first > self.silence]
        if silent and self.waits_since == since:
            self._give_up(
                f"{self._named(silent)} gave no sign of life for {self.silence:.0f} seconds at {self.place}; "
                "was it killed or stopped, or its machine lost?"
            )
        if waited > self.timeout and self.waits_since == since:
            meetings = {rank: json.loads(sign)["meetings"] for rank, sign in signs.items()}
            behind = [rank for rank, count in meetings.items() if count < max(meetings.values())]
            limit = f"within runtime.timeout_minutes={self.timeout / 60:g}"
            if behind:
                self._give_up(f"{self._named(behind)} did not come to {self.place} {limit}; it lives, but hangs")
            self._give_up(f"no process came past {self.place} {limit}, and none is behind; is the network whole?")

    def _give_up(self, line: str) -> None:
        if self.tell(line, 1):
            self._say(f"error: {line}")
        _leave(1)

    def _beat(self) -> None:
        self._beats += 1
        sign = {"beat": self._beats, "meetings": self.meetings, "host": socket.gethostname(), "pid": os.getpid()}
        with self._lock:
            self._store.set(f"alive/{self.rank}", json.dumps(sign))

    def _failure(self) -> dict[str, Any] | None:
        with self._lock:
            return json.loads(self._store.get("failure")) if self._store.check(["failure"]) else None

    def _signs(self) -> dict[int, bytes]:
        with self._lock:
            return dict(enumerate(self._store.multi_get([f"alive/{rank}" for rank in range(self.size)])))

    def _named(self, ranks: list[int]) -> str:
        """`process 3 (12345 on node7)`; the first few of many."""
        signs = self._signs()
        who = [
            f"{rank} ({sign['pid']} on {sign['host']})"
            for rank in ranks[:4]
            for sign in [json.loads(signs[rank])]
        ]  # fmt: skip
        return ("process " if len(ranks) == 1 else "processes ") + ", ".join(who) + ", ..." * (len(ranks) > 4)

    def _say(self, line: str) -> None:
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def _leave(status: int, after: float = 0.0) -> None:
    """Ends this process, whatever its main thread waits for: a collective on a GPU hears no signal."""
    time.sleep(after)
    os._exit(status)


def note_for_torchrun(line: str) -> None:
    """Writes the reason where torchrun looks for it, so that its own report ends with it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}), encoding="utf-8")

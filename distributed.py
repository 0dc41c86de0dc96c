"""Many GPUs and many machines: `torchrun --nproc-per-node=8 training.py` runs this script once for each GPU.

Each process holds the whole networks and computes its shard of the batch: rank r of W takes the images r, r + W,
r + 2 W, ... of it, and the same rows of the step's random numbers, which are sampled for the whole batch. So what a run
learns doesn't depend on W, except for the order in which floats are summed. With one process `World` does nothing.

Each step of a network averages gradients and metrics in one all-reduce. There is no wrapper around the networks:
DistributedDataParallel with a static graph leaves gradients unsynchronised that `torch.autograd.grad` has taken, and
FSDP has no double backward. As shards are equal, the mean over processes of their means is the mean over the batch.
No process waits for ever for another one: see `ProcessWatch`.
"""

import json
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from configuration import RuntimeConfig, UserError
from util import launcher_number, print_error

HEARTBEAT_INTERVAL = 1.0  # seconds
HEARTBEAT_TIMEOUT = 25.0  # seconds without a heartbeat after which a process that others wait for counts as dead
EXIT_GRACE = 3.0  # seconds that a process has to end by itself after a failure was reported


class World:
    """The processes of this run, seen from one of them. A process that has lost the others ends: see `ProcessWatch`.

    Attributes:
        rank: number of this process, from 0.
        size: how many processes there are.
        is_main: whether this is process 0, which alone writes files and prints.
    """

    def __init__(self, rank: int = 0, size: int = 1, watch: "ProcessWatch | None" = None) -> None:
        self.rank, self.size = rank, size
        self.is_main = rank == 0
        self._watch = watch
        self._buckets: dict[str, Tensor] = {}

    def shard(self, x: Tensor) -> Tensor:
        """This process's rows of a tensor (N, ...) for all: (its shard of N, ...)."""
        return x if self.size == 1 else x[self.rank :: self.size]

    def set_phase(self, phase: str) -> None:
        """Notes where the training is, such as `step 3`, for messages about processes that don't come there."""
        if self._watch:
            self._watch.phase = phase

    def average(
        self, network: str, gradients: Sequence[Tensor], metrics: dict[str, Tensor]
    ) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
        """Means over all processes, in one all-reduce: gradients, laid out alike in memory, and metrics (scalars) of
        this process's shard -> those of the whole batch.

        `network`, whose step this is, names the bucket: gradients are valid until the next call for the same one.
        """
        if self.size == 1:
            return gradients, metrics
        values = torch.stack([value.float() for value in metrics.values()])
        sizes = [gradient.numel() for gradient in gradients]
        length = sum(sizes) + len(values)
        bucket = self._buckets.get(network)
        if bucket is None or len(bucket) != length:
            bucket = self._buckets[network] = gradients[0].new_empty(length)
        *parts, tail = bucket.split([*sizes, len(values)])
        strides = (torch.empty_like(gradient, device="meta").stride() for gradient in gradients)  # dense ones
        averaged = [x.as_strided(g.shape, s) for x, g, s in zip(parts, gradients, strides, strict=True)]
        torch._foreach_copy_(averaged, list(gradients))
        tail.copy_(values)
        with self._collective():
            dist.all_reduce(bucket)
        bucket.div_(self.size)
        return averaged, dict(zip(metrics, tail.clone().unbind(), strict=True))

    def agree_on_stop(self, reason: int) -> int:
        """The largest `reason` to stop that a process has, or 0; to be called once after each iteration.

        It travels from CPU to CPU, so no GPU is waited for.
        """
        if self.size == 1:
            return reason
        largest = torch.tensor(reason)
        with self._collective():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def broadcast(self, value: Any) -> Any:
        """Process 0's `value` for all: nested dicts, lists and tuples of tensors and of anything that pickle takes.

        Others' `value` doesn't matter. From several processes all get tensors on the CPU: who takes them over knows
        the device, as after `torch.load`.
        """
        if self.size == 1:
            return value
        box = [tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), value) if self.is_main else None]
        with self._collective():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather_shards(self, x: Tensor) -> Tensor:
        """Puts together what the processes have made of their shards of N things, in the order of the N things.

        (this process's shard of N, ...) -> (N, ...), the same on all processes.
        """
        if self.size == 1:
            return x
        shards = self.gather_objects(x.cpu())
        whole = x.new_empty(sum(map(len, shards)), *x.shape[1:])
        for rank, shard in enumerate(shards):
            whole[rank :: self.size] = shard
        return whole

    def gather_objects(self, value: Any) -> list[Any]:
        """Every process's `value`, anything that pickle takes, in the order of ranks."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        with self._collective():
            dist.all_gather_object(gathered, value)
        return gathered

    def maximum(self, values: list[float]) -> list[float]:
        """The largest of all processes' values, place by place."""
        return [max(column) for column in zip(*self.gather_objects(values), strict=True)]

    def check_equal(self, values: dict[str, Any]) -> None:
        """Checks that all processes have the same `values`. Raises UserError: they don't; names the first that differs,
        and a process for which it does.
        """
        first, *others = self.gather_objects(values)
        for rank, other in enumerate(others, 1):
            for name, value in other.items():
                if value != first[name]:
                    differs = f"process {rank} has {value} for {name}, but process 0 has {first[name]}"
                    raise UserError(f"{differs}; make them the same")

    def check_networks_equal(self, tensors: dict[str, Tensor], step: int) -> None:
        """Checks that networks are equal on all processes, by the sums of their bits. Waits for the device. Raises
        UserError: names a tensor and a process that differ.
        """
        if self.size == 1:
            return
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = (tensor.detach().contiguous().view(integers[tensor.element_size()]) for tensor in tensors.values())
        sums = torch.stack([values.sum(dtype=torch.int64) for values in bits]).tolist()
        first, *others = self.gather_objects(sums)
        for rank, other in enumerate(others, 1):
            if other != first:
                name = next(name for name, *pair in zip(tensors, first, other, strict=True) if pair[0] != pair[1])
                raise UserError(
                    f"training stopped: process {rank} has another {name} than process 0 at step {step}; a "
                    "defective device, or different software? The last checkpoint is good: the same command resumes"
                )

    def _collective(self) -> AbstractContextManager[None]:
        return self._watch.collective() if self._watch else nullcontext()


SINGLE_PROCESS = World()
"""One process, as without a launcher."""


# ------------------------------------------------------------------------------------------------- joining and leaving

_watch: "ProcessWatch | None" = None  # of this process, for `report_error`


@contextmanager
def join_processes(runtime: RuntimeConfig, device: torch.device) -> Iterator[World]:
    """Joins the other processes that the launcher has started, and leaves them at the end. NCCL on GPUs, else gloo.
    Raises UserError: the launcher's address cannot be reached, or a process doesn't come in time.
    """
    global _watch
    rank, size = launcher_number("RANK", 0), launcher_number("WORLD_SIZE", 1)
    if size == 1:
        yield SINGLE_PROCESS
        return
    seconds = 60 * runtime.timeout_minutes
    try:
        store = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=seconds))))[0]
        store = rendezvous(store, rank, size, seconds)
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(
            f"process {rank} of {size} did not meet the others at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} within runtime.timeout_minutes={runtime.timeout_minutes:g} "
            f"({' '.join(str(error).split())[:120]}); do all machines run the same torchrun command, with the same "
            "--rdzv-endpoint?"
        ) from None
    _watch = ProcessWatch(store, rank, size, seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Both backends: small things go from CPU to CPU. torch's own limit comes after the watch's, which names a process.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=seconds + 60)
    try:
        with _watch.collective(), warnings.catch_warnings(action="ignore"):
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        yield (world := World(rank, size, _watch))
    except UserError:
        raise  # the command reports it
    except Exception as error:  # the command reports a lack of memory; of all else Python prints a traceback
        _watch.report(f"{type(error).__name__}: {error}", 1, silent=True)
        raise  # the group is left as it is: to take it down, the others would have to answer
    world.set_phase("the end")
    world.gather_objects(None)  # wait for all: process 0 still writes files when the others have finished
    _watch.close()
    _watch = None
    dist.destroy_process_group()


def report_error(message: str, status: int) -> int:
    """`ProcessWatch.report`; before the processes have met, the first one of each machine prints."""
    if _watch is not None:
        return _watch.report(message, status)
    write_torchrun_error(message)
    alone = "TORCHELASTIC_RUN_ID" not in os.environ  # without torchrun nobody else may be there to print
    return print_error(message, status) if alone or os.environ.get("LOCAL_RANK", "0") == "0" else status


def write_torchrun_error(message: str) -> None:
    """Writes the reason where torchrun looks for it, so that its own report ends with it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")


def rendezvous(store: dist.Store, rank: int, size: int, timeout: float) -> dist.Store:
    """Waits until all processes of this session are there; returns a part of the store for them alone.

    torchrun's store outlives its processes: keys from before a restart are still in it. So process 0 opens a new part
    for its session, and answers each process that asks for it, by the random number that this one has written.

    Raises TimeoutError: names the processes that have not come within `timeout` seconds.
    """
    ends = time.monotonic() + timeout

    def pause(reason: str) -> None:
        time.sleep(0.02)
        if time.monotonic() > ends:
            raise TimeoutError(reason)

    if rank:
        number = os.urandom(8).hex()
        store.set(f"asks/{rank}", number)
        while not store.check([f"answer/{number}"]):
            pause("process 0 is missing")
        session = dist.PrefixStore(store.get(f"answer/{number}").decode(), store)
    else:
        name = f"session {store.add('sessions', 1)}"
        session = dist.PrefixStore(name, store)
        while missing := [other for other in range(1, size) if not session.check([f"alive/{other}"])]:
            for other in missing:
                if store.check([f"asks/{other}"]):  # perhaps of an earlier session: then nobody reads the answer
                    store.set(f"answer/{store.get(f'asks/{other}').decode()}", name)
            pause(f"missing processes: {', '.join(map(str, missing))}")
    session.set(f"alive/{rank}", _heartbeat(0))
    while not session.check(["alive/0"]):
        pause("process 0 still waits for another one")
    return session


def _heartbeat(collectives: int) -> str:
    """A sign of life, never the same twice: how often its process has met the others, and which process it is."""
    process = f"{os.getpid()} on {socket.gethostname()}"
    return json.dumps({"time": time.monotonic(), "collectives": collectives, "process": process})


class ProcessWatch:
    """A thread that writes this process's heartbeat to the launcher's store, and finds out why it waits for others.

    another has reported an error    a broken image, a full disk, no memory: all end, and one line is printed
    one gives no heartbeat           killed, frozen or unplugged: named within 30 seconds
    one never comes                  it lives, but hangs: named after `timeout` seconds
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.phase = "start"  # where the training is, in words
        self._store = store.clone()  # a connection of its own, as one that waits cannot be used by two threads
        self._collectives = 0  # how often this process has come to meet the others
        self._waits_since: float | None = None
        self._lost: tuple[float, str] | None = None  # when a collective failed, and its error
        self._newest: dict[int, tuple[bytes, float]] = {}  # rank -> its newest heartbeat, and when it was first seen
        self._status = 1  # with which all end
        self._over, self._diagnosed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="process watch", daemon=True)
        self._thread.start()

    @contextmanager
    def collective(self) -> Iterator[None]:
        """To be entered where this process waits for the others. Raises SystemExit: one of them has ended, which is
        reported by now.
        """
        self._collectives += 1
        self._waits_since = time.monotonic()
        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # a GPU's own errors surface here too, as its work is asynchronous
        except RuntimeError as error:  # torch's own errors of lost connections have no type in common below this
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's to the rest, which end anyway
            self._lost = time.monotonic(), " ".join(str(error).split())[:160]
            if self._diagnosed.wait(2 * HEARTBEAT_TIMEOUT):
                raise SystemExit(self._status) from None
            raise
        finally:
            self._waits_since = None

    def close(self) -> None:
        """Ends the watch: this process has nothing to do with the others any more."""
        self._over.set()
        self._thread.join(timeout=EXIT_GRACE)

    def report(self, message: str, status: int, silent: bool = False) -> int:
        """Prints why this process ends (not if `silent`), unless another one has failed before, and ends the others.
        Returns the exit status: `status`, or that of the process that failed first.
        """
        message = " ".join(message.split())
        own = {"rank": self.rank, "host": socket.gethostname(), "message": message, "status": status}
        try:
            if self.rank and not self._store.check(["failure"]):
                time.sleep(1.0)  # where all fail alike, process 0 prints
            first = json.loads(self._store.compare_set("failure", "", json.dumps(own)))
        except RuntimeError:  # without the store nobody else can print either
            first = own
        if first["rank"] != self.rank:
            return first["status"]
        write_torchrun_error(message)
        return status if silent else print_error(message, status)

    def _run(self) -> None:
        reached = time.monotonic()
        while not self._over.wait(HEARTBEAT_INTERVAL):
            try:
                self._store.set(f"alive/{self.rank}", _heartbeat(self._collectives))
                if self._store.check(["failure"]):
                    first = json.loads(self._store.get("failure"))
                    if self.rank == 0 and first["host"] != socket.gethostname():  # else it is on this screen already
                        where = f"process {first['rank']} on {first['host']}"
                        print_error(f"{where} stopped the run: {first['message']}", first["status"])
                    self._end(first["status"])
                if message := self._diagnose():
                    self._end(self.report(message, 1))
                reached = time.monotonic()
            except RuntimeError:
                if time.monotonic() - reached > (EXIT_GRACE if self._lost else HEARTBEAT_TIMEOUT):
                    self._end(self.report("the launcher's store is out of reach; was torchrun stopped?", 1))

    def _diagnose(self) -> str | None:
        """Why this process waits for the others in vain; None: it doesn't, or it is too soon to know."""
        now, since, lost = time.monotonic(), self._waits_since, self._lost
        if since is None or (lost is None and now - since < 4 * HEARTBEAT_INTERVAL):
            self._newest.clear()  # and the store has nothing to do for it
            return None
        for rank, sign in enumerate(self._store.multi_get([f"alive/{rank}" for rank in range(self.size)])):
            if rank not in self._newest or self._newest[rank][0] != sign:
                self._newest[rank] = sign, now
        if self._waits_since != since:
            return None  # the others have come meanwhile
        patience = EXIT_GRACE if lost else HEARTBEAT_TIMEOUT
        if silent := [rank for rank, (_, seen) in self._newest.items() if now - seen > patience]:
            return (
                f"{self._named(silent)} gave no sign of life for {patience:g} seconds at {self.phase}; "
                "was it killed (for want of memory?) or stopped, or its machine lost?"
            )
        if lost and now - lost[0] > 3 * EXIT_GRACE:
            return f"the connection to the other processes was lost at {self.phase}: {lost[1]}"
        if now - since > self.timeout:
            counts = [json.loads(self._newest[rank][0])["collectives"] for rank in range(self.size)]
            behind = [rank for rank, count in enumerate(counts) if count == min(counts)]
            limit = f"runtime.timeout_minutes={self.timeout / 60:g}"
            return f"{self._named(behind)} did not come past {self.phase} within {limit}; alive, but hanging"
        return None

    def _named(self, ranks: list[int]) -> str:
        """`process 3 (12345 on node7)`; the first few of many."""
        names = [f"{rank} ({json.loads(self._newest[rank][0])['process']})" for rank in ranks[:4]]
        return ("process " if len(ranks) == 1 else "processes ") + ", ".join(names) + ", ..." * (len(ranks) > 4)

    def _end(self, status: int) -> None:
        """Ends this process, whatever its main thread waits for: a collective on a GPU hears no signal."""
        self._status = status
        self._diagnosed.set()
        time.sleep(EXIT_GRACE)
        os._exit(status)

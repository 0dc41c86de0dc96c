"""Many GPUs and many machines: `torchrun --nproc-per-node=8 training.py` runs this script once for each GPU.

Each process holds the whole networks and computes its share of the batch: rank r of W takes the pictures r, r + W,
r + 2 W, ... of it, and the same rows of the step's random numbers, which are drawn for the whole batch. So what a run
learns doesn't depend on W, but for the order in which floats are summed.

In each step of a network one all-reduce sums all that the processes must share: gradients, metrics and votes to stop,
in one flat bucket. There is no wrapper around the networks: DistributedDataParallel with a static graph leaves
gradients unsynchronised that `torch.autograd.grad` has taken, and FSDP has no double backward. With equal shares the
mean over the processes of means over their pictures is the mean over the batch.

One process is the special case in which nothing here does anything.
"""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configuration import RuntimeConfig, UserError
from process_watch import PeerLostError, ProcessWatch, meet, note_for_torchrun

VOTES = 8  # reasons to stop that a bucket has room for


class World:
    """The processes of this run, seen from one of them.

    Attributes:
        rank: number of this process, from 0. Process 0 alone writes files and speaks.
        size: how many processes there are.
    """

    def __init__(self, rank: int = 0, size: int = 1, watch: ProcessWatch | None = None) -> None:
        self.rank, self.size = rank, size
        self._watch = watch
        self._vote: Callable[[], int] = lambda: 0
        self._buckets: dict[str, Tensor] = {}
        self._ballot: Tensor | None = None  # of the newest exchange, on the device
        self._ballots: list[tuple[Tensor, torch.cuda.Event | None]] = []

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share_of(self, count: int) -> range:
        """The places of this process among `count` things: every `size`-th, so that shares differ by one at most."""
        return range(self.rank, count, self.size)

    def rows(self, x: Tensor) -> Tensor:
        """This process's rows of a tensor (N, ...) for all: (its share of N, ...)."""
        return x if self.size == 1 else x[self.rank :: self.size]

    def share_batch(self, batch_size: int) -> None:
        """Checks that the batch can be shared evenly.

        Raises:
            UserError: it cannot.
        """
        if batch_size % self.size:
            low = batch_size // self.size * self.size
            fitting = f"{low} or {low + self.size}" if low else f"{self.size}"
            raise UserError(
                f"training.batch_size is {batch_size}, which {self.size} processes cannot share evenly; "
                f"use {fitting}, or another number of processes"
            )

    def at(self, place: str) -> None:
        """Notes where the training is, in words, for messages about processes that don't come there."""
        if self._watch:
            self._watch.place = place

    # ---------------------------------------------------------------------------------------------------- every step

    def average(
        self, network: str, gradients: Sequence[Tensor], metrics: dict[str, Tensor]
    ) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
        """Means over all processes, in one all-reduce.

        Args:
            network: whose step this is; names the bucket.
            gradients: of this process's share of the batch.
            metrics: scalars, means over the share.

        Returns:
            The gradients and metrics of the whole batch. Gradients are valid until the next call for the same network.

        Raises:
            PeerLostError: another process has gone.
        """
        if self.size == 1:
            return gradients, metrics
        values = torch.stack([value.float() for value in metrics.values()])
        sizes = [gradient.numel() for gradient in gradients]
        total = sum(sizes)
        length = total + len(values) + VOTES
        bucket = self._buckets.get(network)
        if bucket is None or len(bucket) != length:
            bucket = self._buckets[network] = gradients[0].new_empty(length)
        parts = bucket[:total].split(sizes)
        shared = [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
        torch._foreach_copy_(shared, list(gradients))
        tail = bucket[total:]
        tail.zero_()
        tail[: len(values)] = values
        if vote := self._vote():
            tail[vote - VOTES] = 1
        with self._meeting():
            dist.all_reduce(bucket)
        bucket[: total + len(values)].div_(self.size)
        means = dict(zip(metrics, tail[: len(values)].clone().unbind(), strict=True))
        self._ballot = tail[-VOTES:]
        return shared, means

    def vote(self, vote: Callable[[], int]) -> None:
        """From now on `vote` tells why this process wants to stop, 1 to `VOTES` - 1, or 0."""
        self._vote = vote
        self._ballots.clear()

    def verdict(self) -> int:
        """To be asked once after each iteration: the reason for which all stop now, or 0; the same everywhere.

        A vote lasts, so an iteration's last exchange tells all. On a GPU the answer is that of one iteration ago: the
        newest is still on its way, and nobody waits for it.
        """
        assert self._ballot is not None
        with self._meeting(count=False):
            self._ballots.append(_to_host(self._ballot))
            if self._ballots[-1][1] is not None and len(self._ballots) == 1:
                return 0
            counts, event = self._ballots.pop(0)
            if event is not None:
                event.synchronize()
        return int(counts.nonzero()[0]) if counts.any() else 0

    # --------------------------------------------------------------------------------------------------- now and then

    def from_first(self, value: Any) -> Any:
        """Process 0's `value` for all: nested dicts, lists and tuples of tensors and of anything that pickle takes.

        Tensors stay on their kind of device. Others' `value` doesn't matter.
        """
        if self.size == 1:
            return value
        tensors: list[Tensor] = []
        with self._meeting():
            box = [_without_tensors(value, tensors)] if self.is_first else [None]
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
            places: list[_Place] = []
            _places_in(box[0], places)
            received = []
            for number, place in enumerate(places):
                if self.is_first:
                    tensor = tensors[number].detach().contiguous()
                else:
                    tensor = torch.empty(place.shape, dtype=place.dtype, device=place.device)
                dist.broadcast(tensor, src=0)
                received.append(tensor)
        return value if self.is_first else _with_tensors(box[0], iter(received))

    def gather_rows(self, x: Tensor) -> Tensor:
        """Puts together what the processes have made of their shares.

        Args:
            x: (len(share_of(N)), ...), this process's rows, in its share's order.

        Returns:
            (N, ...), the same on all processes, in the order of the N things.
        """
        if self.size == 1:
            return x
        counts = [int(count) for count in self.gather_objects(len(x))]
        padded = x.new_zeros((max(counts), *x.shape[1:]))
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        with self._meeting():
            dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[: sum(counts)]

    def gather_objects(self, value: Any) -> list[Any]:
        """Everybody's `value`, anything small that pickle takes, in the order of ranks."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        with self._meeting():
            dist.all_gather_object(gathered, value)
        return gathered

    def largest(self, values: list[float]) -> list[float]:
        """The largest of everybody's values, place by place."""
        return [max(column) for column in zip(*self.gather_objects(values), strict=True)]

    def agree(self, values: dict[str, Any]) -> None:
        """Checks that all processes have the same `values`.

        Raises:
            UserError: they don't; names the first that differs, and a process for which it does.
        """
        first, *others = self.gather_objects(values)
        for rank, other in enumerate(others, 1):
            for name, value in other.items():
                if value != first[name]:
                    raise UserError(
                        f"process {rank} has {value} for {name}, but process 0 has {first[name]}; make them the same"
                    )

    def check_same(self, tensors: dict[str, Tensor], step: int) -> None:
        """Checks that networks are equal on all processes, bit for bit, by their checksums. Waits for the device.

        Raises:
            UserError: names a tensor and a process that differ.
        """
        if self.size == 1:
            return
        sums = torch.stack([_checksum(tensor) for tensor in tensors.values()]).tolist()
        for rank, other in enumerate(values := self.gather_objects(sums)):
            for name, mine, theirs in zip(tensors, values[0], other, strict=True):
                if mine != theirs:
                    raise UserError(
                        f"training stopped: process {rank} has another {name} than process 0 at step {step}; a "
                        "defective device, or different software? The last checkpoint is good: the same command goes on"
                    )

    def barrier(self) -> None:
        """Waits until all have come here."""
        self.gather_objects(None)

    @contextmanager
    def _meeting(self, count: bool = True) -> Iterator[None]:
        if self._watch is None:
            yield
            return
        with self._watch.meeting(count):
            yield


ALONE = World()
"""One process, as without a launcher."""


# ------------------------------------------------------------------------------------------------- joining and leaving


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


_watch: ProcessWatch | None = None  # of this process, for what it says when it ends in an error


@contextmanager
def join_processes(runtime: RuntimeConfig, device: torch.device) -> Iterator[World]:
    """Joins the other processes that the launcher has started, and leaves them at the end. NCCL on GPUs, else gloo.

    Raises:
        UserError: the launcher's address cannot be reached, or a process doesn't come in time.
    """
    global _watch
    if not launched():
        yield ALONE
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    seconds = 60 * runtime.timeout_minutes
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=seconds))))[0]
        store = meet(store, rank, size, seconds)
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(
            f"process {rank} of {size} did not meet the others at {address} within runtime.timeout_minutes="
            f"{runtime.timeout_minutes:g} ({' '.join(str(error).split())[:120]}); do all machines run the same "
            "torchrun command, with the same --rdzv-endpoint?"
        ) from None
    _watch = ProcessWatch(store, rank, size, seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torch's own limit comes after the watch's, which can say more. Both backends: small things go from CPU to CPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        with _watch.meeting(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds + 60)
            )
    except PeerLostError as error:
        raise UserError(f"process {rank} of {size} could not connect to the others: {str(error)[:160]}") from None
    world = World(rank, size, _watch)
    try:
        yield world  # after an error the group is left as it is: to take it down, the others would have to answer
    except (UserError, PeerLostError, torch.OutOfMemoryError, MemoryError):
        raise  # the command tells them
    except Exception as error:
        if "DefaultCPUAllocator" not in str(error):  # no lack of memory: its traceback follows, and the others may go
            _watch.tell(f"{type(error).__name__}: {error}", 1)
        raise
    world.at("the end")
    world.barrier()  # process 0 still draws and saves when the others have finished
    _watch.close()
    _watch = None
    dist.destroy_process_group()


def report(line: str, status: int) -> int:
    """Says on standard error why this process ends, unless another one has said why all end; returns `status`.

    Before the processes have met, the first one of each machine speaks.
    """
    if _watch is not None:
        speaks = _watch.tell(line.removeprefix("error: "), status)
    else:
        note_for_torchrun(line)
        speaks = not launched() or os.environ.get("LOCAL_RANK", "0") == "0"
    if speaks:
        print(line, file=sys.stderr, flush=True)
    return status


def report_lost(error: PeerLostError) -> int:
    """The same for a process that has lost the others: names the one that has gone, if it has said nothing itself."""
    assert _watch is not None
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, as it ends the rest: in `PATIENCE` seconds it is done
    reason, status = _watch.why(error)
    return status if reason is None else report(f"error: {reason}", status)


# ------------------------------------------------------------------------------------------------------------- tensors


def _to_host(ballot: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in the host's memory; from a GPU it is complete when the event has come."""
    if ballot.device.type != "cuda":
        return ballot.float(), None
    copy = torch.empty(ballot.shape, dtype=ballot.dtype, pin_memory=True)
    copy.copy_(ballot, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, read as whole numbers: int64, on its device."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()]).sum(dtype=torch.int64)


class _Place:
    """Stands for a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.device = tuple(tensor.shape), tensor.dtype, tensor.device.type


def _without_tensors(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Place(value)
    if isinstance(value, dict):
        return {key: _without_tensors(part, tensors) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_tensors(part, tensors) for part in value)
    return value


def _places_in(value: Any, places: list[_Place]) -> None:
    if isinstance(value, _Place):
        places.append(value)
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            _places_in(part, places)


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, _Place):
        return next(tensors)
    if isinstance(value, dict):
        return {key: _with_tensors(part, tensors) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_tensors(part, tensors) for part in value)
    return value

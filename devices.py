"""The device that a command runs on: chosen, made ready, and named in the log."""

import contextlib
import ctypes
import os
from typing import TypeVar

import torch

from configuration import UserError

Network = TypeVar("Network", bound=torch.nn.Module)


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` to a device that exists. Of several processes each takes a GPU of its own.

    Raises:
        UserError: an unknown name, or a GPU that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine, as torchrun says
    if name == "cuda" and processes > 1 and torch.cuda.is_available():
        if processes > torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node is {processes}, but PyTorch sees {torch.cuda.device_count()} GPU(s) here; "
                "start one process for each GPU, or use runtime.device=cpu"
            )
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if name.startswith("cuda:") and processes > 1:
        raise UserError(
            f"runtime.device is {name}, one GPU for {processes} processes; use auto or cuda: each takes its own"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"runtime.device must be auto, cpu, cuda or cuda:<number>, but is '{name}'") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"runtime.device must be auto, cpu, cuda or cuda:<number>, but is '{name}'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} GPU(s)" if torch.cuda.is_available() else "no CUDA GPU"
        raise UserError(f"runtime.device is {name}, but PyTorch sees {found} here; use auto or cpu")
    return device


def prepare_device(device: torch.device) -> None:
    """Makes `device` the current one, with convolutions and products in true fp32.

    TF32 has a mantissa of 10 bits instead of 23. The gradient penalty needs all of them, and its backward pass runs
    together with all others, so TF32 cannot be kept to the rest. Who wants speed before precision takes
    runtime.precision=bf16, which spares the penalty.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # on by default
        torch.backends.cuda.matmul.allow_tf32 = False
    else:
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Makes the C library keep the memory of freed tensors for the next ones, where it can be asked to (glibc).

    It would return every large block to the system at once, and the next tensor would wait for the system to clear the
    same pages again: about a fifth of a step's time.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mmap_max, trim_threshold = -4, -1
        mallopt(mmap_max, 0)  # no mappings of their own for large blocks
        mallopt(trim_threshold, 2**31 - 1)  # give back only what is free beyond this


def channels_last_on(device: torch.device | str, network: Network) -> Network:
    """Moves a network to the device, its convolutions' weights in the layout channels_last.

    Convolutions run faster in that layout, on CPU and GPU, and pass it on from layer to layer.
    """
    # torch documents both arguments together, but its overloads know no such call.
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"device: {device}, {torch.cuda.get_device_name(device)}"
    return f"device: CPU, {torch.get_num_threads()} threads"

"""What sharing a batch costs: bytes and time of the exchanges of a step, measured here and estimated for clusters.

torchrun --nproc-per-node=2 communication.py runtime.device=cpu               measured between 2 processes
torchrun --nproc-per-node=2 communication.py image.size=32 training.batch_size=64

Takes the settings of training.py. Run with `python` it tells the bytes and the estimate alone.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as training.py does, and before torch is imported

import torch
from torch.utils.flop_counter import FlopCounterMode

from augmentation import DiffAugment
from command_line import OneLineParser
from configuration import Config, UserError, load_config
from devices import choose_device, describe_device, prepare_device
from distributed import VOTES, World, join_processes, report, report_lost
from process_watch import PeerLostError
from random_draws import Draws
from step_runners import EagerSteps
from training_state import TrainingState


class Cluster(NamedTuple):
    """Published speeds of machines with 8 H100 SXM GPUs and one NDR InfiniBand port for each, and what is assumed.

    NVIDIA H100 data sheet: 67 Tflop/s in fp32, NVLink 900 GB/s in both directions together. NVIDIA DGX H100: eight
    ConnectX-7 ports of 400 Gb/s for the GPUs.
    """

    gpus: int = 8
    """In a machine."""
    flops: float = 67e12
    """Per second, of a GPU in fp32."""
    share: float = 0.3
    """Assumed: what convolutions of this size reach of it."""
    nvlink: float = 450e9
    """Bytes per second from a GPU to the others of its machine, one direction."""
    network: float = 50e9
    """Bytes per second from a GPU to other machines: 400 Gb/s."""
    link_share: float = 0.7
    """Assumed: what an all-reduce reaches of both."""
    latency: float = 20e-6
    """Assumed: seconds of an all-reduce of no bytes, once in a machine and once for each doubling of machines."""


class Exchange(NamedTuple):
    """One network's exchange in a step."""

    network: str
    bytes: int
    per_iteration: int


def exchanges(config: Config, state: TrainingState) -> list[Exchange]:
    """The all-reduces of an iteration, in the order of their networks. Metrics are a few numbers more."""
    sizes = {name: sum(parameter.numel() for parameter in state.parameters[name]) for name in state.parameters}
    return [
        Exchange("discriminator", 4 * (sizes["discriminator"] + VOTES), config.training.n_critic),
        Exchange("generator", 4 * (sizes["vae"] + sizes["predictor"] + VOTES), 1),
    ]


def exchange_seconds(size: int, gpus: int, cluster: Cluster) -> float:
    """Time of an all-reduce of `size` bytes over `gpus` GPUs on paper.

    Rings: in a machine each GPU sends 2 (g - 1) / g of the bytes. Then each ring of the m machines carries the share
    1 / g of one GPU, of which each sends 2 (m - 1) / m.
    """
    inside, machines = min(gpus, cluster.gpus), max(1, gpus // cluster.gpus)
    seconds = 2 * (inside - 1) / inside * size / (cluster.nvlink * cluster.link_share)
    seconds += 2 * (machines - 1) / machines * size / inside / (cluster.network * cluster.link_share)
    return seconds + cluster.latency * ((inside > 1) + (machines - 1).bit_length())


def estimate(flops: float, parts: list[Exchange], gpus: int, cluster: Cluster) -> tuple[float, float]:
    """Seconds of arithmetic and of exchanges in an iteration of `flops` operations on each GPU, on paper."""
    waits = sum(part.per_iteration * exchange_seconds(part.bytes, gpus, cluster) for part in parts)
    return flops / (cluster.flops * cluster.share), waits


def measure(config: Config, device: torch.device, world: World) -> list[str]:
    """Lines that tell what the passes and exchanges of this configuration take, with this process's share."""
    state = TrainingState(config, device)
    runner, draws = EagerSteps(state, DiffAugment(config.training.diffaugment)), Draws(config, device, world)
    image = config.image
    x_real = world.rows(torch.rand(config.training.batch_size, image.channels, image.size, image.size, device=device))
    critic_draws, generator_draws = draws.critic(state.generator, 1, 0), draws.generator(state.generator, 1)
    passes: dict[str, Callable[[], Any]] = {
        "discriminator": lambda: runner.run_pass("critic_pass", x_real, critic_draws),
        "generator": lambda: runner.run_pass("generator_pass", x_real, generator_draws),
    }
    parts = exchanges(config, state)
    lines, flops = [], 0.0
    lines.append("network         MB an exchange   s a pass   s an exchange   share of both")
    for part in parts:
        with FlopCounterMode(display=False) as counter:
            done = passes[part.network]()
        flops += part.per_iteration * counter.get_total_flops()

        def exchange(part: Exchange = part, done: Any = done) -> None:
            world.average(part.network, done.gradients, done.metrics)
            world.verdict() if world.size > 1 else None

        a_pass, wait = (median_time(work, device, world) for work in (passes[part.network], exchange))
        lines.append(
            f"{part.network:<16}{part.bytes / 1e6:>14.2f}{a_pass:>11.4f}{wait:>16.4f}{wait / (a_pass + wait):>16.1%}"
        )
    total = sum(part.bytes * part.per_iteration for part in parts)
    lines.append(f"an iteration: {total / 1e6:.1f} MB and {flops / 1e9:.1f} Gflop for each process")
    lines.append("")
    lines.append("on paper, with as many pictures for each H100 as for a process here:")
    lines.append("    GPUs   batch   ms arithmetic   ms exchanges   efficiency")
    own = len(x_real)
    for gpus in (1, 8, 64, 512):
        work, waits = estimate(flops, parts, gpus, Cluster())
        efficiency = work / (work + waits)
        lines.append(f"{gpus:>8}{gpus * own:>8}{1e3 * work:>16.2f}{1e3 * waits:>15.2f}{efficiency:>13.0%}")
    return lines


def median_time(work: Callable[[], object], device: torch.device, world: World, rounds: int = 7) -> float:
    """Seconds that `work` takes when all processes begin it together."""
    times = []
    for _ in range(rounds + 1):
        world.barrier()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(description="Measure what the processes of torchrun exchange in a training step.")
    default = Path(__file__).with_name("config.yaml")
    parser.add_argument("--config", metavar="FILE", default=default, help="YAML file with settings (config.yaml)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    try:
        options = parser.parse_args(arguments)
        config = load_config(options.config, options.overrides)
        device = choose_device(config.runtime.device)
        prepare_device(device)
        with join_processes(config.runtime, device) as world:
            world.share_batch(config.training.batch_size)
            lines = measure(config, device, world)
            if world.is_first:
                print(f"{describe_device(device)}; {world.size} processes, batch {config.training.batch_size}")
                print("\n".join(lines), flush=True)
        return 0
    except UserError as error:
        return report(f"error: {error}", 2)
    except PeerLostError as error:
        return report_lost(error)


if __name__ == "__main__":
    sys.exit(main())

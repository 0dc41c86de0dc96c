"""What `benchmark.py` has measured, as a Markdown page and a plot."""

import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

from step_runners import has_bf16


def table(results: list[dict[str, Any]]) -> list[str]:
    """The results as lines of a Markdown table."""
    lines = [
        "| case | runner | precision | s / iteration (quartiles) | speedup | images/s | critic step | generator step "
        "| data wait | GRU | peak memory | peak of tensors | gradient error | with the same choices | share of floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in results:
        low, high = line["quartiles"]
        seconds = f"{line['seconds_per_iteration']:.3g} ({low:.3g} to {high:.3g})"
        cells = [
            line["case"], line["runner"], line["precision"], seconds, _shown(line["speedup"], "{:.2f} ×"),
            f"{line['images_per_second']:.0f}", f"{line['critic_seconds'] * 1e3:.0f} ms",
            f"{line['generator_seconds'] * 1e3:.0f} ms", f"{line['data_wait_share']:.1%}",
            _shown(line.get("gru_share"), "{:.1%}"), f"{line['peak_memory_bytes'] / 1e9:.2f} GB",
            _shown((line["peak_tensor_bytes"] or 0) / 1e9 or None, "{:.3f} GB"),
            _shown(line["gradient_error"], "{:.1e}"), _shown(line["gradient_error_same_choices"], "{:.1e}"),
            _shown(line["share_of_floor"], "{:.0%}"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def shares_table(results: list[dict[str, Any]]) -> list[str]:
    """Where the time of a checked line goes, as lines of a Markdown table."""
    looked_at = [line for line in results if line["time_shares"]]
    if not looked_at:
        return []
    parts = list(looked_at[0]["time_shares"])
    lines = ["", f"| time of operations | {' | '.join(parts)} |", "|---" * (1 + len(parts)) + "|"]
    for line in looked_at:
        shares = " | ".join(f"{line['time_shares'][part]:.1%}" for part in parts)
        lines.append(f"| {line['case']}, {line['runner']} | {shares} |")
    return lines


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def page(results: list[dict[str, Any]], device: torch.device, rates: dict[str, float], left_out: list[str]) -> str:
    """The whole Markdown page."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{processor()}, {torch.get_num_threads()} threads"
    )
    rate = ", ".join(
        f"{value / 1e9:,.0f} G{'B/s copied' if key == 'copy' else f'FLOP/s {key}'}" for key, value in rates.items()
    )
    notes = [f"{name}; PyTorch {torch.__version__}; {date.today()}. Measured: {rate}."]
    if device.type == "cpu":
        notes.append(f"Load of the machine over the last minutes: {', '.join(f'{x:.1f}' for x in os.getloadavg())}.")
    for line in results:
        if line["compile_seconds"] is not None:
            paid = line["break_even_steps"]
            after = f"has paid after {paid:,} iterations" if paid else "did not pay: no faster than eager"
            notes.append(
                f"Compiling ({line['case']}, {line['precision']}) took {line['compile_seconds']:.0f} s and {after}."
            )
    for line in results:
        if line["gradient_error_same_choices"] is not None:
            notes.append(
                f"Choices of {line['runner']} ({line['case']}): float64 would take "
                f"{', '.join(f'{count:,}' for count in line['flipped_choices'])} of {line['choices']:,} otherwise, "
                f"whose two candidates differ by {line['widest_gap']:.0e} of their map's root mean square at most."
            )
    if not has_bf16(device):
        notes.append("This device has no bf16 arithmetic; emulated, it would be 100 times slower, and is left out.")
    notes += left_out
    return "\n".join(["# Training speed", "", *notes, "", *table(results), *shares_table(results), ""])


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Bars: seconds per iteration of every line, and its floor."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(9, 1.2 + 0.3 * len(results)), layout="constrained")
    axes = figure.subplots()
    places = range(len(results))
    colours = {"textbook": "tab:gray", "eager": "tab:blue", "compiled": "tab:orange", "cuda_graph": "tab:green"}
    seconds = [line["seconds_per_iteration"] for line in results]
    spread = [
        [max(0, line["seconds_per_iteration"] - line["quartiles"][0]) for line in results],
        [max(0, line["quartiles"][1] - line["seconds_per_iteration"]) for line in results],
    ]
    axes.barh(places, seconds, xerr=spread, color=[colours[line["runner"]] for line in results])
    floors = [(place, line["share_of_floor"] * line["seconds_per_iteration"])
              for place, line in zip(places, results, strict=True) if line["share_of_floor"]]  # fmt: skip
    if floors:
        axes.scatter([floor for _, floor in floors], [place for place, _ in floors], color="black", marker="|", s=90,
                     label="floor", zorder=3)  # fmt: skip
        axes.legend(loc="lower right")
    axes.set_yticks(places, [f"{line['case']}: {line['runner']} {line['precision']}" for line in results])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("seconds per iteration (median, quartiles)")
    figure.savefig(path, dpi=120)


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

"""What a run tells afterwards: its metrics, their plot, and one HTML page of all that it left, to send to somebody."""

import base64
import html
import io
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from util import UserError, atomic_write, one_line, os_errors_as_user_errors, shown_path

Records = list[dict[str, float]]  # lines of a metrics.jsonl: metrics by name, and `step`

# Panel title -> the metrics plotted in it, and whether its axis is logarithmic.
_PANELS = {
    "critic: Wasserstein estimate\n(real minus generated score)": (["critic/gap"], False),
    "scores (their zero is arbitrary)": (["score/real", "score/updated", "score/base"], False),
    "gradient penalty": (["critic/penalty"], True),
    "reconstruction error\n(sum of squares per image)": (["generator/reconstruction"], True),
    "KL divergence (nats per image)": (["generator/kl"], False),
    "weight-driven video's error\n(sum of squares per frame)": (["generator/video"], True),
    "size of the update\nrelative to the weights (RMS)": (["update/relative_size"], False),
    "saturated fraction\nof the update": (["update/saturated_fraction"], False),
    "gradient norms": (["gradient_norm/critic", "gradient_norm/vae", "gradient_norm/predictor"], True),
    "images per second": (["speed/images_per_second"], False),
    # Where a run has measured them:
    "kernel distance (KID, raw)\nof updated and base images": (["quality/kid", "quality/kid_base"], True),
    "the critic's gap on training\nand on held-out images": (["quality/train_gap", "quality/heldout_gap"], False),
}


def read_records(run: str | Path) -> Records:
    """The lines of a run's metrics.jsonl; none before its first output.log_every steps. Raises UserError: there is no
    such file, or it is damaged.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")  # a line after it is being written
        records = [json.loads(line) for line in whole.splitlines()]
    except OSError as error:
        raise UserError(f"{shown_path(path)}: {error.strerror}; give a run's folder, such as runs/quick") from None
    except ValueError:
        raise UserError(f"{shown_path(path)} is damaged: not every line of it is JSON") from None
    if not all(isinstance(record, dict) and isinstance(record.get("step"), int) for record in records):
        raise UserError(f"{shown_path(path)}: not the metrics of a run, whose every line has a step")
    return records


def plot_losses(runs: dict[str, Records], path: Path) -> None:
    """Writes `loss_figure` as a PNG, whole or not at all. Raises UserError where it cannot be written."""
    with own_style(), os_errors_as_user_errors(path), atomic_write(path) as part:
        loss_figure(runs).savefig(part, dpi=110, format="png")


@contextmanager
def own_style() -> Iterator[None]:
    """Figures made in it are alike for all: a user's own style, such as fonts that are missing, doesn't reach them."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # what it says of a user's matplotlibrc doesn't matter here
    import matplotlib  # here: it takes a second to load

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def loss_figure(runs: dict[str, Records]) -> Any:
    """A figure of runs (name -> records), one panel per question. Of several, colour is the run, style the metric.
    All places are fixed: to find them, matplotlib would lay out every text several times, in twice the time.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state
    from matplotlib.lines import Line2D

    measured = any("quality/kid" in record for records in runs.values() for record in records)
    panels = [(title, *panel) for title, panel in _PANELS.items() if measured or "quality/" not in panel[0][0]]
    columns = len(panels) // 2
    legend_height = 0.25 * -(-len(runs) // 6) if len(runs) > 1 else 0.0
    width, height = 3.5 * columns, 6.5 + legend_height  # inches
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(left=0.75 / width, right=1 - 0.1 / width, bottom=0.5 / height, hspace=0.35,
                           top=1 - (0.45 + legend_height) / height, wspace=0.3)  # fmt: skip
    for (title, names, logarithmic), axis in zip(panels, figure.subplots(2, columns).flat, strict=True):
        for number, records in enumerate(runs.values()):
            for name, linestyle in zip(names, ("-", "--", ":"), strict=False):
                values = [(record["step"], record[name]) for record in records if name in record]
                if points := [point for point in values if point[1] > 0 or not logarithmic]:
                    label = name.rpartition("/")[2]
                    known = [line.get_label() for line in axis.lines]  # one entry a metric, whichever run is first
                    style: Any = {} if len(runs) == 1 else {"color": f"C{number}", "linestyle": linestyle}
                    axis.plot(*zip(*points, strict=True), label=None if label in known else label, lw=1.3, **style)
        axis.set_title(title, fontsize=10, y=1.0)
        axis.set_xlabel("step", fontsize=8)
        axis.xaxis.set_label_coords(0.5, -0.1)
        axis.yaxis.get_offset_text().set_fontsize(8)
        axis.tick_params(which="both", labelsize=8)
        axis.grid(alpha=0.25)
        axis.set_yscale("log" if logarithmic and axis.lines else "linear")
        if len(names) > 1 and axis.lines:
            axis.legend(fontsize=8, frameon=False)
    if len(runs) > 1:
        lines = [Line2D([], [], color=f"C{number}") for number in range(len(runs))]
        legend = figure.legend(lines, list(runs), loc="upper center", ncols=min(6, len(runs)), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # a run's name may hold $
    return figure


# ---------------------------------------------------------------------------------------------------- a page to send

PAGE_BYTES = 9 * 10**6  # of images and videos in a page, at most: of very many steps it shows some


def sampled_steps(run: str | Path) -> list[int]:
    """The steps that a run has sample images of."""
    return sorted(int(path.stem[5:]) for path in Path(run).glob("samples/step_*.png") if path.stem[5:].isdecimal())


def write_page(run: str | Path, out: str | Path) -> str:
    """Writes a run as one HTML file that needs nothing else: samples and clips by step, curves, settings, quality and
    command; returns a line about it. Raises UserError: no run, one without samples, or it cannot be written.
    """
    run, path = Path(run), Path(out)
    if path.suffix.lower() != ".html":
        raise UserError(f"--page must be an .html, but is {shown_path(out)}")
    records, steps = read_records(run), sampled_steps(run)
    if not steps or not records:
        raise UserError(f"{shown_path(run)} has no samples or no metrics yet: train it further")
    parts, every = [_step_of_page(run, step) for step in steps], 1
    while sum(map(len, parts[::-every])) > PAGE_BYTES and every < len(parts):
        every += 1
    parts = parts[::-every][::-1]  # the newest is one of them
    texts = dict.fromkeys(("name", "settings", "command", "facts"), "") | {"name": run.name}
    with suppress(OSError, ValueError, LookupError):  # lost or damaged: they only inform people
        texts["settings"] = (run / "config.yaml").read_text(encoding="utf-8")
        session = json.loads((run / "environment.json").read_text(encoding="utf-8"))["sessions"][-1]
        texts["command"] = one_line(" ".join(["python", *session["command"]]))
        texts["facts"] = f"python {session['python']}, torch {session['versions']['torch']}, {session['started']}"
    newest = {name: value for record in records for name, value in record.items()}
    rows = (f"<tr><td>{html.escape(name)}<td>{value:,.5g}" for name, value in newest.items())
    with own_style():
        loss_figure({run.name: records}).savefig(curves := io.BytesIO(), format="svg")
    page = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).substitute(
        {name: html.escape(text) for name, text in texts.items()}, steps="".join(parts), last=len(parts) - 1,
        metrics="".join(rows), curves=curves.getvalue().decode().partition("<svg")[2])  # fmt: skip
    with atomic_write(path) as part, os_errors_as_user_errors(path):
        part.write_text(page, encoding="utf-8", errors="backslashreplace")
    return f"wrote {out}: {run.name} at {len(parts)} of {len(steps)} steps, {len(page) / 1e6:.1f} MB"


def _step_of_page(run: Path, step: int) -> str:
    """The samples and the clip of a step as HTML, with their files in it."""
    path, clip, image = run / f"samples/step_{step:06d}.png", run / f"clips/step_{step:06d}.mp4", io.BytesIO()
    try:
        Image.open(path).save(image, "webp", quality=85)  # a fifth of the bytes
        video = clip.read_bytes() if os.path.exists(clip) else b""
    except OSError as error:
        raise UserError(f"{shown_path(path)} or its clip cannot be read: {error.strerror or error}") from None
    shown, moving = (base64.b64encode(data).decode() for data in (image.getvalue(), video))
    tag = f'<img alt="samples of step {step:,}" src="data:image/webp;base64,{shown}">'
    if video:
        tag += f'<video controls loop muted autoplay playsinline src="data:video/mp4;base64,{moving}"></video>'
    return f'<figure data-step="{step:,}">{tag}</figure>'

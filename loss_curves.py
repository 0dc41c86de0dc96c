"""The course of a run as a picture: what metrics.jsonl tells, one panel per question."""

from pathlib import Path

from pictures import told_in_one_line, written_whole

# Panel title -> the metrics drawn in it, and whether its axis is logarithmic.
_PANELS: dict[str, tuple[list[str], bool]] = {
    "critic: Wasserstein estimate\n(real minus generated score)": (["critic/gap"], False),
    "scores (their zero is arbitrary)": (["score/real", "score/updated", "score/base"], False),
    "gradient penalty": (["critic/penalty"], True),
    "reconstruction error\n(sum of squares per picture)": (["generator/reconstruction"], True),
    "KL divergence (nats per picture)": (["generator/kl"], False),
    "size of the update\nrelative to the weights (RMS)": (["update/relative_size"], False),
    "gradient norms": (["gradient_norm/discriminator", "gradient_norm/vae", "gradient_norm/predictor"], True),
    "pictures per second": (["speed/images_per_second"], False),
}
# Drawn where a run has measured it.
_QUALITY_PANELS: dict[str, tuple[list[str], bool]] = {
    "kernel distance (KID, raw)\nof updated and base pictures": (["quality/kid", "quality/kid_base"], True),
    "the critic's gap on training\nand on held-out pictures": (["quality/train_gap", "quality/heldout_gap"], False),
}


def plot_losses(records: list[dict[str, float]], path: Path) -> None:
    """Draws the course of a run, one panel per question, from `metrics.jsonl` records."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    measured = any("quality/kid" in record for record in records)
    panels = _PANELS | (_QUALITY_PANELS if measured else {})
    columns = len(panels) // 2
    figure = Figure(figsize=(3.5 * columns, 6.5), layout="constrained")
    axes = figure.subplots(2, columns).flat
    for (title, (names, logarithmic)), axis in zip(panels.items(), axes, strict=True):
        for name in names:
            points = [(record["step"], record[name]) for record in records if name in record]
            if logarithmic:
                points = [(step, value) for step, value in points if value > 0]
            if points:
                axis.plot(*zip(*points, strict=True), label=name.rpartition("/")[2], linewidth=1.3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if logarithmic and axis.lines:
            axis.set_yscale("log")
        if len(names) > 1 and axis.lines:
            axis.legend(fontsize=8, frameon=False)
    with told_in_one_line(path), written_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")

"""The results of an ablation: paired differences with intervals, a table, and distances over time."""

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from util import atomic_write, os_errors_as_user_errors

REFERENCE = "off"
"""The arm that all others are compared with."""
METHOD = "full"
"""The arm that is the whole method."""

NOTES = """\
Intervals: 95 %. *Bootstrap* resamples seeds and parts of the images, the same ones for both arms. With 3 seeds it is
too narrow: of 3 normal numbers it covers the mean 15 times in 20 (simulated), not 19. *t* is of the logarithm of each
seed's ratio: honest for so few where the ratios are near log-normal, and wide. The mean ratio beside it is geometric,
its centre. Several arms are compared with one: of 20 true zeros one excludes 0 by chance.
KID and Fréchet distance are on {features}: not the "FID" of papers."""


class LearningCurve(NamedTuple):
    """The evaluations of one arm with one seed."""

    arm: str
    seed: int
    seconds_per_step: float
    rows: list[dict[str, Any]]  # by step

    def at(self, where: dict[str, float], side: str, key: str) -> Any:
        """A measure of `base` or `updated` images, linear between the evaluations before and after.

        Args:
            where: {"steps": n} or {"seconds": s} of training; an evaluation less than a step from s counts as at s.

        Returns:
            A number, or an array for `kid_parts`; NaN outside of what was evaluated.
        """
        steps = [row["step"] for row in self.rows]
        step = where["steps"] if "steps" in where else where["seconds"] / self.seconds_per_step
        nearest = min(steps, key=lambda one: abs(one - step), default=math.inf)
        if "seconds" in where and abs(nearest - step) < 1:
            step = nearest
        if not steps or not steps[0] <= step <= steps[-1]:
            return math.nan
        weights = [np.interp(step, steps, one) for one in np.eye(len(steps))]
        return np.array([row[side][key] for row in self.rows]).T @ weights


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or, with a `UserError`, none."""
    with os_errors_as_user_errors(path), atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


Interval = tuple[float, float, float]
"""Difference, low, high: -0.15 is 15 % lower."""


def bootstrap_difference(arm: np.ndarray, reference: np.ndarray, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The relative difference mean(arm) / mean(reference) - 1 and its 95 % percentile interval (Efron 1979).

    Paired and in two stages: each resample takes seeds with replacement, and for each of them parts, the same ones for
    both arms. NaN for all where a value is missing.

    Args:
        arm, reference: (seeds, parts), the distance in each part of each seed's images.
    """
    if not (np.isfinite(arm).all() and np.isfinite(reference).all()) or not arm.size:
        return math.nan, math.nan, math.nan
    seeds, parts = arm.shape
    random = np.random.default_rng(seed)
    chosen = random.integers(seeds, size=(resamples, seeds, 1))
    part = random.integers(parts, size=(resamples, seeds, parts))
    ratios = arm[chosen, part].mean(axis=(1, 2)) / reference[chosen, part].mean(axis=(1, 2)) - 1
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(arm.mean() / reference.mean() - 1), float(low), float(high)


def t_difference(arm: np.ndarray, reference: np.ndarray) -> Interval:
    """The relative difference as the geometric mean of the seeds' ratios, and its 95 % interval by Student's t.

    Arguments as in `bootstrap_difference`. The interval is NaN with one seed, all is NaN where a mean is not above 0.
    """
    from scipy.stats import t  # only studies need scipy

    means, reference_means = arm.mean(axis=1), reference.mean(axis=1)
    if not (np.all(means > 0) and np.all(reference_means > 0)) or not arm.size:
        return math.nan, math.nan, math.nan
    logs = np.log(means / reference_means)
    error = logs.std(ddof=1) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    reach = t.ppf(0.975, max(1, len(logs) - 1)) * error
    difference, low, high = (float(np.expm1(logs.mean() + offset)) for offset in (0, -reach, reach))
    return difference, low, high


def compare(curves: list[LearningCurve], arm: str, where: dict[str, float]) -> dict[str, Any]:
    """An arm's updated images against the reference's at equal steps or seconds, over the seeds that both have."""
    # An ablation that was stopped early has whole comparisons of the first seeds.
    measured = {(curve.arm, curve.seed): curve for curve in curves if math.isfinite(curve.at(where, "updated", "kid"))}
    seeds = sorted(seed for name, seed in measured if name == arm and (REFERENCE, seed) in measured)

    def values(name: str, side: str, key: str) -> np.ndarray:
        return np.array([measured[name, seed].at(where, side, key) for seed in seeds])

    result: dict[str, Any] = {"arm": arm, "seeds": seeds, **where}
    if not seeds:
        return result
    for side in ("base", "updated"):
        result[side] = {key: float(values(arm, side, key).mean()) for key in ("kid", "frechet", "precision", "recall")}
        result[side]["kid_by_seed"] = values(arm, side, "kid").tolist()
    parts, reference = (values(name, "updated", "kid_parts") for name in (arm, REFERENCE))
    difference, *interval = bootstrap_difference(parts, reference)
    mean_ratio, *t_interval = t_difference(parts, reference)
    better = int((parts.mean(1) < reference.mean(1)).sum())
    result["difference"] = {"relative": difference, "bootstrap": interval, "mean_ratio": mean_ratio, "t": t_interval,
                            "better_seeds": better}  # fmt: skip
    off = float(values(REFERENCE, "base", "kid").mean())
    result["base_over_off"] = result["base"]["kid"] / off if off > 0 else math.nan
    return result


def write_table(path: Path, results: dict[str, Any]) -> None:
    """Writes `results` (see `ablation.py`) as Markdown."""
    lines = [f"`{results['command']}`, {results['device']}, {results['date']}", ""]
    for title, key in (("equal steps", "at_steps"), ("equal time of training", "at_seconds")):
        where = results[key]["where"]
        amount = f"{where['steps']:,} steps" if "steps" in where else f"{where['seconds']:,.0f} s of training"
        lines += [
            f"### At {title}: {amount}", "",
            "| arm | seeds | KID × 1000 of θ + Δ | of θ | mean KID against `off` | bootstrap | mean ratio to `off` | t "
            "| better | θ / `off` | Fréchet of θ + Δ / θ | precision | recall |",
            "|" + 13 * "---|", *(table_row(row) for row in results[key]["arms"]), "",
        ]  # fmt: skip
    lines += ["### Arms", "", "| arm | meaning | parameters | s / step |", "|---|---|---|---|"]
    lines += [f"| {name} | {arm['meaning']} | {arm['parameters']:,} | {arm['seconds_per_step']:.3f} |"
              for name, arm in results["arms"].items()]  # fmt: skip
    lines += ["", *(f"Failed: {run}: {reason}" for run, reason in results["failures"].items())]
    lines += [NOTES.format(features=results["features"]).replace("\n", " "), ""]
    write_text(path, "\n".join(lines))


def table_row(row: dict[str, Any]) -> str:
    """A line of the table from what `compare` returns; dashes for what was not measured."""
    if not row["seeds"]:
        return f"| {row['arm']} | 0 |" + " – |" * 11
    updated, base, difference = row["updated"], row["base"], ["reference", "", "", "", ""]
    if row["arm"] != REFERENCE:
        result = row["difference"]
        difference = [_percent(result["relative"]), _percent(*result["bootstrap"]), _percent(result["mean_ratio"]),
                      _percent(*result["t"]), f"{result['better_seeds']} of {len(row['seeds'])}"]  # fmt: skip
    cells = [
        row["arm"], str(len(row["seeds"])), f"{1000 * updated['kid']:.1f}", f"{1000 * base['kid']:.1f}", *difference,
        f"{row['base_over_off']:.2f}", f"{updated['frechet']:.1f} / {base['frechet']:.1f}",
        f"{updated['precision']:.2f}", f"{updated['recall']:.2f}",
    ]  # fmt: skip
    return "| " + " | ".join("–" if cell == "nan" else cell for cell in cells) + " |"


def _percent(*values: float) -> str:
    """A percentage, or an interval of two."""
    texts = [f"{value:+.1%}".replace("%", " %").replace("-", "−") for value in values]
    return "–" if math.isnan(values[0]) else " to ".join(texts)


def plot_over_time(curves: list[LearningCurve], features: str) -> Any:
    """KID over seconds of training: a line for each arm, its seeds' mean, in a band from the least to the largest."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    palette = itertools.cycle([colormaps["tab20"](index) for index in range(20) if index not in (6, 7)])  # no reds
    arms = {name: [curve for curve in curves if curve.arm == name] for name in dict.fromkeys(c.arm for c in curves)}
    for (name, runs), marker in zip(arms.items(), itertools.cycle("osvh^D<>pPX*d"), strict=False):
        colour, main = {REFERENCE: "black", METHOD: "crimson"}.get(name) or next(palette), name in (REFERENCE, METHOD)
        steps = sorted(set.intersection(*({row["step"] for row in run.rows} for run in runs)))
        seconds = [step * runs[0].seconds_per_step for step in steps]
        for axis, side in zip(axes, ("updated", "base"), strict=True):
            kids = [{row["step"]: 1000 * row[side]["kid"] for row in run.rows} for run in runs]
            values = np.array([[kid[step] for step in steps] for kid in kids])
            axis.plot(seconds, values.mean(0), color=colour, marker=marker, label=name, markersize=5 if main else 4,
                      linewidth=2.4 if main else 1.2, zorder=3 if main else 2)  # fmt: skip
            axis.fill_between(seconds, values.min(0), values.max(0), color=colour, alpha=0.1, linewidth=0)
    for axis, title in zip(axes, ("decoded with θ + Δ", "decoded with θ alone"), strict=True):
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("seconds of training (CPU time of one thread)")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))  # a range is rarely a whole decade
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(alpha=0.25, which="both")
    axes[0].set_ylabel(f"KID × 1000 on {features.partition(' (')[0]}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure

"""What an ablation's runs say: paired differences with intervals, a table, and distances over time."""

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ablation_arms import ARMS, METHOD, REFERENCE
from pictures import told_in_one_line, written_whole

RESAMPLES = 10_000

SMALL_NUMBERS = """\
Intervals: 95 %. *Bootstrap* resamples seeds and parts of the pictures, both arms alike. With 3 seeds it knows but 10
different choices of them, and is too narrow: of 3 normal numbers it covers the mean 15 times in 20 (tried), not 19.
*t* is of the logarithm of each seed's ratio, with one degree of freedom less than seeds: honest for so few where
the ratios are near log-normal, and wide. The mean ratio beside it is geometric, its centre. Several arms are compared
with one: of 20 true zeros one excludes 0 by chance.
KID and Fréchet distance are on {features}: not the "FID" of papers."""


class Course(NamedTuple):
    """The evaluations of one arm with one seed."""

    arm: str
    seed: int
    seconds_per_step: float
    rows: list[dict[str, Any]]
    """By step."""

    def at(self, step: float, side: str, key: str) -> Any:
        """A measure of `base` or `updated` pictures at a step: linear between the evaluations before and after it.

        Returns:
            A number, or an array for `kid_parts`; NaN outside of what was evaluated.
        """
        steps = [row["step"] for row in self.rows]
        values = np.array([row[side][key] for row in self.rows], dtype=float)
        if not steps or not steps[0] <= step <= steps[-1]:
            return np.full(values.shape[1:], np.nan) if values.ndim > 1 else math.nan
        if values.ndim == 1:
            return float(np.interp(step, steps, values))
        return np.array([np.interp(step, steps, column) for column in values.T])

    def at_seconds(self, seconds: float, side: str, key: str) -> Any:
        """The same after so many seconds of training: of the evaluation less than a step away, where there is one."""
        steps = seconds / self.seconds_per_step
        nearest = min((row["step"] for row in self.rows), key=lambda step: abs(step - steps), default=math.inf)
        return self.at(nearest if abs(nearest - steps) < 1 else steps, side, key)


# ----------------------------------------------------------------------------------------------------------- statistics


def bootstrap_difference(
    arm: np.ndarray, reference: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """The relative difference mean(arm) / mean(reference) - 1 and its 95 % percentile interval (Efron 1979).

    Paired and in two stages: each resample draws seeds with replacement, and for each of them parts, the same ones for
    both arms.

    Args:
        arm, reference: (seeds, parts), the distance in each part of each seed's pictures.

    Returns:
        Difference, low, high: -0.15 is 15 % lower. NaN for all where a value is missing.
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


def t_difference(arm: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """The relative difference as the geometric mean of the seeds' ratios, and its 95 % interval by Student's t.

    Args:
        arm, reference: (seeds, parts), as in `bootstrap_difference`.

    Returns:
        Difference, low, high, of which the latter two are NaN with one seed; NaN for all where a mean is not above 0.
    """
    mine, theirs = arm.mean(axis=1), reference.mean(axis=1)
    if not (np.all(mine > 0) and np.all(theirs > 0)) or not arm.size:
        return math.nan, math.nan, math.nan
    logs = np.log(mine / theirs)
    spread = logs.std(ddof=1) / math.sqrt(len(logs)) if len(logs) > 1 else math.nan
    reach = _t_quantile(max(1, len(logs) - 1)) * spread
    difference, low, high = (float(np.expm1(logs.mean() + away)) for away in (0, -reach, reach))
    return difference, low, high


def _t_quantile(freedom: int) -> float:
    """Student's t at 97.5 %, for degrees of freedom from 1 on."""
    table = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814)
    if freedom <= len(table):
        return table[freedom - 1]
    z = 1.959964  # Cornish and Fisher's expansion: within 0.0003 from here on
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def compare(courses: list[Course], arm: str, where: dict[str, float], side: str = "updated") -> dict[str, Any]:
    """An arm against the reference at equal steps or seconds, over the seeds that both have.

    Args:
        where: {"steps": n} or {"seconds": s}.
    """

    def value(course: Course, of: str, key: str) -> Any:
        if "steps" in where:
            return course.at(where["steps"], of, key)
        return course.at_seconds(where["seconds"], of, key)

    # Whoever stopped the ablation early has whole comparisons of the first seeds.
    measured = {
        (course.arm, course.seed): course for course in courses if math.isfinite(value(course, "updated", "kid"))
    }
    seeds = sorted(seed for name, seed in measured if name == arm and (REFERENCE, seed) in measured)

    def values(name: str, of: str, key: str) -> list[Any]:
        return [value(measured[name, seed], of, key) for seed in seeds]

    result: dict[str, Any] = {"arm": arm, "seeds": seeds, **where}
    if not seeds:
        return result
    for of in ("base", "updated"):
        result[of] = {key: float(np.mean(values(arm, of, key))) for key in ("kid", "frechet", "precision", "recall")}
        result[of]["kid_by_seed"] = [float(value) for value in values(arm, of, "kid")]
    parts, reference = np.array(values(arm, side, "kid_parts")), np.array(values(REFERENCE, side, "kid_parts"))
    difference, *interval = bootstrap_difference(parts, reference)
    centre, *t_interval = t_difference(parts, reference)
    result["difference"] = {
        "relative": difference,
        "bootstrap": interval,
        "mean_ratio": centre,
        "t": t_interval,
        "better_seeds": int((parts.mean(1) < reference.mean(1)).sum()),
    }
    off = float(np.mean(values(REFERENCE, "base", "kid")))
    result["base_over_off"] = result["base"]["kid"] / off if off > 0 else math.nan
    return result


# ---------------------------------------------------------------------------------------------------------------- table


def write_table(path: Path, results: dict[str, Any]) -> None:
    """Writes `results` (see `ablation.py`) as Markdown."""
    lines = [f"`{results['command']}`, {results['device']}, {results['date']}", ""]
    for title, key in (("equal steps", "at_steps"), ("equal time of training", "at_seconds")):
        where = results[key]["where"]
        what = f"{where['steps']:,} steps" if "steps" in where else f"{where['seconds']:,.0f} s of training"
        lines += [
            f"### At {title}: {what}", "",
            "| arm | seeds | KID × 1000 of θ + Δ | of θ | mean KID against `off` | bootstrap | mean ratio to `off` | t "
            "| better | θ / `off` | Fréchet of θ + Δ / θ | precision | recall |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        lines += [_row(row) for row in results[key]["arms"]]
        lines.append("")
    lines += ["### What ran", "", "| arm | meaning | parameters | s / step | " + " | ".join(_RATES) + " | rates |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, arm in results["arms"].items():
        rates = " | ".join(f"{arm['rates'][rate]:.2g}" for rate in _RATES)
        lines.append(
            f"| {name} | {arm['meaning']} | {arm['parameters']:,} | {arm['seconds_per_step']:.3f} | {rates} "
            f"| {arm['rates_from']} |"
        )
    lines.append("")
    if results.get("amplification"):
        lines += [
            f"Amplification of `{METHOD}`: θ + Δ moves {results['amplification']:.2f} times as far as θ a step.",
            "",
        ]
    lines += [f"Failed: {failure}" for failure in results["failures"]]
    lines += [SMALL_NUMBERS.format(features=results["features"]).replace("\n", " "), ""]
    with told_in_one_line(path), written_whole(path) as part:
        part.write_text("\n".join(lines), encoding="utf-8")


_RATES = ("lr_vae", "lr_discriminator", "lr_predictor")


def _row(row: dict[str, Any]) -> str:
    if "updated" not in row:
        return f"| {row['arm']} | 0 |" + " – |" * 11
    difference, updated, base = row["difference"], row["updated"], row["base"]
    is_reference = row["arm"] == REFERENCE
    cells = [
        row["arm"],
        str(len(row["seeds"])),
        _number(1000 * updated["kid"], ".1f"),
        _number(1000 * base["kid"], ".1f"),
        "reference" if is_reference else _percent(difference["relative"]),
        "" if is_reference else _interval(difference["bootstrap"]),
        "" if is_reference else _percent(difference["mean_ratio"]),
        "" if is_reference else _interval(difference["t"]),
        "" if is_reference else f"{difference['better_seeds']} of {len(row['seeds'])}",
        _number(row["base_over_off"], ".2f"),
        f"{_number(updated['frechet'], '.1f')} / {_number(base['frechet'], '.1f')}",
        _number(updated["precision"], ".2f"),
        _number(updated["recall"], ".2f"),
    ]
    return "| " + " | ".join(cells) + " |"


def _number(value: float, pattern: str) -> str:
    return "–" if math.isnan(value) else format(value, pattern)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.1%}".replace("%", " %").replace("-", "−")


def _interval(values: list[float]) -> str:
    return "–" if math.isnan(values[0]) else f"{_percent(values[0])} to {_percent(values[1])}"


# ----------------------------------------------------------------------------------------------------------------- plot


def plot_over_time(path: Path, courses: list[Course], features: str) -> None:
    """KID over seconds of training: a line for each arm, its seeds' mean, in a band from the least to the largest."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    tab20 = colormaps["tab20"]
    places = (place for place in itertools.cycle(range(20)) if place not in (6, 7))  # reds look like the method's
    colours: dict[str, str | tuple[float, float, float, float]] = {name: tab20(next(places)) for name in ARMS}
    colours |= {REFERENCE: "black", METHOD: "crimson"}
    markers = dict(zip(ARMS, itertools.cycle("osvh^D<>pPX*d"), strict=False))
    for axis, (side, title) in zip(
        axes, (("updated", "drawn with θ + Δ"), ("base", "drawn with θ alone")), strict=True
    ):
        for name in ARMS:
            runs = [course for course in courses if course.arm == name and course.rows]
            if not runs:
                continue
            steps = sorted(set.intersection(*({row["step"] for row in run.rows} for run in runs)))
            values = 1000 * np.array([[run.at(step, side, "kid") for step in steps] for run in runs])
            seconds = [step * runs[0].seconds_per_step for step in steps]
            main = name in (REFERENCE, METHOD)
            axis.plot(
                seconds, values.mean(0), color=colours[name], marker=markers[name], label=name,
                markersize=5 if main else 4, linewidth=2.4 if main else 1.2, zorder=3 if main else 2,
            )  # fmt: skip
            if len(runs) > 1:
                axis.fill_between(
                    seconds,
                    values.min(0),
                    values.max(0),
                    color=colours[name],
                    alpha=0.15 if main else 0.06,
                    linewidth=0,
                )
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("seconds of training (CPU time of one thread)")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))  # a range is rarely a whole decade
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(alpha=0.25, which="both")
    axes[0].set_ylabel(f"KID × 1000 on {features.partition(' (')[0]}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    with told_in_one_line(path), written_whole(path) as part:
        figure.savefig(part, dpi=120, format="png")

"""Plots of evaluations and ablations: a PNG file of each, and SVG in a page's own colours."""

import io
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from scipy.ndimage import uniform_filter1d

from ..utils.files import write_atomically
from .findings import METRICS, TEMPLATES, Metric, Value, dig, metric_keys, rows_of, union

INK = "#1b2129"  # of text and axes in the style sheet
MARKERS, LINES = ("o", "s", "^", "D", "v", "P", "X", "*"), ("-", "--", "-.", ":")  # tell arms apart without colours
Lines = dict[str, dict[int, Value]]  # by label, values by x


@matplotlib.rc_context(fname=TEMPLATES / "plots.mplstyle")
def draw(
    path: Path, title: str, axes: tuple[str, str], lines: Lines, metric: Metric,
    limit: tuple[str, float | None] = ("", None), aligned: Sequence[int] = (),
    thin: dict[str, list[dict[int, float]]] | None = None, from_zero: bool = False,
) -> Markup:  # fmt: skip
    """Draw lines with their confidence as bands, as a PNG file and as SVG.

    Args:
        axes: Labels of x and y; `tokens` are drawn on a logarithmic axis, and so is a wide y with `thin` lines.
        lines: One without values is left out; the others keep their colours.
        metric: For the least range of y: noise must not look like a slope.
        limit: Label and height of what bounds the lines.
        aligned: Decoder layers that training aligned, marked.
        thin: Curves of single seeds behind each line.
        from_zero: Whether y begins at 0.
    """
    axis = Figure().subplots()
    axis.set(title=title, xlabel=axes[0], ylabel=axes[1])
    named: dict[str, Artist] = {}  # the legend, not by `label=`: matplotlib leaves out names that begin with `_`
    for i, (label, points) in enumerate(lines.items()):
        for single in (thin or {}).get(label, []):
            axis.plot(list(single), list(single.values()), color=f"C{i}", linewidth=0.5, alpha=0.4)
        if points:
            x, (y, low, high) = list(points), np.array(list(points.values()), dtype=float).T
            marker = MARKERS[i % len(MARKERS)] if len(x) <= 40 else ""
            (named[label],) = axis.plot(x, y, color=f"C{i}", marker=marker, linestyle=LINES[i % len(LINES)])
            axis.fill_between(x, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
            axis.vlines(x, low, high, color=f"C{i}", alpha=0.4)
    for layer in aligned:
        named["aligned in training"] = axis.axvline(layer, color="C1", linestyle=":")

    # y spans at least the metric's span, else a tenth of the values
    low, high = axis.dataLim.intervaly
    missing = (metric.span or 0.1 * max(abs(low), abs(high))) - (high - low)
    if thin is not None and 0 < 3 * low < high:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif missing > 0:
        axis.set_ylim(low - missing / 2, high + missing / 2)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    if axes[0] == "tokens":
        counts = sorted(union(lines.values()))
        axis.set_xscale("log", base=2)
        axis.set_xlim(counts[0] / 1.2, counts[-1] * 1.2)
        ticks: list[int] = []
        for count in reversed(counts):  # from the right, so that the most tokens are always named
            ticks += [count] if not ticks or ticks[-1] / count >= 1.5 else []
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()

    # The limit: a dashed line; only words where it is so far away that it would flatten the others
    label, height = limit
    if height is not None:
        low, high = axis.get_ylim()
        style = {"color": INK, "linestyle": "--", "linewidth": 1.2}
        if height < metric.lossless and abs(height - (low + high) / 2) <= 4.5 * (high - low):
            named[label] = axis.axhline(height, **style)
            margin = 0.05 * (high - low)
            axis.set_ylim(min(low, height - margin), max(high, height + margin))
        else:
            where = "" if height >= metric.lossless else ", off this axis"
            (named[f"{label}: {metric.show(height)}{where}"],) = axis.plot([], [], **style)
            axis.set_ylim(low, high)
    axis.set_ylim(bottom=0 if from_zero else None)

    figure = axis.figure
    named.pop("", None)  # of an evaluation alone
    if named:
        columns = 1 if max(map(len, named)) > 24 else min(3, len(named))
        legend = figure.legend(named.values(), ["?"] * len(named), loc="outside lower center", ncols=columns)
        for text, name in zip(legend.get_texts(), named):
            text.set_text(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    figure.set_layout_engine("none")  # as it is
    text, nothing = io.StringIO(), dict.fromkeys(["Creator", "Date", "Format", "Type"])
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # ids differ between the plots of a page; rc_context resets it
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = re.sub(r'<defs>\s*<style.*?</defs>|(?<=<g) id="[^"]*"', "", text.getvalue(), flags=re.S)
    return Markup(svg[svg.index("<svg") :].replace(INK, "currentColor"))


def plots_of(arms: Sequence[dict], folder: Path) -> dict[str, Markup]:
    """Draw what the runs of some arms hold, as `folder`/plots/NAME.png; parts without numbers are left out.

    Args:
        arms: Each a name and runs with `results` and `curves`. One run alone is also shown with its limits.

    Returns:
        SVG by name: curves and reconstruction metrics by their keys, then `cknna`, `used`, `entropy_bits`.
    """
    plots: dict[str, Markup] = {}
    runs = [run for arm in arms for run in arm["runs"]]
    alone = runs[0]["results"] if len(runs) == 1 else {}

    def plot(name: str, title: str, axes: tuple[str, str], lines: Lines, metric: Metric, **options) -> None:
        if any(lines.values()):
            path = Path(folder) / "plots" / f"{name.replace('/', '_')}.png"
            plots[name] = draw(path, title, axes, lines, metric, **options)

    for key in curve_keys(runs):
        metric, title = loss_of(key)
        thin = {arm["name"]: [points for run in arm["runs"] if (points := curve(run, key))] for arm in arms}
        means = {name: mean_curve(curves, smooth=key.startswith("train/")) for name, curves in thin.items()}
        plot(key, title, ("optimizer step", metric.label), means, metric, thin=thin)
    for key in union(metric_keys(run["results"]) for run in runs):
        metric = METRICS[key]
        limit = ("VAE alone", dig(alone, "reconstruction", "vae", key, "value"))
        lines = bands(arms, lambda results, key=key: by_tokens(results, key))
        plot(key, metric.label + metric.sign, ("tokens", metric.unit or metric.label), lines, metric, limit=limit)
    axes, limit = ("decoder layer (0 is the first)", "CKNNA"), ("tokens", dig(alone, "alignment", "tokens_cknna"))
    aligned = dig(alone, "alignment", "aligned_layers") or ()
    plot("cknna", "CKNNA by decoder layer ↑", axes, bands(arms, by_layer), METRICS["cknna"], limit=limit,
         aligned=aligned)  # fmt: skip
    n, n_codes = dig(alone, "codes", "n"), dig(alone, "codes", "codebook_size")
    most = min(n, n_codes) if alone else None
    label = f"most possible with {n} images" if most == n else "size of the codebook"
    for key, title in (("used", "Different codes"), ("entropy_bits", "Entropy of the codes")):
        axes = ("token position (1 is the first)", METRICS[key].unit or "codes")
        limit = (label, math.log2(most) if most and key == "entropy_bits" else most)
        lines = bands(arms, lambda results, key=key: {i: Value(x) for i, x in enumerate(results["codes"][key], 1)})
        plot(key, f"{title} by token position ↑", axes, lines, METRICS[key], limit=limit, from_zero=True)
    return plots


def by_tokens(results: dict, key: str) -> dict[int, Value]:
    """A reconstruction metric by token count."""
    rows = {count: row for count, row in rows_of(results).items() if count != "vae"}
    return {int(count): Value.read(row.get(key), METRICS[key]) for count, row in rows.items()}


def by_layer(results: dict) -> dict[int, Value]:
    """CKNNA by decoder layer."""
    return {layer["layer"]: Value(layer["cknna"]) for layer in dig(results, "alignment", "layers") or []}


def bands(arms: Sequence[dict], read: Callable[[dict], dict[int, Value]]) -> Lines:
    """For each arm the band over its seeds of read(results) at each x; nothing where all of it is missing."""
    lines: Lines = {}
    for arm in arms:
        tables = [read(run["results"]) for run in arm["runs"]]
        points = {x: band(table.get(x, Value()) for table in tables) for x in sorted(union(tables))}
        lines[arm["name"]] = points if any(value.value is not None for value in points.values()) else {}
    return lines


def band(values: Iterable[Value]) -> Value:
    """Mean over seeds with mean -+ standard deviation; of one seed, its confidence over images."""
    values = [value for value in values if value.value is not None]
    if len(values) < 2:
        return values[0] if values else Value()
    numbers = [float(value.value or 0.0) for value in values]
    mean, std = statistics.mean(numbers), statistics.stdev(numbers)
    return Value(mean, mean - std, mean + std)


def curve_keys(runs: Sequence[dict]) -> list[str]:
    """Names of the curves that have points in any run."""
    return union([key for key in run.get("curves", {}) if key != "step" and curve(run, key)] for run in runs)


def curve(run: dict, key: str) -> dict[int, float]:
    """One curve of a run by step, given as a value for each step of training or as pairs; without missing values."""
    curves = run["curves"]
    pairs = zip(curves["step"], curves[key]) if key.startswith("train/") else curves[key]
    return {step: value for step, value in pairs if value is not None and math.isfinite(value)}


def loss_of(key: str) -> tuple[Metric, str]:
    """The loss that a curve such as `val/flow_loss` shows, and its name."""
    split, name = key.split("/")
    return METRICS[name], f"{METRICS[name].label}, {'training' if split == 'train' else 'validation'}"


def mean_curve(curves: list[dict[int, float]], smooth: bool) -> dict[int, Value]:
    """Mean over seeds at the steps that all of them have; smoothed over 2 % of them if asked for."""
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    means = [statistics.mean(points[step] for points in curves) for step in steps]
    if smooth and steps:
        means = uniform_filter1d(means, max(1, len(means) // 50), mode="nearest").tolist()
    return {step: Value(mean) for step, mean in zip(steps, means)}

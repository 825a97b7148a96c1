"""Arms of an ablation compared with the first one: differences, and a verdict on each metric.

A verdict calls arms different only where the difference exceeds what seeds alone do: the 95 % interval of the mean
difference over the seeds that both arms have (Student's t) must exclude 0. With one seed that cannot be known, and the
verdict says so.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

from .findings import DASH, Cell, Metric, Value, number
from .plots import band

KINDS = {
    "better": "better",
    "worse": "worse",
    "same": "no difference shown",
    "open": "differs, but not shown beyond one seed",
    "other": "differs, for better or worse",
    "missing": "not compared",
}


class Row(NamedTuple):
    """A metric of all arms: for each arm, its values by seed, without those that are missing."""

    name: str
    metric: Metric
    arms: list[dict[int, Value]]


class Difference(NamedTuple):
    """An arm minus the first: mean, and over two seeds or more standard deviation and half the 95 % interval."""

    mean: float
    std: float | None
    margin: float | None
    seeds: list[int]


def difference(first: dict[int, Value], arm: dict[int, Value]) -> Difference | None:
    """Compare values by seed, paired; None without a seed that both have."""
    seeds = sorted(set(first) & set(arm))
    if not seeds:
        return None
    differences = [arm[seed].value - first[seed].value for seed in seeds]
    mean = statistics.mean(differences)
    if len(seeds) == 1:
        return Difference(mean, None, None, seeds)
    margin = float(stats.t.ppf(0.975, len(seeds) - 1) * stats.sem(differences))
    return Difference(mean, statistics.stdev(differences), margin, seeds)


def verdict(row: Row, i: int, names: Sequence[str]) -> tuple[str, str]:
    """One of KINDS, and in a sentence what the numbers say of arm i against the first arm, and no more than that."""
    first, arm, metric = row.arms[0], row.arms[i], row.metric
    found = difference(first, arm)
    if found is None:
        without = " and ".join(names[j] for j in (0, i) if not row.arms[j]) or "the same seed"
        return "missing", f"{names[i]} not compared: no value for {without}."
    basis = "one seed" if found.margin is None else f"{len(found.seeds)} seeds, paired"
    largest = max(abs(value.value) for value in [*first.values(), *arm.values()])
    if abs(found.mean) <= 1e-9 * largest and not found.margin:
        return "same", f"{names[i]} equal ({basis}): no difference shown."
    side, unit = "higher" if found.mean > 0 else "lower", "percentage points" if metric.unit == "%" else metric.unit
    text = f"{side} by {number(abs(found.mean), metric.digits)} {unit}".strip()
    if found.margin is None:  # nothing is known of seeds: the confidence over images is all there is
        (seed,) = found.seeds
        overlap = first[seed].overlaps(arm[seed])
        start = f"{names[i]} {text} with one seed, so without a spread over seeds"
        if overlap is None:
            return "open", f"{start}, and without a confidence over images: it may be chance."
        if overlap:
            return "same", f"{start}; the 95 % intervals over images overlap: no difference shown."
        doubt = "these two models differ, but another seed may not show it."
        return "open", f"{start}; the 95 % intervals over images do not overlap: {doubt}"
    low, high = (number(found.mean + margin, metric.digits, sign=True) for margin in (-found.margin, found.margin))
    over = f"the spread over seeds (95 % interval of the difference {low} to {high}; {basis})"
    if abs(found.mean) <= found.margin:
        return "same", f"{names[i]} {text}, within {over}: no difference shown."
    if not metric.better:
        return "other", f"{names[i]} {text}, beyond {over}; whether that is better is not known."
    kind = "better" if side == metric.better else "worse"
    return kind, f"{names[i]} {kind}: {text}, beyond {over}."


def cell(row: Row, i: int, names: Sequence[str]) -> Cell:
    """Mean ± standard deviation over seeds, or one seed's value and confidence; below it the difference to arm 0."""
    metric, mean = row.metric, band(row.arms[i].values())
    text = metric.show(mean.value)
    if len(row.arms[i]) > 1:
        text = f"{text} ± {number((mean.high - mean.low) / 2, metric.digits)}"
    elif mean.interval(metric):
        text = f"{text} ({mean.interval(metric)})"
    if i == 0:
        return Cell(text)
    found = difference(row.arms[0], row.arms[i])
    if found is None:
        return Cell(text, f"difference {DASH}")
    spread = "" if found.std is None else f" ± {number(found.std, metric.digits)}"
    return Cell(text, f"difference {number(found.mean, metric.digits, sign=True)}{spread}", verdict(row, i, names)[0])


def comparison(rows: Sequence[Row], names: Sequence[str]) -> list[list]:
    """Heading and rows of a table: metric, then each arm."""
    table = [[row.name + row.metric.sign, *(cell(row, i, names) for i in range(len(names)))] for row in rows]
    return [["metric", *names], *table]

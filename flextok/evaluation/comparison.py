"""Arms of an ablation compared with the first one: differences, and a verdict on each metric.

A verdict calls arms different only where the difference exceeds what seeds alone do: the 95 % interval of the mean
difference (Student's t; paired where the arms share seeds) must exclude 0. With one seed that cannot be known, and
the verdict says so.
"""

import math
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
    "missing": "not compared",
}


class Difference(NamedTuple):
    """An arm minus the first: mean, standard deviation over seeds, half the 95 % interval, and what it rests on."""

    mean: float
    std: float | None
    margin: float | None
    basis: str


class Row(NamedTuple):
    """A metric of all arms: for each arm, its values by seed."""

    name: str
    metric: Metric
    arms: list[dict[int, Value]]

    @property
    def counts(self) -> bool:
        """Whether any run has the metric."""
        return any(known(arm) for arm in self.arms)


def known(values: dict) -> dict[int, float]:
    """Numbers by seed (or layer), without those that are missing."""
    return {key: value.value for key, value in values.items() if value.value is not None}


def difference(first: dict[int, float], arm: dict[int, float]) -> Difference | None:
    """Compare values by seed: paired over shared seeds if there are two, else as groups; None without values.

    Independent groups take Welch's standard error with the smaller group's degrees of freedom, which is cautious.
    """
    if not first or not arm:
        return None
    shared = sorted(set(first) & set(arm))
    if len(shared) >= 2:
        groups, basis = [[arm[seed] - first[seed] for seed in shared]], f"{len(shared)} seeds, paired"
        mean = statistics.mean(groups[0])
    else:
        groups = [list(first.values()), list(arm.values())]
        if shared and min(map(len, groups)) == 1:
            groups = [[first[shared[0]]], [arm[shared[0]]]]  # the same seed on both sides
        mean = statistics.mean(groups[1]) - statistics.mean(groups[0])
        basis = " and ".join(str(len(group)) for group in groups) + " other seeds"
    fewest = min(map(len, groups))
    if fewest < 2:
        return Difference(mean, None, None, "one seed")
    error = math.hypot(*(stats.sem(group) for group in groups))
    std = math.hypot(*(statistics.stdev(group) for group in groups))
    return Difference(mean, std, float(stats.t.ppf(0.975, fewest - 1)) * error, basis)


def verdict(row: Row, i: int, names: Sequence[str]) -> tuple[str, str]:
    """One of KINDS, and in a sentence what the numbers say of arm i against the first arm, and no more than that."""
    first, arm, metric = known(row.arms[0]), known(row.arms[i]), row.metric
    found = difference(first, arm)
    if found is None:
        without = " and ".join(names[j] for j in (0, i) if not known(row.arms[j]))
        return "missing", f"{names[i]} not compared: no value for {without}."
    if abs(found.mean) <= 1e-9 * max(map(abs, [*first.values(), *arm.values()])) and not found.margin:
        return "same", f"{names[i]} equal ({found.basis}): no difference shown."
    side, unit = "higher" if found.mean > 0 else "lower", "percentage points" if metric.unit == "%" else metric.unit
    text = f"{side} by {number(abs(found.mean), metric.digits)} {unit}".strip()
    if found.margin is None:  # nothing is known of seeds: the confidence over images is all there is
        seed = next(iter(sorted(set(first) & set(arm))), None)
        a, b = (row.arms[j][next(iter(known(row.arms[j]))) if seed is None else seed] for j in (0, i))
        start = f"{names[i]} {text} with one seed, so without a spread over seeds"
        overlap = a.overlaps(b)
        if overlap is None:
            return "open", f"{start}, and without a confidence over images: it may be chance."
        if overlap:
            return "same", f"{start}; the 95 % intervals over images overlap: no difference shown."
        doubt = "these two models differ, but another seed may not show it."
        return "open", f"{start}; the 95 % intervals over images do not overlap: {doubt}"
    low, high = (number(found.mean + margin, metric.digits, sign=True) for margin in (-found.margin, found.margin))
    over = f"the spread over seeds (95 % interval of the difference {low} to {high}; {found.basis})"
    if abs(found.mean) <= found.margin:
        return "same", f"{names[i]} {text}, within {over}: no difference shown."
    kind = "better" if side == metric.better else "worse"
    return kind, f"{names[i]} {kind}: {text}, beyond {over}."


def cell(row: Row, i: int, names: Sequence[str]) -> Cell:
    """Mean ± standard deviation over seeds, or one seed's value and confidence; below it the difference to arm 0."""
    metric, mean = row.metric, band(row.arms[i].values())
    text = metric.show(mean.value)
    if len(known(row.arms[i])) > 1:
        text = f"{text} ± {number((mean.high - mean.low) / 2, metric.digits)}"
    elif mean.interval(metric):
        text = f"{text} ({mean.interval(metric)})"
    if i == 0:
        return Cell(text)
    found = difference(known(row.arms[0]), known(row.arms[i]))
    if found is None:
        return Cell(text, f"difference {DASH}")
    spread = "" if found.std is None else f" ± {number(found.std, metric.digits)}"
    return Cell(text, f"difference {number(found.mean, metric.digits, sign=True)}{spread}", verdict(row, i, names)[0])


def comparison(rows: Sequence[Row], names: Sequence[str]) -> list[list]:
    """Heading and rows of a table: metric, then each arm."""
    table = [[row.name + row.metric.sign, *(cell(row, i, names) for i in range(len(names)))] for row in rows]
    return [["metric", *names], *table]

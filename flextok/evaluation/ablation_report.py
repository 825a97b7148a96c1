"""Arms of an ablation compared with the first one: tables, curves, pictures, and a verdict on each metric.

A verdict calls arms different only where the difference exceeds what seeds alone do: the 95 % interval of the mean
difference (Student's t; paired where the arms share seeds) must exclude 0. With one seed that cannot be known, and
the verdict says so.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from .report import (
    COLOURS,
    DASH,
    GRID_TITLES,
    METRICS,
    Metric,
    bullets,
    definitions,
    draw_line,
    duration,
    escape,
    escaped_table,
    explained_keys,
    explanations,
    finite,
    grid_html,
    html_table,
    metric_keys,
    metric_of,
    missing_parts,
    new_plot,
    number,
    plots_html,
    save_plot,
    size,
    text_table,
    token_axis,
    token_counts,
    tokens,
    value_of,
    warnings_of,
    write_page,
)

# 97.5 % quantiles of Student's t by degrees of freedom; more seeds than these take the last, which is a little wide.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")  # broken ones let the arm below show through
LOSSES = {
    "flow_loss": Metric(
        "flow loss", "", "lower", 4,
        "Mean squared error of the decoder's velocity, on fixed noise and timesteps in validation.",
        "rectified flow, arXiv 2209.03003", "https://arxiv.org/abs/2209.03003",
    ),
    "repa_loss": Metric(
        "REPA loss", "", "lower", 4,
        "Minus the cosine similarity of projected decoder features and the vision encoder's.",
        "REPA, arXiv 2410.06940", "https://arxiv.org/abs/2410.06940",
    ),
}  # fmt: skip
KINDS = {
    "better": "better",
    "worse": "worse",
    "same": "no difference shown",
    "open": "differs, but not shown beyond one seed",
    "missing": "not compared",
}


class Value(NamedTuple):
    """A metric of one run; `low` and `high` are its confidence over images, where known."""

    value: Optional[float]
    low: Optional[float] = None
    high: Optional[float] = None


class Row(NamedTuple):
    """A metric of all arms: for each arm, its values by seed."""

    name: str
    metric: Metric
    arms: List[Dict[int, Value]]


class Verdict(NamedTuple):
    """One of KINDS and the sentence that says it."""

    kind: str
    text: str


# Numbers


def check(ablation: dict) -> None:
    """Raise ValueError for another format, no arms, arms of one name, or two runs of an arm with one seed."""
    if ablation.get("format") != 1:
        raise ValueError(f"the ablation has format {ablation.get('format')!r}, expected 1")
    names = [arm["name"] for arm in ablation["arms"]]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"the ablation's arms are {names}, expected at least one, each with its own name")
    for arm in ablation["arms"]:
        seeds = [run["seed"] for run in arm["runs"]]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"arm {arm['name']!r} has runs with seeds {seeds}, expected each seed once")


def results_of(run: dict) -> dict:
    return run.get("results") or {}


def all_runs(ablation: dict) -> List[Tuple[dict, dict]]:
    """(arm, run) of every run."""
    return [(arm, run) for arm in ablation["arms"] for run in arm["runs"]]


def union(lists: Sequence[Sequence]) -> list:
    """Entries of all lists once, in the order in which they first come."""
    return list(dict.fromkeys(entry for entries in lists for entry in entries))


def points(curve: Sequence, steps: Sequence[int]) -> List[Tuple[int, float]]:
    """(step, value) of a curve, which is one value per step or holds pairs; without those that are not finite."""
    pairs = [entry if isinstance(entry, (list, tuple)) else (step, entry) for step, entry in zip(steps, curve)]
    if curve and isinstance(curve[0], (list, tuple)):
        pairs = curve
    return [(step, value) for step, value in pairs if finite(value) is not None]


def curve_points(run: dict, key: str) -> List[Tuple[int, float]]:
    """The points of one curve of a run, none if it has no such curve."""
    curves = run.get("curves") or {}
    return points(curves.get(key) or [], curves.get("step") or [])


def curve_keys(ablation: dict) -> List[str]:
    """Names of all curves that have points in any run."""
    return union([[key for key in run.get("curves") or {} if key != "step" and curve_points(run, key)]
                  for _, run in all_runs(ablation)])  # fmt: skip


def loss_metric(key: str) -> Metric:
    """The description of the loss that a curve such as `val/flow_loss` shows."""
    name = key.split("/")[-1]
    return LOSSES.get(name, Metric(name.replace("_", " "), better="lower"))


def curve_name(key: str) -> str:
    split = {"train": "training", "val": "validation"}.get(key.split("/")[0], key.split("/")[0])
    return f"{loss_metric(key).label}, {split}"


def final_value(run: dict, key: str) -> Value:
    """The end of a curve: the last validation, or the mean of the last tenth of the logged training steps."""
    values = [value for _, value in curve_points(run, key)]
    if not values:
        return Value(None)
    last = values[-max(1, len(values) // 10) :] if key.startswith("train/") else values[-1:]
    return Value(sum(last) / len(last))


def measured(measure: Optional[dict]) -> Value:
    """The value of a results dict's measure with its confidence."""
    measure = measure or {}
    return Value(value_of(measure), finite(measure.get("low")), finite(measure.get("high")))


def share(value) -> Value:
    """A share of 1 in percent."""
    return Value(None if finite(value) is None else 100 * value)


def make_row(ablation: dict, name: str, metric: Metric, read) -> Row:
    """A row with read(run) of every run."""
    return Row(name, metric, [{run["seed"]: read(run) for run in arm["runs"]} for arm in ablation["arms"]])


def reconstruction_row(ablation: dict, key: str, count) -> Row:
    read = lambda run: measured((results_of(run).get("reconstruction") or {}).get(str(count), {}).get(key))  # noqa: E731
    return make_row(ablation, f"{metric_of(key).label}, {tokens(count)}", metric_of(key), read)


def all_counts(ablation: dict) -> List[int]:
    return sorted(union([token_counts(results_of(run)) for _, run in all_runs(ablation)]))


def all_metric_keys(ablation: dict) -> List[str]:
    return union([metric_keys(results_of(run)) for _, run in all_runs(ablation)])


def final_rows(ablation: dict) -> List[Row]:
    """What arms are judged by: losses, reconstruction with the fewest and most tokens, alignment, probes, codes."""
    rows = []
    for key in curve_keys(ablation):
        note = "mean of the last tenth" if key.startswith("train/") else "last"
        rows.append(
            make_row(
                ablation, f"{curve_name(key)} ({note})", loss_metric(key), lambda run, key=key: final_value(run, key)
            )
        )
    counts = all_counts(ablation)
    for key in all_metric_keys(ablation):
        rows += [reconstruction_row(ablation, key, count) for count in union([counts[:1], counts[-1:]])]
    return rows + representation_rows(ablation)


def representation_rows(ablation: dict) -> List[Row]:
    """Alignment, probes and codes; only those that any run has."""
    part = lambda run, name: results_of(run).get(name) or {}  # noqa: E731
    layers = lambda run: [finite(layer["cknna"]) for layer in part(run, "alignment").get("layers") or []]  # noqa: E731
    best = lambda run: max((value for value in layers(run) if value is not None), default=None)  # noqa: E731
    rows = [
        make_row(ablation, "cosine", METRICS["cosine"], lambda run: measured(part(run, "alignment").get("cosine"))),
        make_row(ablation, "CKNNA, best decoder layer", METRICS["cknna"], lambda run: Value(best(run))),
        make_row(
            ablation, "CKNNA, tokens", METRICS["cknna"],
            lambda run: Value(finite(part(run, "alignment").get("tokens_cknna"))),
        ),
    ]  # fmt: skip
    runs = [run for _, run in all_runs(ablation)]
    for feature in union([part(run, "probes").get("features") or {} for run in runs]):
        for key in ("knn", "linear"):
            scores = lambda run, f=feature: (part(run, "probes").get("features") or {}).get(f) or {}  # noqa: E731
            name = f"{METRICS[key].label}, {feature}"
            rows.append(make_row(ablation, name, METRICS[key], lambda run, k=key, s=scores: share(s(run).get(k))))
    used = lambda run: Value(finite(part(run, "codes").get("used_overall")))  # noqa: E731
    rows.append(make_row(ablation, "codes used at any position", METRICS["used"], used))
    for count in union([part(run, "codes").get("silhouette") or {} for run in runs]):
        read = lambda run, c=count: Value(finite((part(run, "codes").get("silhouette") or {}).get(c)))  # noqa: E731
        rows.append(make_row(ablation, f"silhouette, first {tokens(count)}", METRICS["silhouette"], read))
    return [row for row in rows if any(value.value is not None for arm in row.arms for value in arm.values())]


def known(arm: Dict[int, Value]) -> Dict[int, float]:
    """Values by seed, without those that are missing."""
    return {seed: value.value for seed, value in arm.items() if value.value is not None}


def spread(values: Sequence[float]) -> Optional[float]:
    """Standard deviation over seeds (n - 1), None for one."""
    return statistics.stdev(values) if len(values) > 1 else None


class Difference(NamedTuple):
    """An arm minus the first: mean, standard deviation over seeds, half the 95 % interval, and what it rests on."""

    mean: float
    std: Optional[float]
    margin: Optional[float]
    basis: str


def difference(first: Dict[int, float], arm: Dict[int, float]) -> Optional[Difference]:
    """Compare values by seed: paired over shared seeds if there are two, else as groups; None without values.

    Independent groups take Welch's standard error with the smaller group's degrees of freedom, which is cautious.
    """
    if not first or not arm:
        return None
    shared = sorted(set(first) & set(arm))
    if len(shared) >= 2:
        differences = [arm[seed] - first[seed] for seed in shared]
        std = statistics.stdev(differences)
        return Difference(statistics.mean(differences), std, _t(len(shared)) * std / math.sqrt(len(shared)),
                          f"{len(shared)} seeds, paired")  # fmt: skip
    groups = [list(first.values()), list(arm.values())]
    if len(shared) == 1 and min(map(len, groups)) == 1:
        groups = [[first[shared[0]]], [arm[shared[0]]]]  # the same seed on both sides
    mean = statistics.mean(groups[1]) - statistics.mean(groups[0])
    if min(map(len, groups)) < 2:
        return Difference(mean, None, None, "one seed")
    variances = [statistics.variance(group) for group in groups]
    error = math.sqrt(sum(variance / len(group) for variance, group in zip(variances, groups)))
    sizes = " and ".join(str(len(group)) for group in groups)
    return Difference(mean, math.sqrt(sum(variances)), _t(min(map(len, groups))) * error, f"{sizes} other seeds")


def _t(n: int) -> float:
    return STUDENT_T[min(n - 1, len(STUDENT_T)) - 1]


def verdict(row: Row, i: int, names: Sequence[str]) -> Verdict:
    """What the numbers of a row say of arm i against the first arm, and no more than that."""
    first, arm = known(row.arms[0]), known(row.arms[i])
    found, metric = difference(first, arm), row.metric
    if found is None:
        without = " and ".join(names[j] for j in (0, i) if not known(row.arms[j]))
        return Verdict("missing", f"{names[i]} not compared: no value for {without}.")
    scale = max(map(abs, [*first.values(), *arm.values()]))
    if abs(found.mean) <= 1e-9 * scale and not found.margin:
        return Verdict("same", f"{names[i]} equal ({found.basis}): no difference shown.")
    side = "higher" if found.mean > 0 else "lower"
    text = f"{side} by {_amount(abs(found.mean), metric)}"
    if found.margin is None:
        return _one_seed_verdict(row, i, names, text)
    low, high = (number(found.mean + sign * found.margin, metric.digits, sign=True) for sign in (-1, 1))
    over = f"the spread over seeds (95 % interval of the difference {low} to {high}; {found.basis})"
    if abs(found.mean) <= found.margin:
        return Verdict("same", f"{names[i]} {text}, within {over}: no difference shown.")
    kind = "better" if side == metric.better else "worse"
    return Verdict(kind, f"{names[i]} {kind}: {text}, beyond {over}.")


def _amount(value: float, metric: Metric) -> str:
    unit = "percentage points" if metric.unit == "%" else metric.unit
    return f"{number(value, metric.digits)} {unit}".strip()


def _one_seed_verdict(row: Row, i: int, names: Sequence[str], text: str) -> Verdict:
    """With one seed nothing is known of seeds; the confidence over images is all there is."""
    values = [row.arms[j] for j in (0, i)]
    shared = [seed for seed in known(values[0]) if seed in known(values[1])]
    a, b = (arm[next(iter(shared or known(arm)))] for arm in values)
    start = f"{names[i]} {text} with one seed, so without a spread over seeds"
    if None in (a.low, a.high, b.low, b.high):
        return Verdict("open", f"{start}, and without a confidence over images: it may be chance.")
    if a.low <= b.high and b.low <= a.high:
        return Verdict("same", f"{start}; the 95 % intervals over images overlap: no difference shown.")
    doubt = "these two models differ, but another seed may not show it."
    return Verdict("open", f"{start}; the 95 % intervals over images do not overlap: {doubt}")


def tally(rows: Sequence[Row], names: Sequence[str]) -> List[str]:
    """For each arm after the first, a sentence that counts its verdicts."""
    lines = []
    for i in range(1, len(names)):
        verdicts = [verdict(row, i, names).kind for row in rows]
        counts = [f"{kind_text} in {verdicts.count(kind)}" for kind, kind_text in KINDS.items() if kind in verdicts]
        lines.append(
            f"{names[i]} against {names[0]}, {len(rows)} metrics: {', '.join(counts) or 'nothing to compare'}."
        )
    return lines


def seeds_statement(ablation: dict) -> str:
    """How many seeds there are, and what follows for the reading."""
    fewest = min(len(arm["runs"]) for arm in ablation["arms"])
    counts = "; ".join(f"{arm['name']}: {len(arm['runs'])}" for arm in ablation["arms"])
    if fewest == 0:
        return f"Runs by arm: {counts}. An arm without runs cannot be compared."
    if fewest == 1:
        return (
            f"Runs by arm: {counts}. With one seed there is no spread over seeds, only the confidence over images of "
            "this one model: what another seed would give is not known."
        )
    few = " Two seeds show only very large differences." if fewest == 2 else ""
    return (
        f"Runs by arm: {counts}. Values are mean ± standard deviation over seeds; a difference counts where the 95 % "
        f"interval of its mean excludes 0.{few} Of 20 comparisons without a true difference one may do so by chance."
    )


# Text


def cell(values: Dict[int, Value], metric: Metric) -> str:
    """Mean ± standard deviation over seeds; for one seed the value with its confidence over images."""
    numbers = list(known(values).values())
    if not numbers:
        return DASH
    mean = number(statistics.mean(numbers), metric.digits)
    if len(numbers) > 1:
        return f"{mean} ± {number(spread(numbers), metric.digits)}"
    only = next(value for value in values.values() if value.value is not None)
    if only.low is None or only.high is None:
        return mean
    return f"{mean} ({number(only.low, metric.digits)} to {number(only.high, metric.digits)})"


def difference_cell(row: Row, i: int) -> str:
    """The difference of arm i to the first, with its standard deviation over seeds where there is one."""
    found = difference(known(row.arms[0]), known(row.arms[i]))
    if found is None:
        return DASH
    text = number(found.mean, row.metric.digits, sign=True)
    return text if found.std is None else f"{text} ± {number(found.std, row.metric.digits)}"


def table_rows(ablation: dict, rows: Sequence[Row]) -> List[List[str]]:
    """Heading and rows: metric, the first arm, then each other arm with its difference."""
    first, *others = (arm["name"] for arm in ablation["arms"])
    heading = ["metric", first]
    for name in others:
        heading += [name, "difference"]
    table = [heading]
    for row in rows:
        cells = [_row_name(row), cell(row.arms[0], row.metric)]
        for i in range(1, len(row.arms)):
            cells += [cell(row.arms[i], row.metric), difference_cell(row, i)]
        table.append(cells)
    return table


def _row_name(row: Row) -> str:
    unit = f" [{row.metric.unit}]" if row.metric.unit else ""
    return row.name + unit + {"higher": " ↑", "lower": " ↓", "": ""}[row.metric.better]


def cost_rows(ablation: dict) -> List[List[str]]:
    """Heading and rows: training time and peak memory of each arm, also relative to the first."""
    rows, first = [["arm", "runs", "training time", "relative", "peak memory", "relative"]], None
    for arm in ablation["arms"]:
        seconds = [run["seconds"] for run in arm["runs"] if finite(run.get("seconds")) is not None]
        memory = [run["peak_memory_bytes"] for run in arm["runs"] if finite(run.get("peak_memory_bytes")) is not None]
        cost = [statistics.mean(seconds) if seconds else None, max(memory) if memory else None]
        first = first or cost
        ratios = [f"{a / b:.2f}x" if a is not None and b else DASH for a, b in zip(cost, first)]
        time = duration(cost[0]) + (f" ± {duration(spread(seconds))}" if len(seconds) > 1 else "")
        rows.append([arm["name"], str(len(arm["runs"])), time, ratios[0], size(cost[1]), ratios[1]])
    return rows


def override_rows(ablation: dict) -> List[List[str]]:
    """Heading and rows: what each arm changes in the config."""
    texts = (
        [f"{key}={json.dumps(value)}" for key, value in (arm.get("overrides") or {}).items()]
        for arm in ablation["arms"]
    )
    names = (arm["name"] for arm in ablation["arms"])
    return [["arm", "changes to the config"], *([n, ", ".join(t) or "none"] for n, t in zip(names, texts))]


def verdict_lines(rows: Sequence[Row], names: Sequence[str]) -> List[str]:
    """A sentence for each metric, with every arm after the first."""
    return [f"{row.name}: " + " ".join(verdict(row, i, names).text for i in range(1, len(names))) for row in rows]


def console_table(ablation: dict) -> str:
    """The comparison as plain text: values, differences, verdicts, cost, notes."""
    check(ablation)
    names, rows = [arm["name"] for arm in ablation["arms"]], final_rows(ablation)
    blocks = [
        f"Ablation of {ablation['config']}\n{seeds_statement(ablation)}",
        definitions("Changes to the config", override_rows(ablation)[1:]),
    ]
    blocks.append(text_table(table_rows(ablation, rows)) if rows else "No run has a metric.")
    if len(names) > 1 and rows:
        blocks.append(
            "\n".join(["Verdicts", *(f"  {line}" for line in tally(rows, names) + verdict_lines(rows, names))])
        )
    blocks.append(text_table(cost_rows(ablation)))
    for title, lines in (("Not evaluated", missing_lines(ablation)), ("Warnings", warning_lines(ablation)),
                         ("Notes", ablation.get("notes") or [])):  # fmt: skip
        if lines:
            blocks.append("\n".join([title, *(f"  {line}" for line in lines)]))
    return "\n\n".join(blocks) + "\n"


def markdown_table(ablation: dict) -> str:
    """The table of final metrics for a README, and below it how many seeds it rests on."""
    check(ablation)
    heading, *rows = [
        [text.replace("|", "\\|").replace("<", "&lt;") for text in row]
        for row in table_rows(ablation, final_rows(ablation))
    ]
    line = lambda cells: f"| {' | '.join(cells)} |"  # noqa: E731
    ruler = "|" + "---|" * len(heading)
    return "\n".join([line(heading), ruler, *map(line, rows), "", seeds_statement(ablation)]) + "\n"


def missing_lines(ablation: dict) -> List[str]:
    """What was not evaluated, each reason once with the runs that it concerns; pictures and cost may come from runs."""

    def missing(run: dict) -> List[str]:
        parts = missing_parts({**results_of(run), "grids": True, "cost": True})
        own = {"curves": run.get("curves"), "pictures": grids_of(run), "training time": run.get("seconds"),
               "peak memory": run.get("peak_memory_bytes")}  # fmt: skip
        return [f"{name}: {why}" for name, why in parts] + [
            f"{name}: not recorded" for name, it in own.items() if not it
        ]

    empty = [f"{arm['name']}: no runs" for arm in ablation["arms"] if not arm["runs"]]
    return empty + _with_runs(ablation, missing)


def warning_lines(ablation: dict) -> List[str]:
    """Warnings of all evaluations, each once with the runs that it concerns."""
    return _with_runs(ablation, lambda run: warnings_of(results_of(run)))


def _with_runs(ablation: dict, read) -> List[str]:
    """Each line that read(run) gives, once, with the arms and seeds that gave it, or `all runs`."""
    found: Dict[str, Dict[str, List[str]]] = {}
    for arm, run in all_runs(ablation):
        for line in read(run):
            found.setdefault(line, {}).setdefault(arm["name"], []).append(str(run["seed"]))
    lines = []
    for line, seeds in found.items():
        if sum(map(len, seeds.values())) == len(all_runs(ablation)):
            lines.append(f"{line} [all runs]")
        else:
            concerned = (f"{name}, seed {', '.join(arm_seeds)}" for name, arm_seeds in seeds.items())
            lines.append(f"{line} [{'; '.join(concerned)}]")
    return lines


# Plots


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def line_style(i: int) -> dict:
    """Marker and line style of arm i, to tell arms apart without colours and where they coincide."""
    return {"marker": MARKERS[i % len(MARKERS)], "linestyle": LINES[i % len(LINES)], "markersize": 4}


def mean_curve(curves: Sequence[List[Tuple[int, float]]]) -> List[Tuple[int, float]]:
    """Mean over seeds at the steps that all of them have."""
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*map(set, tables)))
    return [(step, statistics.mean(table[step] for table in tables)) for step in steps]


def running_mean(curve: List[Tuple[int, float]], window: int) -> List[Tuple[int, float]]:
    """Each value replaced by the mean of about `window` values around it, fewer towards the ends."""
    values, half = [value for _, value in curve], window // 2
    smooth = []
    for i, (step, _) in enumerate(curve):
        reach = min(half, i, len(curve) - 1 - i)
        smooth.append((step, statistics.mean(values[i - reach : i + reach + 1])))
    return smooth


def plot_curve(ablation: dict, key: str):
    """One loss of all arms: thin lines are seeds, thick ones their mean; a log axis for a wide range above 0."""
    figure, axis = new_plot(curve_name(key), "optimizer step", loss_metric(key).label)
    shown: List[float] = []
    for i, arm in enumerate(ablation["arms"]):
        curves = [curve for curve in (curve_points(run, key) for run in arm["runs"]) if curve]
        if not curves:
            continue
        shown += [value for curve in curves for _, value in curve]
        style = line_style(i) if max(map(len, curves)) <= 30 else {}
        for curve in curves:
            axis.plot(*zip(*curve), color=colour(i), linewidth=0.5, alpha=0.35)
        mean = mean_curve(curves)
        if key.startswith("train/"):
            mean = running_mean(mean, len(mean) // 50)
        if mean:
            axis.plot(*zip(*mean), color=colour(i), linewidth=1.6, label=arm["name"], **style)
    if shown and 0 < 3 * min(shown) < max(shown):
        log_axis(axis)
    return figure


def log_axis(axis) -> None:
    """A log y axis with plain numbers such as 0.2, not powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def plot_metric(ablation: dict, key: str):
    """One metric against the token count for all arms; bands are the seeds' spread, or the images' confidence."""
    metric, counts = metric_of(key), all_counts(ablation)
    better = f" ({metric.better} is better)" if metric.better else ""
    figure, axis = new_plot(metric.label + better, "tokens", metric.unit or metric.label)
    rows = [reconstruction_row(ablation, key, count) for count in counts]
    for i, arm in enumerate(ablation["arms"]):
        bands = [band(row.arms[i]) for row in rows]
        if any(band_.value is not None for band_ in bands):
            draw_line(axis, counts, *zip(*bands), colour(i), arm["name"], **line_style(i))
    token_axis(axis, counts)
    return figure


def band(values: Dict[int, Value]) -> Value:
    """Mean over seeds with mean -+ standard deviation; one seed with its confidence over images."""
    numbers = list(known(values).values())
    if len(numbers) > 1:
        mean, std = statistics.mean(numbers), spread(numbers)
        return Value(mean, mean - std, mean + std)
    return next((value for value in values.values() if value.value is not None), Value(None))


def plot_cknna(ablation: dict):
    """CKNNA by decoder layer for all arms; None where no run has it."""
    from matplotlib.ticker import MaxNLocator

    figure, axis = new_plot("CKNNA by decoder layer (higher is better)", "decoder layer (0 is the first)", "CKNNA")
    drawn = False
    for i, arm in enumerate(ablation["arms"]):
        tables = [
            {layer["layer"]: Value(finite(layer["cknna"])) for layer in alignment.get("layers") or []}
            for alignment in ((results_of(run).get("alignment") or {}) for run in arm["runs"])
        ]
        layers = sorted(set().union(*tables))
        bands = [band(dict(enumerate(table.get(layer, Value(None)) for table in tables))) for layer in layers]
        if any(band_.value is not None for band_ in bands):
            draw_line(axis, layers, *zip(*bands), colour(i), arm["name"], **line_style(i))
            drawn = True
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    return figure if drawn else None


def write_plots(ablation: dict, folder: Path) -> Dict[str, Path]:
    """Draw curves, metrics by token count and CKNNA as PNG files in `folder`/plots; paths by name."""
    figures = {}
    for key in curve_keys(ablation):
        figures[key] = plot_curve(ablation, key)
    for key in all_metric_keys(ablation) if all_counts(ablation) else []:
        figures[key] = plot_metric(ablation, key)
    cknna = plot_cknna(ablation)
    if cknna is not None:
        figures["cknna"] = cknna
    folder = Path(folder) / "plots"
    return {name: save_plot(figure, folder / f"{name.replace('/', '_')}.png") for name, figure in figures.items()}


# HTML


def grids_of(run: dict) -> dict:
    """The run's pictures, else those of its evaluation."""
    return run.get("grids") or results_of(run).get("grids") or {}


def _grids_section(ablation: dict, folder: Path) -> str:
    lines = ["<h2>Pictures</h2>"]
    for name in union([grids_of(run) for _, run in all_runs(ablation)]):
        note = "The same images and noise in every arm."
        if name in GRID_TITLES:
            note = "Ranked within each arm, so arms may show other images; an image has the same noise in all of them."
        lines += [f"<h3>{escape(GRID_TITLES.get(name, name))}</h3>", f'<p class="muted">{note}</p>']
        for arm in ablation["arms"]:
            run = next((run for run in arm["runs"] if name in grids_of(run)), None)
            if run is None:
                lines.append(f'<p class="muted">{escape(arm["name"])}: no picture.</p>')
                continue
            title = f"{arm['name']}, seed {run['seed']}"
            lines.append(grid_html(folder / grids_of(run)[name], f"{name}: {title}", title))
    return "\n".join(lines)


def _comparison_table(ablation: dict, rows: Sequence[Row]) -> str:
    """One column per arm; below each value its difference to the first arm, coloured by the verdict."""
    names = [arm["name"] for arm in ablation["arms"]]
    table = [["metric", *map(escape, names)]]
    for row in rows:
        cells = [escape(_row_name(row)), escape(cell(row.arms[0], row.metric))]
        for i in range(1, len(names)):
            kind = {"better": "good", "worse": "bad"}.get(verdict(row, i, names).kind, "")
            text = escape(f"difference {difference_cell(row, i)}")
            cells.append(f'{escape(cell(row.arms[i], row.metric))}<small class="{kind}">{text}</small>')
        table.append(cells)
    return html_table(table, "compare")


def _verdict_section(rows: Sequence[Row], names: Sequence[str]) -> str:
    items = []
    for row in rows:
        sentences = []
        for i in range(1, len(names)):
            found = verdict(row, i, names)
            kind = {"better": "good", "worse": "bad"}.get(found.kind)
            sentences.append(f'<span class="{kind}">{escape(found.text)}</span>' if kind else escape(found.text))
        items.append(f"<li><b>{escape(row.name)}</b><br>{'<br>'.join(sentences)}</li>")
    return f'<h2>Verdict on each metric</h2>\n<ul class="verdicts">{"".join(items)}</ul>'


def _curves_section(ablation: dict, plots: Dict[str, Path]) -> str:
    own = {name: path for name, path in plots.items() if name in curve_keys(ablation)}
    note = (
        "Thick lines are means over seeds, in training also over 2 % of the logged steps around each; thin lines are "
        "the seeds. An axis over a wide range above 0 is logarithmic."
    )
    return f'<h2>Curves</h2>\n<p class="muted">{note}</p>\n{plots_html(own)}'


def _metrics_section(ablation: dict, plots: Dict[str, Path]) -> str:
    keys = all_metric_keys(ablation)
    own = {name: path for name, path in plots.items() if name in keys or name == "cknna"}
    counts = all_counts(ablation)
    vae = (
        ["vae"] if any("vae" in (results_of(run).get("reconstruction") or {}) for _, run in all_runs(ablation)) else []
    )
    rows = [reconstruction_row(ablation, key, count) for key in keys for count in [*counts, *vae]]
    note = "Bands: mean ± standard deviation over seeds; for an arm with one seed, the 95 % confidence over images."
    table = f"<details><summary>All token counts as a table</summary>{_comparison_table(ablation, rows)}</details>"
    return f'<h2>By token count and layer</h2>\n<p class="muted">{note}</p>\n{plots_html(own)}\n{table if rows else ""}'


def _explained(ablation: dict) -> List[Metric]:
    losses = union([[key.split("/")[-1]] for key in curve_keys(ablation)])
    keys = union([explained_keys(results_of(run)) for _, run in all_runs(ablation)])
    return [LOSSES[name] for name in losses if name in LOSSES] + [METRICS[key] for key in keys]


def write_ablation_report(ablation: dict, folder: Path) -> Path:
    """Draw the plots and write `folder`/report.html, one page that compares the arms with the first.

    Args:
        ablation: Arms with their runs (format 1): overrides, results, curves, cost and pictures.
        folder: Where the page goes; relative paths of pictures start here.

    Returns:
        The page's path.

    Raises:
        ValueError: For another format, no arms, arms of one name, or two runs of an arm with one seed.
    """
    check(ablation)
    folder, names, rows = Path(folder), [arm["name"] for arm in ablation["arms"]], final_rows(ablation)
    plots = write_plots(ablation, folder)
    title = f"Ablation of {ablation['config']}"
    body = [f"<h1>{escape(title)}</h1>", escaped_table(override_rows(ablation), "text")]
    body += [f'<p class="lead">{escape(line)}</p>' for line in tally(rows, names)]
    body.append(f'<p class="warn">{escape(seeds_statement(ablation))}</p>')
    if warning_lines(ablation):
        body.append(bullets(warning_lines(ablation), "warn"))
    body.append("<h2>Final metrics</h2>")
    body.append(_comparison_table(ablation, rows) if rows else "<p>No run has a metric.</p>")
    if curve_keys(ablation):
        body.append(_curves_section(ablation, plots))
    if all_metric_keys(ablation) or "cknna" in plots:
        body.append(_metrics_section(ablation, plots))
    if any(grids_of(run) for _, run in all_runs(ablation)):
        body.append(_grids_section(ablation, folder))
    if len(names) > 1 and rows:
        body.append(_verdict_section(rows, names))
    body.append("<h2>Cost</h2>\n" + escaped_table(cost_rows(ablation)))
    for heading, lines in (("Not evaluated", missing_lines(ablation)), ("Notes", ablation.get("notes") or [])):
        if lines:
            body.append(f"<h2>{heading}</h2>\n{bullets(lines)}")
    body.append(explanations(_explained(ablation)))
    return write_page(folder / "report.html", title, body)

"""One report of an ablation: arms compared with the first one in tables, curves, pictures and verdicts."""

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from .comparison import KINDS, Row, comparison, known, verdict
from .findings import (
    DASH,
    METRICS,
    Metric,
    Value,
    dig,
    duration,
    explained_keys,
    finite,
    metric_keys,
    metric_of,
    missing_parts,
    rows_of,
    size,
    tokens,
    union,
    warnings_of,
)
from .plots import by_layer, curve, curve_keys, loss_of, plots_of
from .report import picture, render, write_page


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


def final_value(run: dict, key: str) -> Value:
    """The end of a curve: the last validation, or the mean of the last tenth of the logged training steps."""
    values = list(curve(run, key).values())
    if not values:
        return Value()
    return Value(statistics.mean(values[-max(1, len(values) // 10) :]) if key.startswith("train/") else values[-1])


class Runs:
    """The arms and runs of an ablation, and the rows of its tables."""

    def __init__(self, ablation: dict):
        self.arms = ablation["arms"]
        self.names = [arm["name"] for arm in self.arms]
        self.all = [run for arm in self.arms for run in arm["runs"]]
        self.results = [run.get("results") or {} for run in self.all]
        self.metrics = union(map(metric_keys, self.results))
        self.counts = list(rows_of({"reconstruction": dict.fromkeys(union(map(rows_of, self.results)), {})}))
        self.curves = curve_keys(self.all)

    def row(self, name: str, metric: Metric, read: Callable[[dict], Value]) -> Row:
        """A row with read(run) of every run."""
        return Row(name, metric, [{run["seed"]: read(run) for run in arm["runs"]} for arm in self.arms])

    def found(self, name: str, key: str, *path: str) -> Row:
        """A row with what every run has at results[path]."""
        return self.row(name, metric_of(key), lambda run: Value.read(dig(run, "results", *path), metric_of(key)))

    def reconstruction(self, key: str, count: str) -> Row:
        return self.found(f"{metric_of(key).label}, {tokens(count)}", key, "reconstruction", count, key)

    def final(self) -> list[Row]:
        """What arms are judged by: losses, reconstruction with the fewest and most tokens, alignment, probes, codes."""
        rows = []
        for key in self.curves:
            metric, name = loss_of(key)
            note = "mean of the last tenth" if key.startswith("train/") else "last"
            rows.append(self.row(f"{name} ({note})", metric, lambda run, key=key: final_value(run, key)))
        counts = [count for count in self.counts if count != "vae"]
        ends = union([counts[:1], counts[-1:]])
        rows += [self.reconstruction(key, count) for key in self.metrics for count in ends]
        rows.append(self.found("cosine", "cosine", "alignment", "cosine"))
        best = lambda run: Value(max(known(by_layer(run.get("results") or {})).values(), default=None))  # noqa: E731
        rows.append(self.row("CKNNA, best decoder layer", METRICS["cknna"], best))
        rows.append(self.found("CKNNA, tokens", "cknna", "alignment", "tokens_cknna"))
        for name in union(dig(results, "probes", "features") or {} for results in self.results):
            for key in ("knn", "linear"):
                rows.append(self.found(f"{METRICS[key].label}, {name}", key, "probes", "features", name, key))
        rows.append(self.found("codes used at any position", "used", "codes", "used_overall"))
        for k in union(dig(results, "codes", "silhouette") or {} for results in self.results):
            rows.append(self.found(f"silhouette, first {tokens(k)}", "silhouette", "codes", "silhouette", k))
        return [row for row in rows if row.counts]

    def lines(self, read: Callable[[dict], Iterable[str]]) -> list[str]:
        """Each line that read(run) gives, once, with the arms and seeds that gave it, or `all runs`."""
        found: dict[str, dict[str, list[str]]] = {}
        for arm in self.arms:
            for run in arm["runs"]:
                for line in read(run):
                    found.setdefault(line, {}).setdefault(arm["name"], []).append(str(run["seed"]))
        lines = []
        for line, seeds in found.items():
            everywhere = sum(map(len, seeds.values())) == len(self.all)
            concerned = "; ".join(f"{name}, seed {', '.join(of_arm)}" for name, of_arm in seeds.items())
            lines.append(f"{line} [{'all runs' if everywhere else concerned}]")
        return lines


def grids_of(run: dict) -> dict:
    """The run's pictures, else those of its evaluation."""
    return run.get("grids") or dig(run, "results", "grids") or {}


def pictures(arms: list[dict], name: str, folder: Path) -> list[tuple[str, dict | None]]:
    """Caption and picture of each arm: of its first run that has one of that name."""
    found = []
    for arm in arms:
        run = next((run for run in arm["runs"] if name in grids_of(run)), None)
        caption = f"{arm['name']}, seed {run['seed']}" if run else f"{arm['name']}: no picture"
        found.append((caption, picture(folder / grids_of(run)[name], f"{name}: {caption}") if run else None))
    return found


def cost_table(arms: list[dict]) -> list[list[str]]:
    """Heading and rows: training time and peak memory of each arm, also relative to the first."""
    table, first = [["arm", "runs", "training time", "relative", "peak memory", "relative"]], None
    for arm in arms:
        costs = [[finite(run.get(key)) for run in arm["runs"]] for key in ("seconds", "peak_memory_bytes")]
        seconds, memory = ([value for value in values if value is not None] for values in costs)
        cost = (statistics.mean(seconds) if seconds else None, max(memory, default=None))
        first = first or cost
        ratios = [f"{a / b:.2f}x" if a is not None and b else DASH for a, b in zip(cost, first, strict=True)]
        time = duration(cost[0]) + (f" ± {duration(statistics.stdev(seconds))}" if len(seconds) > 1 else "")
        table.append([arm["name"], str(len(arm["runs"])), time, ratios[0], size(cost[1]), ratios[1]])
    return table


def missing_in(run: dict) -> list[str]:
    """What was not evaluated or recorded; pictures and cost may come from the run."""
    parts = missing_parts({**(run.get("results") or {}), "grids": True, "cost": True})
    own = {
        "curves": run.get("curves"),
        "pictures": grids_of(run),
        "training time": run.get("seconds"),
        "peak memory": run.get("peak_memory_bytes"),
    }
    lines = [f"{name}: {reason}" for name, reason in parts]
    return lines + [f"{name}: not recorded" for name, recorded in own.items() if not recorded]


def findings_of(ablation: dict) -> dict:
    """What both templates of an ablation show."""
    check(ablation)
    runs = Runs(ablation)
    names, rows = runs.names, runs.final()
    verdicts = [(row.name, [verdict(row, i, names) for i in range(1, len(names))]) for row in rows]
    tally = []
    for i, name in enumerate(names[1:]):
        kinds = [found[i][0] for _, found in verdicts]
        counts = ", ".join(f"{text} in {kinds.count(kind)}" for kind, text in KINDS.items() if kind in kinds)
        tally.append(f"{name} against {names[0]}, {len(rows)} metrics: {counts or 'nothing to compare'}.")
    changes = []
    for arm in runs.arms:
        texts = [f"{key}={json.dumps(value)}" for key, value in (arm.get("overrides") or {}).items()]
        changes.append((arm["name"], ", ".join(texts) or "none"))
    return {
        "runs": runs,
        "config": ablation["config"],
        "notes": ablation.get("notes") or [],
        "tally": tally,
        "changes": changes,
        "table": comparison(rows, names) if rows else [],
        "verdicts": verdicts if len(names) > 1 else [],
        "cost": cost_table(runs.arms),
        "warnings": runs.lines(lambda run: warnings_of(run.get("results") or {})),
        "missing": [f"{arm['name']}: no runs" for arm in runs.arms if not arm["runs"]] + runs.lines(missing_in),
    }


def console_table(ablation: dict) -> str:
    """The comparison as plain text: values, differences, verdicts, cost, notes."""
    return render("ablation.txt", **findings_of(ablation))


def markdown_table(ablation: dict) -> str:
    """The table of final metrics for a README, and below it how many seeds it rests on."""
    return render("ablation.md", **findings_of(ablation))


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
    findings = findings_of(ablation)
    runs: Runs = findings["runs"]
    every = [runs.reconstruction(key, count) for key in runs.metrics for count in runs.counts]
    losses = [metric for key in runs.curves if (metric := loss_of(key)[0]).text]
    page = render(
        "ablation.html",
        plots=plots_of(runs.arms, folder),
        every=comparison(every, runs.names),
        grids={name: pictures(runs.arms, name, Path(folder)) for name in union(map(grids_of, runs.all))},
        explained=union([losses, [METRICS[key] for key in union(map(explained_keys, runs.results))]]),
        **findings,
    )
    return write_page(folder, page)

"""One report of an ablation: arms compared with the first one in tables, curves, pictures and verdicts."""

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

from .comparison import KINDS, Row, comparison, verdict
from .findings import (
    DASH,
    METRICS,
    Metric,
    Value,
    dig,
    duration,
    explained_keys,
    metric_keys,
    missing_parts,
    number,
    plain,
    rows_of,
    sampling,
    size,
    tokens,
    union,
    warnings_of,
)
from .plots import by_layer, curve, curve_keys, loss_of, plots_of
from .report import picture, render, write_page


def row_of(arms: list[dict], name: str, metric: Metric, read: Callable[[dict], Value]) -> Row:
    """A row with read(run) of every run that has a value."""
    values = [{run["seed"]: read(run) for run in arm["runs"]} for arm in arms]
    return Row(name, metric, [{seed: v for seed, v in arm.items() if v.value is not None} for arm in values])


def found(arms: list[dict], name: str, key: str, *path: str) -> Row:
    """A row with what every run has at results[path]."""
    return row_of(arms, name, METRICS[key], lambda run: Value.read(dig(run["results"], *path), METRICS[key]))


def reconstruction_rows(arms: list[dict], keys: Iterable[str], counts: Iterable[str]) -> list[Row]:
    return [
        found(arms, f"{METRICS[key].label}, {tokens(count)}", key, "reconstruction", count, key)
        for key in keys
        for count in counts
    ]


def final_rows(arms: list[dict], curves: list[str], keys: list[str], counts: list[str]) -> list[Row]:
    """What arms are judged by: losses, reconstruction with the fewest and most tokens, alignment, probes, codes."""
    results = [run["results"] for arm in arms for run in arm["runs"]]
    rows = []
    for key in curves:  # the last validation, or the mean of the last tenth of the logged training steps
        metric, name = loss_of(key)
        in_training = key.startswith("train/")

        def end(run: dict, key: str = key, in_training: bool = in_training) -> Value:
            values = list(curve(run, key).values())
            n = max(1, len(values) // 10) if in_training else 1
            return Value(statistics.mean(values[-n:]) if values else None)

        rows.append(row_of(arms, f"{name} ({'mean of the last tenth' if in_training else 'last'})", metric, end))
    counts = [count for count in counts if count != "vae"]
    rows += reconstruction_rows(arms, keys, union([counts[:1], counts[-1:]]))
    rows.append(found(arms, "cosine", "cosine", "alignment", "cosine"))

    def best(run: dict) -> Value:
        layers = by_layer(run["results"]).values()
        return Value(max((value.value for value in layers if value.value is not None), default=None))

    rows.append(row_of(arms, "CKNNA, best decoder layer", METRICS["cknna"], best))
    rows.append(found(arms, "CKNNA, tokens", "cknna", "alignment", "tokens_cknna"))
    probes = [dig(one, "probes", "features") or {} for one in results]
    for name in union(probes):
        for key in union(one.get(name, {}) for one in probes):
            rows.append(found(arms, f"{METRICS[key].label}, {name}", key, "probes", "features", name, key))
    rows.append(found(arms, "codes used at any position", "used", "codes", "used_overall"))
    for k in union(one["codes"]["silhouette"] for one in results):
        rows.append(found(arms, f"silhouette, first {tokens(k)}", "silhouette", "codes", "silhouette", k))
    return [row for row in rows if any(row.arms)]


def lines_of(arms: list[dict], read: Callable[[dict], Iterable[str]]) -> list[str]:
    """Each line that read(results) gives of a run, once, with the arms and seeds that gave it, or `all runs`."""
    seeds: dict[str, dict[str, list[str]]] = {}
    for arm in arms:
        for run in arm["runs"]:
            for line in read(run["results"]):
                seeds.setdefault(line, {}).setdefault(arm["name"], []).append(str(run["seed"]))
    lines, n_runs = [], sum(len(arm["runs"]) for arm in arms)
    for line, by_arm in seeds.items():
        everywhere = sum(map(len, by_arm.values())) == n_runs
        concerned = "; ".join(f"{name}, seed {', '.join(of_arm)}" for name, of_arm in by_arm.items())
        lines.append(f"{line} [{'all runs' if everywhere else concerned}]")
    return lines


def cost_table(arms: list[dict]) -> list[list[str]]:
    """Heading and rows: training time and peak memory of each arm, also relative to the first."""
    table = [["arm", "runs", "training time", "relative", "peak memory", "relative"]]
    first: tuple[float, int | None] | None = None
    for arm in arms:
        seconds = [run["seconds"] for run in arm["runs"]]
        peaks = [run["peak_memory_bytes"] for run in arm["runs"] if run["peak_memory_bytes"] is not None]
        cost = (statistics.mean(seconds), max(peaks, default=None))
        first = first or cost
        time = duration(cost[0]) + (f" ± {duration(statistics.stdev(seconds))}" if len(seconds) > 1 else "")
        ratios = [f"{a / b:.2f}x" if a and b else DASH for a, b in zip(cost, first)]
        table.append([arm["name"], str(len(seconds)), time, ratios[0], size(cost[1]), ratios[1]])
    return table


def conditions(results: dict) -> list[str]:
    """In a line each, what the numbers of an evaluation are of, and what its cosine is to be compared with."""
    about, digits = results["about"], METRICS["cosine"].digits
    lines = [
        f"{about['n_images']} images of {about['data']}, {about['img_size']} px; reconstructions with "
        f"{sampling(results)}, pictures with guidance {plain(about['picture_guidance_scale'])}; encoder "
        f"{about['encoder']}; {about['precision']} on {about['device']}"
    ]
    constant, mean = (dig(results, "alignment", name) for name in ("constant", "mean"))
    if constant is not None:
        lines.append(
            f"a cosine of {number(constant, digits)} needs no look at the image: the best constant at each position "
            f"({number(mean, digits)}: one constant for all positions)"
        )
    return lines


def findings_of(ablation: dict) -> dict:
    """What both templates of an ablation show."""
    arms = ablation["arms"]
    names, runs = [arm["name"] for arm in arms], [run for arm in arms for run in arm["runs"]]
    keys = union(metric_keys(run["results"]) for run in runs)
    counts = union(rows_of(run["results"]) for run in runs)
    curves = curve_keys(runs)
    rows = final_rows(arms, curves, keys, counts)
    verdicts = [(row.name, [verdict(row, i, names) for i in range(1, len(names))]) for row in rows]
    tally = []
    for i, name in enumerate(names[1:]):
        kinds = [verdicts_of_row[i][0] for _, verdicts_of_row in verdicts]
        number_of_each = ", ".join(f"{text} in {kinds.count(kind)}" for kind, text in KINDS.items() if kind in kinds)
        tally.append(f"{name} against {names[0]}, {len(rows)} metrics: {number_of_each}.")
    changes = []
    for arm in arms:
        texts = [f"{key}={json.dumps(value)}" for key, value in arm["overrides"].items()]
        changes.append((arm["name"], ", ".join(texts) or "none"))
    return {
        "arms": arms,
        "config": ablation["config"],
        "notes": ablation["notes"],
        "metrics": keys,
        "curves": curves,
        "tally": tally,
        "changes": changes,
        "table": comparison(rows, names),
        "every": comparison(reconstruction_rows(arms, keys, counts), names),
        "verdicts": verdicts if len(names) > 1 else [],
        "cost": cost_table(arms),
        "conditions": lines_of(arms, conditions),
        "warnings": lines_of(arms, warnings_of),
        "missing": lines_of(arms, lambda results: map(": ".join, missing_parts(results))),
    }


def console_table(ablation: dict) -> str:
    """The comparison as plain text: values, differences, verdicts, cost, notes."""
    return render("ablation.txt", **findings_of(ablation))


def write_ablation_report(ablation: dict, folder: Path) -> Path:
    """Draw the plots and write `folder`/report.html, one page that compares the arms with the first.

    Args:
        ablation: Arms with their runs (format 2): overrides, results, curves, cost and pictures.
        folder: Where the page goes; relative paths of pictures start here.

    Returns:
        The page's path.
    """
    findings = findings_of(ablation)
    arms, runs = ablation["arms"], [run for arm in ablation["arms"] for run in arm["runs"]]
    grids: dict[str, list] = {}
    for arm in arms:
        run = arm["runs"][0]
        for name, path in run["grids"].items():
            caption = f"{arm['name']}, seed {run['seed']}"
            grids.setdefault(name, []).append((caption, picture(Path(folder) / path, f"{name}: {caption}")))
    losses = [loss_of(key)[0] for key in findings["curves"]]
    explained = union([losses, [METRICS[key] for key in union(explained_keys(run["results"]) for run in runs)]])
    plots = plots_of(arms, folder)
    return write_page(folder, render("ablation.html", plots=plots, grids=grids, explained=explained, **findings))

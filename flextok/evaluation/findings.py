"""What the results of an evaluation (format 1) say: metrics, values with their confidence, findings in words.

Missing numbers (null, NaN) are shown as a dash, and parts that were not evaluated are named with the reason.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

TEMPLATES = Path(__file__).parent / "templates"
DASH = "–"
PARTS = {
    "reconstruction": "reconstruction metrics",
    "alignment": "alignment with the vision encoder",
    "probes": "probes (classes from frozen features)",
    "codes": "use of the codes",
    "grids": "pictures",
    "cost": "cost of the evaluation",
}


@dataclass(frozen=True)
class Metric:
    """How a number is called, read and explained; templates/glossary.yaml says what the fields mean."""

    label: str
    part: str = ""
    unit: str = ""
    better: str = ""
    digits: int = 4
    span: float | None = None
    lossless: float = math.inf
    text: str = ""
    source: str = ""
    url: str = ""

    @property
    def sign(self) -> str:
        """Unit and direction of better, e.g. ` [dB] ↑`."""
        return (f" [{self.unit}]" if self.unit else "") + {"higher": " ↑", "lower": " ↓"}.get(self.better, "")

    def show(self, value: float | None, unit: bool = False) -> str:
        """The value as text, with its unit if asked for; `lossless` where a reconstruction is."""
        if value is not None and value >= self.lossless:
            return "lossless"
        return f"{number(value, self.digits)} {self.unit if unit else ''}".strip()


GLOSSARY = yaml.safe_load((TEMPLATES / "glossary.yaml").read_text("utf-8"))
METRICS = {key: Metric(**fields) for key, fields in GLOSSARY.items()}


class Value(NamedTuple):
    """A number with its 95 % confidence interval and its count of images, where they are known."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @classmethod
    def read(cls, found, metric: Metric) -> "Value":
        """From results: a measure {value, low, high, n}, a number or None. Shares of 1 become percentages."""
        found = found if isinstance(found, dict) else {"value": found}
        value = metric.lossless if found.get("value") == math.inf else found.get("value")
        scale = 100 if metric.unit == "%" else 1
        finite_numbers = [finite(x) for x in (value, found.get("low"), found.get("high"))]
        value, low, high = (None if x is None else scale * x for x in finite_numbers)
        return cls(value, low, high, found.get("n"))

    def interval(self, metric: Metric) -> str:
        """The confidence as `low to high`, or nothing."""
        if None in self[:3] or self.value >= metric.lossless:
            return ""
        return f"{number(self.low, metric.digits)} to {number(self.high, metric.digits)}"

    def overlaps(self, other: "Value") -> bool | None:
        """Whether the two confidence intervals overlap; None where one of them is unknown."""
        if None in (self.low, self.high, other.low, other.high):
            return None
        return self.low <= other.high and other.low <= self.high


class Cell(NamedTuple):
    """A cell of a table: text, a note in small print, and a verdict (`better`, `worse`) where there is one."""

    text: str
    note: str = ""
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.note})" if self.note else self.text


# Numbers and words


def finite(value) -> float | None:
    """`value` as a float, or None where there is none (missing, NaN, infinite)."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def number(value, digits: int = 2, sign: bool = False) -> str:
    """A number with fixed digits, a dash for none; one significant digit where fixed ones would show only 0."""
    if finite(value) is None:
        return DASH
    plus = "+" if sign else ""
    if 1e-9 < abs(value) < 0.5 * 10.0**-digits:  # below is what rounding leaves of a 0
        return f"{value:{plus}.1g}"
    return f"{round(value, digits) + 0.0:{plus}.{digits}f}"  # no -0


def tokens(count) -> str:
    """`1 token`, `256 tokens`, or what "vae" stands for."""
    return "VAE alone" if count == "vae" else f"{count} token{'' if int(count) == 1 else 's'}"


def duration(seconds) -> str:
    """Seconds as people say them; a dash for none."""
    if finite(seconds) is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(n_bytes) -> str:
    """Bytes in GB (powers of ten); a dash for none."""
    return DASH if finite(n_bytes) is None else f"{number(n_bytes / 1e9)} GB"


def percent(share, digits: int = 1) -> str:
    """A share of 1 in percent; a dash for none."""
    return DASH if finite(share) is None else f"{100 * share:.{digits}f} %"


def plain(value) -> str:
    """A setting as text: yes or no, lists with commas, a dash for none."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or DASH
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str("" if value is None else value) or DASH


# Reading results


def dig(tree: dict | None, *keys):
    """tree[key][key]..., None where one of them is missing or null."""
    for key in keys:
        tree = (tree or {}).get(key)
    return tree


def union(lists: Iterable[Iterable]) -> list:
    """Entries of all lists once, in the order in which they first come."""
    return list(dict.fromkeys(entry for entries in lists for entry in entries))


def metric_of(key: str) -> Metric:
    """The description of a metric; one that is not known is called by its key."""
    return METRICS.get(key) or Metric(key)


def rows_of(results: dict) -> dict[str, dict]:
    """Reconstruction metrics by token count, ascending, then those of "vae"."""
    rows = results.get("reconstruction") or {}
    return {key: rows[key] for key in sorted(rows, key=lambda key: math.inf if key == "vae" else int(key))}


def metric_keys(results: dict) -> list[str]:
    """The reconstruction metrics of any token count: known ones first, in the glossary's order."""
    found = {key for row in rows_of(results).values() for key in row}
    return [key for key in METRICS if key in found] + sorted(found - set(METRICS))


def explained_keys(results: dict) -> list[str]:
    """Keys of METRICS for which the results hold numbers."""
    parts = {metric.part for metric in METRICS.values() if results.get(metric.part)} - {"reconstruction"}
    return [key for key, metric in METRICS.items() if key in metric_keys(results) or metric.part in parts]


def headline(results: dict) -> str:
    """The main finding in a sentence: the first metric that has values, from the fewest tokens to the most."""
    for key in metric_keys(results):
        metric = metric_of(key)
        values = {count: Value.read(row.get(key), metric) for count, row in rows_of(results).items()}
        vae = values.pop("vae", Value()).value
        values = {int(count): value for count, value in values.items() if value.value is not None}
        if values:
            text, limit = _course(metric, values), metric.show(vae, unit=True)
            verb = "is" if limit == "lossless" else "gives"
            return text + ("." if vae is None else f"; the VAE alone, without tokens, {verb} {limit}.")
    return "No reconstruction metric has a value."


def _course(metric: Metric, values: dict[int, Value]) -> str:
    """How a metric goes from the fewest tokens to the most."""
    shown = {count: metric.show(value.value, unit=True) for count, value in values.items()}
    first, last = min(values), max(values)
    if first == last:
        return f"{metric.label} is {shown[first]} with {tokens(first)}"
    if shown[first] == shown[last]:
        text = f"{metric.label} stays at {shown[first]} from {tokens(first)} to {last}"
    else:
        verb = "rises" if values[last] > values[first] else "falls"
        text = f"{metric.label} {verb} from {shown[first]} with {tokens(first)} to {shown[last]} with {last}"
        if values[first].overlaps(values[last]):
            text += " (the 95 % intervals overlap: no clear difference)"
    choose = {"higher": max, "lower": min}.get(metric.better)
    best = choose(values, key=lambda count: values[count].value) if choose else last
    if best not in (first, last):
        text += f", and is best with {best}: {shown[best]}"
    elif best == first and shown[first] != shown[last]:
        text += f", so more tokens are worse here ({metric.better} is better)"
    return text


def warnings_of(results: dict) -> list[str]:
    """Every distinct warning once, that of tokens which carry nothing first."""
    of_tokens = results.get("tokens_warning")
    measures = [measure for row in rows_of(results).values() for measure in row.values()]
    found = [dig(measure, "warning") for measure in [*measures, dig(results, "alignment", "cosine")]]
    return list(dict.fromkeys(filter(None, [of_tokens and of_tokens[0].upper() + of_tokens[1:], *found])))


def missing_parts(results: dict) -> list[tuple[str, str]]:
    """(name, reason) of every part and every usual metric that was not evaluated."""
    skipped = dict(results.get("skipped") or {})
    absent = {part: label for part, label in PARTS.items() if not results.get(part)}
    if results.get("reconstruction"):
        usual = {key: metric.label for key, metric in METRICS.items() if metric.part == "reconstruction"}
        absent |= {key: label for key, label in usual.items() if key not in metric_keys(results)}
    lines = [(label, skipped.pop(key, "not computed")) for key, label in absent.items()]
    return lines + [(metric_of(key).label, reason) for key, reason in skipped.items()]


def reconstruction_table(results: dict) -> list[list]:
    """Heading and a row for each token count; a value whose number of images is not its row's says so."""
    keys = metric_keys(results)
    table: list[list] = [["tokens", "images", *(metric_of(key).label + metric_of(key).sign for key in keys)]]
    for count, row in rows_of(results).items():
        values = [Value.read(row.get(key), metric_of(key)) for key in keys]
        n = Counter(value.n for value in values if value.n is not None).most_common(1)[:1]
        usual = n[0][0] if n else None
        cells = []
        for metric, value in zip(map(metric_of, keys), values, strict=True):
            notes = [value.interval(metric), f"n={value.n}" if value.n not in (usual, None) else ""]
            cells.append(Cell(metric.show(value.value), ", ".join(filter(None, notes))))
        table.append([tokens(count) if count == "vae" else count, plain(usual), *cells])
    return table

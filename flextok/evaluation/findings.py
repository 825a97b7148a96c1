"""What the results of an evaluation (format 2) say: metrics, values with their confidence, findings in words.

Numbers that are not known (null) are shown as a dash, and parts that were not evaluated are named with the reason.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

TEMPLATES = Path(__file__).parent / "templates"
DASH = "–"
PARTS = {"alignment": "alignment with the vision encoder", "probes": "probes (classes from frozen features)"}


@dataclass(frozen=True)
class Metric:
    """How a number is called, read and explained; templates/glossary.yaml says what the fields mean."""

    label: str
    part: str
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
        return (f" [{self.unit}]" if self.unit else "") + {"higher": " ↑", "lower": " ↓", "": ""}[self.better]

    def show(self, value: float | None, unit: bool = False) -> str:
        """The value as text, with its unit if asked for; `lossless` where a reconstruction is."""
        if value is not None and value >= self.lossless:
            return "lossless"
        return f"{number(value, self.digits)} {self.unit if unit else ''}".strip()


class Glossary(dict[str, Metric]):
    """Metrics by name, in the order of reports; one without an entry is shown by its name."""

    def __missing__(self, name: str) -> Metric:
        return Metric(name, part="")


GLOSSARY = yaml.safe_load((TEMPLATES / "glossary.yaml").read_text("utf-8"))
METRICS = Glossary({key: Metric(**fields) for key, fields in GLOSSARY.items()})


class Value(NamedTuple):
    """A number with its 95 % confidence interval, where they are known."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def read(cls, found, metric: Metric) -> "Value":
        """From results: a measure {value, low, high}, a number or None. Shares of 1 become percentages."""
        found = found if isinstance(found, dict) else {"value": found}
        numbers = [found.get(name) for name in ("value", "low", "high")]
        return cls(*(x if x is None or metric.unit != "%" else 100 * x for x in numbers))

    def interval(self, metric: Metric) -> str:
        """The confidence as `low to high`, or nothing."""
        if None in self or self.value >= metric.lossless:
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


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number with fixed digits, a dash for none; one significant digit where fixed ones would show only 0."""
    if value is None:
        return DASH
    plus = "+" if sign else ""
    if 1e-9 < abs(value) < 0.5 * 10.0**-digits:  # below is what rounding leaves of a 0
        return f"{value:{plus}.1g}"
    return f"{round(value, digits) + 0.0:{plus}.{digits}f}"  # no -0


def tokens(count) -> str:
    """`1 token`, `256 tokens`, or what "vae" stands for."""
    return "VAE alone" if count == "vae" else f"{count} token{'' if int(count) == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(n_bytes: float | None) -> str:
    """Bytes in GB (powers of ten), a dash where they are not known."""
    return DASH if n_bytes is None else f"{number(n_bytes / 1e9)} GB"


def percent(share: float, digits: int = 1) -> str:
    """A share of 1 in percent."""
    return f"{100 * share:.{digits}f} %"


def plain(value) -> str:
    """A setting as text: yes or no, lists with commas, a dash for none."""
    if isinstance(value, list):
        return ", ".join(map(plain, value)) or DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return DASH if value is None else str(value)


# Reading results


def dig(tree: dict | None, *keys):
    """tree[key][key]..., None where one of them is missing or null."""
    for key in keys:
        tree = (tree or {}).get(key)
    return tree


def union(lists: Iterable[Iterable]) -> list:
    """Entries of all lists once, in the order in which they first come."""
    return list(dict.fromkeys(entry for entries in lists for entry in entries))


def rows_of(results: dict) -> dict[str, dict]:
    """Reconstruction metrics by token count, ascending, then those of "vae"."""
    rows = results["reconstruction"]
    return {key: rows[key] for key in sorted(rows, key=lambda key: math.inf if key == "vae" else int(key))}


def metric_keys(results: dict) -> list[str]:
    """The reconstruction metrics of any token count, in the glossary's order; those that it does not have follow."""
    found = union(rows_of(results).values())
    return union([[key for key in METRICS if key in found], found])


def sampling(results: dict) -> str:
    """How the reconstructions were drawn that metrics are of, e.g. `guidance 1, 25 steps`."""
    about = results["about"]
    return f"guidance {plain(about['guidance_scale'])}, {about['inference_steps']} steps"


def explained_keys(results: dict) -> list[str]:
    """Keys of METRICS for which the results hold numbers."""
    parts = [part for part in ("alignment", "probes", "codes") if results[part]]
    return [key for key, metric in METRICS.items() if key in metric_keys(results) or metric.part in parts]


def headline(results: dict) -> str:
    """The main finding in a sentence: PSNR from the fewest tokens to the most, and its limit."""
    metric = METRICS["psnr"]
    values = {count: Value.read(row["psnr"], metric) for count, row in rows_of(results).items()}
    limit = metric.show(values.pop("vae").value, unit=True)
    shown = {count: metric.show(value.value, unit=True) for count, value in values.items()}
    counts = list(values)
    first, last = counts[0], counts[-1]
    if first == last:
        text = f"PSNR is {shown[first]} with {tokens(first)}"
    elif shown[first] == shown[last]:
        text = f"PSNR stays at {shown[first]} from {tokens(first)} to {last}"
    else:
        verb = "rises" if values[last].value > values[first].value else "falls"
        text = f"PSNR {verb} from {shown[first]} with {tokens(first)} to {shown[last]} with {last}"
        if values[first].overlaps(values[last]):
            text += " (the 95 % intervals overlap: no clear difference)"
    best = max(values, key=lambda count: values[count].value)
    if best not in (first, last):
        text += f", and is best with {best}: {shown[best]}"
    elif best == first and shown[first] != shown[last]:
        text += ", so more tokens are worse here (higher is better)"
    return f"{text}; the VAE alone, without tokens, {'is' if limit == 'lossless' else 'gives'} {limit}."


def warnings_of(results: dict) -> list[str]:
    """Every distinct warning once, that of tokens which carry nothing first."""
    of_tokens = results["tokens_warning"]
    found = [of_tokens and of_tokens[0].upper() + of_tokens[1:]]
    found += [measure.get("warning") for row in rows_of(results).values() for measure in row.values()]
    return union([filter(None, found)])


def missing_parts(results: dict) -> list[tuple[str, str]]:
    """(name, reason) of every part and every usual metric that was not evaluated."""
    skipped = dict(results["skipped"])
    absent = {part: label for part, label in PARTS.items() if not results[part]}
    usual = {key: metric.label for key, metric in METRICS.items() if metric.part == "reconstruction"}
    absent |= {key: label for key, label in usual.items() if key not in metric_keys(results)}
    lines = [(label, skipped.pop(key, "not computed")) for key, label in absent.items()]
    return lines + [(METRICS[key].label if key in METRICS else key, reason) for key, reason in skipped.items()]


def reconstruction_table(results: dict) -> list[list]:
    """Heading and a row for each token count."""
    keys = metric_keys(results)
    table: list[list] = [["tokens", "images", *(METRICS[key].label + METRICS[key].sign for key in keys)]]
    for count, row in rows_of(results).items():
        values = [Value.read(row.get(key), METRICS[key]) for key in keys]
        cells = [Cell(METRICS[key].show(value.value), value.interval(METRICS[key])) for key, value in zip(keys, values)]
        table.append([tokens(count) if count == "vae" else count, str(row["psnr"]["n"]), *cells])
    return table

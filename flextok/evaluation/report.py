"""What people look at: tables, plots and one self-contained HTML page from the results of an evaluation (format 1).

Missing numbers (null, NaN) are shown as a dash, and parts that were not evaluated are named with the reason.
"""

import base64
import html
import math
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..utils.files import write_atomically

DASH = "–"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555", "#a6761d")  # Okabe and Ito


class Metric(NamedTuple):
    """How a number is called, read and explained; `better` is "higher", "lower" or "" where neither is better."""

    label: str
    unit: str = ""
    better: str = ""
    digits: int = 4
    text: str = "No explanation is known for this metric."
    source: str = ""
    url: str = ""

    @property
    def heading(self) -> str:
        """Label, unit and the direction of better, e.g. `PSNR [dB] ↑`."""
        arrow = {"higher": " ↑", "lower": " ↓", "": ""}[self.better]
        return self.label + (f" [{self.unit}]" if self.unit else "") + arrow


def _arxiv(number: str) -> Tuple[str, str]:
    return f"arXiv {number}", f"https://arxiv.org/abs/{number}"


def _doi(name: str, doi: str) -> Tuple[str, str]:
    return name, f"https://doi.org/{doi}"


RECONSTRUCTION = ("psnr", "ssim", "latent_mse", "lpips", "rfid", "fd")
METRICS: Dict[str, Metric] = {
    "psnr": Metric(
        "PSNR", "dB", "higher", 2,
        "How close the pixels are: the mean squared error of an image on a logarithmic scale. It favours blur.",
        *_doi("Huynh-Thu and Ghanbari 2008", "10.1049/el:20080522"),
    ),
    "ssim": Metric(
        "SSIM", "", "higher", 3,
        "How alike brightness, contrast and structure are in small windows; 1 is identical.",
        *_doi("Wang et al. 2004", "10.1109/TIP.2003.819861"),
    ),
    "latent_mse": Metric(
        "latent MSE", "", "lower", 4,
        "Mean squared error in the VAE's latents, where the decoder works; what the VAE itself loses is not in it.",
        "FlexTok, arXiv 2502.13967", "https://arxiv.org/abs/2502.13967",
    ),
    "lpips": Metric(
        "LPIPS", "", "lower", 3,
        "How different two images look to a network trained on human judgements; 0 is identical.",
        *_arxiv("1801.03924"),
    ),
    "rfid": Metric(
        "rFID", "", "lower", 2,
        "How far the reconstructions as a whole set are from the originals, in Inception features. Few images make it "
        "too high, so only compare values over the same number of images.",
        *_arxiv("1706.08500"),
    ),
    "fd": Metric(
        "FD", "", "lower", 2,
        "The same Fréchet distance as rFID in the features of the encoder named in the settings. Its scale depends on "
        "that encoder, and few images make it too high.",
        *_arxiv("2306.04675"),
    ),
    "cosine": Metric(
        "cosine", "", "higher", 3,
        "How well the projected decoder features point where the vision encoder's do. A constant prediction, which "
        "ignores the image, scores well above 0 already: only what exceeds it is alignment.",
        "REPA, arXiv 2410.06940", "https://arxiv.org/abs/2410.06940",
    ),
    "cknna": Metric(
        "CKNNA", "", "higher", 3,
        "How far these features and the vision encoder's agree on which images are each other's nearest neighbours; "
        "1 is full agreement.",
        *_arxiv("2405.07987"),
    ),
    "knn": Metric(
        "kNN accuracy", "%", "higher", 1,
        "Share of test images whose class the nearest training images name right.",
        *_doi("Cover and Hart 1967", "10.1109/TIT.1967.1053964"),
    ),
    "linear": Metric(
        "linear accuracy", "%", "higher", 1,
        "Share of test images whose class a linear classifier on the frozen features names right.",
        *_arxiv("1610.01644"),
    ),
    "used": Metric(
        "codes used", "", "higher", 0,
        "Different codes at a token position over the images; at most the number of images or of codes.",
        "FSQ, arXiv 2309.15505", "https://arxiv.org/abs/2309.15505",
    ),
    "entropy_bits": Metric(
        "entropy", "bits", "higher", 2,
        "How evenly the codes of a position are used; at most the logarithm of the number of images or of codes.",
        *_doi("Shannon 1948", "10.1002/j.1538-7305.1948.tb01338.x"),
    ),
    "perplexity": Metric(
        "perplexity", "codes", "higher", 1,
        "2 to the power of the entropy: as many equally frequent codes would have it.",
        "VQ-VAE, arXiv 1711.00937", "https://arxiv.org/abs/1711.00937",
    ),
    "silhouette": Metric(
        "silhouette", "", "higher", 3,
        "Whether images of one group (a class, else a cluster) are closer in their first tokens than to other groups: "
        "from -1 to 1, 0 is no grouping.",
        *_doi("Rousseeuw 1987", "10.1016/0377-0427(87)90125-7"),
    ),
}  # fmt: skip
PARTS = {
    "reconstruction": "reconstruction metrics",
    "alignment": "alignment with the vision encoder",
    "probes": "probes (classes from frozen features)",
    "codes": "use of the codes",
    "grids": "pictures",
    "cost": "cost of the evaluation",
}
GRID_TITLES = {
    "best": "Best reconstructions",
    "median": "Median reconstructions",
    "worst": "Worst reconstructions",
}
ABOUT_LABELS = {
    "n_images": "images",
    "img_size": "image size [px]",
    "inference_steps": "sampling steps",
    "guidance_scale": "guidance scale",
    "perform_norm_guidance": "norm guidance (APG)",
    "encoder": "vision encoder",
    "averaged_weights": "averaged weights (EMA)",
}


# Numbers and words


def finite(value) -> Optional[float]:
    """`value` as a float, or None where there is none (None, NaN, infinite)."""
    return float(value) if value is not None and math.isfinite(value) else None


def number(value, digits: int = 2, sign: bool = False) -> str:
    """A number with fixed digits, a dash for None or NaN; one significant digit where fixed ones would show only 0."""
    value = finite(value)
    if value is None:
        return DASH
    value, plus = value + 0.0, "+" if sign else ""  # no -0
    if 1e-9 < abs(value) < 0.5 * 10.0**-digits:  # below is what rounding leaves of a 0
        return f"{value:{plus}.1g}"
    return f"{value:{plus}.{digits}f}"


def metric_of(key: str) -> Metric:
    """The description of a metric; one that is not known is called by its key."""
    return METRICS.get(key, Metric(key))


def tokens(count) -> str:
    """`1 token`, `256 tokens`, or what "vae" stands for."""
    if count == "vae":
        return "VAE alone"
    return f"{count} token{'' if int(count) == 1 else 's'}"


def duration(seconds) -> str:
    """Seconds as people say them; a dash for None."""
    if finite(seconds) is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(n_bytes) -> str:
    """Bytes as GB or MB (powers of ten); a dash for None."""
    if finite(n_bytes) is None:
        return DASH
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def plain(value) -> str:
    """A setting as text: yes or no, lists with commas, a dash for None."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or DASH
    return DASH if value is None else str(value)


def percent(value, digits: int = 1) -> str:
    """A share of 1 in percent; a dash for None."""
    return DASH if finite(value) is None else f"{100 * value:.{digits}f} %"


# Reading results


def token_counts(results: dict) -> List[int]:
    """The token counts that were evaluated, ascending."""
    return sorted(int(key) for key in (results.get("reconstruction") or {}) if key != "vae")


def metric_keys(results: dict) -> List[str]:
    """The reconstruction metrics of any token count, known ones first and in their usual order."""
    found = {key for row in (results.get("reconstruction") or {}).values() for key in row}
    return [key for key in RECONSTRUCTION if key in found] + sorted(found - set(RECONSTRUCTION))


def reconstruction_rows(results: dict) -> List[Tuple[str, dict]]:
    """(token count or "vae", its metrics), ascending, the VAE last."""
    rows = results.get("reconstruction") or {}
    return [(key, rows[key]) for key in [*map(str, token_counts(results)), "vae"] if key in rows]


def interval(measure: Optional[dict], digits: int) -> str:
    """The 95 % confidence as `low to high`, or nothing."""
    if not measure or finite(measure.get("low")) is None or finite(measure.get("high")) is None:
        return ""
    return f"{number(measure['low'], digits)} to {number(measure['high'], digits)}"


def value_of(measure: Optional[dict]) -> Optional[float]:
    """The number of a measure, None where there is none."""
    return finite(measure.get("value")) if measure else None


def headline(results: dict) -> str:
    """The main finding in a sentence: the first metric that has values, from the fewest tokens to the most."""
    rows = results.get("reconstruction") or {}
    for key in metric_keys(results):
        values = {n: value_of(rows[str(n)].get(key)) for n in token_counts(results)}
        values = {n: value for n, value in values.items() if value is not None}
        if values:
            return _headline(metric_of(key), key, values, rows)
    return "No reconstruction metric has a value."


def _headline(metric: Metric, key: str, values: Dict[int, float], rows: dict) -> str:
    amount = lambda value: f"{number(value, metric.digits)} {metric.unit}".strip()  # noqa: E731
    first, last = min(values), max(values)
    if first == last:
        text = f"{metric.label} is {amount(values[first])} with {tokens(first)}"
    else:
        low, high = (amount(values[n]) for n in (first, last))
        verb = "rises" if values[last] > values[first] else "falls"
        text = f"{metric.label} {verb} from {low} with {tokens(first)} to {high} with {last}"
        if low == high:
            text = f"{metric.label} stays at {low} from {tokens(first)} to {last}"
        elif _overlap(rows[str(first)][key], rows[str(last)][key]):
            text += " (the 95 % intervals overlap: no clear difference)"
        best = {"higher": max, "lower": min}.get(metric.better, lambda *_, **__: last)(values, key=values.get)
        if best not in (first, last):
            text += f", and is best with {best}: {amount(values[best])}"
        elif best == first and low != high:
            text += f", so more tokens are worse here ({metric.better} is better)"
    vae = value_of((rows.get("vae") or {}).get(key))
    return text + (f"; the VAE alone, without tokens, gives {amount(vae)}." if vae is not None else ".")


def _overlap(a: dict, b: dict) -> bool:
    """Whether both confidence intervals are there and overlap."""
    bounds = [finite(measure.get(end)) for measure in (a, b) for end in ("low", "high")]
    return None not in bounds and bounds[0] <= bounds[3] and bounds[2] <= bounds[1]


def warnings_of(results: dict) -> List[str]:
    """Each distinct warning once, with the metrics and token counts that it concerns unless it names them itself."""
    found: Dict[str, Dict[str, List[str]]] = {}
    rows = reconstruction_rows(results)
    for count, row in rows:
        for key, measure in row.items():
            if measure and measure.get("warning"):
                found.setdefault(measure["warning"], {}).setdefault(key, []).append(count)
    cosine = (results.get("alignment") or {}).get("cosine")
    if cosine and cosine.get("warning"):
        found.setdefault(cosine["warning"], {}).setdefault("cosine", [])
    lines = []
    for warning, concerned in found.items():
        names = []
        for key, counts in concerned.items():
            named = warning.lower().startswith(key.lower())
            some = f" ({', '.join(counts)})" if counts and len(counts) < len(rows) else ""
            names.append("" if named and not some else metric_of(key).label + some)
        prefix = ", ".join(filter(None, names))
        lines.append(f"{prefix}: {warning}" if prefix else warning)
    of_tokens = results.get("tokens_warning")
    return [of_tokens[0].upper() + of_tokens[1:], *lines] if of_tokens else lines


def missing_parts(results: dict) -> List[Tuple[str, str]]:
    """(name, reason) of every part and every usual metric that was not evaluated."""
    skipped = dict(results.get("skipped") or {})
    lines = [(label, skipped.pop(part, "not computed")) for part, label in PARTS.items() if not results.get(part)]
    present = metric_keys(results)
    if results.get("reconstruction"):
        for key in RECONSTRUCTION:
            if key not in present:
                lines.append((metric_of(key).label, skipped.pop(key, "not computed")))
    return lines + [(metric_of(key).label, reason) for key, reason in skipped.items()]


def usual_n(row: dict) -> Optional[int]:
    """The number of images of most metrics of a row."""
    counts = Counter(measure["n"] for measure in row.values() if measure and measure.get("n") is not None)
    return counts.most_common(1)[0][0] if counts else None


def describe_alignment(alignment: dict) -> List[Tuple[str, str]]:
    """(name, text) of the alignment's single numbers."""
    cosine, digits = alignment.get("cosine"), METRICS["cosine"].digits
    confidence = interval(cosine, digits)
    n = f", {cosine['n']} images" if cosine and cosine.get("n") is not None else ""
    layers, aligned_with = alignment.get("aligned_layers"), alignment.get("projector_encoder")
    lines = [
        ("vision encoder", plain(alignment.get("encoder"))),
        *([("trained towards", plain(aligned_with))] if aligned_with else []),
        ("cosine", number(value_of(cosine), digits) + (f" ({confidence}{n})" if confidence else n)),
        ("cosine of a constant prediction", number(alignment.get("constant"), digits)),
        ("CKNNA of the tokens", number(alignment.get("tokens_cknna"), METRICS["cknna"].digits)),
        ("CKNNA over", f"{plain(alignment.get('n'))} images, {plain(alignment.get('k'))} neighbours"),
    ]
    return lines + ([("aligned decoder layers", plain(layers))] if layers is not None else [])


def describe_codes(codes: dict) -> List[Tuple[str, str]]:
    """(name, text) of the numbers on codes that are not by position."""
    used, n_codes = codes.get("used_overall"), codes.get("codebook_size")
    share = f" ({percent(used / n_codes, 2)})" if used is not None and n_codes else ""
    lines = [
        ("codes used at any position", f"{plain(used)} of {plain(n_codes)}{share}, {plain(codes.get('n'))} images")
    ]
    for key, name in (("used", "codes used"), ("entropy_bits", "entropy [bits]"), ("perplexity", "perplexity")):
        values = [finite(value) for value in codes.get(key) or []]
        values = [value for value in values if value is not None]
        if values:
            digits = METRICS[key].digits
            low, high = number(min(values), digits), number(max(values), digits)
            mean = number(sum(values) / len(values), max(digits, 1))
            lines.append((f"{name} by position", f"{low} to {high}, mean {mean}"))
    for count, value in (codes.get("silhouette") or {}).items():
        by = f" (by {codes['silhouette_by']})" if codes.get("silhouette_by") else ""
        lines.append((f"silhouette of the first {tokens(count)}", number(value, METRICS["silhouette"].digits) + by))
    return lines


# Text


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = (
        [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        for row in rows
    )
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def definitions(title: str, lines: Sequence[Tuple[str, str]]) -> str:
    """A titled list of names and texts."""
    width = max(len(name) for name, _ in lines)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in lines)])


def console_table(results: dict) -> str:
    """Results as plain text: reconstruction by token count, alignment, probes, codes, what was skipped, warnings."""
    about = results.get("about") or {}
    blocks = [f"Evaluation of {plain(about.get('checkpoint'))}\n{headline(results)}"]
    keys = metric_keys(results)
    if keys:
        rows = [["tokens", "images", *(metric_of(key).heading for key in keys)]]
        for count, row in reconstruction_rows(results):
            rows.append([count, plain(usual_n(row)), *(_text_cell(row, key) for key in keys)])
        blocks.append("Reconstruction: mean (95 % confidence of the mean over images)\n" + text_table(rows))
    if results.get("alignment"):
        alignment = results["alignment"]
        lines = describe_alignment(alignment)
        digits = METRICS["cknna"].digits
        layers = [f"{layer['layer']}: {number(layer['cknna'], digits)}" for layer in alignment.get("layers") or []]
        lines.append(("CKNNA by decoder layer", ", ".join(layers) or DASH))
        blocks.append(definitions("Alignment", lines))
    if results.get("probes"):
        blocks.append(f"Probes: {probes_caption(results['probes'])}\n" + text_table(probe_rows(results["probes"])))
    if results.get("codes"):
        blocks.append(definitions("Codes", describe_codes(results["codes"])))
    if missing_parts(results):
        blocks.append(definitions("Not evaluated", missing_parts(results)))
    if warnings_of(results):
        blocks.append("\n".join(["Warnings", *(f"  {line}" for line in warnings_of(results))]))
    return "\n\n".join(blocks) + "\n"


def _text_cell(row: dict, key: str) -> str:
    measure, digits = row.get(key), metric_of(key).digits
    text, confidence = number(value_of(measure), digits), interval(measure, digits)
    if confidence:
        text += f" ({confidence})"
    return text + _other_n(row, measure)


def _other_n(row: dict, measure: Optional[dict]) -> str:
    """The number of images of a measure where it is not that of its row."""
    n = (measure or {}).get("n")
    return f" n={n}" if n is not None and n != usual_n(row) else ""


def probe_rows(probes: dict) -> List[List[str]]:
    """Heading and rows of the probes' table, chance last."""
    rows = [["features", METRICS["knn"].label, METRICS["linear"].label]]
    for name, scores in (probes.get("features") or {}).items():
        rows.append([name, percent(scores.get("knn")), percent(scores.get("linear"))])
    return rows + [["chance", percent(probes.get("chance")), percent(probes.get("chance"))]]


def probes_caption(probes: dict) -> str:
    """How many images and which classes the probes saw."""
    classes = probes.get("classes") or []
    named = ", ".join(map(str, classes[:12])) + (f" and {len(classes) - 12} more" if len(classes) > 12 else "")
    split = f"{plain(probes.get('n_train'))} training and {plain(probes.get('n_test'))} test images"
    return f"{split}, {len(classes)} classes ({named})"


# Plots


def new_plot(title: str, x_label: str, y_label: str):
    """An empty plot: (figure, axis)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axis = figure.subplots()
    axis.set_title(title, fontsize=12)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def save_plot(figure, path: Path) -> Path:
    """Write the figure as a PNG, with a legend below the axes if anything has a label."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        columns = 1 if max(map(len, labels)) > 24 else min(3, len(labels))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=160))
    return path


def token_axis(axis, counts: Sequence[int]) -> None:
    """A log2 axis of token counts with plain numbers, as many as fit."""
    axis.set_xscale("log", base=2)
    ticks: List[int] = []
    for count in sorted(counts, reverse=True):  # from the right, so that the most tokens are always named
        if not ticks or ticks[-1] / count >= 1.5:
            ticks.append(count)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    if len(counts) == 1:
        axis.set_xlim(counts[0] / 2, counts[0] * 2)


def draw_line(axis, x: Sequence, y: Sequence, low: Sequence, high: Sequence, colour: str, label=None, **style):
    """A line with a confidence band; None leaves a gap. A single point gets a bar instead of a band.

    `style` is for matplotlib's plot, a marker and a line style for example.
    """
    y, low, high = ([math.nan if finite(v) is None else float(v) for v in values] for values in (y, low, high))
    axis.plot(x, y, color=colour, label=label, **{"marker": "o", "markersize": 4, "linewidth": 1.8, **style})
    if len(x) == 1:
        axis.vlines(x, low, high, color=colour, alpha=0.5, linewidth=3)
    else:
        axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def plot_metric(results: dict, key: str):
    """One reconstruction metric against the token count, with its confidence and the VAE's own value."""
    metric, counts = metric_of(key), token_counts(results)
    rows = results["reconstruction"]
    measures = [rows[str(n)].get(key) or {} for n in counts]
    better = f" ({metric.better} is better)" if metric.better else ""
    figure, axis = new_plot(metric.label + better, "tokens", metric.unit or metric.label)
    ends = [[measure.get(end) for measure in measures] for end in ("low", "high")]
    has_band = any(finite(value) is not None for value in ends[0])
    label = "mean, 95 % confidence over images" if has_band else None
    draw_line(axis, counts, [value_of(measure) for measure in measures], *ends, COLOURS[0], label)
    _draw_limit(axis, value_of((rows.get("vae") or {}).get(key)))
    token_axis(axis, counts)
    return figure


def _draw_limit(axis, vae: Optional[float]) -> None:
    """What the VAE alone gives: a line, or words where a line so far away would flatten the curve."""
    if vae is None:
        return
    low, high = axis.get_ylim()
    if low - 4 * (high - low) <= vae <= high + 4 * (high - low):
        axis.axhline(vae, color="#555555", linestyle="--", linewidth=1.2, label="VAE alone")
    else:
        axis.plot([], [], color="#555555", linestyle="--", linewidth=1.2, label=f"VAE alone: {vae:.4g}, off this axis")


def plot_cknna(alignment: dict):
    """CKNNA with the vision encoder by decoder layer; aligned layers in another colour, tokens as a line."""
    from matplotlib.ticker import MaxNLocator

    figure, axis = new_plot("CKNNA by decoder layer (higher is better)", "decoder layer (0 is the first)", "CKNNA")
    values = {layer["layer"]: finite(layer["cknna"]) for layer in alignment["layers"]}
    aligned = set(alignment.get("aligned_layers") or [])
    groups = (
        (COLOURS[1], "aligned in training", aligned),
        (COLOURS[0], "not aligned" if aligned else None, set(values) - aligned),
    )
    for colour, label, members in groups:
        shown = [layer for layer in values if layer in members and values[layer] is not None]
        if shown:
            axis.bar(shown, [values[layer] for layer in shown], color=colour, label=label, zorder=2)
    axis.set_xlim(min(values) - 0.8, max(values) + 0.8)
    if finite(alignment.get("tokens_cknna")) is not None:
        axis.axhline(alignment["tokens_cknna"], color="#555555", linestyle="--", linewidth=1.2, label="tokens")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    return figure


def plot_codes(codes: dict, key: str):
    """`used` or `entropy_bits` by token position, with the most that so many images can show."""
    from matplotlib.ticker import MaxNLocator

    titles = {"used": ("Different codes by token position", "codes"), "entropy_bits": ("Entropy of the codes", "bits")}
    title, unit = titles[key]
    values = [math.nan if finite(value) is None else value for value in codes[key]]
    figure, axis = new_plot(title, "token position (1 is the first)", unit)
    positions = range(1, len(values) + 1)
    style = {"marker": "o", "markersize": 4} if len(values) <= 40 else {}
    axis.plot(positions, values, color=COLOURS[0], linewidth=1.4, **style)
    limits = [limit for limit in (codes.get("n"), codes.get("codebook_size")) if limit]
    if limits:
        limit = min(limits) if key == "used" else math.log2(min(limits))
        label = f"most possible with {codes['n']} images" if codes.get("n") == min(limits) else "size of the codebook"
        axis.axhline(limit, color="#555555", linestyle="--", linewidth=1.2, label=label)
    axis.set_ylim(bottom=0)
    axis.set_xlim(0.4, len(values) + 0.6)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def write_plots(results: dict, folder: Path) -> Dict[str, Path]:
    """Draw what the results hold as PNG files in `folder`/plots; parts without numbers are left out.

    Returns:
        Paths by name: the reconstruction metrics' keys, then `cknna`, `used`, `entropy_bits`.
    """
    figures = {}
    for key in metric_keys(results) if token_counts(results) else []:
        rows = results["reconstruction"]
        if any(value_of(rows[str(n)].get(key)) is not None for n in token_counts(results)):
            figures[key] = plot_metric(results, key)
    alignment, codes = results.get("alignment") or {}, results.get("codes") or {}
    if any(finite(layer["cknna"]) is not None for layer in alignment.get("layers") or []):
        figures["cknna"] = plot_cknna(alignment)
    for key in ("used", "entropy_bits"):
        if any(finite(value) is not None for value in codes.get(key) or []):
            figures[key] = plot_codes(codes, key)
    return {name: save_plot(figure, Path(folder) / "plots" / f"{name}.png") for name, figure in figures.items()}


# HTML


CSS = """
:root { color-scheme: light dark; --text: #1c2128; --muted: #57606a; --back: #ffffff; --soft: #f4f6f8; --line: #d5dae0;
  --link: #0550ae; --warn: #fff4d6; --warn-line: #c98a00; --good: #116329; --bad: #a40e26; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ed; --muted: #9aa4af; --back: #14181d; --soft: #1e242b;
  --line: #39424c; --link: #6cb6ff; --warn: #33290f; --warn-line: #d9a520; --good: #57c97a; --bad: #ff8182; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }
a { color: var(--link); }
p, ul { max-width: 46rem; margin: .5rem 0; }
li { margin: .25rem 0; }
.lead { font-size: 1.15rem; border-left: 4px solid var(--link); padding-left: .8rem; margin: 1rem 0; }
.muted, small { color: var(--muted); }
.warn { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .5rem .8rem; max-width: 46rem; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right; vertical-align: top;
  white-space: nowrap; }
th { background: var(--soft); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
th:first-child { background: var(--soft); }
td small { display: block; font-size: .78rem; line-height: 1.2; }
table.text td, table.text th { text-align: left; white-space: normal; overflow-wrap: break-word; }
table.text td:first-child { min-width: 7rem; position: static; }
table.compare td:first-child { white-space: normal; min-width: 7.5rem; max-width: 15rem; }
@media (max-width: 40rem) { table.compare td:first-child { max-width: 8.5rem; } th, td { padding: .3rem .4rem; } }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .8rem; }
figure { margin: 0 0 .8rem; break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; }
.plots img { width: 100%; }
.verdicts span { font-weight: 400; }
code { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .88em;
  overflow-wrap: anywhere; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--link); }
@media print { :root { color-scheme: light; --text: #000; --muted: #444; --back: #fff; --soft: #f2f2f2; --line: #bbb;
  --link: #000; --warn: #fff; --good: #000; --bad: #000; } body { font-size: 11px; max-width: none; padding: 0; }
  .plots { grid-template-columns: repeat(2, 1fr); } .scroll { overflow: visible; }
  figure img { min-width: 0 !important; } h2, h3 { break-after: avoid; }
  th, td { padding: .2rem .35rem; } th:first-child, td:first-child { position: static; } tr { break-inside: avoid; } }
"""


def escape(text) -> str:
    """Text for HTML, in elements and in quoted attributes."""
    return html.escape(str(text), quote=True)


def page(title: str, body: Sequence[str]) -> str:
    """A whole HTML page that loads nothing: the policy forbids it."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def write_page(path: Path, title: str, body: Sequence[str]) -> Path:
    """Write the page whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(page(title, body), encoding="utf-8"))
    return path


def html_table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already, the first row its heading; `text` for columns of words."""
    head, *body = rows
    cells = lambda tag, row: "".join(f"<{tag}>{cell}</{tag}>" for cell in row)  # noqa: E731
    lines = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in body)
    attribute = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll"><table{attribute}><thead><tr>{cells("th", head)}</tr></thead>\n'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )


def escaped_table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of plain text."""
    return html_table([[escape(cell) for cell in row] for row in rows], kind)


def picture(path: Path, alt: str) -> str:
    """A PNG inside the page; one that is missing is named."""
    if not Path(path).is_file():
        return f'<p class="warn">The picture {escape(path)} ({escape(alt)}) is missing.</p>'
    data = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    return f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></figure>'


def grid_html(path: Path, alt: str, caption: str) -> str:
    """A wide picture that keeps a legible width on a phone, where it scrolls sideways."""
    path = Path(path)
    width = int.from_bytes(path.read_bytes()[16:20], "big") if path.is_file() else 0  # of a PNG's header
    image = picture(path, alt).replace("<img ", f'<img style="min-width: min({width}px, 46rem)" ', 1)
    return f'<div class="scroll">{image}</div><p class="muted">{escape(caption)}</p>'


def plots_html(paths: Dict[str, Path]) -> str:
    """Plots side by side, as many as fit the width."""
    pictures = "\n".join(picture(path, f"Plot of {metric_of(name).label}") for name, path in paths.items())
    return f'<div class="plots">\n{pictures}\n</div>' if paths else ""


def bullets(lines: Sequence[str], kind: str = "") -> str:
    """A list of plain texts."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="{kind}"><ul>{items}</ul></div>' if kind else f"<ul>{items}</ul>"


def explanations(metrics: Sequence[Metric]) -> str:
    """What each number means, which direction is better, and where it comes from."""
    rows = [["metric", "better", "meaning", "source"]]
    for metric in metrics:
        link = f'<a href="{escape(metric.url)}">{escape(metric.source)}</a>' if metric.url else escape(metric.source)
        better = f"{metric.better}&nbsp;{'↑' if metric.better == 'higher' else '↓'}" if metric.better else DASH
        rows.append([escape(metric.label), better, escape(metric.text), link or DASH])
    return "<h2>What the numbers mean</h2>\n" + html_table(rows, "text")


def _html_cell(row: dict, key: str) -> str:
    measure, digits = row.get(key), metric_of(key).digits
    confidence = interval(measure, digits) + _other_n(row, measure)
    return number(value_of(measure), digits) + (f"<small>{escape(confidence.strip())}</small>" if confidence else "")


def _reconstruction_section(results: dict, plots: Dict[str, Path]) -> str:
    keys = metric_keys(results)
    rows = [["tokens", "images", *(escape(metric_of(key).heading) for key in keys)]]
    for count, row in reconstruction_rows(results):
        name = "VAE alone" if count == "vae" else count
        rows.append([name, plain(usual_n(row)), *(_html_cell(row, key) for key in keys)])
    note = (
        "Each number is a mean over the images, with the range of its 95 % confidence below it where there is one; "
        "↑ higher is better, ↓ lower is better. The VAE alone, without tokens, is the limit."
    )
    own = {key: path for key, path in plots.items() if key in keys}
    return f'<h2>Reconstruction</h2>\n{html_table(rows)}\n<p class="muted">{note}</p>\n{plots_html(own)}'


def _grids_section(results: dict, folder: Path) -> str:
    counts, n = token_counts(results), (results.get("about") or {}).get("n_images")
    chosen = "by PSNR" + (f" with {tokens(max(counts))}" if counts else "")
    lines = ["<h2>Pictures</h2>"]
    for name, path in results["grids"].items():
        title = GRID_TITLES.get(name, name)
        of = f" of {n} images" if n is not None else ""
        how = f"{title}{of}, ranked {chosen}. " if name in GRID_TITLES else ""
        caption = f"{how}More tokens to the right; the VAE alone is the limit."
        lines += [f"<h3>{escape(title)}</h3>", grid_html(Path(folder) / path, title, caption)]
    return "\n".join(lines)


def _alignment_section(alignment: dict, plots: Dict[str, Path]) -> str:
    digits = METRICS["cknna"].digits
    layers = alignment.get("layers") or []
    rows = [["decoder layer", "CKNNA ↑"], *([str(x["layer"]), number(x["cknna"], digits)] for x in layers)]
    table = f"<details><summary>CKNNA of each layer</summary>{escaped_table(rows)}</details>" if layers else ""
    own = plots_html({key: path for key, path in plots.items() if key == "cknna"})
    single = escaped_table([["", "value"], *describe_alignment(alignment)], "text")
    return f"<h2>Alignment with the vision encoder</h2>\n{single}\n{own}\n{table}"


def _codes_section(codes: dict, plots: Dict[str, Path]) -> str:
    keys = ("used", "entropy_bits", "perplexity")
    lists = [codes.get(key) or [] for key in keys]
    rows = [["position", *(METRICS[key].heading for key in keys)]]
    for i in range(max(map(len, lists))):
        cells = (number(v[i], METRICS[key].digits) if i < len(v) else DASH for key, v in zip(keys, lists))
        rows.append([str(i + 1), *cells])
    own = plots_html({key: path for key, path in plots.items() if key in keys})
    single = escaped_table([["", "value"], *describe_codes(codes)], "text")
    return (
        f"<h2>Use of the codes</h2>\n{single}\n{own}\n"
        f"<details><summary>Each token position</summary>{escaped_table(rows)}</details>"
    )


def _settings_section(results: dict) -> str:
    rows = [["setting", "value"]]
    rows += [[ABOUT_LABELS.get(key, key), plain(value)] for key, value in (results.get("about") or {}).items()]
    cost = results.get("cost") or {}
    if cost:
        rows += [["time", duration(cost.get("seconds"))], ["peak memory", size(cost.get("peak_memory_bytes"))]]
    return "<h2>What was evaluated, and how</h2>\n" + escaped_table(rows, "text")


def explained_keys(results: dict) -> List[str]:
    """Keys of METRICS for which the results hold numbers."""
    keys = [key for key in metric_keys(results) if key in METRICS]
    parts = {
        "alignment": ["cosine", "cknna"],
        "probes": ["knn", "linear"],
        "codes": ["used", "entropy_bits", "perplexity", "silhouette"],
    }
    return keys + [key for part, names in parts.items() if results.get(part) for key in names]


def _summary_line(about: dict) -> str:
    """What was evaluated in one line: images, size, data, seed."""
    n = about.get("n_images")
    images = f"{plain(n)} image{'' if n == 1 else 's'} of {plain(about.get('data'))}"
    return f"{images}, {plain(about.get('img_size'))} px, seed {plain(about.get('seed'))}. {plain(about.get('model'))}."


def write_report(results: dict, folder: Path) -> Path:
    """Draw the plots and write `folder`/report.html, one page with everything in it.

    Args:
        results: What the evaluation found (format 1).
        folder: Where the results lie; the grids' paths are relative to it.

    Returns:
        The page's path.
    """
    folder, about = Path(folder), results.get("about") or {}
    plots = write_plots(results, folder)
    title = f"Evaluation of {plain(about.get('checkpoint'))}"
    body = [f"<h1>{escape(title)}</h1>", f'<p class="muted">{escape(_summary_line(about))}</p>']
    body.append(f'<p class="lead">{escape(headline(results))}</p>')
    if warnings_of(results):
        body.append(bullets(warnings_of(results), "warn"))
    if metric_keys(results):
        body.append(_reconstruction_section(results, plots))
    if results.get("grids"):
        body.append(_grids_section(results, folder))
    if results.get("alignment"):
        body.append(_alignment_section(results["alignment"], plots))
    if results.get("probes"):
        caption = escape(probes_caption(results["probes"]))
        table = escaped_table(probe_rows(results["probes"]))
        body.append(f'<h2>Probes</h2>\n<p class="muted">{caption}</p>\n{table}')
    if results.get("codes"):
        body.append(_codes_section(results["codes"], plots))
    if missing_parts(results):
        rows = [["part", "reason"], *missing_parts(results)]
        body.append("<h2>Not evaluated</h2>\n" + escaped_table(rows, "text"))
    body += [_settings_section(results), explanations([METRICS[key] for key in explained_keys(results)])]
    return write_page(folder / "report.html", title, body)

"""What people look at: console tables and one self-contained HTML page from the results of an evaluation (format 2)."""

import base64
from collections.abc import Sequence
from pathlib import Path

import jinja2
from PIL import Image

from ..utils.files import write_atomically
from .findings import (
    METRICS,
    TEMPLATES,
    duration,
    explained_keys,
    headline,
    missing_parts,
    number,
    percent,
    plain,
    reconstruction_table,
    sampling,
    size,
    tokens,
    warnings_of,
)
from .plots import plots_of


def columns(rows: Sequence[Sequence]) -> str:
    """Rows of cells in columns of plain text: the first to the left, the others to the right."""
    rows = [list(map(str, row)) for row in rows]
    first, *widths = (max(map(len, column)) for column in zip(*rows))
    return "\n".join("  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]).rstrip() for row in rows)


def definitions(lines: Sequence[tuple[str, str]]) -> str:
    """Names and texts in two columns of plain text, indented."""
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in lines)


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=jinja2.select_autoescape(["html"]),
    undefined=jinja2.ChainableUndefined,  # a part of the results may be missing
    trim_blocks=True,
    lstrip_blocks=True,
)
FILTERS = (columns, definitions, duration, number, percent, plain, size)
ENVIRONMENT.filters.update({function.__name__: function for function in FILTERS})
ENVIRONMENT.globals.update(METRICS=METRICS, tokens=tokens)


def render(template: str, **context) -> str:
    """One of the templates, with a line break at its end."""
    return ENVIRONMENT.get_template(template).render(context).strip() + "\n"


def write_page(folder: Path, page: str) -> Path:
    """Write `folder`/report.html whole or not at all."""
    path = Path(folder) / "report.html"
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def picture(path: Path, alt: str) -> dict:
    """A PNG file for a page: its data and its width in pixels."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return {"alt": alt, "data": data, "width": Image.open(path).width}


def findings_of(results: dict) -> dict:
    """What console and page both show."""
    return {
        "results": results,
        "about": results["about"],
        "headline": headline(results),
        "sampling": sampling(results),
        "table": reconstruction_table(results),
        "warnings": warnings_of(results),
        "missing": missing_parts(results),
    }


def console_table(results: dict) -> str:
    """Results as plain text: reconstruction by token count, alignment, probes, codes, what was skipped, warnings."""
    return render("evaluation.txt", **findings_of(results))


def write_report(results: dict, folder: Path) -> Path:
    """Draw the plots and write `folder`/report.html, one page with everything in it.

    Args:
        results: What the evaluation found (format 2).
        folder: Where the results lie; the grids' paths are relative to it.

    Returns:
        The page's path.
    """
    page = render(
        "evaluation.html",
        plots=plots_of([{"name": "", "runs": [{"results": results}]}], folder),
        grids={name: picture(Path(folder) / path, name) for name, path in results["grids"].items()},
        explained=[METRICS[key] for key in explained_keys(results)],
        **findings_of(results),
    )
    return write_page(folder, page)

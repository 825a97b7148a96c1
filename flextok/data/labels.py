"""Class labels as numbers, by one rule for every source: the data set's own numbers, else texts in natural order."""

import logging
import re
from collections.abc import Sequence

import numpy as np

from ..utils.config import ConfigError

log = logging.getLogger("flextok")

NO_LABEL = re.compile(r"|-[0-9]+(\.0+)?")
WHOLE_NUMBER = re.compile(r"(0|[1-9][0-9]{0,17}|[1-8][0-9]{18})(\.0+)?")  # within 64 bits; 007 is a name


def natural_key(text: str) -> tuple:
    """Sorts texts so that runs of digits compare as numbers: a2 before a10."""
    parts = re.split(r"(\d+)", text.casefold())  # digits are at odd places
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], text


def plain(text: str) -> str:
    """A whole number without the zeros behind its point, any other text as it is."""
    return text.partition(".")[0] if WHOLE_NUMBER.fullmatch(text) else text


def number_labels(
    values: Sequence[str | int | float | None], source: str, numbers: dict[str, int] | None = None
) -> tuple[np.ndarray | None, dict[str, int] | None]:
    """The class number of each of N images, and the number of each class by its name, in the order of the numbers.

    Missing labels (None, NaN, an empty text) and negative numbers are -1: no label. Whole numbers (3, 3.0, and '3' if
    all labels are such) keep their value. Other texts are numbered from 0 in natural order, which the log says; it also
    counts the images without a label.

    Args:
        source: What the images are of, for messages.
        numbers: The classes, if they are known: those of the training images, or of a ClassLabel.

    Returns:
        int64 [N] and the numbers; (None, None) if there are no labels at all.

    Raises:
        ConfigError: A label is not among `numbers`.
    """
    texts = {value: "" if value is None or value != value else str(value).strip() for value in set(values)}
    n = len(values)
    if numbers is None:
        found = {text for text in texts.values() if not NO_LABEL.fullmatch(text)}
        if not found:
            if any(texts.values()):
                log.warning("%s: the labels of all %d images are negative, which means that there are none", source, n)
            return None, None
        if all(map(WHOLE_NUMBER.fullmatch, found)):
            numbers = {text: int(text) for text in sorted(map(plain, found), key=int)}
        else:
            names = sorted(found, key=natural_key)
            numbers = {name: i for i, name in enumerate(names)}
            shown = ", ".join(f"{name} is {i}" for name, i in [*numbers.items()][:3])
            last = f", ..., {names[-1]} is {len(names) - 1}" if len(names) > 3 else ""
            log.info("%s: its %d classes are texts, numbered in natural order: %s%s", source, len(names), shown, last)
    of_value, known = {}, {name.strip(): number for name, number in numbers.items()}
    for value, text in texts.items():
        name = text if text in known else plain(text)
        if name not in known and not NO_LABEL.fullmatch(text):
            raise ConfigError(
                f"{source} has the class {text!r}, which is none of the {len(numbers)} classes of the training images: "
                "leave its images out, or train on some of them"
            )
        of_value[value] = known.get(name, -1)
    labels = np.fromiter((of_value[value] for value in values), np.int64, n)
    if (labels < 0).any():
        log.warning("%s: %d of %d images have no class label (-1)", source, (labels < 0).sum(), n)
    return labels, numbers


def class_names(numbers: dict[str, int] | None) -> list[str] | dict[int, str] | None:
    """The name of each class by its number: a list, or a dict where numbers are left out."""
    if numbers is None or list(numbers.values()) == list(range(len(numbers))):
        return None if numbers is None else list(numbers)
    return {number: name for name, number in numbers.items()}

"""Plain values from YAML and JSON, read without building or calling anything."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from .config import ConfigError, shown


class _Loader(yaml.SafeLoader):
    """SafeLoader with the floats of YAML 1.2 (`1e-4` is a number), where a key given twice is an error."""

    def construct_mapping(self, node, deep=False):
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: {key.value!r} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """YAML text to plain values; raises ConfigError where it is wrong, with the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the date 2026-99-99
        raise ConfigError(f"not valid YAML: {error}") from error


def read_json_object(path: Path) -> dict:
    """The object in a JSON file; raises ConfigError, with the path, for anything else that a file may hold."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {shown(value)}, expected an object, {{...}}")
    return value

"""Plain values from text that may be hostile: YAML and JSON, read without building or calling anything."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from .config import ConfigError, check_tree, shown


class _Loader(yaml.SafeLoader):
    """SafeLoader with the floats of YAML 1.2 (`1e-4` is a number), where a key given twice is an error.

    As in YAML 1.2, `<<` merges nothing: a few lines of merges could ask for billions of keys.
    """

    def construct_mapping(self, node, deep=False):
        if not isinstance(node, yaml.MappingNode):  # e.g. `!!map` before a list
            raise yaml.constructor.ConstructorError(None, None, "expected a mapping", node.start_mark)
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise ConfigError(f"line {key_node.start_mark.line + 1}: `<<` merges nothing here: write the keys out")
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool)) and key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: {shown(key)} is given twice")
            seen.add(key) if isinstance(key, (str, int, float, bool)) else None
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """YAML text to plain values; raises ConfigError where it is wrong, with the line, or too large for `check_tree`."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}") from error
    except RecursionError:
        raise ConfigError("not valid YAML for this program: it is nested too deeply") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        if isinstance(error, ConfigError):
            raise
        # Of values that PyYAML cannot make: the date 2026-99-99, a number of 5000 digits, `!!bool 7`.
        raise ConfigError(f"not valid YAML: {type(error).__name__}: {error}") from error
    check_tree(value)
    return value


def read_json_object(path: Path) -> dict:
    """The object in a JSON file; raises ConfigError, with the path, for anything else that a file may hold."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ConfigError(f"it holds {shown(value)}, expected an object, {{...}}")
        check_tree(value)
    except (ValueError, RecursionError, OSError) as error:  # ConfigError, JSONDecodeError and UnicodeDecodeError too
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return value

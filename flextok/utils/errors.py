"""The base of errors that are the user's to mend."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger("flextok")


class UserError(Exception):
    """Its message says what was given, what was expected and what to do; commands show it without a traceback."""


@contextlib.contextmanager
def only_warned(what: Any) -> Iterator[None]:
    """Let an OSError inside, such as a full disk, be a warning that `what` cannot be written."""
    try:
        yield
    except OSError as error:
        log.warning("%s cannot be written: %s", what, error)


def run_command(main: Callable[[], None]) -> None:
    """Run a command; what is the user's to mend ends it with one line and exit code 1, not with a traceback."""
    try:
        main()
    except (UserError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped: the same command goes on where it was", file=sys.stderr)
        sys.exit(130)

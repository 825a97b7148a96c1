"""The base of errors that are the user's to mend."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Its message says what was given, what was expected and what to do; commands show it without a traceback."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command; what is the user's to mend ends it with one line and exit code 1, not with a traceback."""
    try:
        main()
    except (UserError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped: the same command goes on where it was", file=sys.stderr)
        sys.exit(130)

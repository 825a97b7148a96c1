"""The base of errors that are the user's to mend."""


class UserError(Exception):
    """Its message says what was given, what was expected and what to do; commands show it without a traceback."""

"""The root of the errors that a reader can mend."""


class MinimoeError(ValueError):
    """What went wrong and what to do, in one line; the command line prints it without a traceback."""

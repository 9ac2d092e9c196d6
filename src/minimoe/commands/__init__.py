"""The subcommands of ``minimoe``, a module each, imported only when chosen.

A module has ``add_arguments(parser)`` and ``run(args) -> int`` (the exit code). It imports torch and other
slow things inside ``run``, raises :class:`UserError` for what the user can mend, and is named in
:data:`minimoe.cli.COMMANDS`.
"""
from ..errors import MinimoeError


class UserError(MinimoeError):
    """What a command alone finds wrong; the command line prints it as one line and exits with code 1."""

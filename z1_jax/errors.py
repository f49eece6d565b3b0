"""The one exception that a command tells in a line instead of a traceback. Importable by every module."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user can mend. One line: what was wrong, what was got, what was expected, how to mend it."""

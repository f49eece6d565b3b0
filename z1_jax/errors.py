"""The one exception that a command tells in a line instead of a traceback, and what of others fits into one.

Importable by every module.
"""

from __future__ import annotations

from envs.text import shortened

__all__ = ["UserError", "first_line", "shortened"]


class UserError(ValueError):
    """Something that the user can mend. One line: what was wrong, what was got, what was expected, how to mend it."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message, which may be pages; a long one without its middle."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return shortened(lines[0], 400) if lines else type(error).__name__

"""Groups and episodes whose environments fail again and again at one state, and how many of them a run bears."""

from __future__ import annotations

from z1_jax.errors import UserError

LOST_SHARE = 0.01  # of all that may be lost; but LOST_FREELY always
LOST_FREELY = 2


class TooManyLost(UserError):
    """Environments fail so often that what is left would not stand for what was asked."""


class Lost:
    """Groups whose environments failed again and again at one state.

    Args:
        what: they are called; before, drawn: how many were lost, and drawn, earlier in the run.
    """

    def __init__(self, what: str, before: int, drawn: int):
        self._what, self._before, self.drawn = what, before, drawn
        self.why: dict[int, str] = {}  # by number, since the run's earlier ones
        self.newest = ""

    def add(self, group: int, why: str) -> None:
        """Raises TooManyLost: see `collect`."""
        if group in self.why:
            return
        self.why[group] = self.newest = why
        check_lost(self._before + len(self.why), self.drawn, self._what, why)


def check_lost(lost: int, drawn: int, what: str, why: str) -> None:
    """Raises TooManyLost: see `collect`. `what` was lost, and `why` the last one."""
    if lost > max(LOST_FREELY, LOST_SHARE * drawn):
        raise TooManyLost(
            f"{lost} of {drawn} {what} were lost, for an environment failed again and again at one state; more than "
            f"{LOST_SHARE:.0%} would falsify the result. The last: {why}"
        )

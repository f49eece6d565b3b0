"""Z-1 JAX: GRPO post-training of the π0.5 vision-language-action model in JAX."""

import sys
from types import TracebackType

__version__ = "0.1.0"


def _tell_interruption(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted: the same command continues where it stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if sys.argv[:1] == ["-m"]:  # `python -m z1_jax.…`: the command's imports take seconds, and Ctrl-C may fall into them
    sys.excepthook = _tell_interruption

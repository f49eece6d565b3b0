"""Z-1 JAX: GRPO post-training of the π0.5 vision-language-action model in JAX."""

import sys

from z1_jax import interrupt

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # `python -m z1_jax.…`: the command's imports take seconds, and Ctrl-C may fall into them
    interrupt.install_hooks()

"""Z-1 JAX: GRPO post-training of the π0.5 vision-language-action model in JAX."""

__version__ = "0.1.0"

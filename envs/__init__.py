"""Environments: the built-in kitchen, RoboCasa and the worker pool. NumPy only, never JAX."""

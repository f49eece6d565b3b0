"""The settings of a run: their defaults, their checks, and how the command line changes them."""

"""Checkpoints of other projects and our own as files: arrays in blocks, and what goes with them."""

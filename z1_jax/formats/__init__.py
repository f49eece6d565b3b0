"""Checkpoints of other projects and our own as files: tensors read and written piece by piece, and what goes with them."""

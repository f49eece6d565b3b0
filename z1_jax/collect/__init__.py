"""Demonstrations → a dataset: the expert's, or those of others."""

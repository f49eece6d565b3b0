"""Configuration files: each defines get_config(preset) -> ml_collections.ConfigDict."""

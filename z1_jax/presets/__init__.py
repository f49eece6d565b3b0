"""The presets that every command finds wherever the package is installed; configs/ of the repository names them."""

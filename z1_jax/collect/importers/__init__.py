"""Demonstrations of others: RoboCasa's HDF5 files and LeRobot directories, read as raw episodes."""

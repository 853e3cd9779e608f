"""The tools whose configs are read, one file each."""

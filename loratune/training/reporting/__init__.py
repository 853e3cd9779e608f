"""Reports on a run: screen, files, trackers."""

"""The run folder: the only contract between training and everything after it."""

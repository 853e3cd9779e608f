"""The run folder: the only interface between training and later commands."""

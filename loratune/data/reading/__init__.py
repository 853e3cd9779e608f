"""Streams the rows of files and hub datasets in constant memory."""

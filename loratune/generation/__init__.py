"""Generates answers with a trained adapter or a plain model: in the chat, for files of rows, and over HTTP."""

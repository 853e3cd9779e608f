"""Modelfiles for Ollama, with the chat template converted to a Go template."""

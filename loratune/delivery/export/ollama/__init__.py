"""Modelfiles for Ollama, with the chat template in Go's language."""

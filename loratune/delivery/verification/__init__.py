"""Verifies that a merged model equals base + adapter."""

"""Adapter + base → a merged model folder."""

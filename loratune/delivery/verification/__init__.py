"""Whether a merged model is base + adapter."""

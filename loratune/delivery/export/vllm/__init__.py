"""Whether vLLM can serve an adapter, and with which flags."""

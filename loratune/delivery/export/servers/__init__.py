"""Checks whether vLLM or SGLang can serve an adapter, proves it in the class that they load, and determines flags."""

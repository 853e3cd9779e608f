"""The HTTP server: OpenAI's protocol in front of the engine, and a chat page."""

from loratune.errors import Exit, LoratuneError

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as missing:
    raise LoratuneError(
        f'loratune serve needs the package {missing.name}: pip install "loratune[serve]"', Exit.USAGE
    ) from missing

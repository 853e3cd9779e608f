"""The HTTP server: OpenAI's API on top of the engine, and a chat page."""

from loratune.extras import required

with required("loratune serve", "serve"):
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401

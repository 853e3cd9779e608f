"""The page that shows the runs of a folder, also while another process trains them; it can only read."""

from loratune.extras import required

with required("loratune runs serve", "serve"):
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401

"""The files of a page, read once at startup."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.responses import Response

from loratune.generation.server.failures import ApiError

CHAT_PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}


class Page:
    """The files by name.

    Args:
        folders: where they lie; a file of a later folder takes the place of an earlier one of its name.
    """

    def __init__(self, *folders: Path) -> None:
        files = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in TYPES]
        self.files = {path.name: (path.read_bytes(), TYPES[path.suffix]) for path in files}

    def response(self, name: str) -> Response:
        """Return a file.

        Raises:
            ApiError: there is no file of this name.
        """
        if name not in self.files:
            raise ApiError(404, f"there is no file {name}", "not_found")
        content, kind = self.files[name]
        return Response(content, headers=HEADERS, media_type=kind)


def add_page(app: FastAPI, page: Page) -> None:
    """Serve a page, whose files need no key."""

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page.response("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return page.response(name)

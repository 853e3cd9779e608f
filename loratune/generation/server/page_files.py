"""The chat page's files, read once at startup."""

from __future__ import annotations

from pathlib import Path

from starlette.responses import Response

from loratune.generation.server.failures import ApiError

FOLDER = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}


class Page:
    """The files by name."""

    def __init__(self) -> None:
        files = sorted(path for path in FOLDER.iterdir() if path.suffix in TYPES)
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

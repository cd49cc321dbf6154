"""The playground: a page at `/` and its files, which a browser loads from here alone."""

import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from services.common.errors import NotFound

_FOLDER = Path(__file__).parents[1] / "playground"
_PAGE = "index.html"
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Nothing from elsewhere, nothing inline, nobody's frame: what a model says can be shown and never run.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def playground_routes() -> list[Route]:
    """GET / and /playground/NAME. The files are read here, once."""
    files = {file.name: _File(file) for file in _FOLDER.iterdir() if file.suffix in _MEDIA_TYPES}

    async def show_page(request: Request) -> Response:
        return files[_PAGE].answer(request)

    async def show_file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in files:
            raise NotFound(f"The playground has no file {name[:100]!r}.")
        return files[name].answer(request)

    return [Route("/", show_page), Route("/playground/{name}", show_file)]


class _File:
    """One file, which browsers keep but ask for each time whether it has changed."""

    def __init__(self, path: Path) -> None:
        self._content = path.read_bytes()
        self._headers = {
            "content-type": f"{_MEDIA_TYPES[path.suffix]}; charset=utf-8",
            "content-security-policy": _POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
            "etag": f'"{hashlib.sha256(self._content).hexdigest()[:32]}"',
        }

    def answer(self, request: Request) -> Response:
        if request.headers.get("if-none-match") == self._headers["etag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers)

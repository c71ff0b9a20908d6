"""The page at /ui, for whoever runs the server. It is static, and asks the paths under /admin with the admin key.

The page may load what the server gives it and nothing else, and no other page may frame it. Its scripts are files:
the policy forbids inline ones, and code made from texts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles

FOLDER = Path(__file__).parent / "static"

HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "connect-src 'self'",
            "img-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # A newer server has a newer page; whether the file is the same is asked each time.
    "Cache-Control": "no-cache",
}
"""What a browser is told with each file of the page."""


class _Files(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """A file, with what the browser may do with it."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def add_page(app: FastAPI) -> None:
    """Add the page and its files."""

    async def page() -> Response:
        return RedirectResponse("ui/", 307)

    app.add_api_route("/ui", page, methods=["GET"], include_in_schema=False)
    app.mount("/ui/", _Files(directory=FOLDER, html=True))

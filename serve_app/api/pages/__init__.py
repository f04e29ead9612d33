"""The pages that a browser opens. All that they load comes from here, so they work without internet."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse

_PAGES = Path(__file__).parent
_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
OPEN_PATHS = frozenset({"/", "/docs", *(f"/docs/{name}" for name in _ASSETS)})
"""Paths of the pages. They hold nothing of a model, and ask for a key where the routes want one."""


def add_pages(api: FastAPI) -> None:
    """Add the playground and the description of the API."""
    playground, docs = (
        (_PAGES / f"{name}.html").read_text(encoding="utf-8") for name in ("playground", "docs")
    )

    @api.get("/", include_in_schema=False)
    async def playground_page() -> HTMLResponse:
        return HTMLResponse(playground)

    @api.get("/docs", include_in_schema=False)
    async def docs_page() -> HTMLResponse:
        return HTMLResponse(docs)

    for name, media_type in _ASSETS.items():
        _add_asset(api, name, media_type)


def _add_asset(api: FastAPI, name: str, media_type: str) -> None:
    @api.get(f"/docs/{name}", include_in_schema=False)
    async def asset() -> FileResponse:
        headers = {"Cache-Control": "max-age=86400"}
        return FileResponse(_PAGES / "swagger-ui" / name, media_type=media_type, headers=headers)

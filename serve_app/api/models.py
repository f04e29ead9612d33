"""What can be asked for, and whether this process and the models answer."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI, Request

from serve_app.api.generating import ERRORS, models_of
from serve_app.protocol.models import Health, ModelCard, ModelList, Ready, Version, cards, ready
from serve_app.routing.choice import not_served


def add_routes(api: FastAPI) -> None:
    """Add the routes that ask no replica."""

    @api.get("/v1/models", responses=ERRORS)
    async def models(request: Request) -> ModelList:
        """List what can be asked for: each model by its name, by its aliases, and by exact versions."""
        return ModelList(data=cards(await models_of(request).table()))

    @api.get("/v1/models/{name:path}", responses=ERRORS)
    async def model_card(name: str, request: Request) -> ModelCard:
        """Describe one of the models that `GET /v1/models` lists."""
        table = await models_of(request).table()
        card = next((card for card in cards(table) if card.id == name), None)
        if card is None:
            raise not_served(table, name)
        return card

    @api.get("/health")
    async def health() -> Health:
        """Return 200: this process answers. Whether the models can, `GET /ready` tells."""
        return Health()

    @api.get("/ready", responses=ERRORS)
    async def is_ready(request: Request) -> Ready:
        """Return 200 while every model has a replica that can answer, else 503 with what is missing."""
        return ready(models_of(request).known)

    @api.get("/version", responses=ERRORS)
    async def version_of_this() -> Version:
        """Return the version of llama_ray."""
        return Version(version=version("llama-ray"))

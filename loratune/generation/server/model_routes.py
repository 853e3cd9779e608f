"""The routes that list models, and vLLM's that load and unload adapters."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.responses import PlainTextResponse

from loratune.generation.server.endpoints import Endpoints
from loratune.generation.server.middleware import LOAD_PATH, UNLOAD_PATH
from loratune.generation.server.offered import OfferedAdapters
from loratune.generation.server.schemas import LoadRequest, UnloadRequest
from loratune.generation.server.serializers import FAILURES, Model, ModelList

if TYPE_CHECKING:
    from loratune.engine.engine import Engine


def add_models(app: FastAPI, engine: Engine, responder: Endpoints) -> None:
    """Add the routes that list the base model and the adapters.

    Args:
        app: the application.
        engine: of the models that are always there.
        responder: knows further ones, and what to say of an unknown one.
    """
    bearer = [Depends(HTTPBearer(auto_error=False))]
    since, base = int(time.time()), engine.base_name

    def described(name: str, created: int = since, root: str | None = None) -> Model:
        parent = None if name == base else base
        return Model(id=name, object="model", created=created, owned_by="loratune", root=root or name, parent=parent)

    @app.get("/v1/models", responses=FAILURES, dependencies=bearer)
    async def list_models() -> ModelList:
        """List the base model and the adapters."""
        found = await responder.offered.all() if responder.offered else {}
        models = [described(name) for name in (base, *engine.adapters)]
        models += [described(name, one.changed, one.name) for name, one in found.items()]
        return ModelList(object="list", data=models)

    @app.get("/v1/models/{name:path}", responses=FAILURES, dependencies=bearer)
    async def show_model(name: str) -> Model:
        """Describe one model."""
        if name in (base, *engine.adapters):
            return described(name)
        found = await responder.offered.find(name) if responder.offered else None
        if found is None:
            raise await responder.unknown(name)
        return described(name, found.changed, found.name)


def add_loading(app: FastAPI, offered: OfferedAdapters) -> None:
    """Add the routes with which vLLM's clients load and unload adapters."""
    bearer = [Depends(HTTPBearer(auto_error=False))]

    @app.post(LOAD_PATH, responses=FAILURES, dependencies=bearer, response_class=PlainTextResponse)
    async def load(body: LoadRequest) -> str:
        """Load an adapter of the store, and offer it under a name."""
        await offered.load(body.lora_name, body.lora_path, body.load_inplace)
        return f"Success: the adapter {body.lora_name} is loaded."

    @app.post(UNLOAD_PATH, responses=FAILURES, dependencies=bearer, response_class=PlainTextResponse)
    async def unload(body: UnloadRequest) -> str:
        """Offer an adapter no more; running requests are answered."""
        await offered.unload(body.lora_name)
        return f"Success: the adapter {body.lora_name} is unloaded."

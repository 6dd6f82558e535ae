"""The application: its paths, and errors in OpenAI's form."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException

from .requests import RequestError
from .service import Service


# The page runs its own script and styles only, talks to this server only, and no other page can show it in a frame.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class _Anything(Convertor[str]):
    """A part of an address that may have any character; Starlette's own stop at a line break."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("anything", _Anything())


def make_app(service: Service) -> FastAPI:
    """The application of a service. [`Gate`] belongs around it."""
    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.engine.close)

    async def root() -> HTMLResponse:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    # FastAPI's own pages load scripts from the network.
    app = FastAPI(title="retro-hf", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for method, path, serve in (
        ("GET", "/", root),
        ("GET", "/health", service.health),
        ("GET", "/metrics", service.numbers),
        ("GET", "/v1/models", service.models),
        ("GET", "/v1/models/{name:path}", service.model),
        ("POST", "/v1/chat/completions", service.chat),
        ("POST", "/v1/completions", service.complete),
        ("POST", "/v1/retrieval/compare", service.compare),
        ("POST", "/v1/store/documents", service.put_documents),
        ("GET", "/v1/store/documents/{id:anything}", service.document),
        ("DELETE", "/v1/store/documents/{id:anything}", service.delete_document),
    ):
        app.add_api_route(path, serve, methods=[method], response_model=None)

    app.add_exception_handler(RequestError, _explained)
    app.add_exception_handler(HTTPException, _unknown)
    app.add_exception_handler(Exception, _unexpected)
    return app


async def _explained(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestError):
        raise error
    headers = None if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(error.body(), error.status, headers=headers)


async def _unknown(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    message = f"{request.method} {request.url.path}: {error.detail}."
    return JSONResponse(RequestError(message, error.status_code).body(), error.status_code, headers=error.headers)


async def _unexpected(_: Request, error: Exception) -> JSONResponse:
    message = f"The server failed ({type(error).__name__}); its log says why."
    return JSONResponse(RequestError(message, 500).body(), 500)

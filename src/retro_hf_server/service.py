"""Handle a request: put it into the engine's queue, and turn the engine's events into an answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from retro_hf.errors import RetroError

from .answers import PartialAnswer, event_line
from .compare import compare
from .engine import Engine
from .jobs import Delta, Event, Failed, Finished, Job, QueueFullError, StoppedError
from .limits import Limits
from .metrics import Metrics
from .prompts import Prompts
from .requests import ChatRequest, CompareRequest, CompletionRequest, DocumentsRequest, Kind, RequestError, parsed
from .source import UnknownDocumentError


logger = logging.getLogger(__name__)


class Service:
    """
    Answers requests with an engine.

    Args:
        engine ([`Engine`]): the model and its store.
        name (`str`): under which the model is served.
        limits ([`Limits`]): of a request.
        allow_store_changes (`bool`, defaults to `False`): whether clients may change the store.
    """

    def __init__(self, engine: Engine, name: str, limits: Limits, *, allow_store_changes: bool = False) -> None:
        self.engine, self.name, self.limits = engine, name, limits
        self.allow_store_changes = allow_store_changes
        self.metrics = Metrics(engine)
        self.prompts = Prompts(engine, limits.max_tokens)
        self.created = int(time.time())

    async def health(self) -> dict[str, Any]:
        """Whether the server works, and whether its store does."""
        source = self.engine.source
        retrieval = "off" if source is None else "on" if source.available else "unavailable"
        return {"status": "ok", "retrieval": retrieval}

    async def numbers(self) -> Response:
        """The numbers of the server, in the text format of Prometheus."""
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> dict[str, Any]:
        """The list of models, which has one entry."""
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, name: str) -> dict[str, Any]:
        """The model of a name, and its abilities."""
        self._check_model(name)
        source = self.engine.source
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "retro-hf",
            "context_size": self.engine.context_size,
            "chat": self.prompts.has_chat,
            "retrieval": source is not None,
            "store_changes": self.allow_store_changes and source is not None,
        }

    async def chat(self, request: Request) -> Response:
        """Answer the last message of a chat."""
        return await self.answer("chat.completion", request)

    async def complete(self, request: Request) -> Response:
        """Continue a text."""
        return await self.answer("text_completion", request)

    async def answer(self, kind: Kind, request: Request) -> Response:
        """Generate an answer, whole or streamed."""
        asked = parsed(ChatRequest if kind == "chat.completion" else CompletionRequest, await request.body())
        self._check_model(asked.model)
        prompt, sampling = await run_in_threadpool(self.prompts.of, asked)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def emit(event: Event) -> None:  # called in the engine's thread
            with contextlib.suppress(RuntimeError):  # the event loop is closed, so no client waits for the answer
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(prompt, sampling, emit, asked.retrieval, time.monotonic() + self.limits.timeout)
        self._accepted(lambda: self.engine.submit(job))
        answer = PartialAnswer(kind, self.name, len(prompt.tokens))
        self.metrics.prompt_tokens.inc(len(prompt.tokens))
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            pieces = self._pieces(job, answer, events, usage)
            return StreamingResponse(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        watcher = asyncio.create_task(self._cancel_when_gone(job, request))
        try:
            async for event in self._events(job, events):
                answer.add(event)
        finally:
            watcher.cancel()
        return JSONResponse(answer.body())

    async def _events(self, job: Job, events: asyncio.Queue[Event]) -> AsyncIterator[Event]:
        """The events of a job until its end. If the client has gone, the job is canceled."""
        begun, has_text = time.monotonic(), False
        try:
            while True:
                try:
                    event = await asyncio.wait_for(events.get(), max(job.deadline + 1 - time.monotonic(), 0))
                except TimeoutError:  # it still waits for a row
                    event = Finished("timeout", 0, "off")
                if isinstance(event, Failed):
                    raise RequestError(event.message, 500, code="generation_failed")
                if isinstance(event, Delta) and not has_text:
                    has_text = True
                    self.metrics.first_seconds.observe(time.monotonic() - begun)
                if isinstance(event, Finished):
                    if event.reason == "timeout":
                        raise RequestError(
                            f"The answer was not complete after {self.limits.timeout:g} seconds.", 504, code="timeout"
                        )
                    self.metrics.tokens.inc(event.num_tokens)
                    self.metrics.answers.labels(event.retrieval).inc()
                    self.metrics.seconds.observe(time.monotonic() - begun)
                    yield event
                    return
                yield event
        finally:
            job.canceled = True

    async def _pieces(
        self, job: Job, answer: PartialAnswer, events: asyncio.Queue[Event], with_usage: bool
    ) -> AsyncIterator[bytes]:
        try:
            yield event_line(answer.opening())
            async for event in self._events(job, events):
                answer.add(event)
                yield event_line(answer.piece(event))
            if with_usage:
                yield event_line(answer.usage_piece())
            yield event_line("[DONE]")
        except RequestError as error:
            yield event_line(error.body())
        finally:
            job.canceled = True

    async def _cancel_when_gone(self, job: Job, request: Request) -> None:
        # Of an answer that is not streamed nothing is written before its end, so nothing else would notice.
        while not await request.is_disconnected():
            await asyncio.sleep(0.2)
        job.canceled = True

    async def compare(self, request: Request) -> dict[str, Any]:
        """How likely each token of an answer is with retrieval and without."""
        asked: CompareRequest = parsed(CompareRequest, await request.body())
        prompt = await run_in_threadpool(self.prompts.prompt, asked.question, asked.query)
        return await self._result(lambda: compare(self.engine, prompt, asked.answer))

    async def document(self, id: str) -> dict[str, Any]:
        """A document of the store."""
        source = self._store(changes=False)
        return await self._result(lambda: source.document(id))

    async def put_documents(self, request: Request) -> dict[str, Any]:
        """Add documents, or replace those of the same ids."""
        source = self._store(changes=True)
        asked: DocumentsRequest = parsed(DocumentsRequest, await request.body())
        documents = [one.model_dump() for one in asked.documents]
        replaced = await self._result(lambda: source.upsert(documents))
        return {"added": len(documents) - replaced, "replaced": replaced, "store": source.describe()}

    async def delete_document(self, id: str) -> dict[str, Any]:
        """Delete a document."""
        source = self._store(changes=True)
        await self._result(lambda: source.delete(id))
        return {"id": id, "deleted": True, "store": source.describe()}

    def _store(self, *, changes: bool) -> Any:
        if self.engine.source is None:
            raise RequestError("This server has no store. Start it with `--store`.", 404, code="no_store")
        if changes and not self.allow_store_changes:
            raise RequestError(
                "The store of this server cannot be changed. Start it with `--allow-store-changes`.",
                403,
                code="store_changes_not_allowed",
            )
        return self.engine.source

    async def _result(self, run: Callable[[], Any]) -> Any:
        future: Future = self._accepted(lambda: self.engine.call(run))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.limits.timeout)
        except TimeoutError:
            raise RequestError("The server was too busy to do this in time.", 504, code="timeout") from None
        except UnknownDocumentError as error:
            raise RequestError(str(error), 404) from error
        except OSError as error:
            # Why it cannot be read has been told; `source.error` is what clients may know.
            if self.engine.source is None or str(error) != self.engine.source.error:
                logger.error("The store could not be used: %s", error, exc_info=error)
            message = "The store cannot be read or written at present; the log of the server says why."
            raise RequestError(message, 503, code="store_unavailable") from error
        except RetroError as error:
            raise RequestError(str(error), 400) from error

    def _accepted(self, submit: Callable[[], Any]) -> Any:
        try:
            return submit()
        except QueueFullError as error:
            raise RequestError(str(error), 429, code="queue_full", retry_after=2) from error
        except StoppedError as error:
            raise RequestError(str(error), 503, code="stopping", retry_after=10) from error

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise RequestError(
                f"There is no model {name!r} here. This server has {self.name!r}.",
                404,
                param="model",
                code="model_not_found",
            )

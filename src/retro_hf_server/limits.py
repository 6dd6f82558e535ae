"""Check every request before the server reads it: its host, its key, its size and its time."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from .requests import RequestError


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """
    What a request may cost.

    Attributes:
        max_body (`int`): bytes of a body.
        body_timeout (`float`): seconds for the head of a request, and as many again for its body.
        timeout (`float`): seconds from the request to the end of its answer, with the time in the queue.
        max_tokens (`int`): tokens of an answer.
        max_batch (`int`): requests that are generated together.
        max_queue (`int`): requests that may wait.
    """

    max_body: int = 1_000_000
    body_timeout: float = 20.0
    timeout: float = 300.0
    max_tokens: int = 2048
    max_batch: int = 16
    max_queue: int = 64


class Gate:
    """
    The outermost layer of the server. It answers requests that may not enter, and ends those that take too long.

    Args:
        app: the ASGI application inside.
        limits ([`Limits`]): of a request.
        hosts (`frozenset[str]`, *optional*): names under which the server may be called. A page of another site can make a
            browser call a local server under its own name; that call is refused.
        api_key (`str`, *optional*): what clients must send as a bearer token to read or change anything.
        count (`Callable[[str, int], None]`, *optional*): is told the path and the status of every request.
    """

    def __init__(
        self,
        app: Any,
        *,
        limits: Limits,
        hosts: frozenset[str] | None = None,
        api_key: str | None = None,
        count: Callable[[str, int], None] | None = None,
    ) -> None:
        self.app, self.limits, self.hosts, self.api_key, self.count = app, limits, hosts, api_key, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 0

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self._check(scope)
            body = await self._body(receive)
            # A client that reads slowly holds its connection no longer than an answer may take. The answer's own limit comes a
            # little earlier, and can still say what happened.
            async with asyncio.timeout(self.limits.timeout + 10):
                await self.app(scope, _replayed(body, receive), noted)
        except RequestError as error:
            await refuse(error, noted)
        except TimeoutError:
            if not status:
                await refuse(RequestError("The answer took too long.", 504, code="timeout"), noted)
        finally:
            if self.count is not None:  # by the pattern of the path: ids of documents would make a number for each
                self.count(getattr(scope.get("route"), "path", "other"), status)
        return None

    def _check(self, scope: Scope) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        # `localhost:8000`, `[::1]:8000`, or either without a port.
        host = headers.get(b"host", "").rpartition(":")
        name = (host[0] if host[2].isdigit() and host[0] else "".join(host)).lower()
        if self.hosts is not None and name not in self.hosts:
            raise RequestError(
                f"The server was called as {name!r}, which is none of its names. Call it as localhost, or start it with "
                f"`--host {name}` and an `--api-key`.",
                403,
                code="unknown_host",
            )
        if self.api_key is not None and scope["path"].startswith("/v1"):
            scheme, _, key = headers.get(b"authorization", "").partition(" ")
            given = key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
            # `==` would end sooner the earlier a guess is wrong, so the key could be found letter by letter.
            if not secrets.compare_digest(given, self.api_key.encode()):
                raise RequestError(
                    "The API key is missing or wrong. Send it in the header `Authorization: Bearer KEY`.",
                    401,
                    code="invalid_api_key",
                )
        if scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
            # A form on a page of another site cannot send JSON, and a script there would have to ask this server first.
            kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
            if scope["method"] != "DELETE" and kind != "application/json":
                raise RequestError(
                    f"The content type is {kind or 'missing'!r}. Send JSON with the header `Content-Type: application/json`.",
                    415,
                    code="unsupported_content_type",
                )
            if (encoding := headers.get(b"content-encoding", "identity").lower()) != "identity":
                raise RequestError(
                    f"The body has the encoding {encoding!r}. Send it without one.",
                    415,
                    code="unsupported_content_encoding",
                )
        length = headers.get(b"content-length", "0")
        if length.isdigit() and int(length) > self.limits.max_body:
            raise self._too_large()

    async def _body(self, receive: Receive) -> bytes:
        """The whole body, unless it is too large or too slow."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RequestError("The client has gone.", 400)
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.limits.max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise RequestError(
                f"The body was not complete after {self.limits.body_timeout:g} seconds.", 408, code="slow_body"
            ) from None

    def _too_large(self) -> RequestError:
        return RequestError(
            f"The body has more than the {self.limits.max_body:,} bytes that this server accepts. Send less, or start the "
            "server with a larger `--max-body`.",
            413,
            code="too_large",
        )


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give the body that was read already, and then what comes after it."""
    given = False

    async def replay() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def refuse(error: RequestError, send: Send) -> None:
    """Send an error in OpenAI's form."""
    content = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})

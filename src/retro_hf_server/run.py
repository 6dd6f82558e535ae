"""Open a model and its store, and serve them until the process is told to end."""

from __future__ import annotations

import logging
import os
import signal
from typing import TYPE_CHECKING, Any

import uvicorn

from retro_hf.errors import counted

from .address import LOOPBACK, is_loopback
from .app import make_app
from .connections import connections
from .engine import Engine
from .limits import Gate, Limits
from .service import Service
from .source import Source


if TYPE_CHECKING:
    import socket
    from types import FrameType

    from retro_hf import RetroRetriever

logger = logging.getLogger(__name__)


def settings(gate: Gate, limits: Limits) -> uvicorn.Config:
    """How uvicorn serves the application behind a gate."""
    return uvicorn.Config(
        gate,
        http=connections(limits.body_timeout),
        log_level="warning",
        timeout_graceful_shutdown=int(limits.timeout) + 10,  # the longest answer, and its last bytes
        # Far above what can wait for an answer: idle connections count too, and a full queue has an answer of its own.
        limit_concurrency=limits.max_queue + limits.max_batch + 1000,
        server_header=False,
    )


class _Server(uvicorn.Server):
    """
    A server that finishes what runs after a first signal, and ends at once after a second one.

    Args:
        config (`uvicorn.Config`): of [`settings`].
        engine ([`Engine`]): that makes the answers.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Act on a signal."""
        if self.should_exit:
            os._exit(128 + sig)  # what is in the middle of an answer cannot be ended in an orderly way
        if remaining := self._engine.num_running + self._engine.num_waiting:
            logger.warning("Finishing %s. A second signal, or Ctrl-C, ends at once.", counted(remaining, "answer"))
        super().handle_exit(sig, frame)


def serve(
    model: Any,
    tokenizer: Any,
    retriever: RetroRetriever | None,
    listening: socket.socket,
    *,
    name: str,
    limits: Limits,
    host: str,
    api_key: str | None = None,
    allow_store_changes: bool = False,
) -> None:
    """
    Serve a model until the process gets SIGTERM or SIGINT; then finish what runs. A second signal ends the process at once.

    Args:
        model ([`RetroForCausalLM`]): in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        retriever ([`RetroRetriever`], *optional*): over the store.
        listening (`socket.socket`): from [`bind`].
        name (`str`): under which the model is served.
        limits ([`Limits`]): of a request.
        host (`str`): that the socket is bound to.
        api_key (`str`, *optional*): that clients must send.
        allow_store_changes (`bool`, defaults to `False`): whether clients may change the store.
    """
    source = None if retriever is None else Source(retriever, tokenizer, model.config.chunk_size)
    engine = Engine(model, tokenizer, source, max_batch=limits.max_batch, max_queue=limits.max_queue)
    service = Service(engine, name, limits, allow_store_changes=allow_store_changes)
    gate = Gate(
        make_app(service),
        limits=limits,
        # A server for other machines has names that only its network knows.
        hosts=frozenset(LOOPBACK | {host}) | {"[::1]"} if is_loopback(host) else None,
        api_key=api_key,
        count=lambda path, status: service.metrics.requests.labels(path, str(status)).inc(),
    )
    # After an orderly end uvicorn raises the signal again, which must not count as an error.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    _Server(settings(gate, limits), engine).run(sockets=[listening])

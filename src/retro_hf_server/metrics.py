"""The numbers at `/metrics`, for Prometheus."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .engine import Engine


_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The numbers of one server."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "retro_requests", "Requests by path and status.", ["path", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "retro_answer_seconds",
            "From a request to the end of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_seconds = Histogram(
            "retro_first_text_seconds", "From a request to its first text.", buckets=_SECONDS, registry=self._registry
        )
        self.prompt_tokens = Counter("retro_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self.tokens = Counter("retro_generated_tokens", "Tokens of answers.", registry=self._registry)
        self.answers = Counter(
            "retro_answers", "Answers by retrieval: on, off or unavailable.", ["retrieval"], registry=self._registry
        )
        for name, what, value in (
            ("retro_requests_waiting", "Requests in the queue.", lambda: engine.num_waiting),
            ("retro_requests_running", "Requests that are being generated.", lambda: engine.num_running),
            ("retro_lookups_done", "Chunks that were looked up.", lambda: engine.num_lookups),
        ):
            Gauge(name, what, registry=self._registry).set_function(value)
        if engine.source is not None:
            source = engine.source
            for name, what, key in (
                ("retro_store_documents", "Documents that can be found.", "documents"),
                ("retro_store_generation", "Changes of the store, plus one.", "generation"),
            ):
                # `partial`, since a plain lambda would see the last key of the loop.
                Gauge(name, what, registry=self._registry).set_function(
                    partial(lambda key: source.describe()[key], key)
                )

    def page(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self._registry)

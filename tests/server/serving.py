"""A tiny model, store and server on a port of this machine, for the tests of the server."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import uvicorn
from tiny import tiny_retro
from tiny_training import CHUNK_SIZE, NEIGHBOR_SIZE, make_world

from retro_hf import RetroDatastore, RetroRetriever
from retro_hf_server.address import bind
from retro_hf_server.app import make_app
from retro_hf_server.engine import Engine
from retro_hf_server.limits import Gate, Limits
from retro_hf_server.run import settings
from retro_hf_server.service import Service
from retro_hf_server.source import Source


TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}answer: {% endif %}"
CONTEXT = 256


def make_parts(folder: Path) -> SimpleNamespace:
    """A tiny world with a chat template, and a model whose context is limited."""
    world = make_world(folder)
    world.tokenizer.chat_template = TEMPLATE
    sizes = {"chunk_size": CHUNK_SIZE, "neighbor_size": NEIGHBOR_SIZE}
    world.model = tiny_retro("llama", {"vocab_size": 400, "max_position_embeddings": CONTEXT}, **sizes)
    return world


@contextlib.contextmanager
def serving(
    world: SimpleNamespace, *, store: Path | None = None, changes: bool = False, **options
) -> Iterator[SimpleNamespace]:
    """A running server: `url`, `client` (httpx), `engine`. Options are those of `Limits`, `api_key` and `hosts`."""
    gate_options = {name: options.pop(name) for name in ("api_key", "hosts") if name in options}
    limits = Limits(**options)
    source = None
    if store is not None:
        retriever = RetroRetriever(RetroDatastore.load(store), embedder=world.embedder)
        source = Source(retriever, world.tokenizer, world.model.config.chunk_size)
    engine = Engine(world.model, world.tokenizer, source, max_batch=limits.max_batch, max_queue=limits.max_queue)
    service = Service(engine, "tiny", limits, allow_store_changes=changes)
    count = lambda path, status: service.metrics.requests.labels(path, str(status)).inc()  # noqa: E731
    gate = Gate(make_app(service), limits=limits, count=count, **gate_options)
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(settings(gate, limits))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    headers = {"Authorization": f"Bearer {options.get('api_key') or gate_options.get('api_key')}"}
    with httpx.Client(base_url=url, timeout=60, headers=headers, trust_env=False) as client:
        while not server.started:
            time.sleep(0.01)
        yield SimpleNamespace(url=url, client=client, engine=engine, service=service)
    server.should_exit = True
    thread.join(60)
    engine.close()
    listening.close()

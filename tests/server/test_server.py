"""The server as its clients see it: OpenAI's own client, plain HTTP, and clients that behave badly."""

import contextlib
import json
import re
import shutil
import socket
import threading
import time
from pathlib import Path
from urllib.parse import quote

import openai
import pytest
from server.serving import make_parts, serving

from retro_hf import RetroDatastore


DOCS = Path(__file__).parents[2] / "docs"
MESSAGES = [{"role": "user", "content": "the golden lighthouse"}]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, and a folder with its store."""
    folder = tmp_path_factory.mktemp("server")
    made = make_parts(folder)
    made.folder = folder
    return made


@pytest.fixture(scope="module")
def server(world):
    """A server that reads the store."""
    with serving(world, store=world.folder / "store") as running:
        yield running


@pytest.fixture
def own_store(world, tmp_path):
    """A copy of the store that a test may change."""
    world.datastore.save(tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture(scope="module")
def client(server):
    """OpenAI's client."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def test_the_openai_client_chats_and_is_told_what_was_read(client):
    """The extra field is an attribute of its answer."""
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.retrieval["status"] == "on"
    (read,) = answer.retrieval["chunks"]
    assert read["query"] == "the golden lighthouse"
    assert read["tokens"] == [0, 12]
    assert read["characters"] == [0, len(answer.choices[0].message.content)]
    assert read["passages"][0]["document_id"].startswith("doc-")


def test_the_documentation_names_each_field_of_what_was_read_once(client):
    """Of a chat and of a completion, which tell their passages in one shape."""
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12)
    text = client.completions.create(model="tiny", prompt="the golden lighthouse", max_tokens=12)
    table = (DOCS / "serving.md").read_text().split("## What was read")[1].split("In a stream")[0]
    named = [name for row in re.findall(r"^\|(.+?)\|", table, re.MULTILINE) for name in re.findall("`(.+?)`", row)]
    for answer in (chat, text):
        assert sorted(fields_of(answer.retrieval) | {"message"}) == sorted(named)


def fields_of(value):
    """The names of all fields of a JSON value; all entries of a list must have the same ones."""
    if isinstance(value, list):
        (names,) = {frozenset(fields_of(one)) for one in value} or {frozenset()}
        return set(names)
    return (
        {name for field, part in value.items() for name in {field, *fields_of(part)}}
        if isinstance(value, dict)
        else set()
    )


def test_a_streamed_answer_is_the_whole_answer_in_pieces(client):
    """With the usage at the end, where it was asked for."""
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 1, "seed": 5}
    whole = client.chat.completions.create(**options)
    pieces = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(one.choices[0].delta.content or "" for one in pieces if one.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-1].usage == whole.usage
    assert pieces[-2].choices[0].finish_reason == "length"
    assert pieces[-2].retrieval == whole.retrieval
    told = [chunk["query"] for one in pieces[:-2] for chunk in getattr(one, "retrieval", {"chunks": []})["chunks"]]
    assert told == [chunk["query"] for chunk in whole.retrieval["chunks"]]


def test_completions_continue_a_text(client):
    """The older protocol, whole and streamed."""
    options = {"model": "tiny", "prompt": "the river runs over the old castle", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**options)
    text = whole.choices[0].text
    assert "".join(one.choices[0].text for one in client.completions.create(**options, stream=True)) == text
    read = [chunk for chunk in whole.retrieval["chunks"] if chunk["tokens"][1] > 0]
    assert [chunk["tokens"] for chunk in read] == [[0, 8], [8, 12]]
    assert read[0]["query"].endswith("castle")
    assert "".join(text[slice(*chunk["characters"])] for chunk in read) == text


def test_the_model_is_listed_with_what_it_can(client):
    """Programs choose by this list."""
    (model,) = client.models.list().data
    assert (model.id, model.chat, model.retrieval, model.store_changes) == ("tiny", True, True, False)
    assert client.models.retrieve("tiny").id == "tiny"


def test_retrieval_can_be_turned_off_for_one_request(client):
    """Which the page does for its left side."""
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=5, extra_body={"retrieval": False}
    )
    assert answer.retrieval == {"status": "off", "chunks": []}


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"n": 2}, 400, "n"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"made_up": 1}, 400, "made_up"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "messages"),
        ({"messages": [{"role": "system", "content": "be brief"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}]}, 400, "messages"),
        ({"messages": [{"role": "cat", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}, 400, "messages.0"),
        ({"messages": ["hello"]}, 400, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x " * 1000}]}, 400, "messages"),
        ({"max_tokens": 100_000}, 400, "messages"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"stop": [""]}, 400, "stop"),
        ({"model": "other"}, 404, "model"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server, change, status, param):
    """In OpenAI's form for errors."""
    answer = server.client.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, **change})
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == param


def test_an_answer_can_be_sent_back_as_a_turn_of_the_chat(client):
    """As the client gives it, with its empty fields or without."""
    first = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=3, temperature=0)
    for turn in (first.choices[0].message, first.choices[0].message.model_dump()):
        messages = [*MESSAGES, turn, {"role": "user", "content": "a quiet baker"}]
        second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3, temperature=0)
        assert second.retrieval["chunks"][0]["query"] == "a quiet baker"


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2]], None, 5, {}, [], ["a", "b"], ""])
def test_a_prompt_that_is_not_one_text_is_refused(server, prompt):
    """By the name of the field alone."""
    answer = server.client.post("/v1/completions", json={"prompt": prompt})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_a_packed_body_is_refused_as_what_it_is(server):
    """Not as JSON that is wrong."""
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert server.client.post("/v1/completions", content=b"\x1f\x8b", headers=headers).status_code == 415


def test_fields_that_change_nothing_are_accepted(server):
    """Clients send them without being asked."""
    neutral = {"n": 1, "presence_penalty": 0.0, "user": "me", "response_format": {"type": "text"}, "tools": None}
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, **neutral}
    assert server.client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"messages": ' + b"[" * 5000])
def test_a_body_that_is_no_request_gets_an_error_and_the_server_lives_on(server, content):
    """Whatever is sent."""
    headers = {"Content-Type": "application/json"}
    assert server.client.post("/v1/chat/completions", content=content, headers=headers).status_code == 400
    assert server.client.get("/health").json() == {"status": "ok", "retrieval": "on"}


def test_a_page_of_another_site_cannot_call_the_server(world):
    """Neither by a form, whose content type is none of ours, nor under a name that it made up for this machine."""
    with serving(world, hosts=frozenset({"127.0.0.1"})) as server:
        form = server.client.post("/v1/completions", content="{}", headers={"Content-Type": "text/plain"})
        assert form.status_code == 415
        assert server.client.get("/v1/models", headers={"Host": "evil.example:80"}).status_code == 403
        assert server.client.get("/v1/models").status_code == 200


def test_large_and_slow_bodies_are_refused(world):
    """With or without an announced length."""
    with serving(world, max_body=1000, body_timeout=0.5) as server:
        headers = {"Content-Type": "application/json"}
        for content in (b"x" * 2000, iter([b"x" * 600] * 3)):
            answer = server.client.post("/v1/completions", content=content, headers=headers)
            assert answer.status_code == 413
        with socket.create_connection(server.url.removeprefix("http://").split(":")) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
            )
            assert b" 408 " in connection.recv(1000)
        assert server.client.get("/health").status_code == 200


def test_a_slow_head_ends_its_connection(world):
    """Byte by byte, or nothing at all; also where a whole request came before, and while others are answered."""
    with serving(world, body_timeout=0.5) as server:
        address = server.url.removeprefix("http://").split(":")
        request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        for before, answers in ((b"", [b" 408 "]), (request, [b" 200 ", b" 408 "])):
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(before)
                received, sent = b"", 0
                while b" 408 " not in received and sent < 100:
                    connection.sendall(b"G")
                    sent += 1
                    connection.settimeout(0.1)
                    with contextlib.suppress(TimeoutError):
                        received += connection.recv(1000)
                assert all(one in received for one in answers)
        with socket.create_connection(address, timeout=10) as silent:
            assert b" 408 " in silent.recv(1000)
        assert server.client.get("/health").status_code == 200


def test_a_key_is_needed_where_one_is_set(world):
    """For the API; the page and the health of the server are open."""
    with serving(world, api_key="secret") as server:
        assert server.client.get("/v1/models").status_code == 200
        for wrong in ("", "Bearer", "Bearer wrong", "Basic secret"):
            answer = server.client.get("/v1/models", headers={"Authorization": wrong})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        health = server.client.get("/health", headers={"Authorization": ""})
        assert health.json() == {"status": "ok", "retrieval": "off"}
        assert server.client.get("/", headers={"Authorization": ""}).status_code == 200


def test_a_client_that_hangs_up_stops_its_answer(server):
    """Streamed or not, so that the others do not wait for text that nobody reads."""
    for stream in (True, False):
        body = json.dumps({"prompt": "a king", "max_tokens": 240, "stream": stream, "temperature": 1}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(server.url.removeprefix("http://").split(":")) as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: server.engine.num_running == 1)
        begun = time.monotonic()
        wait_until(lambda: server.engine.num_running == 0)
        assert time.monotonic() - begun < 5


def test_more_requests_than_may_wait_are_told_to_come_back(world):
    """With the status that OpenAI's client tries again after."""
    with serving(world, max_queue=1, max_batch=1) as server:
        server.engine.call(lambda: time.sleep(1))
        wait_until(lambda: server.engine.num_waiting == 0)
        statuses = []

        def ask():
            statuses.append(server.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(one.status_code for one in statuses) == [200, 429, 429]
        assert {one.headers.get("retry-after") for one in statuses if one.status_code == 429} == {"2"}


def test_an_answer_that_takes_too_long_is_an_error(world):
    """Whole: a status. Streamed: an error among the pieces, which OpenAI's client raises."""
    with serving(world, timeout=0.3, max_batch=1) as server:
        body = {"prompt": "a king", "max_tokens": 240}
        server.engine.call(lambda: time.sleep(0.6))
        assert server.client.post("/v1/completions", json=body).status_code == 504
        server.engine.call(lambda: time.sleep(0.6))
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.APIError):
            list(client.completions.create(model="tiny", **body, stream=True))
        assert server.client.get("/health").status_code == 200


def test_documents_are_added_replaced_and_deleted_while_the_server_runs(world, own_store):
    """The next answer reads what is there then."""
    with serving(world, store=own_store, changes=True) as server:
        documents = "/v1/store/documents"
        text = "the golden lighthouse"
        added = server.client.post(documents, json={"documents": [{"id": "new", "title": "New", "text": text}]})
        assert added.json()["added"] == 1
        assert server.client.get(f"{documents}/new").json()["text"] == text
        body = {"messages": MESSAGES, "max_tokens": 3}
        assert "new" in documents_read(server.client.post("/v1/chat/completions", json=body).json())
        changed = server.client.post(documents, json={"documents": [{"id": "new", "text": text + "."}]})
        assert (changed.json()["added"], changed.json()["replaced"]) == (0, 1)
        assert server.client.get(f"{documents}/new").json()["text"] == text + "."
        assert server.client.delete(f"{documents}/new").json()["deleted"] is True
        assert "new" not in documents_read(server.client.post("/v1/chat/completions", json=body).json())
        assert server.client.delete(f"{documents}/new").status_code == 404
        assert server.client.get(f"{documents}/new").status_code == 404


def test_a_document_that_cannot_be_stored_leaves_the_one_that_it_was_to_replace(world, own_store, monkeypatch):
    """A replacement is a deletion and an addition; a failure between the two must lose nothing."""
    with serving(world, store=own_store, changes=True) as server:
        before = server.client.get("/v1/store/documents/doc-3").json()
        append, calls = RetroDatastore.append, []

        def fail_once(self, *args, **kwargs):
            calls.append(args)
            if len(calls) == 1:
                raise OSError("the disk is full")
            return append(self, *args, **kwargs)

        monkeypatch.setattr(RetroDatastore, "append", fail_once)
        body = {"documents": [{"id": "doc-3", "text": "a king"}]}
        assert server.client.post("/v1/store/documents", json=body).status_code == 503
        assert server.client.get("/v1/store/documents/doc-3").json() == before


def test_documents_of_any_id_are_added_read_and_deleted(world, own_store):
    """An id is percent-encoded in the path; what cannot be stored as an id is refused, and nothing breaks."""
    ids = [
        "a/b",
        "a//b",
        "/",
        "a/",
        "a b",
        "x?y=1",
        "x#y",
        "50%",
        "%2F",
        "%252F",
        "a/../b",
        "...",
        "ü/日本語 🐸",
        "a\nb\t",
        "<b>&amp;",
    ]
    ids += ["\\", "'\"", "*", "-1", "0", "null", "x" * 2000]
    with serving(world, store=own_store, changes=True) as server:
        documents = [{"id": one, "text": f"the golden lighthouse {number}"} for number, one in enumerate(ids)]
        added = server.client.post("/v1/store/documents", json={"documents": documents})
        assert added.json()["added"] == len(ids)
        for number, one in enumerate(ids):
            address = f"/v1/store/documents/{quote(one, safe='')}"
            assert server.client.get(address).json()["text"].endswith(f" {number}"), one
            assert server.client.delete(address).json() == {
                "id": one,
                "deleted": True,
                "store": added.json()["store"] | {"generation": 3 + number, "documents": 40 + len(ids) - number - 1},
            }, one
            assert server.client.delete(address).status_code == 404, one
        for address in ("", "/", "/%00", "/%FF%FE", "/%ED%A0%80", "/..", "/%2E%2E"):
            assert server.client.delete(f"/v1/store/documents{address}").status_code in (404, 405), address
        for id in (r"\ud800", "", 7, None, ["x"]):
            body = json.dumps({"documents": [{"id": id, "text": "a king"}]}).replace("\\\\", "\\")
            headers = {"Content-Type": "application/json"}
            assert server.client.post("/v1/store/documents", content=body, headers=headers).status_code == 400, id
        assert server.client.get("/health").json() == {"status": "ok", "retrieval": "on"}


def test_the_store_cannot_be_changed_unless_that_is_allowed(server):
    """Off by default."""
    body = {"documents": [{"id": "new", "text": "a king"}]}
    assert server.client.post("/v1/store/documents", json=body).status_code == 403
    assert server.client.delete("/v1/store/documents/doc-3").status_code == 403


def test_a_store_that_another_process_changes_is_picked_up(world, own_store):
    """Before the next answer."""
    with serving(world, store=own_store) as server:
        other = RetroDatastore.load(own_store)
        other.append([{"id": "other", "text": "the golden lighthouse"}], embedder=world.embedder)
        answer = server.client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 3}).json()
        assert answer["retrieval"]["store"] == {"generation": 2, "documents": 41}
        assert "other" in documents_read(answer)


def test_a_store_that_vanishes_is_reported_in_every_answer_until_it_is_back(world, own_store):
    """The server stays up and says that nothing was read."""
    with serving(world, store=own_store, changes=True) as server:
        body = {"messages": MESSAGES, "max_tokens": 3}
        own_store.rename(own_store.with_name("gone"))
        assert server.client.get("/health").json()["retrieval"] == "unavailable"
        answer = server.client.post("/v1/chat/completions", json=body).json()
        assert answer["retrieval"]["status"] == "unavailable"
        assert "log" in answer["retrieval"]["message"]
        text = server.client.post("/v1/completions", json={"prompt": "a king", "max_tokens": 9}).json()
        assert (text["retrieval"]["status"], text["usage"]["completion_tokens"]) == ("unavailable", 9)
        change = {"documents": [{"id": "new", "text": "a king"}]}
        for refused in (
            server.client.post("/v1/store/documents", json=change),
            server.client.get("/v1/store/documents/doc-3"),
            server.client.delete("/v1/store/documents/doc-3"),
        ):
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert server.client.get("/health").json()["retrieval"] == "unavailable"
        own_store.with_name("gone").rename(own_store)
        assert server.client.post("/v1/chat/completions", json=body).json()["retrieval"]["status"] == "on"


def test_a_store_that_is_replaced_by_one_of_other_chunks_asks_for_a_restart(world, own_store):
    """The model of this server may well read it, but with other settings."""
    with serving(world, store=own_store) as server:
        shutil.rmtree(own_store)
        texts = ["a king", "the golden castle"]
        options = {"tokenizer": world.tokenizer, "embedder": world.embedder, "chunk_size": 16}
        RetroDatastore.build(texts, own_store, show_progress=False, **options)
        answer = server.client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 3}).json()
        assert answer["retrieval"]["status"] == "unavailable"
        assert "restart" in answer["retrieval"]["message"]


def test_an_answer_is_scored_with_retrieval_and_without(server):
    """The numbers behind the colors of the page."""
    answer = " sings golden lighthouse — over"
    scored = server.client.post("/v1/retrieval/compare", json={"messages": MESSAGES, "answer": answer}).json()
    assert "".join(token["text"] for token in scored["tokens"]) == answer
    assert all(token["off"] > 0 and token["on"] > 0 for token in scored["tokens"])
    assert any(abs(token["off"] - token["on"]) > 1e-3 for token in scored["tokens"])
    assert server.client.post("/v1/retrieval/compare", json={"answer": answer}).status_code == 400


def test_metrics_count_answers_tokens_and_errors(world):
    """In Prometheus' format."""
    with serving(world, store=world.folder / "store") as server:
        server.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 7})
        server.client.post("/v1/completions", json={"prompt": ""})
        lines = server.client.get("/metrics").text.splitlines()
    assert "retro_generated_tokens_total 7.0" in lines
    assert 'retro_answers_total{retrieval="on"} 1.0' in lines
    assert 'retro_requests_total{path="/v1/completions",status="200"} 1.0' in lines
    assert 'retro_requests_total{path="/v1/completions",status="400"} 1.0' in lines


def documents_read(answer):
    """Ids of the documents that an answer read."""
    return {one["document_id"] for chunk in answer["retrieval"]["chunks"] for one in chunk["passages"]}


def wait_until(condition, seconds=30):
    """Wait for the server to get somewhere."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)

"""The evaluation on a tiny store: identities, sweeps, documents that must not be scored, and runs that are cut off."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datastore.fixtures import corpus
from tiny import tiny_backbone
from tiny_training import CHUNK_SIZE, make_model
from transformers import AutoModelForCausalLM

from retro_hf import RetroRetriever, retrofit
from retro_hf.datastore import LexicalSearcher
from retro_hf.errors import DatasetError, DatastoreMismatchError, RetrieverError
from retro_hf.evaluation import Evaluation, bits_per_byte, evaluate
from retro_hf.evaluation.neighbors import Chunks, oracle_neighbors, random_neighbors, shuffled_neighbors
from retro_hf.evaluation.provenance import weights_digest
from retro_hf.evaluation.report.page import render_page
from retro_hf.evaluation.scoring import read_documents


OPTIONS = {"window": 32, "num_resamples": 50}
MODES = ["off", "on", "random", "shuffled", "oracle"]


@pytest.fixture(scope="module")
def model():
    return make_model(scale=0.25)


@pytest.fixture(scope="module")
def held_out() -> list[dict]:
    return [{"id": f"new-{number}", "text": row["text"]} for number, row in enumerate(corpus(10, seed=5))]


def measure(model, documents, world, **options) -> Evaluation:
    return evaluate(model, documents, world.tokenizer, **{"retriever": world.retriever, **OPTIONS, **options})


@pytest.fixture(scope="module")
def kept(world, model, held_out, tmp_path_factory):
    """An evaluation with all there is, and its folder."""
    folder = tmp_path_factory.mktemp("evaluation")
    options = {"num_neighbors_sweep": [1, 2, 3], "fractions": [0.3, 1.0], "output": folder}
    return measure(model, held_out, world, **options), folder


def test_totals_equal_those_of_bits_per_byte(world, model, held_out, kept):
    """The same tokens, the same neighbors, the same intervals."""
    result, _ = kept
    expected = bits_per_byte(model, held_out, world.tokenizer, retriever=world.retriever, **OPTIONS)
    for name, value in expected.bits_per_byte.items():
        mode = result.mode(name)
        assert mode.bits_per_byte == pytest.approx(value, rel=1e-6)
        assert mode.perplexity == pytest.approx(
            np.exp(expected.nats[name].sum() / expected.num_tokens.sum()), rel=1e-6
        )
        if name != "off":
            found = mode.difference
            assert (found.value, found.low, found.high) == pytest.approx(expected.differences[name], abs=1e-6)
    assert [mode.name for mode in result.modes] == MODES
    assert [mode.cheating for mode in result.modes] == [False] * 4 + [True]
    assert (result.inputs.num_tokens, result.inputs.num_bytes) == (
        expected.num_tokens.sum(),
        expected.num_bytes.sum(),
    )


def test_all_figures_are_sums_over_the_token_table(world, held_out, kept):
    """Totals, documents, buckets, levels and places: each token counts once."""
    result, folder = kept
    tokens = pq.read_table(folder / "tokens.parquet").to_pydict()
    documents = pq.read_table(folder / "documents.parquet").to_pydict()
    number, size = np.array(tokens["document"]), np.array(tokens["num_bytes"])
    assert documents["id"] == [row["id"] for row in held_out]
    later = np.array(tokens["position"]) >= CHUNK_SIZE
    for mode in result.modes:
        nats = np.array(tokens[f"nats_{mode.name}"])
        np.testing.assert_allclose(np.bincount(number, nats), documents[f"nats_{mode.name}"], rtol=1e-6)
        assert mode.bits_per_byte == pytest.approx(nats.sum() / np.log(2) / size.sum(), rel=1e-6)
        assert mode.later_chunks_bits_per_byte == pytest.approx(
            nats[later].sum() / np.log(2) / size[later].sum(), rel=1e-6
        )
        places = np.array(result.offsets.bits_per_token[mode.name]) * result.offsets.num_tokens
        assert places.sum() == pytest.approx(nats[later].sum() / np.log(2), rel=1e-6)
        # alpha = 1 filters nothing.
        assert result.leakage[-1].bits_per_byte[mode.name] == pytest.approx(mode.bits_per_byte, rel=1e-6)
        assert not later.all() and np.array_equal(nats[~later], np.array(tokens["nats_off"])[~later]), (
            "the first chunk of a document reads nothing"
        )
    assert result.leakage[-1].difference["on"] == result.mode("on").difference
    levels = [level.num_tokens for level in result.leakage]
    assert levels == sorted(levels) and levels[-1] == result.inputs.num_tokens and levels[0] < levels[-1]
    gain = (np.array(tokens["nats_off"]) - np.array(tokens["nats_on"])) / np.log(2)
    for buckets, kind in ((result.overlap, "overlap"), (result.runs, "run")):
        where = np.array(tokens[kind]) >= 0
        assert sum(bucket.num_tokens for bucket in buckets) == where.sum()
        total = sum(bucket.gain * bucket.num_tokens for bucket in buckets if bucket.num_tokens)
        assert total == pytest.approx(gain[where].sum(), rel=1e-6)


def test_sweep_equals_a_separate_measurement(world, model, held_out, kept, tmp_path):
    """k as with that many neighbors; a fraction as with a datastore of these documents; the whole as ON."""
    result, _ = kept
    assert [point.num_neighbors for point in result.num_neighbors_sweep] == [1, 2, 3]
    on = result.mode("on")
    for point in result.num_neighbors_sweep:
        alone = bits_per_byte(
            model,
            held_out,
            world.tokenizer,
            retriever=world.retriever,
            num_neighbors=point.num_neighbors,
            modes=("on",),
            **OPTIONS,
        )
        assert point.bits_per_byte == pytest.approx(alone.bits_per_byte["on"], rel=1e-6)
    small, whole = result.fraction_sweep
    subset = world.datastore.subset(tmp_path / "subset", fraction=0.3, seed=0)
    retriever = RetroRetriever(subset, embedder=world.embedder)
    alone = bits_per_byte(model, held_out, world.tokenizer, retriever=retriever, modes=("on",), **OPTIONS)
    assert small.bits_per_byte == pytest.approx(alone.bits_per_byte["on"], rel=1e-6)
    assert (small.num_documents, small.num_chunks) == (subset.num_documents, subset.num_chunks)
    assert 0 < small.num_documents < whole.num_documents == world.datastore.num_documents
    assert whole.bits_per_byte == result.num_neighbors_sweep[1].bits_per_byte == on.bits_per_byte
    # Where ON gains nothing there is nothing to have a share of.
    assert whole.gain_share == (pytest.approx(1) if on.difference.value < 0 else None)


def test_killed_run_resumes_and_ends_with_the_same_bytes(world, model, held_out, kept, tmp_path, monkeypatch):
    """What was finished is not scored again, and nothing else differs."""
    from retro_hf.evaluation import scoring as module

    result, folder = kept
    options = {"num_neighbors_sweep": [1, 2, 3], "fractions": [0.3, 1.0], "output": tmp_path / "again"}
    calls = []
    genuine = module.token_nats

    def counted(*arguments):
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(arguments)
        return genuine(*arguments)

    monkeypatch.setattr(module, "token_nats", counted)
    limit = 5
    with pytest.raises(KeyboardInterrupt):
        measure(model, held_out, world, **options)
    assert not (tmp_path / "again/evaluation.json").exists()
    limit = None
    resumed = measure(model, held_out, world, **options)
    for name in ("tokens.parquet", "documents.parquet"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    first, again = result.to_dict(), resumed.to_dict()
    for content in (first, again):
        for name in ("seconds", "started", "command"):
            del content["provenance"][name]
    assert first == again
    total = len(calls)
    measure(model, held_out, world, **options)
    assert len(calls) == total, "a finished run scores nothing again"

    # Work on a file that was damaged is done again, and said to be.
    victim = sorted((tmp_path / "again/blocks").glob("scores-*"))[0]
    victim.write_bytes(victim.read_bytes()[:40])
    measure(model, held_out, world, **options)
    assert len(calls) == total + 1
    # Other weights are other work, for another folder; or for this one once its results are gone.
    with pytest.raises(FileExistsError):
        measure(make_model(seed=1, scale=0.25), held_out, world, **options)
    (tmp_path / "again/evaluation.json").unlink()
    measure(make_model(seed=1, scale=0.25), held_out, world, **options)
    assert len(calls) >= 2 * total - 5


def test_foreign_files_are_not_overwritten(world, model, held_out, kept, tmp_path):
    """A file of the same name, a datastore, results of other texts, a path that is a file."""
    _, folder = kept
    for name in ("documents.parquet", "evaluation.json"):
        (tmp_path / name).write_text("[1, 2]")
        with pytest.raises(FileExistsError):
            measure(model, held_out, world, output=tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "[1, 2]"
        (tmp_path / name).unlink()
    with pytest.raises(FileExistsError):
        measure(model, held_out, world, output=world.datastore.path)
    with pytest.raises(FileExistsError, match="datastore and documents"):
        measure(model, held_out[1:], world, output=folder, retriever=None)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        measure(model, held_out, world, output=tmp_path / "file" / "results")


def test_weights_digest_depends_on_weights_and_settings_only(model, tmp_path):
    """Saved and loaded, in the same precision: the same; one weight changed: another."""
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16").to(torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert weights_digest(rounded) == weights_digest(model)
    assert weights_digest(loaded) != weights_digest(model)
    with torch.no_grad():
        for one, other in zip(rounded.parameters(), loaded.parameters(), strict=True):
            one.copy_(other)
    assert weights_digest(loaded) == weights_digest(rounded)
    rounded.config.neighbor_encoder_config.rms_norm_eps = 0.5
    assert weights_digest(loaded) != weights_digest(rounded)


def test_each_mode_gives_the_right_neighbors(world, held_out):
    """Compared with neighbors placed by hand."""
    documents = list(read_documents([row["text"] for row in held_out], world.tokenizer))
    chunks = Chunks.of(documents, CHUNK_SIZE)
    assert [int(count) for count in chunks.counts] == [-(-len(one.input_ids) // CHUNK_SIZE) for one in documents]
    found = np.random.default_rng(0).integers(world.datastore.num_chunks, size=(len(chunks.rows), 2))
    by_document, complete = chunks.by_document(found), chunks.complete_by_document(found)
    oracle = oracle_neighbors(world.datastore, by_document, chunks.complete.tolist())
    first_chunks = set(world.datastore.first_chunks(np.arange(world.datastore.num_documents)).tolist())
    shuffled = shuffled_neighbors(complete, seed=0)
    given = chunks.read_by_each(complete)
    assert any(len(rows) == 1 for rows in complete) and any(len(rows) > 3 for rows in complete)
    for place, rows in enumerate(complete):
        whole = by_document[place]
        for chunk in range(len(rows)):
            # What was found for the answer, as the continuation of the chunk before it.
            follows = whole[chunk + 1].tolist() if chunk + 1 < len(whole) else [-1, -1]
            answers = [id if id in first_chunks or id < 0 else id - 1 for id in follows]
            assert oracle[place][chunk].tolist() == answers
            others = [rows[other].tolist() for other in range(len(rows)) if other not in (chunk, chunk + 1)]
            assert shuffled[place][chunk].tolist() in (others or [[-1, -1]])
            if chunk + 1 < len(whole):
                assert given[chunks.starts[place] + chunk + 1].tolist() == rows[chunk].tolist()
        assert (given[chunks.starts[place]] == -1).all()
    random = random_neighbors(world.datastore, complete, seed=0)
    assert [rows.shape for rows in random] == [rows.shape for rows in complete]


def test_documents_in_the_datastore_are_reported_and_not_scored(world, model, held_out, kept):
    """By what they say: under another id, within a longer document, with small changes; not by their id alone."""
    stored = {row["id"]: row["text"] for row in corpus()}
    long = [id for id, text in stored.items() if len(text.split()) > 60]
    words = stored[long[2]].split()
    leaks = [
        {"id": "renamed", "text": stored[long[0]]},
        {"id": long[1], "text": stored[long[1]]},
        {"id": "part", "text": " ".join(words[:40])},
        {"text": " ".join([*words[:-1], "lighthouse"])},
    ]
    same_id = {"id": long[3], "text": held_out[0]["text"]}
    result = measure(model, [*leaks, *held_out[1:], same_id], world)
    found = {one.id: (one.stored_id, one.same_id) for one in result.inputs.leaked}
    assert found == {
        "renamed": (long[0], False),
        long[1]: (long[1], True),
        "part": (long[2], False),
        None: (long[2], False),
    }
    assert all(one.contained >= 0.8 for one in result.inputs.leaked)
    assert result.inputs.num_documents == len(held_out) and result.inputs.num_same_id == 1
    assert any("4 of 14 documents, found in the datastore" in line for line in result.verdict.details)
    assert "not scored: 4; renamed (as" in " ".join(str(result).split())
    # What is left is scored as if the others had never been there.
    alone = measure(model, [*held_out[1:], same_id], world)
    assert result.mode("on").bits_per_byte == pytest.approx(alone.mode("on").bits_per_byte, rel=1e-6)
    with pytest.raises(DatasetError, match=long[0]):
        measure(model, leaks[:2], world)


def test_copies_are_reported_and_not_scored(world, model, held_out):
    """The same text under the same id, under another, and without: no figure moves, no interval narrows."""
    again = [held_out[0], {"id": "renamed", "text": held_out[1]["text"]}, held_out[2]["text"]]
    result, alone = measure(model, [*held_out, *again], world), measure(model, held_out, world)
    assert [(one.id, one.copy_of) for one in result.inputs.copies] == [
        ("new-0", "new-0"),
        ("renamed", "new-1"),
        ("document 12", "new-2"),
    ]
    assert result.modes == alone.modes and result.on_minus_random == alone.on_minus_random
    assert any(line.startswith("Copies: 3 of 13 documents") for line in result.verdict.details)
    assert "not scored: 3; new-0 (of new-0), renamed (of new-1)" in " ".join(str(result).split())
    # One that is in the datastore besides is leakage.
    stored = corpus()[0]["text"]
    both = measure(model, [*held_out, stored, stored], world).inputs
    assert (len(both.leaked), both.copies) == (2, [])


def test_id_with_two_texts_is_an_error(world, model, held_out):
    """Parts of a document, or a mistake; ids of the wrong field, too."""
    documents = [*held_out, {"id": "new-3", "text": corpus(40, seed=3)[0]["text"]}]
    with pytest.raises(DatasetError, match="'new-3'.* number 3 and number 10"):
        measure(model, documents, world)


def test_documents_that_read_nothing_are_not_drawn(world, model, held_out):
    """One that reads beside short ones is one document; what cannot differ does not pass for evidence."""
    short = ["the river", "a king", "the harbor", "old bridge"]
    long = [row for row in held_out if len(row["text"].split()) > 40][0]
    lone = measure(model, [*short, long], world)
    assert lone.verdict.outcome == "not_measured" and "only one goes beyond its first chunk" in lone.verdict.text
    assert np.isnan(lone.mode("on").difference.low) and lone.inputs.num_short == 4
    assert any(line.startswith("Short: 4 of 5 documents") for line in lone.verdict.details)
    assert lone.to_dict()["modes"][1]["difference"]["low"] is None
    for shown in (str(lone), render_page(lone)):
        assert "one document" in shown and "nan" not in re.findall(r"[a-z]+", shown.lower())
    # Bytes that cannot differ make differences smaller, all of them alike.
    whole, mixed = measure(model, held_out, world), measure(model, [*held_out, *short], world)
    share = whole.inputs.num_bytes / mixed.inputs.num_bytes
    for name in ("on", "random"):
        one, other = whole.mode(name).difference, mixed.mode(name).difference
        assert share < 1 and other.value == pytest.approx(one.value * share)
    assert mixed.mode("on").later_chunks_difference == whole.mode("on").later_chunks_difference


def test_short_and_empty_documents_are_counted(world, model, held_out):
    """Nothing to score is left out; nothing to read is said."""
    short = "the river"
    result = measure(model, ["", "a", short, *held_out], world)
    assert (result.inputs.num_unscorable, result.inputs.num_documents) == (2, len(held_out) + 1)
    assert result.inputs.num_short >= 1 and "no longer than one chunk" in str(result)
    alone = measure(model, [short, "the king"], world)
    assert alone.verdict.outcome == "not_measured" and "first chunk of 8 tokens" in alone.verdict.text
    assert alone.mode("on").bits_per_byte == alone.mode("off").bits_per_byte
    assert not alone.leakage and alone.offsets is None and str(alone).startswith("Not measured")
    assert "random" not in str(alone), "where all modes are OFF, one row is enough"
    with pytest.raises(DatasetError):
        measure(model, ["", "a"], world)


def test_model_without_retrieval_is_measured_off_only(world, model, held_out, tmp_path):
    """Its backbone alone is OFF; a retriever has nothing to give it."""
    backbone = model.model.backbone
    plain = evaluate(backbone, held_out, world.tokenizer, output=tmp_path, **OPTIONS, stride=16)
    assert plain.verdict.outcome == "not_measured" and [mode.name for mode in plain.modes] == ["off"]
    retro = measure(model, held_out, world)
    assert plain.mode("off").bits_per_byte == pytest.approx(retro.mode("off").bits_per_byte, rel=1e-6)
    assert Evaluation.load(tmp_path).to_dict() == plain.to_dict()
    with pytest.raises(ValueError):
        measure(backbone, held_out, world)


def test_untrained_retrofit_is_reported_to_do_nothing(world, model, held_out):
    """Its neighbors don't reach the output yet."""
    fresh = retrofit(tiny_backbone("gpt2", vocab_size=400), chunk_size=CHUNK_SIZE, neighbor_size=16)
    result = measure(fresh, held_out, world)
    assert result.verdict.outcome == "nothing" and "to the last bit" in result.verdict.text
    assert result.mode("on").difference.value == 0


def test_other_retrievers_are_called_as_in_generation(world, model, held_out, monkeypatch):
    """One by words; and one that overrides the search, which must not be bypassed."""
    lexical = RetroRetriever(world.datastore, searcher=LexicalSearcher.build(world.datastore))
    result = measure(model, held_out, world, retriever=lexical)
    expected = bits_per_byte(model, held_out, world.tokenizer, retriever=lexical, modes=("on",), **OPTIONS)
    assert result.mode("on").bits_per_byte == pytest.approx(expected.bits_per_byte["on"], rel=1e-6)
    with pytest.raises(RetrieverError):
        measure(model, held_out, world, retriever=lexical, fractions=[0.5])

    class Nothing(RetroRetriever):
        def search(self, chunk_input_ids, *arguments, **options):
            found = super().search(chunk_input_ids, *arguments, **options)
            found.chunk_ids[:] = -1
            return found

    nothing = measure(model, held_out, world, retriever=Nothing(world.datastore, embedder=world.embedder))
    assert nothing.mode("on").bits_per_byte == nothing.mode("off").bits_per_byte
    assert nothing.verdict.outcome == "broken" and "it found nothing for any of" in nothing.verdict.text


class Answers:
    """A searcher that answers whatever it is told to."""

    metric = "none"

    def __init__(self, answer):
        self.answer = answer

    def search(self, texts, num_neighbors, *, exclude_documents=None):
        return self.answer(len(texts), num_neighbors)


def answering(answer, world) -> RetroRetriever:
    return RetroRetriever(world.datastore, searcher=Answers(answer))


def test_often_silent_retriever_is_not_called_working(world, model, held_out):
    """Reading random chunks half of the time harms half as much as the control, if that reads all of the time."""
    generator = np.random.default_rng(0)

    def sometimes(rows, k):
        ids = generator.integers(world.datastore.num_chunks, size=(rows, k))
        return np.zeros((rows, k)), np.where(generator.random((rows, 1)) < 0.5, -1, ids)

    documents = [row["text"] for row in corpus(40, seed=7)]
    result = measure(model, documents, world, retriever=answering(sometimes, world), modes=["off", "on", "random"])
    assert result.verdict.outcome in ("broken", "nothing") and result.on_minus_random.low <= 0
    assert any(line.startswith("Nothing was found for ") for line in result.verdict.details)
    (drawn,) = random_neighbors(world.datastore, [np.array([[7, -1], [-1, -1]])], seed=0)
    assert (drawn >= 0).tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize(
    "answer",
    [
        lambda rows, k: (np.zeros((rows, 1)), np.zeros((rows, 1), dtype=int)),
        lambda rows, k: (np.zeros((rows - 1, k)), np.zeros((rows - 1, k), dtype=int)),
        lambda rows, k: (np.zeros((rows, k + 1)), np.zeros((rows, k + 1), dtype=int)),
        lambda rows, k: (np.zeros((rows, k)), np.zeros((rows, k))),
        lambda rows, k: np.zeros((rows, k), dtype=int),
        lambda rows, k: None,
    ],
)
def test_searcher_that_returns_wrong_shapes_is_reported(world, model, held_out, answer):
    """One neighbor is not stretched into several, nor a score taken for an id."""
    with pytest.raises(RetrieverError, match="Answers"):
        measure(model, held_out, world, retriever=answering(answer, world))


def test_saved_result_loads_equal(kept, tmp_path):
    """JSON without NaN; damaged files and other formats are named."""
    result, folder = kept
    assert Evaluation.load(folder) == result == Evaluation.load(folder / "evaluation.json")
    content = json.loads((folder / "evaluation.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["provenance"]["seed"] == 0 and content["provenance"]["model"]["chunk_size"] == CHUNK_SIZE
    for name in ("command", "versions", "machine", "datastore", "documents", "started"):
        assert content["provenance"][name]
    assert str(result).splitlines()[0] == result.verdict.text[:110].rsplit(" ", 1)[0] or result.verdict.text in str(
        result
    )
    for broken in ("{}", '{"format_version": 7}', "["):
        (tmp_path / "evaluation.json").write_text(broken)
        with pytest.raises(DatasetError):
            Evaluation.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Evaluation.load(tmp_path / "nothing")


def test_examples_are_parts_of_the_documents(world, held_out, kept):
    """Tokens put together are the text; gains are those of the table."""
    result, folder = kept
    tokens = pq.read_table(folder / "tokens.parquet").to_pandas()
    assert {example.kind for example in result.examples} == {"gain", "typical", "loss"}
    for example in result.examples:
        text = held_out[example.document]["text"]
        assert example.document_id == held_out[example.document]["id"]
        assert "".join(example.tokens) in text and (example.context + "".join(example.tokens)) in text
        rows = tokens[(tokens.document == example.document) & (tokens.position // CHUNK_SIZE == example.chunk)]
        gain = (rows.nats_off.astype(float) - rows.nats_on.astype(float)) / np.log(2)
        np.testing.assert_allclose(example.gain, gain, atol=1e-3)
        assert len(example.neighbors) == 2 and all(one.document_id.startswith("doc-") for one in example.neighbors)
    best = [sum(example.gain) for example in result.examples if example.kind == "gain"]
    worst = [sum(example.gain) for example in result.examples if example.kind == "loss"]
    assert min(best) > max(worst)


@pytest.mark.parametrize(
    "options",
    [
        {"modes": ["onn"]},
        {"modes": ["on", "off"]},
        {"modes": "on"},
        {"retriever": None, "modes": ["on"]},
        {"retriever": None, "fractions": [0.5]},
        {"fractions": [0]},
        {"fractions": ["half"]},
        {"fractions": 0.5},
        {"num_neighbors_sweep": [0]},
        {"num_neighbors_sweep": [2.5]},
        {"num_neighbors_sweep": 3},
        {"num_neighbors": 2.5},
        {"window": 4096},
        {"window": "x"},
        {"stride": 8.0},
        *({name: value} for name in ("batch_size", "num_resamples", "window", "stride") for value in (-1, 0)),
        {"seed": -1},
        {"seed": 0.5},
    ],
    ids=str,
)
def test_option_out_of_range_is_an_error_that_names_the_option(world, model, held_out, options):
    with pytest.raises(ValueError) as raised:
        measure(model, held_out, world, **options)
    assert set(re.findall(r"\w+", str(raised.value))) & {*options, "retriever", "Unknown", "sweep"}


def test_retriever_must_know_chunk_ids(world, model, held_out):
    with pytest.raises(ValueError, match="RetroDatastore"):
        measure(model, held_out, world, retriever=world.datastore)


@pytest.mark.parametrize(
    "documents",
    [None, "text", {"text": "the king"}, ["the king", 3], ["the king", {"id": "a"}]],
)
def test_documents_without_text_are_an_error(world, model, documents):
    with pytest.raises(DatasetError):
        measure(model, documents, world)


def test_missing_texts_are_counted(world, model, held_out):
    """As in a table of pandas with gaps: they are left out, and told."""
    result = measure(model, [*held_out, None, {"id": "gap", "text": float("nan")}], world)
    assert result.inputs.num_unscorable == 2


def test_tokenizer_and_datastore_must_fit_the_model(world, model, held_out):
    with pytest.raises(DatasetError, match="fast tokenizer"):
        evaluate(model, held_out, None)
    with pytest.raises(DatastoreMismatchError):
        measure(make_model(chunk_size=4), held_out, world)


def test_missing_evaluation_is_an_error_that_names_the_path():
    with pytest.raises(FileNotFoundError, match="'nowhere'"):
        Evaluation.load("nowhere")


def test_nan_predictions_are_an_error(world, held_out):
    """Damaged weights: an error, and no NaN in a table."""
    broken = make_model(scale=0.25)
    with torch.no_grad():
        next(part for name, part in broken.named_parameters() if "encoder" in name).fill_(torch.nan)
    with pytest.raises(ValueError, match="'on'"):
        measure(broken, held_out, world)


def test_bfloat16_model_is_measured(world, model, held_out):
    """Scores are float32 whatever the weights are."""
    import copy

    half = measure(copy.deepcopy(model).to(torch.bfloat16), held_out, world)
    whole = measure(model, held_out, world)
    assert half.mode("on").bits_per_byte == pytest.approx(whole.mode("on").bits_per_byte, rel=0.03)
    assert half.provenance["dtype"] == "bfloat16"

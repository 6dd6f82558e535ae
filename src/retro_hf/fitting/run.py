"""fit: from a base and documents to a reader of one's own, and what it is worth."""

from __future__ import annotations

import json
import os
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .. import arguments, extras
from ..datastore import ChunkEmbedder, RetroDatastore
from ..datastore.atomic_files import digest_of, make_folder, write_file
from ..datastore.chunks import padded
from ..datastore.compatibility import load_tokenizer
from ..datastore.duplicates import stored_documents
from ..datastore.manifest import portable_name
from ..errors import DatasetError, UnsupportedBackboneError, counted
from ..evaluation import Evaluation, bits_per_byte, evaluate
from ..evaluation.leakage import holders
from ..model.modeling_retro import RetroForCausalLM
from ..outside import read_json
from ..retriever import RetroRetriever
from ..retrofit import parameter_report, retrofit
from ..special_tokens import tokenize_texts
from ..training import precompute_neighbors, start_by_copying, train_pointer
from ..training.collator import padding_id
from ..training.search import MOST_NEIGHBORS
from .plan import Plan, check_memory, measure
from .recipe import FitCollator, is_adapter, load_start
from .result import Fit
from .texts import Texts, split, windows_of, with_stored_ids
from .train import last_checkpoint, train


logger = logging.get_logger(__name__)

_CHUNK_SIZE, _NEIGHBOR_SIZE = 32, 128  # of a datastore that is built here
_WINDOW, _LEAST_CHUNKS = 256, 4
_WATCHED = 6  # held-out documents that are scored on the way
_START_WINDOWS = 240  # that a new reader begins with
_MODES = ("off", "on", "random", "in_context")
_MINUTES, _MOST_MINUTES = 30.0, 1e6
_MOST_STEPS, _MOST_SEED = 10_000_000, (1 << 32) - 1  # numpy takes no larger seed


def fit(
    base: str | os.PathLike[str],
    texts: Any,
    output: str | os.PathLike[str],
    *,
    retriever: RetroRetriever | None = None,
    embedder: ChunkEmbedder | str | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    num_neighbors: int = 2,
    num_heldout: int = 24,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    backbone: str | os.PathLike[str] | None = None,
) -> Fit:
    """Fit a reader to documents, and measure on documents that were held out what it brings.

    A new reader begins with [`start_by_copying`] and [`train_pointer`]; a RETRO adapter is trained further. Every chunk reads neighbors of other
    documents: a document that is in the datastore, under any id, gives none to itself. Held-out documents are looked up in a
    datastore without them. At the end the adapter is compared with no retrieval, with random neighbors, and with the base that
    reads the same neighbors untrained, in its prompt and in parallel context.

    Two steps are timed, and the time of the whole fit is logged before it starts. The state is saved every two minutes; repeat
    the same call to resume after a crash, or when the time was over.

    Args:
        base (`str` or `Path`): a causal language model, which stays as it is, or a RETRO adapter to train further.
        texts: documents, as for [`RetroDatastore.build`].
        output (`str` or `Path`): folder of the adapter. Its `work` folder is only needed to resume.
        retriever ([`RetroRetriever`], *optional*): where to look. By default a datastore is built in `output/store` from the
            documents that are not held out.
        embedder ([`ChunkEmbedder`] or `str`, *optional*): for that datastore.
        minutes (`float`, *optional*): longest time of training; 30 unless `steps` are given.
        steps (`int`, *optional*): steps of training; by default as many as fit into the time, and at most four times through
            the texts.
        num_neighbors (`int`, defaults to 2): what is read in use. In training it varies from one to one more.
        num_heldout (`int`, defaults to 24): documents to hold out, at most a fifth of all. Each is cut to a window.
        batch_size (`int`, *optional*): windows of 256 tokens per step; 6 on a CPU, 32 on a GPU.
        learning_rate (`float`, *optional*): 5e-4 for a new reader, 7e-4 for an adapter that goes on.
        seed (`int`, defaults to 0): of what is held out and of all draws.
        backbone (`str` or `Path`, *optional*): where the base of the adapter is, if that is a local folder.
    Returns:
        [`Fit`]: `print` shows the verdict and a table.
    Raises:
        DatasetError: if there are too few documents.
        DatastoreMismatchError: if the datastore has another tokenizer or chunk size.
        FileExistsError: if `output` has something else, or a fit with other settings.
        UnsupportedBackboneError: for a base that cannot get a reader.
        ValueError: if this machine is too small; the message says what would do.
    *Memory*: logged before the training. *Disk*: the datastore a second time if it has documents that are held out.
    """
    extras.load("accelerate", "Fitting")
    output = arguments.path("output", output, ValueError)
    _check_names(base, backbone, retriever)
    minutes = _MINUTES if minutes is None and steps is None else minutes
    minutes, learning_rate = _above_zero("minutes", minutes), _above_zero("learning_rate", learning_rate)
    steps = arguments.optional_whole("steps", steps, ValueError, most=_MOST_STEPS)
    batch_size = arguments.optional_whole("batch_size", batch_size, ValueError, most=_MOST_STEPS)
    num_neighbors = arguments.whole("num_neighbors", num_neighbors, ValueError, most=MOST_NEIGHBORS)
    num_heldout = arguments.whole("num_heldout", num_heldout, ValueError, least=2)
    seed = arguments.whole("seed", seed, ValueError, least=0, most=_MOST_SEED)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    goes_on = is_adapter(base)
    batch_size = batch_size or (6 if device.type == "cpu" else 32)
    learning_rate = learning_rate or (7e-4 if goes_on else 5e-4)
    if retriever is None and embedder is None:
        raise ValueError("Give a `retriever`, or an `embedder` to build a datastore of the texts with.")
    if backbone is not None and not goes_on:
        raise ValueError(f"backbone is {str(backbone)!r}, but '{base}' is no RETRO adapter. Leave it out.")
    chunk_size = _CHUNK_SIZE if retriever is None else retriever.chunk_size
    neighbor_size = _NEIGHBOR_SIZE if retriever is None else retriever.neighbor_size
    window = max(_WINDOW // chunk_size, _LEAST_CHUNKS) * chunk_size
    tokenizer = load_tokenizer(base if retriever is None else retriever.tokenizer)
    num_read = batch_size * window // chunk_size * num_neighbors * neighbor_size
    check_memory(base, device, dtype, batch_size * window, num_read)

    parts = split(texts, tokenizer, num_heldout=num_heldout, least=3 * chunk_size, window=window, seed=seed)
    logger.info(
        f"{counted(len(parts.train), 'document')} to train on, {len(parts.heldout)} held out; {parts.num_near:,} left out because they "
        "have most of a text that is held out."
    )
    files = [] if retriever is None else retriever.datastore.manifest.files
    identity = {
        "base": str(base),
        "num_neighbors": num_neighbors,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "num_heldout": len(parts.heldout),
        "texts": digest_of(*(f"{one['id']}\n{one['text']}" for one in (*parts.train, *parts.heldout))),
        "datastore": digest_of(*(file.sha256 for file in files)) if files else "",
    }
    state = _claim(output, identity if steps is None else identity | {"planned": steps})
    work = output / "work"
    if retriever is None:
        retriever = _own_store(parts, output / "store", tokenizer, embedder)
    store = retriever.datastore
    store.check_compatible(tokenizer=load_tokenizer(base))
    if (wanted := _looked_up(num_neighbors)) > store.num_chunks:
        raise DatasetError(
            f"num_neighbors is {num_neighbors}, for which {wanted} are looked up in training, but the datastore has "
            f"{counted(store.num_chunks, 'chunk')}. Lower it, or give more texts."
        )
    sizes = {"chunk_size": store.chunk_size, "neighbor_size": store.neighbor_size, "num_neighbors": num_neighbors}
    finished = "steps" in state and state["steps"] == state["planned"]
    torch.manual_seed(seed)
    if backbone is None and not goes_on and os.path.isdir(base):
        backbone = base  # what is saved does not name it
    model: Any = load_start(output if finished else base, dtype, backbone, **sizes)
    model.to(device)
    store.check_compatible(chunk_size=model.config.chunk_size)
    logger.info(parameter_report(model))
    held = _without(parts, retriever, work / "store", tokenizer)
    watch = partial(
        bits_per_byte,
        documents=parts.heldout[:_WATCHED],
        tokenizer=tokenizer,
        retriever=held,
        num_neighbors=num_neighbors,
        modes=("off", "on", "random"),
        window=window,
        batch_size=batch_size,
        seed=seed,
        show_progress=False,
    )

    if not finished:
        cut = {"window": window, "chunk_size": chunk_size, "seed": seed}
        collator = FitCollator(padding_id(tokenizer), store, num_neighbors=num_neighbors, seed=seed)
        planned = state.get("planned", steps)
        logger.info("Timing two training steps; the plan follows.")
        plan = _plan(model, parts, tokenizer, store, cut, steps=planned, minutes=minutes, batch_size=batch_size)
        logger.info(str(plan))
        write_file(work / "state.json", json.dumps(identity | {"planned": plan.steps}).encode())
        if not goes_on and last_checkpoint(work) is None:
            few = windows_of(parts.train, tokenizer, count=_START_WINDOWS, **cut)
            # Measured with SmolLM2-135M and two neighbors on two cores.
            logger.info(
                f"Teaching the new reader where to look takes as long as about {len(few) // 8} steps of training."
            )
            start_by_copying(model, _rows(few["input_ids"]).to(device))
            few = _with_neighbors(few, parts, retriever, tokenizer, num_neighbors, work / "neighbors")
            begin = range(0, len(few), batch_size)
            train_pointer(
                model,
                (collator([few[row] for row in range(first, min(first + batch_size, len(few)))]) for first in begin),
            )
        windows = windows_of(parts.train, tokenizer, count=plan.steps * batch_size, **cut)
        done = train(
            model,
            _with_neighbors(windows, parts, retriever, tokenizer, num_neighbors, work / "neighbors"),
            collator,
            watch,
            plan,
            work=work,
            batch_size=batch_size,
            learning_rate=learning_rate,
            minutes=minutes,
            seed=seed,
        )
        model.model.retro.to(torch.bfloat16)
        model.save_pretrained(output, save_backbone=False)
        tokenizer.save_pretrained(output)
        state = identity | {"planned": plan.steps} | done
        write_file(work / "state.json", json.dumps(state).encode())
    result = _measured(model, parts, tokenizer, held, window, num_neighbors, work / f"measured-{state['steps']}", seed)
    settings = {
        **identity,
        **state,
        **sizes,
        "base": portable_name(str(base)),
        "backbone": portable_name(str(model.config.backbone_name_or_path)),
        "num_train": len(parts.train),
        "window": window,
        **_environment(device),
    }
    fitted = Fit(output, *result, settings)
    fitted.save()
    return fitted


def _check_names(base: Any, backbone: Any, retriever: Any) -> None:
    """Raise ValueError for what names no model, and for another retriever."""
    arguments.path("base", base, ValueError)
    if backbone is not None:
        arguments.path("backbone", backbone, ValueError)
    if retriever is not None and not isinstance(retriever, RetroRetriever):
        raise ValueError(
            f"The retriever is {arguments.shown(retriever)}. Pass a RetroRetriever, or an `embedder` without one."
        )


def _above_zero(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if (number := arguments.real(name, value, ValueError, least=0, most=_MOST_MINUTES)) == 0:
        raise ValueError(f"{name} is {value}, but it must be above 0.")
    return number


def _with_neighbors(
    windows: Any, parts: Texts, retriever: RetroRetriever, tokenizer: Any, num_neighbors: int, folder: Path
) -> Any:
    """Windows with neighbors, none of them from the documents that the windows are part of."""
    windows = with_stored_ids(windows, parts.train, retriever.datastore, tokenizer)
    return precompute_neighbors(windows, retriever, num_neighbors=_looked_up(num_neighbors), cache_dir=folder)


def _looked_up(num_neighbors: int) -> int:
    """Neighbors that are looked up for a chunk in training, which reads up to one more, and also those from twice as far down."""
    return 2 * (num_neighbors + 1)


def _environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a fit ran with."""
    threads = f"{torch.get_num_threads()} threads of a CPU"
    return {
        "device": threads if device.type == "cpu" else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("retro-hf", "torch", "transformers")},
    }


def _claim(output: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call of this fit has left in its folder.

    Raises:
        FileExistsError: if the folder has something else.
    """
    path = output / "work" / "state.json"
    if os.path.exists(path):
        try:
            state: dict[str, Any] = read_json(path.parent, path.name)
        except ValueError as error:
            raise DatasetError(f"'{path}' is damaged: {error}. Remove '{output}', and repeat the call.") from error
        for name, value in identity.items():
            # Without "planned" nothing was trained: the time that was given was too short.
            if state.get(name) != value and (name != "planned" or name in state):
                raise FileExistsError(
                    f"'{output}' has a fit with {name}={state.get(name)!r}, but this one has {value!r}. Choose another folder, or "
                    "remove that one."
                )
        return state
    if os.path.isdir(output) and any(output.iterdir()):
        raise FileExistsError(f"'{output}' is not empty and has no fit to resume. Choose another folder.")
    make_folder(path.parent)
    write_file(path, json.dumps(identity).encode())
    return identity


def _own_store(parts: Texts, path: Path, tokenizer: Any, embedder: ChunkEmbedder | str | None) -> RetroRetriever:
    """The retriever of the documents that are not held out."""
    encoder = ChunkEmbedder.of(embedder)  # type: ignore[arg-type]  # checked
    if not path.exists():
        RetroDatastore.build(
            parts.train,
            path,
            tokenizer=tokenizer,
            embedder=encoder,
            chunk_size=_CHUNK_SIZE,
            neighbor_size=_NEIGHBOR_SIZE,
        )
    return RetroRetriever(RetroDatastore.load(path), embedder=encoder, tokenizer=tokenizer)


def _without(parts: Texts, retriever: RetroRetriever, path: Path, tokenizer: Any) -> RetroRetriever:
    """A retriever of the same datastore without the documents that are held out, or have most of one."""
    store = retriever.datastore
    tokens = [np.array(ids) for ids in tokenize_texts(tokenizer, [one["text"] for one in parts.heldout])[0]]
    gone = set().union(*holders(tokens, stored_documents(store)))
    if not gone:
        return retriever
    logger.info(
        f"{counted(len(gone), 'document')} of the datastore have a text that is held out; that text is looked up without them."
    )
    if not path.exists():
        kept = [id for ids, _ in stored_documents(store) for id in ids if id not in gone]
        if not kept:
            raise DatasetError("Every document of the datastore has a text that is held out. Give a larger datastore.")
        store.subset(path, ids=kept)
    searcher = retriever.searcher
    if retriever.embedder is None:
        raise DatasetError(
            f"The datastore has texts that are held out. {type(searcher).__name__} searches it, but only a search by vectors can "
            "leave them out. Leave those documents out of `texts` or of the datastore."
        )
    return RetroRetriever(
        RetroDatastore.load(path), embedder=retriever.embedder, num_neighbors=retriever.num_neighbors
    )


def _plan(
    model: RetroForCausalLM,
    parts: Texts,
    tokenizer: Any,
    store: RetroDatastore,
    cut: dict[str, int],
    *,
    steps: int | None,
    minutes: float | None,
    batch_size: int,
) -> Plan:
    """Time steps with random neighbors."""
    few = windows_of(parts.train, tokenizer, count=batch_size, **cut)
    rows, _ = padded(few["input_ids"], cut["window"], padding_id(tokenizer))
    shape = (len(rows), cut["window"] // cut["chunk_size"], model.config.num_neighbors)
    ids, mask = store.gather(store.random_chunks(np.random.default_rng(0), shape))
    given = {"input_ids": rows, "labels": rows, "neighbor_input_ids": ids, "neighbor_attention_mask": mask}
    batch = {name: torch.as_tensor(values).to(model.device) for name, values in given.items()}

    def run() -> torch.Tensor:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
            loss: torch.Tensor = model.train()(**batch, use_cache=False).loss
        return loss

    # Tokens through the base for each scored one: three modes and the parallel reader's three, each of two windows; and the
    # neighbors, in the prompt of every chunk and as the parallel reader's.
    read = cut["window"] // 2 + shape[2] * store.neighbor_size
    per_token = 6 + 3 * read / cut["chunk_size"]
    characters = sum(len(one["text"]) for one in parts.train)
    return measure(
        model,
        run,
        steps=steps,
        minutes=minutes,
        most_windows=max(len(parts.train), characters // (4 * cut["window"])),
        batch_size=batch_size,
        batch_tokens=rows.size,
        afterwards=int(per_token * len(parts.heldout) * cut["window"]),
    )


def _measured(
    model: Any,
    parts: Texts,
    tokenizer: Any,
    retriever: RetroRetriever,
    window: int,
    num_neighbors: int,
    work: Path,
    seed: int,
) -> tuple[Evaluation, Evaluation | None]:
    """The adapter, and the base that reads in parallel context, on what was held out."""
    options: dict[str, Any] = {
        "num_neighbors": num_neighbors,
        "window": window,
        "stride": window // 2 // retriever.chunk_size * retriever.chunk_size,
    }
    options |= {"retriever": retriever, "seed": seed}
    model.eval().to(model.model.backbone.dtype)
    found = evaluate(model, parts.heldout, tokenizer, modes=_MODES, output=work / "evaluation", **options)
    config = model.config
    try:
        # Loaded again, because the base in the model reads through its reader.
        other: Any = retrofit(
            config.backbone_name_or_path,
            reader="parallel_context",
            revision=config.backbone_revision,
            base_kwargs={"dtype": model.dtype},
            chunk_size=config.chunk_size,
            neighbor_size=config.neighbor_size,
        ).to(model.device)
    except UnsupportedBackboneError as error:
        logger.info(f"Not measured in parallel context: {error}")
        return found, None
    modes = ("off", "on", "random")
    return found, evaluate(other, parts.heldout, tokenizer, modes=modes, output=work / "parallel_context", **options)


def _rows(windows: list[list[int]]) -> torch.Tensor:
    """Tokens of windows one after another, in rows of equal length."""
    tokens = [token for ids in windows for token in ids]
    length = min(128, max(8, len(tokens) // 8))
    return torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)

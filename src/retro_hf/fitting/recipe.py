"""How a reader is fitted: what it is made of, how it begins, and what its batches are made of."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..datastore import RetroDatastore
from ..errors import PretrainedNotFoundError, UnsupportedBackboneError
from ..model.configuration_retro import RetroEncoderConfig
from ..model.modeling_retro import RetroForCausalLM
from ..model.names_retro import check_weights
from ..model.readers_retro import traits_of
from ..retrofit import retrofit
from ..training import RetroDataCollator
from ..training.collator import generator_for


# Where cross-attention is, as a share of the base's layers: layers 16 and 28 of SmolLM2's 30.
_DEPTHS = (0.53, 0.94)
# Few and wide heads: one must tell a token among hundreds.
_HEADS = 2
_RANDOM_NEIGHBORS = 0.25  # share of chunks
_COPIES = 0.2  # share of windows in which a neighbor says what comes next, with errors
_COPIED_CHUNKS = 0.8  # of such a window
_ERRORS = 0.12
_NOT_THE_BEST = 0.3  # share of windows that read neighbors from twice as far down


def is_adapter(base: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a RETRO model, whose reader goes on learning.

    Raises:
        PretrainedNotFoundError: if there is nothing of this name.
        ValueError: for a model that has nothing to learn.
    """
    try:
        check_weights(base, {})
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise PretrainedNotFoundError.for_name("model", str(base), error) from error
    if config.model_type == "retro" and not traits_of(config.reader).has_weights:
        raise ValueError(
            f"'{base}' reads with {config.reader}, which has no weights to fit. Use it as it is, or fit its base "
            f"'{config.backbone_name_or_path}'."
        )
    return bool(config.model_type == "retro")


def new_reader(base: str | os.PathLike[str], dtype: torch.dtype, **sizes: Any) -> RetroForCausalLM:
    """A frozen base with a small reader in two of its upper layers, as `start_by_copying` wants it."""
    config = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config(decoder=True)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    if layers < 2 or hidden < 36:
        raise UnsupportedBackboneError(
            f"'{base}' has {layers} layers of width {hidden}, too small for a reader to be fitted. Use a base of at least two "
            "layers of width 36."
        )
    head_dim = min(hidden // 9, 64) // 2 * 2
    width = 10 * head_dim
    width += 2 * (width == hidden)  # an encoder as wide as the base would have no map from its embeddings
    encoder = RetroEncoderConfig(
        hidden_size=width,
        intermediate_size=8 * head_dim,
        num_attention_heads=8,
        head_dim=head_dim,
        cross_attention_layers=[1],
        initializer_range=width**-0.5,
    )
    return retrofit(
        base,
        encoder=encoder,
        cross_attention_layers=sorted({min(round(depth * layers), layers - 1) for depth in _DEPTHS}),
        cross_attention_num_heads=_HEADS,
        cross_attention_head_dim=hidden // _HEADS,
        cross_attention_null_key=True,
        initializer_range=hidden**-0.5,
        base_kwargs={"dtype": dtype},
        save_backbone=False,
        **sizes,
    )


def load_start(
    base: str | os.PathLike[str], dtype: torch.dtype, backbone: str | os.PathLike[str] | None = None, **sizes: Any
) -> RetroForCausalLM:
    """The reader to go on with, whose base may be in the folder `backbone`, or a new one.

    The base is in `dtype` and frozen, the reader in float32.
    """
    if is_adapter(base):
        where = {} if backbone is None else {"backbone_name_or_path": backbone}
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, trust_remote_code=False, **where)
        model.model.backbone.requires_grad_(False)
    else:
        model = new_reader(base, dtype, **sizes)
    model.model.retro.float()
    loaded: RetroForCausalLM = model
    return loaded


class FitCollator(RetroDataCollator):
    """Batches with neighbors of all sorts, so that the reader learns how far to trust what it reads.

    The number of neighbors is drawn from one to one more than is read later; some windows read neighbors that are not the best,
    a quarter of the chunks read random ones, and in a fifth of the windows a neighbor is a copy of what comes next, with
    errors, so that copying is learned for every kind of text.

    Args:
        pad_token_id (`int`): any token, to pad with.
        datastore ([`RetroDatastore`]): where the neighbors were found.
        num_neighbors (`int`): what is read later. Examples have twice as many as are drawn at most.
        seed (`int`): of all draws, which depend on the tokens of the batch, too.
    """

    def __init__(self, pad_token_id: int, datastore: RetroDatastore, *, num_neighbors: int, seed: int) -> None:
        super().__init__(pad_token_id, datastore, random_neighbor_probability=_RANDOM_NEIGHBORS, seed=seed)
        self.wanted = num_neighbors

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make one batch; see [`RetroDataCollator`]."""
        batch = super().__call__(examples)
        ids, mask = batch["neighbor_input_ids"].numpy(), batch["neighbor_attention_mask"].numpy()
        tokens, lengths = batch["input_ids"].numpy(), batch["attention_mask"].numpy().sum(axis=1)
        generator = generator_for(self.seed + 1, tokens)
        size = self.datastore.chunk_size
        for row in np.flatnonzero(generator.random(len(tokens)) < _COPIES):
            for chunk in np.flatnonzero(generator.random(lengths[row] // size) < _COPIED_CHUNKS):
                place = generator.integers(ids.shape[2])
                copy = self._copy_with_errors(tokens[row, : lengths[row]], int(chunk), generator)
                ids[row, chunk, place, : len(copy)] = copy
                mask[row, chunk, place] = np.arange(mask.shape[-1]) < len(copy)
        return batch

    def _drawn(self, chunk_ids: np.ndarray, input_ids: np.ndarray, num_chunks: np.ndarray) -> np.ndarray:
        """As in [`RetroDataCollator`], but of fewer neighbors than were found: their number is drawn for the batch.

        Most windows read the best of them, some any of the best twice as many.
        """
        generator = generator_for(self.seed + 2, input_ids)
        most = min(self.wanted + 1, chunk_ids.shape[2] // 2)
        count = int(generator.choice([generator.integers(1, most + 1), *[min(self.wanted, most)] * 6, most]))
        ranks = np.tile(np.arange(count), (len(chunk_ids), 1))
        for row in np.flatnonzero(generator.random(len(chunk_ids)) < _NOT_THE_BEST):
            ranks[row] = np.sort(generator.permutation(2 * count)[:count])
        return super()._drawn(np.take_along_axis(chunk_ids, ranks[:, None], axis=2), input_ids, num_chunks)

    def _copy_with_errors(self, text: np.ndarray, chunk: int, generator: np.random.Generator) -> np.ndarray:
        """What a window says around the end of a chunk, with some tokens left out and some replaced by others of it."""
        size, length = self.datastore.chunk_size, self.datastore.neighbor_size
        first = max((chunk + 1) * size - int(generator.integers(0, 2 * size)), 0)
        copy = text[first : first + length + length // 8]
        copy = copy[generator.random(len(copy)) > 0.4 * _ERRORS]
        others = text[generator.integers(0, len(text), len(copy))]
        return np.where(generator.random(len(copy)) < 0.6 * _ERRORS, others, copy)[:length]

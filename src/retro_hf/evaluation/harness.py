"""RetroLM: a RETRO model and its datastore in EleutherAI's lm-evaluation-harness.

    python -m retro_hf.evaluation.harness run --model retro --tasks lambada_openai \
        --model_args pretrained=hub_configs/retro-bible,datastore=my_store,embedder=.data/minilm

The command is the harness's own, `lm-eval`, which by itself finds no models of other packages. docs/lm_eval.md says which
of its numbers equal those of [`bits_per_byte`].
"""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import extras
from ..retriever import RetroRetriever


_PURPOSE = "Evaluation in the lm-evaluation-harness"
register_model = extras.load("lm_eval.api.registry", _PURPOSE).register_model
HFLM: Any = extras.load("lm_eval.models.huggingface", _PURPOSE).HFLM


__all__ = ["RetroLM"]


@register_model("retro")
class RetroLM(HFLM):
    """The model `retro` of the harness: its `hf`, with retrieval where a datastore is given and without where none is.

    Retrieval begins with the first complete chunk: a request of fewer than `chunk_size` tokens before its last scored one
    reads nothing, so that ON is OFF there. The harness knows no document ids, so nothing is excluded: a text that is to
    be scored must not lie in the datastore.

    Args:
        pretrained ([`RetroForCausalLM`] or `str`): the model, or its folder or name on the Hub. A model is left as it is,
            whatever retriever it has attached.
        datastore (`str`, *optional*): folder or Hub name of the datastore to read; none is RETRO[OFF].
        embedder (`str`, *optional*): the encoder of the datastore's keys, where it is not the one it names.
        num_neighbors (`int`, *optional*): neighbors per chunk; as the datastore was saved with, 2 by default.
        retriever (`Callable`, *optional*): instead of a datastore, any retriever that the model's `forward` takes.
        options: those of the harness's `HFLM`: `batch_size`, `device`, `dtype`, `tokenizer`, `max_length` …

    Raises:
        ValueError: if the model is no RETRO model, or both a datastore and a retriever are given.
        DatastoreMismatchError: if the datastore is of another tokenizer than the model.
    """

    def __init__(
        self,
        pretrained: PreTrainedModel | str,
        *,
        datastore: str | os.PathLike[str] | None = None,
        embedder: Any = None,
        num_neighbors: int | None = None,
        retriever: Any = None,
        **options: Any,
    ) -> None:
        if datastore is not None and retriever is not None:
            raise ValueError("Both `datastore` and `retriever` were given, but a model reads one of them. Drop one.")
        super().__init__(pretrained, **options)
        if not hasattr(self.model, "set_retriever"):
            raise ValueError(
                f"{type(self.model).__name__} is no RETRO model and cannot read a datastore. Evaluate it with the harness's "
                "`--model hf`, or make a RETRO model of it with `retrofit`."
            )
        if datastore is not None:
            retriever = RetroRetriever.from_pretrained(
                datastore, embedder=embedder, tokenizer=self.tokenizer, num_neighbors=num_neighbors
            )
        self.retriever = retriever

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        # The harness pads on the right and keeps no mask. Chunks count from the left and nothing looks ahead, so padding
        # moves no score; what is looked up for it is looked up in vain.
        precision = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
            return self.model(inps, retriever=self.retriever, use_cache=False).logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        return super()._model_generate(context, max_length, stop, retriever=self.retriever, **options)


def main() -> None:
    """Run the harness's own command line, in which the model `retro` is known."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()

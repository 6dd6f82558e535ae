"""RetroLM: a RETRO model and its datastore in EleutherAI's lm-evaluation-harness.

    python -m retro_hf.evaluation.lm_eval run --model retro --tasks lambada_openai \
        --model_args pretrained=hub_configs/retro-bible,datastore=my_store,embedder=.data/minilm

This is the harness's own command, `lm-eval`, which knows only its own models. docs/lm_eval.md says
which of its numbers equal those of [`bits_per_byte`].
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


@register_model("retro")
class RetroLM(HFLM):
    """The harness's model `retro`: its `hf` model, with retrieval if a datastore is given.

    Retrieval begins with the first complete chunk. A request with fewer than `chunk_size` tokens before its last scored
    token reads nothing, so ON equals OFF there. The harness has no document ids, so nothing is excluded: keep the scored
    texts out of the datastore.

    Args:
        pretrained ([`RetroForCausalLM`] or `str`): the model, its folder or its name on the Hub. A retriever attached to
            the model is not used and stays attached.
        datastore (`str`, *optional*): folder or Hub name of the datastore; without one retrieval is off.
        embedder (`str`, *optional*): encoder of the datastore's keys, if it is not the one that the datastore names.
        num_neighbors (`int`, *optional*): neighbors per chunk; by default the number saved with the datastore.
        retriever (`Callable`, *optional*): any retriever that the model's `forward` accepts, instead of a datastore.
        options: those of the harness's `HFLM`: `batch_size`, `device`, `dtype`, `tokenizer`, `max_length` and so on.

    Raises:
        ValueError: if the model is not a RETRO model, or both a datastore and a retriever are given.
        DatastoreMismatchError: if the datastore has another tokenizer than the model.
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
            raise ValueError("Pass either `datastore` or `retriever`, not both.")
        super().__init__(pretrained, **options)
        if not hasattr(self.model, "set_retriever"):
            raise ValueError(
                f"{type(self.model).__name__} is not a RETRO model. Evaluate it with the harness's `--model hf`, or make a "
                "RETRO model of it with `retrofit`."
            )
        if datastore is not None:
            retriever = RetroRetriever.from_pretrained(
                datastore, embedder=embedder, tokenizer=self.tokenizer, num_neighbors=num_neighbors
            )
        self.retriever = retriever

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        # The harness pads on the right without a mask. Chunks count from the left and attention is causal, so padding
        # changes no score.
        precision = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
            return self.model(inps, retriever=self.retriever, use_cache=False).logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        return super()._model_generate(context, max_length, stop, retriever=self.retriever, **options)


def main() -> None:
    """Run the harness's command line with the model `retro`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()

"""RETRO for Hugging Face transformers: language models that read a datastore, chunk by chunk."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .model.configuration_retro import RetroConfig, RetroDecoderConfig, RetroEncoderConfig
from .model.modeling_retro import RetroForCausalLM, RetroModel, RetroPreTrainedModel
from .model.modeling_retro_decoder import RetroDecoderForCausalLM, RetroDecoderModel

# A function named like its module: bound here, before anything else can bind the module to the name.
from .retrofit import retrofit


if TYPE_CHECKING:
    from .answering import Answer, answer
    from .datastore import ChunkEmbedder, RetroDatastore
    from .errors import RetroError
    from .fitting import Fit, fit
    from .retriever import RetrievedNeighbor, RetroRetriever
    from .training import RetroDataCollator, precompute_neighbors


__version__ = "0.1.0"

# The model needs torch and transformers alone; what needs faiss or datasets is imported when it is first used.
_LAZY = {
    "Answer": "answering",
    "ChunkEmbedder": "datastore",
    "Fit": "fitting",
    "RetrievedNeighbor": "retriever",
    "RetroDataCollator": "training",
    "RetroDatastore": "datastore",
    "RetroError": "errors",
    "RetroRetriever": "retriever",
    "answer": "answering",
    "fit": "fitting",
    "precompute_neighbors": "training",
}

__all__ = [
    "Answer",
    "ChunkEmbedder",
    "Fit",
    "RetrievedNeighbor",
    "RetroConfig",
    "RetroDataCollator",
    "RetroDatastore",
    "RetroDecoderConfig",
    "RetroDecoderForCausalLM",
    "RetroDecoderModel",
    "RetroEncoderConfig",
    "RetroError",
    "RetroForCausalLM",
    "RetroModel",
    "RetroPreTrainedModel",
    "RetroRetriever",
    "answer",
    "fit",
    "precompute_neighbors",
    "retrofit",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the names that aren't imported yet, too."""
    return sorted({*globals(), *__all__})


def _register() -> None:
    """Make `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know both model types."""
    AutoConfig.register(RetroEncoderConfig.model_type, RetroEncoderConfig, exist_ok=True)
    for config, base_model, causal_lm in (
        (RetroConfig, RetroModel, RetroForCausalLM),
        (RetroDecoderConfig, RetroDecoderModel, RetroDecoderForCausalLM),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, base_model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
        # `register` does not change the table of names, in which Trainer looks up whether to shift labels.
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = causal_lm.__name__


_register()

"""A tiny language-model tokenizer, a tiny random encoder and a tiny corpus, made on the spot: no download."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


WORDS = (
    "the a river mountain city castle train garden winter summer king queen baker sailor letter bridge clock music "
    "runs falls opens sings builds reads crosses finds loses writes over under near beyond with without old new tall "
    "quiet bright broken golden seven three hundred years ago today again because although lighthouse harbor"
).split()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread for torch and, since they share OpenMP, FAISS: two would mostly wait for each other on tiny inputs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sentence(generator: np.random.Generator, num_words: int) -> str:
    """Words drawn at random: no two documents alike."""
    return " ".join(generator.choice(WORDS, size=num_words)) + "."


def corpus(num_documents: int = 40, seed: int = 0) -> list[dict]:
    """Documents of 5 to 80 words, with ids, titles, sources and one field of their own."""
    generator = np.random.default_rng(seed)
    return [
        {
            "id": f"doc-{number}",
            "title": f"Title {number}",
            "source": "test corpus",
            "text": sentence(generator, int(generator.integers(5, 80))),
            "year": 1900 + number,
        }
        for number in range(num_documents)
    ]


def make_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as GPT-2's: every text goes through it and comes back."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    generator = np.random.default_rng(7)
    backend.train_from_iterator([sentence(generator, 50) for _ in range(50)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def make_encoder(folder: Path, seed: int = 0, hidden_size: int = 32) -> Path:
    """A folder with a random two-layer BERT and its own WordPiece tokenizer, as transformers saves them."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
    )
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

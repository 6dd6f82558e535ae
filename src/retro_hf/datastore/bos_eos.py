"""The begin-of-text and end-of-text tokens of a document: one rule for training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..arguments import check_tokenizer, flag
from ..errors import DatasetError


@dataclass(frozen=True)
class Borders:
    """What stands before and behind the tokens of a document: one token id or none."""

    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, add_bos: bool | None, add_eos: bool | None) -> Borders:
        """The borders for a tokenizer.

        Args:
            add_bos (`bool`, *optional*): by default, whether the tokenizer puts the token before a prompt.
            add_eos (`bool`, *optional*): by default, whether the tokenizer has the token.
        Raises:
            DatasetError: if the tokenizer lacks a token that is asked for, or is not a tokenizer.
        """
        check_tokenizer(tokenizer, DatasetError)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if add_bos is None:
            add_bos = bos is not None and list(tokenizer("a", verbose=False)["input_ids"])[:1] == [bos]
        if add_eos is None:
            add_eos = eos is not None
        add_bos, add_eos = flag("add_bos", add_bos, DatasetError), flag("add_eos", add_eos, DatasetError)
        for name, wanted, id in (("bos", add_bos, bos), ("eos", add_eos, eos)):
            if wanted and id is None:
                raise DatasetError(
                    f"add_{name}=True, but the tokenizer has no {name}_token. Set `tokenizer.{name}_token`, or pass add_{name}=False."
                )
        return cls((bos,) if add_bos else (), (eos,) if add_eos else ())

    def around(self, tokens: list[int]) -> list[int]:
        """The tokens of a document between them."""
        return [*self.begin, *tokens, *self.end]

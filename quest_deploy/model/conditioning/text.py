"""Tokenizers and text encoders, whatever runs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quest_deploy.errors import ArtifactError
from quest_deploy.model.families import TextPart

Outputs = Mapping[str, Tensor]
"""What one component gives, by output name."""
Run = Callable[[str, Mapping[str, Tensor]], Outputs]
"""(name of a component, its inputs by name) -> its outputs by name."""

# What transformers takes for the length of a tokenizer that names none is 10^30.
MOST_TOKENS = 2**31 - 1

# A tokenizer cuts and pads as it was last told, by whichever thread.
_TOKENIZING = threading.Lock()


def load_tokenizer(folder: Path, part: TextPart, tokenizer_class: Any) -> Any:
    """Load a tokenizer from its own folder, and from nowhere else.

    Args:
        folder: Where it lies.
        part: The text encoder that it goes with.
        tokenizer_class: Of transformers.

    Raises:
        ArtifactError: a file is missing, or nothing says how many tokens the encoder reads.
    """
    # Without its files, transformers makes up a tokenizer that knows no word.
    names = dict(getattr(tokenizer_class, "vocab_files_names", {}))
    whole = names.pop("tokenizer_file", None)
    missing = [name for name in names.values() or filter(None, [whole]) if not (folder / name).is_file()]
    if missing and not (whole and (folder / whole).is_file()) and not any(folder.glob("*.model")):
        raise ArtifactError(f"'{folder / missing[0]}' is missing; restore the directory from its source")
    tokenizer = tokenizer_class.from_pretrained(folder, local_files_only=True)
    if token_limit(part, tokenizer) > MOST_TOKENS:
        raise ArtifactError(
            f"'{folder}': the tokenizer has no length (model_max_length in tokenizer_config.json); "
            "restore the directory from its source"
        )
    return tokenizer


def token_limit(part: TextPart, tokenizer: Any) -> int:
    """How many tokens an encoder reads, special ones included."""
    return int(tokenizer.model_max_length) if part.max_tokens is None else part.max_tokens


def tokenize(
    part: TextPart, tokenizer: Any, prompts: Sequence[str], limit: int | None = None
) -> dict[str, Tensor]:
    """What a text encoder is given: `input_ids`, and `attention_mask` where it takes one, int64 [n, tokens].

    Args:
        part: The text encoder.
        tokenizer: Its own.
        prompts: n texts.
        limit: What they are padded and cut to; None is the encoder's length.
    """
    with _TOKENIZING:
        encoded = tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=limit or token_limit(part, tokenizer),
            padding_side="right",
            return_tensors="pt",
        )
    names = ("input_ids", "attention_mask") if part.masked else ("input_ids",)
    return {name: torch.as_tensor(encoded[name]) for name in names}


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """All tokens of a text, special ones included: neither cut nor padded."""
    with _TOKENIZING:
        tokens: list[int] = tokenizer([text], truncation=False, verbose=False).input_ids[0]
    return tokens


@dataclass(frozen=True, kw_only=True)
class TextEncoders:
    """The text encoders of one model.

    Attributes:
        parts: In the order of their numbers.
        tokenizers: By name of the encoder.
        run: Runs one of them.
    """

    parts: tuple[TextPart, ...]
    tokenizers: Mapping[str, Any]
    run: Run

    def tokens(self, part: TextPart, prompts: Sequence[str], limit: int | None = None) -> dict[str, Tensor]:
        """What one of them is given for `prompts`, padded and cut to `limit`, or to its own length."""
        return tokenize(part, self.tokenizers[part.name], prompts, limit)

    def __call__(self, part: TextPart, prompts: Sequence[str]) -> Outputs:
        """What one of them gives for `prompts`, [n, ...] by output name."""
        return self.run(part.name, self.tokens(part, prompts))

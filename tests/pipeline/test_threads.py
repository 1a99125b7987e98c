"""Several threads on one pipeline, and several that load one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import BatchEncoding

from quest_deploy.model.conditioning import tokenize, tokens_of
from quest_deploy.model.families import FAMILIES

(CLIP,) = FAMILIES["StableDiffusionPipeline"].text
LENGTH = 8


class Stateful:
    """A tokenizer that, as those of transformers, cuts and pads by what it was last told."""

    model_max_length = LENGTH

    def __init__(self) -> None:
        self.length: int | None = None

    def __call__(
        self, texts: Sequence[str], truncation: bool = False, max_length: int | None = None, **options: Any
    ) -> BatchEncoding:
        self.length = max_length if truncation else None
        time.sleep(0.002)
        tokens = [[0] * (len(text) if self.length is None else self.length) for text in texts]
        return BatchEncoding({"input_ids": tokens})


def test_threads_do_not_change_how_a_text_of_another_is_cut() -> None:
    tokenizer = Stateful()
    jobs: list[Callable[[], int]] = [
        lambda: tokenize(CLIP, tokenizer, ["long" * LENGTH])["input_ids"].shape[1],
        lambda: len(tokens_of(tokenizer, "long" * LENGTH)),
    ] * 10
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda job: job(), jobs)) == [LENGTH, 4 * LENGTH] * 10

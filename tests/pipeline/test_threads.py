"""Several threads on one pipeline, and several that load one."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchEncoding

from quest_deploy.model.conditioning import tokenize, tokens_of
from quest_deploy.model.families import FAMILIES
from quest_deploy.model.libraries import class_of
from quest_deploy.pipeline import load_pipeline

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


LAZY = """
import sys, time
from types import ModuleType
time.sleep(0.2)
class Whole(ModuleType):
    Scheduler = int
sys.modules[__name__] = Whole(__name__)
"""


def test_a_library_that_another_thread_imports_has_its_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers and transformers put another module in their place at the end of their import."""
    (tmp_path / "lazy_library.py").write_text(textwrap.dedent(LAZY))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: class_of("lazy_library", "Scheduler"), range(4)))
    finally:
        sys.modules.pop("lazy_library", None)
    assert found == [int] * 4


@pytest.mark.parametrize("kind", ["tiny_model", pytest.param("tiny_checkpoint", marks=pytest.mark.thorough)])
def test_threads_load_pipelines_at_the_same_time(request: pytest.FixtureRequest, kind: str) -> None:
    path = request.getfixturevalue(kind)
    with ThreadPoolExecutor(3) as pool:
        loaded = list(pool.map(lambda _: load_pipeline(path), range(3)))
    told = [pipeline.encode(["rocket"])["encoder_hidden_states"] for pipeline in loaded]
    assert all(torch.equal(one, told[0]) for one in told)

"""Prompt lists: what is packaged, and what a user's file may hold."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from quest_deploy.errors import ConfigError
from quest_deploy.prompts import load_prompts


@pytest.fixture(scope="module")
def make_prompts(repository: Path) -> ModuleType:
    """The script that made the lists; it knows which captions are near-synonyms."""
    spec = importlib.util.spec_from_file_location("make_prompts", repository / "scripts" / "make_prompts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "count"), [("calibration", 256), ("heldout", 64)])
def test_packaged_lists_hold_distinct_prompts(name: str, count: int) -> None:
    prompts = load_prompts(default=name)
    assert len(prompts) == len(set(prompts)) == count


def test_heldout_and_calibration_are_disjoint() -> None:
    assert not set(load_prompts(default="heldout")) & set(load_prompts(default="calibration"))


def test_no_calibration_prompt_is_a_near_synonym_of_a_heldout_one(make_prompts: ModuleType) -> None:
    calibration = load_prompts(default="calibration")
    near = [prompt for prompt in load_prompts(default="heldout") if make_prompts.is_near(prompt, calibration)]
    assert near == []


def test_near_synonyms_are_recognized(make_prompts: ModuleType) -> None:
    assert make_prompts.is_near("woman dancing", ["man dancing dark skin tone"])
    assert not make_prompts.is_near("red apple", ["red heart"])


def test_heldout_starts_with_the_prompts_of_the_sample_picture(repository: Path) -> None:
    training = json.loads((repository / "reference-model" / "training.json").read_text())
    assert load_prompts(default="heldout")[:16] == tuple(training["prompts"])


def test_no_packaged_prompt_is_truncated_by_the_tokenizer(reference_model: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(reference_model / "tokenizer"))
    for name in ("calibration", "heldout"):
        longest = max(load_prompts(default=name), key=lambda prompt: len(tokenizer(prompt).input_ids))
        assert len(tokenizer(longest).input_ids) <= tokenizer.model_max_length


def test_file_keeps_order_and_drops_comments_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# a comment\r\n  zèbre \r\n\r\na cat # not a comment\r\n".encode())
    assert load_prompts(path) == ("zèbre", "a cat # not a comment")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "got no prompt"),
        (b"# only a comment\n\n", "got no prompt"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "got binary data"),
        (b"cat\0dog", "got binary data"),
    ],
    ids=["missing", "empty", "only-comments", "not-utf8", "nul-byte"],
)
def test_unusable_file_is_a_config_error(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_prompts(path)


def test_directory_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prompts(tmp_path)

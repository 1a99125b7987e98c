from __future__ import annotations

import pytest

from quest_deploy.engines.arithmetic import (
    RTX_BY_DEFAULT,
    Capability,
    covers,
    meanings,
    parse_capability,
    remarks,
    rtx_runs,
)
from quest_deploy.engines.libraries import supported_capabilities
from quest_deploy.errors import ConfigError


def sentence(capability: Capability, recipe: str) -> str:
    return next(one.sentence for one in meanings(capability) if one.recipe == recipe)


@pytest.mark.parametrize(("text", "capability"), [("8.9", (8, 9)), (" 12.0 ", (12, 0))])
def test_compute_capability_is_two_numbers(text: str, capability: Capability) -> None:
    assert parse_capability(text) == capability


@pytest.mark.parametrize("text", ["8", "89", "8.9.1", "sm_89", ""])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected one like 8\.9"):
        parse_capability(text)


def test_every_recipe_is_explained_on_every_gpu() -> None:
    for capability in ((6, 1), (7, 0), (7, 5), (8, 6), (9, 0), (12, 0)):
        recipes = [one.recipe for one in meanings(capability)]
        assert recipes == ["w8a8", "w4a8", "w4a4", "int4-weight-only"]


@pytest.mark.parametrize(
    ("capability", "runs"), [((6, 1), False), ((7, 0), False), ((7, 5), True), ((9, 0), True)]
)
def test_integer_recipes_run_from_turing_on(capability: Capability, runs: bool) -> None:
    assert {one.runs for one in meanings(capability)} == {runs}


def test_four_bits_are_eight_in_an_engine() -> None:
    assert "of convolutions too, are stored as INT8" in sentence((8, 9), "w4a8")
    assert "INT4 tensor cores, where the GPU has them, are not used" in sentence((8, 9), "w4a4")
    assert [one.nearest for one in meanings((8, 9))] == ["w8a8", "w8a8", "w8a8", "int4-weight-only"]


def test_weights_alone_are_storage() -> None:
    assert "storage only" in sentence((8, 0), "int4-weight-only")
    assert "multiplied in fp16 or bf16;" in sentence((8, 0), "int4-weight-only")
    assert "multiplied in fp16;" in sentence((7, 5), "int4-weight-only")


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        ((8, 6), None),
        ((8, 9), "FP8 of this GPU are not used"),
        ((9, 0), "FP8 of this GPU are not used"),
        ((12, 0), "FP8 and FP4 of this GPU are not used"),
    ],
)
def test_eight_and_four_bit_floats_are_not_used(capability: Capability, words: str | None) -> None:
    text = "; ".join(remarks(capability))
    assert words in text if words else "not used" not in text


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        ((7, 5), "lists neither INT8 nor INT4 for this GPU"),
        ((8, 9), "INT8 and INT4 for weights alone"),
        ((12, 1), "INT8 and INT4 for weights alone"),
        ((8, 0), "does not list which types it has there"),
        ((13, 0), "does not list which types it has there"),
        (
            (9, 0),
            "does not support this compute capability (it supports 7.5, 8.0, 8.6, 8.9, 12.0 and later) and refused to",
        ),
        (
            (8, 7),
            "does not support this compute capability (it supports 7.5, 8.0, 8.6, 8.9, 12.0 and later): use",
        ),
    ],
)
def test_tensorrt_for_rtx_is_promised_nothing_that_it_does_not_list(
    capability: Capability, words: str
) -> None:
    assert any(words in remark for remark in remarks(capability))


def test_tensorrt_for_rtx_runs_where_it_says_and_can_be_told_to_build() -> None:
    """Of version 1.7: its message on an H200 (docs/results.md), and the capabilities that its builder has."""
    runs = [(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1), (13, 0)]
    tried = [*runs, (7, 0), (8, 7), (9, 0), (10, 0), (10, 3), (11, 0)]
    assert [capability for capability in tried if rtx_runs(capability)] == runs
    pytest.importorskip("tensorrt_rtx")
    assert all(rtx_runs(parse_capability(text)) for text in supported_capabilities("tensorrt-rtx"))


@pytest.mark.parametrize(
    ("said", "capability", "holds"),
    [
        ("8.6", "8.6", True),
        ("8.6", "8.9", False),
        ("8.6, any GPU", "8.6", True),
        ("8.0 and later", "12.0", True),
        ("8.0 and later", "7.5", False),
        (RTX_BY_DEFAULT, "8.6", True),
        (RTX_BY_DEFAULT, "12.1", True),
        (RTX_BY_DEFAULT, "8.7", False),
        (RTX_BY_DEFAULT, "10.0", False),
        ("None", "8.6", False),
    ],
)
def test_capabilities_that_engines_were_built_for(said: str, capability: str, holds: bool) -> None:
    assert covers(said, capability) is holds


def test_volta_has_no_int8_tensor_cores() -> None:
    assert any("none here" in remark for remark in remarks((7, 0)))
    assert not any("none here" in remark for remark in remarks((7, 5)))

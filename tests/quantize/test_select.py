"""Presets: which layers of a Stable Diffusion U-Net each stands for."""

from __future__ import annotations

import dataclasses

import pytest

from quest_deploy.config import BitsOverride
from quest_deploy.errors import ConfigError
from quest_deploy.quantize.insert import Role
from quest_deploy.quantize.recipe import load_recipe
from quest_deploy.quantize.select import PRESETS, layer_bits, select
from quest_deploy.quantize.trace import Trace

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
NAMES = (
    "conv_in",
    "time_embedding.linear_1",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.resnets.0.conv_shortcut",
    "down_blocks.0.resnets.0.time_emb_proj",
    "down_blocks.0.attentions.0.proj_in",
    f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.attn1.to_k",
    f"{BLOCK}.attn1.to_v",
    f"{BLOCK}.attn1.to_out.0",
    f"{BLOCK}.attn2.to_q",
    f"{BLOCK}.attn2.to_k",
    f"{BLOCK}.ff.net.0.proj",
    f"{BLOCK}.ff.net.2",
    "mid_block.attention.qkv",
)
ROLES: dict[str, Role] = {
    name: "boundary" if name == "conv_in" else "temporal" if "time_emb" in name else "other" for name in NAMES
}
FEED_FORWARD = {f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.2"}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("none", set()),
        ("all", set(NAMES)),
        ("temporal", {"time_embedding.linear_1", "down_blocks.0.resnets.0.time_emb_proj"}),
        ("paper-sd", FEED_FORWARD),
        (
            "paper-cldm",
            FEED_FORWARD
            | {f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k", f"{BLOCK}.attn1.to_v", f"{BLOCK}.attn2.to_q"},
        ),
        (
            "paper-uncond",
            {"mid_block.attention.qkv", f"{BLOCK}.attn2.to_q", f"{BLOCK}.attn2.to_k"}
            | {f"{BLOCK}.attn1.to_{part}" for part in "qkv"},
        ),
        (
            "residual-projections",
            {"down_blocks.0.attentions.0.proj_in", "down_blocks.0.resnets.0.conv_shortcut"},
        ),
        ("attention-and-feed-forward", {name for name in NAMES if name.startswith(BLOCK)}),
    ],
)
def test_a_preset_stands_for_its_layers(preset: str, expected: set[str]) -> None:
    assert select(ROLES, preset) == expected


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError,
        match="'sensitiv' stands for no layer of this model; give a preset .none, temporal, time-pro",
    ):
        select(ROLES, "sensitiv")


def test_a_preset_that_finds_no_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="'paper-uncond' stands for no layer of this model"):
        select({name: ROLES[name] for name in NAMES[:4]}, "paper-uncond")


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"none"}))
def test_a_preset_finds_layers_in_a_stable_diffusion_unet(preset: str, traced: Trace) -> None:
    assert select(traced.roles, preset)


def test_time_projections_are_those_of_a_unet_s_residual_blocks(traced: Trace) -> None:
    assert select(traced.roles, "time-projections") == select(traced.roles, "*.time_emb_proj")


def test_patterns_and_names_choose_layers_together() -> None:
    assert select(ROLES, ("mid_block.*", "conv_in")) == {"mid_block.attention.qkv", "conv_in"}


def test_patterns_that_find_no_layer_are_refused_together() -> None:
    with pytest.raises(ConfigError, match=r"'up_blocks\.9\.\*', 'qkv' stand for no layer"):
        select(ROLES, ("up_blocks.9.*", "conv_in", "qkv"))


def test_all_names_that_find_no_layer_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match="layers 'attn9', 'ff9' stand for no layer"):
        select(ROLES, ("attn9", "conv_in", "ff9"))
    with pytest.raises(ConfigError, match="layers 'attn9', 'ff9' stand for no layer"):
        overridden(BitsOverride(layers="attn9", weight_bits=8), BitsOverride(layers="ff9", weight_bits=8))


def overridden(*overrides: BitsOverride) -> dict[str, tuple[int, int]]:
    return layer_bits(ROLES, dataclasses.replace(load_recipe("w4a8"), overrides=overrides))


def test_both_ends_keep_eight_bits_and_others_have_the_recipes() -> None:
    bits = overridden()
    assert (bits["conv_in"], bits[f"{BLOCK}.ff.net.2"]) == ((8, 8), (4, 8))


def test_a_later_override_holds() -> None:
    bits = overridden(
        BitsOverride(layers="*.attn1.*", activation_bits=4, weight_bits=8),
        BitsOverride(layers="*.to_q", weight_bits=4),
    )
    assert bits[f"{BLOCK}.attn1.to_q"] == (4, 4)
    assert bits[f"{BLOCK}.attn1.to_k"] == (8, 4)
    assert bits[f"{BLOCK}.attn2.to_q"] == (4, 8)


def test_an_override_by_a_preset_may_find_nothing_but_one_by_a_pattern_may_not() -> None:
    assert layer_bits({"conv_in": "boundary"}, load_recipe("w4a4")) == {"conv_in": (8, 8)}
    with pytest.raises(ConfigError, match="'nothing' stands for no layer"):
        overridden(BitsOverride(layers="nothing", weight_bits=8))

"""Sizes that a model cannot draw are refused by the configuration files alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quest_deploy.config import GenerateConfig
from quest_deploy.errors import ConfigError
from quest_deploy.export.lint.read import default_dimensions
from quest_deploy.pipeline.request import check_request

both = pytest.mark.parametrize("backend", ["torch", "onnxruntime"])


def request(height: int, width: int) -> GenerateConfig:
    return GenerateConfig(prompts=("cat",), height=height, width=width)


@both
@pytest.mark.parametrize("kind", ["flux-dev", "sd3"])
def test_a_size_that_leaves_half_a_patch_is_refused(
    kind: str, backend: str, altered: Callable[..., Path]
) -> None:
    path = altered(kind, "vae/config.json", block_out_channels=[8, 8, 8, 8])
    check_request(path, request(80, 64), backend)
    with pytest.raises(
        ConfigError, match=r"height: got 72 pixels, expected multiples of 16 .* choose 64 or 80"
    ):
        check_request(path, request(72, 64), backend)


@both
def test_a_size_beyond_the_stored_positions_is_refused(backend: str, model_of: Callable[[str], Path]) -> None:
    check_request(model_of("sd3"), request(16, 48), backend)
    with pytest.raises(ConfigError, match=r"width is 56 pixels, .* positions for 48 at most"):
        check_request(model_of("sd3"), request(16, 56), backend)


def test_how_many_positions_are_stored_may_be_left_out(altered: Callable[..., Path]) -> None:
    path = altered("sd3", "transformer/config.json") / "transformer" / "config.json"
    config = json.loads(path.read_text())
    del config["pos_embed_max_size"]
    path.write_text(json.dumps(config))
    check_request(path.parents[1], request(16, 384), "torch")
    with pytest.raises(ConfigError, match="positions for 384 at most"):
        check_request(path.parents[1], request(16, 392), "torch")


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("sdxl", 24), ("sd3", 24 + 256), ("flux-dev", 512), ("sana", 300), ("pixart-alpha", 120)],
)
def test_lint_counts_at_the_size_and_the_tokens_of_the_model(
    kind: str, tokens: int, model_of: Callable[[str], Path]
) -> None:
    sizes = default_dimensions(model_of(kind))
    assert sizes["sequence"] == tokens
    assert sizes.get("image_tokens") == (16 if kind == "flux-dev" else None)

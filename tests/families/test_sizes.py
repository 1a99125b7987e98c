"""Sizes that a model cannot draw are refused by the configuration files alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quest_deploy.config import GenerateConfig
from quest_deploy.errors import ConfigError
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

"""Requests are checked by the configuration files alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from quest_deploy.config import GenerateConfig
from quest_deploy.errors import ConfigError
from quest_deploy.pipeline.request import check_request

SIZE = GenerateConfig(prompts=("cat",), height=72)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"])
def test_a_size_that_an_exported_unet_cannot_halve_is_refused_as_by_build_engine(
    reference_model: Path, backend: str
) -> None:
    with pytest.raises(
        ConfigError, match=r"height: got 72 pixels, expected multiples of 16 .* choose 64 or 80"
    ):
        check_request(reference_model, SIZE, backend)


def test_torch_draws_sizes_that_the_unet_cannot_halve(reference_model: Path) -> None:
    check_request(reference_model, SIZE, "torch")


def test_files_that_cannot_be_read_are_left_to_loading(tmp_path: Path) -> None:
    check_request(tmp_path, SIZE, "torch")

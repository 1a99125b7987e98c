"""Our own exports in every mode and type: lint refuses what the runtime refuses, and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest

from quest_deploy.export.graph import component_graph
from quest_deploy.export.lint import lint
from quest_deploy.model.components import Denoiser, parameters_frozen
from quest_deploy.quantize.weight_only import drop_activation_quantizers
from tests.export.conftest import quantize_unet, tiny_unet, unet_spec
from tests.export.lint.attempts import first_line

MODES = ("none", "int8", "int4-weight-only")


def write(path: Path, mode: str, dtype: str, target: str) -> Path:
    """A tiny U-Net as our exporter writes it."""
    unet = tiny_unet() if mode == "none" else quantize_unet(tiny_unet(), 4, 8)
    if mode == "int4-weight-only":
        drop_activation_quantizers(unet)
    module = parameters_frozen(Denoiser(unet, unet_spec()))
    graph = component_graph(
        module,
        unet_spec(),
        granularity=2,
        opset=21,
        target=target,
        dtype=dtype,
        fragile=lambda model: {},
    )
    ir.save(graph, path)
    return path


def opens(path: Path) -> str | None:
    """Why ONNX Runtime does not open a file, or None where it does."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class of their own
        return first_line(error)
    return None


def grid(often: tuple[str, str]) -> pytest.MarkDecorator:
    """Every mode and type; all but one are slow. Each takes seconds on an idle machine."""
    return pytest.mark.parametrize(
        ("mode", "dtype"),
        [
            pytest.param(mode, dtype, marks=() if (mode, dtype) == often else pytest.mark.slow)
            for mode in MODES
            for dtype in ("fp32", "fp16", "bf16")
        ],
    )


# Those that lower what is quantized are the ones that went wrong.
@grid(("int4-weight-only", "fp16"))
@pytest.mark.thorough
def test_for_onnx_runtime_lint_says_what_it_does(mode: str, dtype: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", mode, dtype, "onnxruntime")
    report, refused = lint(path, "onnxruntime"), opens(path)
    assert report.breaks == (refused is not None), refused
    # The CPU has no bfloat16; everything else must run.
    assert report.breaks == (dtype == "bf16"), [item for item in report.findings if item.breaks][:1]


@pytest.mark.thorough
@grid(("int8", "bf16"))
def test_for_tensorrt_nothing_is_refused(mode: str, dtype: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", mode, dtype, "tensorrt-rtx")
    report = lint(path, "tensorrt-rtx")
    assert not report.breaks, [item for item in report.findings if item.breaks][:1]
    runs = Counter(layer.execution for layer in report.layers)
    if mode == "int8":
        assert runs["int8"] > runs["float"]
    else:
        assert not runs["int8"]

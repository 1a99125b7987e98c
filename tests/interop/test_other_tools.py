"""An exported file needs nothing of quest-deploy: ONNX Runtime alone and Polygraphy's command line take it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quest_deploy.config import ExportConfig
from quest_deploy.export.to_onnx import export

POLYGRAPHY = Path(sys.executable).with_name("polygraphy")
pytestmark = pytest.mark.thorough

COMPONENTS = ("text_encoder", "unet", "vae_decoder")
SHAPES = {
    "text_encoder": {"input_ids": (2, 24)},
    "unet": {"sample": (2, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (2, 24, 16)},
    "vae_decoder": {"latent_sample": (1, 4, 8, 8)},
}
OPEN_AND_RUN = """
import sys
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
sizes = {"batch": 2, "steps": 1, "height": 8, "width": 8, "sequence": 24}
types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
given = {
    value.name: np.ones([sizes.get(size, size) for size in value.shape], types[value.type])
    for value in session.get_inputs()
}
outputs = session.run(None, given)
assert outputs and all(np.isfinite(output).all() for output in outputs)
assert not {"quest_deploy", "torch", "diffusers"} & sys.modules.keys()
print("ran", ",".join(given))
"""


@pytest.fixture(scope="module", params=["fp32", "w4a8"])
def tiny_export(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path
) -> Path:
    """The tiny model as ONNX for ONNX Runtime."""
    if request.param == "fp32":
        return tiny_onnx
    path = tmp_path_factory.mktemp("interop") / "onnx"
    export(request.getfixturevalue("tiny_checkpoint"), path, ExportConfig())
    return path


def run(*command: object, cwd: Path) -> str:
    """Run a process in a directory without quest-deploy's sources, and give what it prints."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "POLYGRAPHY_AUTOINSTALL_DEPS": "0"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("component", COMPONENTS)
def test_onnx_runtime_alone_opens_and_runs_the_file(
    tiny_export: Path, tmp_path: Path, component: str
) -> None:
    printed = run("-c", OPEN_AND_RUN, tiny_export / component / "model.onnx", cwd=tmp_path)
    assert printed.split()[-1] == ",".join(SHAPES[component])


@pytest.mark.parametrize("component", COMPONENTS)
def test_polygraphy_inspects_the_file(tiny_export: Path, tmp_path: Path, component: str) -> None:
    model = tiny_export / component / "model.onnx"
    printed = run(POLYGRAPHY, "inspect", "model", model, "--show", "layers", cwd=tmp_path)
    assert all(name in printed for name in SHAPES[component])
    quantized = component == "unet" and (tiny_export / "quest.json").is_file()
    assert ("DequantizeLinear" in printed) is quantized


@pytest.mark.parametrize("component", COMPONENTS)
def test_polygraphy_runs_the_file(tiny_export: Path, tmp_path: Path, component: str) -> None:
    shapes = [f"{name}:[{','.join(map(str, shape))}]" for name, shape in SHAPES[component].items()]
    model = tiny_export / component / "model.onnx"
    printed = run(POLYGRAPHY, "run", model, "--onnxrt", "--input-shapes", *shapes, "--validate", cwd=tmp_path)
    assert "PASSED" in printed

"""Engines of whole models, not of toys: what the real builder takes of what `export` writes, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from quest_deploy.artifacts import read_artifact
from quest_deploy.config import BuildConfig, ExportConfig, Mode, ShapeRange
from quest_deploy.engines.libraries import gpus
from quest_deploy.engines.trt_build import PLAN_NAME, build_engine
from quest_deploy.export.to_onnx import export

pytest.importorskip("tensorrt_rtx")

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]

SIZES = ShapeRange(min=64, opt=64, max=128)
# With the batches and the height in pixels that each engine must say it takes: (smallest, optimal, largest).
SHAPES = {
    "dynamic": (
        BuildConfig(height=SIZES, width=SIZES),
        {"unet": (1, 2, 8), "vae_decoder": (1, 1, 4)},
        (64, 64, 128),
    ),
    "static": (BuildConfig(static=True), {"unet": (2, 2, 2), "vae_decoder": (1, 1, 1)}, None),
}

# Of a latent: the reference model's VAE halves twice, the small one's once.
PIXELS = {"none": 4, "int4-weight-only": 2}


@pytest.fixture(scope="module", params=["none", "int4-weight-only"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Mode, Path]:
    """The reference model in floats, and a small checkpoint of its architecture with weights in 4 bits."""
    mode: Mode = request.param
    source = request.getfixturevalue("reference_model" if mode == "none" else "tiny_checkpoint")
    config = ExportConfig(target="tensorrt-rtx", mode=mode)
    return mode, export(source, tmp_path_factory.mktemp(mode) / "onnx", config).path


@pytest.mark.parametrize(("config", "batches", "pixels"), SHAPES.values(), ids=SHAPES)
def test_every_component_builds_and_the_manifest_says_for_what(
    exported: tuple[Mode, Path],
    tmp_path: Path,
    config: BuildConfig,
    batches: dict[str, tuple[int, int, int]],
    pixels: tuple[int, int, int] | None,
) -> None:
    mode, source = exported
    build_engine(source, tmp_path / "engines", config)
    manifest = read_artifact(tmp_path / "engines", stage="engines", verify=True).manifest
    details, reports = manifest.details, manifest.details["components"]
    assert (details["library"], details["lowering"]) == ("TensorRT for RTX", mode)
    assert reports.keys() == {"text_encoder", "unet", "vae_decoder"} and reports["unet"]["layers"] > 1000
    for name, report in reports.items():
        assert manifest.files[f"{name}/{PLAN_NAME}"].size_bytes == report["size_bytes"] > 10_000
        assert "fallback" not in report and report["verified"] is bool(gpus())
    for name, latents in (("unet", "sample"), ("vae_decoder", "latent_sample")):
        (profile,) = reports[name]["profiles"]
        shapes = [profile[latents][edge] for edge in ("min", "opt", "max")]
        assert tuple(shape[0] for shape in shapes) == batches[name]
        if pixels is None:
            assert shapes[0] == shapes[1] == shapes[2]
        else:
            assert tuple(shape[2] * PIXELS[mode] for shape in shapes) == pixels

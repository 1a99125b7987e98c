"""Finetune, export, draw and compare: the same stages for a model of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quest_deploy.artifacts import read_artifact
from quest_deploy.config import BuildConfig, FinetuneConfig, GenerateConfig, ShapeRange
from quest_deploy.engines.profiles import component_profiles
from quest_deploy.errors import ConfigError
from quest_deploy.parity.gates import Gate
from quest_deploy.pipeline import generate
from quest_deploy.quantize.checkpoint import load_checkpoint
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.insert import quantizable_layers, quantized_layers
from quest_deploy.quantize.recipe import recipe_from_dict

KINDS = ("dit", "class-unet", "ldm", "ddpm")
DENOISER = {"dit": "transformer"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_quantized_and_both_ends_keep_eight_bits(
    kind: str, checkpoint_of: Callable[[str], Path], loaded: Callable
) -> None:
    layers = quantized_layers(load_checkpoint(checkpoint_of(kind)).denoiser)
    assert layers.keys() == quantizable_layers(loaded(kind).denoiser).keys()
    eight = {name for name, layer in layers.items() if layer.weight_bits == 8}
    assert eight == ({"pos_embed.proj", "proj_out_2"} if kind == "dit" else {"conv_in", "conv_out"})


# Each takes about 20 seconds; `-m slow` runs the rest.
EXPORTED = ["dit", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("class-unet", "ldm", "ddpm"))]


@pytest.mark.parametrize("kind", EXPORTED)
def test_onnx_runtime_computes_the_codes_of_torch(
    kind: str, deployment_gates: Callable[[str], dict[str, Gate]]
) -> None:
    gates = deployment_gates(kind)
    assert gates["int8 codes that differ"].passed and gates["noise SNR, same codes"].passed
    # Nothing is said about a part that there is not.
    assert "text encoder SNR" not in gates
    assert ("VAE decoder SNR" in gates) == (kind in ("dit", "ldm"))


@pytest.mark.parametrize(
    ("kind", "batch"), [("dit", (2, 4)), ("class-unet", (2, 4)), ("ldm", (1, 2)), ("ddpm", (1, 2))]
)
def test_guidance_doubles_an_engine_s_batch_where_there_is_a_null_class(
    kind: str, batch: tuple[int, int], model_of: Callable[[str], Path]
) -> None:
    config = BuildConfig(batch=ShapeRange(min=1, opt=1, max=2))
    profile = component_profiles(model_of(kind), config)[DENOISER.get(kind, "unet")]
    assert {(shape.opt[0], shape.max[0]) for name, shape in profile.items() if name != "timestep"} == {batch}
    assert ("class_labels" in profile) == (kind in ("dit", "class-unet"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_tensorrt_for_rtx_builds_engines(
    kind: str, onnx_of: Callable[[str, str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    from quest_deploy.engines.trt_build import build_engine

    config = BuildConfig(batch=ShapeRange(min=1, opt=1, max=1))
    built = build_engine(onnx_of(kind, "tensorrt-rtx"), tmp_path / "engines", config)
    assert (built.path / DENOISER.get(kind, "unet") / "model.plan").stat().st_size > 10_000


def test_an_unconditional_model_draws_as_many_images_as_asked_for(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    images = generate(checkpoint_of("ddpm"), tmp_path / "images", GenerateConfig(num_images=3, steps=2))
    names = sorted(name for name in images.manifest.files if name.startswith("image-"))
    assert names == ["image-00000.png", "image-00001.png", "image-00002.png"]


def test_calibration_goes_round_all_classes(checkpoint_of: Callable[[str], Path]) -> None:
    config = read_artifact(checkpoint_of("dit")).manifest.config
    assert config["prompts"] == ["zero", "one"]


def test_calibrating_an_unconditional_model_on_prompts_is_refused(
    model_of: Callable[[str], Path], checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipe_from_dict(read_artifact(checkpoint_of("ddpm")).manifest.config["recipe"])
    with pytest.raises(ConfigError, match="draws without any"):
        finetune(model_of("ddpm"), tmp_path / "out", FinetuneConfig(recipe=recipe, prompts=("a", "b")))

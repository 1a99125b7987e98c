"""Finetune, export, draw and compare models that read text: the same stages as for any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quest_deploy.config import BuildConfig, ExportConfig, GenerateConfig, ShapeRange
from quest_deploy.engines.profiles import LONG_TEXT, component_profiles
from quest_deploy.export.to_onnx import export
from quest_deploy.metrics import snr_db
from quest_deploy.model.spec import component_specs, family_of
from quest_deploy.parity.gates import Gate
from quest_deploy.pipeline import generate, load_pipeline
from quest_deploy.quantize.checkpoint import load_checkpoint
from quest_deploy.quantize.insert import quantizable_layers, quantized_layers

KINDS = (
    "sd2",
    "sdxl",
    "sdxl-refiner",
    "lcm",
    "inpaint",
    "controlnet",
    "pixart-alpha",
    "pixart-sized",
    "pixart-sigma",
    "sd3",
    "sd35",
    "flux-dev",
    "flux-schnell",
    "sana",
)
# Half a minute each, and more for U-Nets; `-m slow` runs them.
SLOW = [pytest.param(kind, marks=(pytest.mark.slow, pytest.mark.timeout(600))) for kind in KINDS]
FINETUNED = [
    "pixart-alpha",
    pytest.param("flux-dev", marks=pytest.mark.thorough),
    *(
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in KINDS
        if kind not in ("pixart-alpha", "flux-dev")
    ),
]
# What ONNX Runtime keeps of a component in full precision.
FLOAT_SNR_DB = 90.0


@pytest.mark.parametrize("kind", FINETUNED)
def test_every_layer_is_quantized_and_the_checkpoint_draws(
    kind: str, checkpoint_of: Callable[[str], Path], loaded: Callable, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(kind)
    assert family_of(checkpoint) == loaded(kind).family
    layers = quantized_layers(load_checkpoint(checkpoint).denoiser)
    assert layers.keys() == quantizable_layers(loaded(kind).denoiser).keys()
    assert sum(layer.weight_bits == 8 for layer in layers.values()) == 2
    generate(checkpoint, tmp_path / "images", GenerateConfig(prompts=("pizza",), steps=2))


@pytest.mark.parametrize("kind", SLOW)
def test_onnx_runtime_keeps_full_precision(
    kind: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    export(model_of(kind), tmp_path / "onnx", ExportConfig(mode="none"))
    prompts, timestep = ["a red heart", "pizza"], torch.tensor(500.0)
    with load_pipeline(model_of(kind)) as torch_one, load_pipeline(tmp_path / "onnx") as other:
        noise = torch_one.initial_noise([1, 2])
        told, negative = torch_one.encode(prompts), torch_one.encode_negative(2)
        read = other.encode(prompts)
        for name, value in told.items():
            assert float(snr_db(value.float(), read[name].float()).min()) >= FLOAT_SNR_DB, name
        expected, got = (
            pipeline.predict_noise(noise, timestep, told, negative, guidance_scale=3.0)
            for pipeline in (torch_one, other)
        )
        assert float(snr_db(expected, got).min()) >= FLOAT_SNR_DB
        images = torch_one.decode(noise)
        assert float(snr_db(images, other.decode(noise)).min()) >= FLOAT_SNR_DB
        if torch_one.family.reads_images:
            read, back = (pipeline.encode_images(images) for pipeline in (torch_one, other))
            assert float(snr_db(read, back).min()) >= FLOAT_SNR_DB


@pytest.mark.parametrize("kind", SLOW)
def test_onnx_runtime_computes_the_codes_of_torch(
    kind: str, deployment_gates: Callable[[str], dict[str, Gate]]
) -> None:
    gates = deployment_gates(kind)
    for quantity in (
        "int8 codes that differ",
        "noise SNR, same codes",
        "text encoder SNR",
        "VAE decoder SNR",
    ):
        assert gates[quantity].passed, gates[quantity]


@pytest.mark.parametrize("kind", SLOW)
def test_tensorrt_for_rtx_builds_engines(
    kind: str, onnx_of: Callable[[str, str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    from quest_deploy.engines.trt_build import build_engine

    config = BuildConfig(batch=ShapeRange(min=1, opt=1, max=1))
    built = build_engine(onnx_of(kind, "tensorrt-rtx"), tmp_path / "engines", config)
    for name in component_specs(built.path):
        assert (built.path / name / "model.plan").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("kind", "tokens"), [("sdxl", 24), ("sd3", 24 + 256), ("sd35", 24 + 256), ("flux-dev", 512)]
)
def test_an_engine_s_denoiser_reads_the_tokens_of_all_encoders(
    kind: str, tokens: int, model_of: Callable[[str], Path]
) -> None:
    profiles = component_profiles(model_of(kind), BuildConfig())
    denoiser = profiles[family_of(model_of(kind)).denoiser]
    assert denoiser["encoder_hidden_states"].max[1] == tokens


def test_an_engine_of_packed_latents_takes_their_tokens(model_of: Callable[[str], Path]) -> None:
    config = BuildConfig(batch=ShapeRange(min=1, opt=1, max=2), height=ShapeRange(min=16, opt=16, max=32))
    denoiser = component_profiles(model_of("flux-dev"), config)["transformer"]
    assert (denoiser["hidden_states"].min, denoiser["hidden_states"].max) == ((1, 16, 16), (2, 32, 16))
    assert denoiser["img_ids"].max == (32, 3)


def test_text_embeddings_of_one_length_leave_instructions_room(model_of: Callable[[str], Path]) -> None:
    own = ShapeRange(min=300, opt=300, max=300)
    profiles = component_profiles(model_of("sana"), BuildConfig(sequence=own))
    ids, told = profiles["text_encoder"]["input_ids"], profiles["transformer"]["encoder_hidden_states"]
    assert (ids.min[1], ids.max[1]) == (LONG_TEXT.min, LONG_TEXT.max)
    assert (told.min[1], told.max[1]) == (300, 300)

"""Small models of real classes: what the exporter must cope with, in seconds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from quest_deploy.export.graph import component_graph
from quest_deploy.model.components import Denoiser, parameters_frozen
from quest_deploy.model.spec import ComponentSpec, TensorSpec
from quest_deploy.quantize.affine import minmax_grid, minmax_weight_scale
from quest_deploy.quantize.insert import (
    LayerQParams,
    channel_axis,
    insert,
    quantizable_layers,
    quantized_layers,
)
from quest_deploy.quantize.layers import TimestepContext

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


@dataclass(frozen=True)
class Exported:
    """A torch module and the ONNX model made from it."""

    module: nn.Module
    spec: ComponentSpec
    proto: onnx.ModelProto


def run_onnx(
    model: onnx.ModelProto, inputs: Mapping[str, Tensor], *, optimize: bool = True
) -> dict[str, np.ndarray]:
    """Outputs of `model` in ONNX Runtime, by name."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    return dict(zip(names, values, strict=True))


def snr_db(expected: np.ndarray, got: np.ndarray) -> float:
    """Signal-to-noise ratio of `got` in dB."""
    noise = float(np.square(expected.astype(np.float64) - got).sum())
    return float("inf") if noise == 0 else 10 * np.log10(float(np.square(expected).sum()) / noise)


def unet_spec(channels: int = 4, text: int = 8) -> ComponentSpec:
    """The specification of :data:`UNET`."""
    latents = TensorSpec(name="sample", dtype="float32", shape=("batch", channels, "height", "width"))
    return ComponentSpec(
        name="unet",
        inputs=(
            latents,
            TensorSpec(name="timestep", dtype="float32", shape=("steps",)),
            TensorSpec(name="encoder_hidden_states", dtype="float32", shape=("batch", "sequence", text)),
        ),
        outputs=(TensorSpec(name="out_sample", dtype="float32", shape=latents.shape),),
    )


def unet_inputs(batch: int, steps: int, height: int, width: int, sequence: int) -> dict[str, Tensor]:
    """Random inputs of :data:`UNET`."""
    return {
        "sample": torch.randn(batch, 4, height, width),
        "timestep": torch.linspace(3, 990, steps),
        "encoder_hidden_states": torch.randn(batch, sequence, 8),
    }


def tiny_unet() -> nn.Module:
    """A U-Net with random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return parameters_frozen(UNet2DConditionModel(**UNET))


@torch.no_grad()
def quantize_unet(unet: nn.Module, weight_bits: int, activation_bits: int) -> nn.Module:
    """`unet` with every layer quantized and frozen, scales by timestep group."""
    seen: dict[str, Tensor] = {}
    layers = quantizable_layers(unet)

    def keep(name: str, axis: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: seen.update({name: args[0].movedim(axis, -1).flatten(0, -2)})

    handles = [
        layer.register_forward_pre_hook(keep(name, channel_axis(layer))) for name, layer in layers.items()
    ]
    Denoiser(unet, unet_spec())(*unet_inputs(2, 2, 8, 8, 5).values())
    for handle in handles:
        handle.remove()
    qparams = {}
    for name, layer in layers.items():
        grid = minmax_grid(seen[name], activation_bits)
        qparams[name] = LayerQParams(
            weight_bits=weight_bits,
            weight_scale=minmax_weight_scale(layer.weight, weight_bits),
            activation_bits=activation_bits,
            group_scale=grid.scale * torch.tensor([1.0, 1.3, 0.9]),
            qmin=grid.qmin,
            qmax=grid.qmax,
        )
    insert(unet, qparams, TimestepContext(boundaries=torch.tensor([300.0, 700.0])))
    for layer in quantized_layers(unet).values():
        layer.freeze()
    return unet


def _exported(unet: nn.Module) -> Exported:
    spec = unet_spec()
    module = parameters_frozen(Denoiser(unet, spec))
    graph = component_graph(module, spec, granularity=2, opset=21, target="onnxruntime")
    return Exported(module, spec, ir.to_proto(graph))


@pytest.fixture(scope="session")
def float_unet() -> Exported:
    """The U-Net in full precision."""
    return _exported(tiny_unet())


@pytest.fixture(scope="session")
def w4a4_unet() -> Exported:
    """The U-Net at W4A4, for ONNX Runtime."""
    return _exported(quantize_unet(tiny_unet(), 4, 4))


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory, reference_model: Path) -> Path:
    """A diffusers directory of a few thousand weights; tokenizer and scheduler are the reference model's."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(reference_model / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        mid_block_add_attention=False,
    )
    pipeline = StableDiffusionPipeline(
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=tiny_unet(),
        vae=vae,
        scheduler=DDIMScheduler.from_pretrained(reference_model / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    path = tmp_path_factory.mktemp("model") / "tiny"
    pipeline.save_pretrained(path)
    shutil.copyfile(reference_model.parent.parent / "LICENSE", path / "LICENSE")
    (path / "README.md").write_text("# A model card\n")
    return path

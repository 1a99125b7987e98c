"""Time-embedding tables of models that read no text, and refusals where a time path has other inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from quest_deploy.config import ExportConfig, FinetuneConfig, GenerateConfig, ParityConfig
from quest_deploy.errors import ConfigError
from quest_deploy.export.to_onnx import export
from quest_deploy.model.load import LoadedModel
from quest_deploy.parity import compare
from quest_deploy.pipeline import generate
from quest_deploy.quantize.checkpoint import load_checkpoint
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.recipe import recipe_from_dict
from quest_deploy.quantize.tables import check_tables, time_tables
from quest_deploy.quantize.trace import trace

# What the time path of each kind depends on beside the timestep.
CONDITIONS = {
    "dit": "class_labels",
    "class-unet": "class_labels",
    "sdxl": "text_embeds, time_ids",
    "lcm": "timestep_cond",
    "flux-dev": "guidance, pooled_projections",
    "sd3": "pooled_projections",
    "pixart-sized": "aspect_ratio, resolution",
}
RECIPE = recipe_from_dict(
    {
        "name": "table",
        "weight_bits": 4,
        "activation_bits": 8,
        "calibration_prompts": 2,
        "validation_prompts": 1,
        "calibration_steps": 3,
        "initializer": "nearest",
        "temporal_path": "table",
        "temporal": {"layers": "temporal", "steps": 2, "batch_size": 2},
        "sensitive": {"layers": "all", "steps": 2, "batch_size": 2},
    }
)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["ddpm", "ldm"])
def test_an_unconditional_model_with_tables_is_the_same_in_onnx_runtime(
    kind: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model, checkpoint, exported = model_of(kind), tmp_path / "checkpoint", tmp_path / "onnx"
    finetune(model, checkpoint, FinetuneConfig(recipe=RECIPE))
    tables = time_tables(load_checkpoint(checkpoint).denoiser)
    assert tables and all(table.table.shape[0] == 3 for table in tables.values())
    export(checkpoint, exported, ExportConfig(target="onnxruntime"))
    operators = {node.op_type for node in onnx.load(exported / "unet" / "model.onnx").graph.node}
    assert not operators & {"Sin", "Cos"}
    # Two steps where three were recorded, so that one lies between knots.
    result = compare(
        model, exported, tmp_path / "parity", ParityConfig(num_prompts=2, steps=2), via=(checkpoint,)
    )
    gates = {gate.quantity: gate for gate in result.gates if gate.rung == "onnx"}
    assert gates["int8 codes that differ"].passed and gates["noise SNR, same codes"].passed
    images = generate(exported, tmp_path / "images", GenerateConfig(num_images=2, steps=2))
    assert len([name for name in images.manifest.files if name.startswith("image-")]) == 2


@pytest.mark.parametrize("kind", ["ddpm", "ldm", "sd2", "inpaint", "controlnet", "pixart-sigma"])
def test_a_time_path_of_the_timestep_alone_can_be_a_table(
    kind: str, loaded: Callable[[str], LoadedModel]
) -> None:
    check_tables(trace(loaded(kind)), RECIPE)


@pytest.mark.parametrize("kind", CONDITIONS)
def test_a_time_path_with_other_inputs_is_refused_by_their_names(
    kind: str, loaded: Callable[[str], LoadedModel]
) -> None:
    wanted = rf"depend on {CONDITIONS[kind]} as well, expected the timestep alone; leave temporal_path out"
    with pytest.raises(ConfigError, match=wanted):
        check_tables(trace(loaded(kind)), RECIPE)


def test_the_refusal_comes_before_anything_is_written(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="temporal_path is table"):
        finetune(model_of("dit"), tmp_path / "out", FinetuneConfig(recipe=RECIPE))
    assert not (tmp_path / "out").exists()

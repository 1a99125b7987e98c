"""The export stage: a model or a quantized checkpoint -> a directory of ONNX files."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from torch import nn

from quest_deploy.artifacts import (
    Artifact,
    artifact_digest,
    hash_directory,
    read_artifact,
    stage_of,
    write_artifact,
    write_json,
)
from quest_deploy.config import ExportConfig, ProgressEvent, to_dict
from quest_deploy.errors import ExportError
from quest_deploy.export.check import GraphSummary, check_file
from quest_deploy.export.fragile import Arrays, Report, fragile_nodes, sample_inputs
from quest_deploy.export.graph import component_graph
from quest_deploy.files import copy_tree
from quest_deploy.manifest import QUANTIZATION_NAME
from quest_deploy.model.carried import copy_notices, copy_safety, index_of_carried
from quest_deploy.model.components import runs
from quest_deploy.model.families import VAE_DECODER
from quest_deploy.model.load import LoadedModel, load_model, wrap_components
from quest_deploy.model.merged import merged_details
from quest_deploy.model.spec import (
    ComponentSpec,
    config_paths,
    decoder_granularity,
    family_of,
    latent_granularity,
    read_config,
)
from quest_deploy.quantize.weight_only import drop_activation_quantizers

if TYPE_CHECKING:
    from quest_deploy.quantize.layers import QuantizedLayer

logger = logging.getLogger(__name__)

Progress = Callable[[ProgressEvent], None]

STAGE = "onnx"
MODEL_FILE = "model.onnx"
EXTERNAL_DATA_FILE = "model.onnx_data"
# protobuf ends at 2 GB; but checking a file holds it several times, and without its weights it is small.
INLINE_LIMIT_BYTES = 50_000_000
INT4_BITS = 4
INDEX = "model_index.json"


def export(
    source: Path,
    output: Path,
    config: ExportConfig,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Write every component (text encoder, denoiser, VAE decoder) as ONNX, in optimum-onnx's layout.

    Args:
        source: A diffusers model (mode "none") or a checkpoint of `finetune` (mode "int8").
        output: The directory to make.
        config: Target, mode and operator set.
        progress: Told after each component.
        overwrite: Replace an existing ONNX directory.

    Raises:
        ArtifactError: `source` or `output` cannot be used.
        ExportError: mode and source do not go together, or a component cannot be exported.
    """
    source, output = Path(source), Path(output)
    stage = check_mode(source, config)
    checkpoint = None if stage == "model" else read_artifact(source, stage=stage)
    digest = hash_directory(source) if checkpoint is None else checkpoint.digest
    with write_artifact(
        output,
        stage=STAGE,
        config=to_dict(config),
        inputs={"source": digest},
        sources={"source": (source, hash_directory if checkpoint is None else artifact_digest)},
        overwrite=overwrite,
    ) as writer:
        model = load_source(source, config)
        specs = model.specs
        modules = wrap_components(model)
        denoiser, vae = model.denoiser, model.vae
        granularities = {model.family.denoiser: latent_granularity(config_of(denoiser))}
        if model.family.controlnet is not None:
            granularities[model.family.controlnet] = granularities[model.family.denoiser]
        if vae is not None:
            granularities[VAE_DECODER] = decoder_granularity(config_of(vae))
        components: dict[str, Any] = {}
        samples = {} if config.dtype == "fp32" else sample_inputs(model)
        for done, (name, spec) in enumerate(specs.items()):
            _report(progress, "export", done, len(specs), name)
            quantized, weight_only = (
                quantized_layer_names(modules[name]),
                weight_only_layer_names(modules[name]),
            )
            summary, fragile = export_component(
                modules[name],
                spec,
                writer.path / name / MODEL_FILE,
                config,
                granularity=granularities.get(name, 1),
                quantized_layers=len(quantized),
                weight_only_layers=len(weight_only),
                samples=samples.get(name, ()),
                progress=progress,
            )
            logger.info("%s: %d nodes, %d bytes", name, summary.nodes, summary.size_bytes)
            components[name] = {
                **asdict(summary),
                "quantized_layers": quantized,
                "weight_only_layers": weight_only,
                "float32_nodes": {node: known(snr) for node, snr in fragile.items()},
            }
        copy_configuration(model.path, writer.path)
        writer.details.update({} if checkpoint is None else merged_details(checkpoint.manifest))
        writer.details.update(
            components=components,
            opset=max(component["opset"] for component in components.values()),
            target=config.target,
            lowering=config.mode,
            dtype=config.dtype,
        )
        _report(progress, "export", len(specs), len(specs), "done")
    return read_artifact(output, stage=STAGE)


def config_of(module: nn.Module) -> Any:
    """The configuration of a module of diffusers."""
    return module.config


def export_component(
    module: nn.Module,
    spec: ComponentSpec,
    path: Path,
    config: ExportConfig,
    *,
    granularity: int,
    quantized_layers: int,
    weight_only_layers: int = 0,
    samples: Sequence[Arrays] = (),
    progress: Progress | None = None,
) -> tuple[GraphSummary, dict[str, float]]:
    """Export one component to `path` and check the result.

    Args:
        module: The component.
        spec: Its inputs and outputs.
        path: Of the file.
        config: Target, operator set and type of the float operators.
        granularity: What latent height and width are multiples of.
        quantized_layers: How many products must be quantized.
        weight_only_layers: How many must have quantized weights alone.
        samples: What the component is given, by which its fragile operators are found; not needed in fp32.
        progress: Told of operators that were tried, and of weights that were written.

    Returns:
        What is in the file; and the nodes that stayed in float32, with the dB that each would have had otherwise.
    """
    fragile: dict[str, float] = {}

    def find_fragile(model: ir.Model) -> dict[str, float]:
        if not samples:
            logger.warning("%s: not run by sampling, so which operators need float32 is not known", spec.name)
            return fragile
        report = partial(_report, progress, f"try operators of {spec.name}")
        fragile.update(fragile_nodes(model, samples, config.dtype, report=report))
        return fragile

    _report(progress, f"trace {spec.name}", 0, 1)
    graph = component_graph(
        module,
        spec,
        granularity=granularity,
        opset=config.opset,
        target=config.target,
        dtype=config.dtype,
        fragile=find_fragile,
    )
    _report(progress, f"trace {spec.name}", 1, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(graph, path, report=partial(_report, progress, f"write {spec.name}"))
    opset = graph.opset_imports[""]
    summary = check_file(
        path, spec, opset=opset, quantized_layers=quantized_layers, weight_only_layers=weight_only_layers
    )
    return summary, fragile


def known(snr_db: float) -> float | None:
    """A figure as JSON has it: None for what overflows."""
    return round(snr_db, 1) if math.isfinite(snr_db) else None


def save(
    model: ir.Model,
    path: Path,
    *,
    inline_limit_bytes: int | None = None,
    report: Report = lambda done, total: None,
) -> None:
    """Write `model`; weights of more than a limit in total go to a file next to it, one after the other.

    Args:
        model: With weights that are read when they are written, or not.
        path: Of the ``.onnx`` file.
        inline_limit_bytes: That limit; None for :data:`INLINE_LIMIT_BYTES`.
        report: Called with how many weights were written to the other file, and their number.
    """
    limit = INLINE_LIMIT_BYTES if inline_limit_bytes is None else inline_limit_bytes
    weights = (value.const_value for value in model.graph.initializers.values())
    size_bytes = sum(weight.nbytes for weight in weights if weight is not None)
    external = EXTERNAL_DATA_FILE if size_bytes > limit else None
    ir.save(
        model,
        path,
        external_data=external,
        callback=None if external is None else lambda tensor, info: report(info.index + 1, info.total),
    )


def quantized_layer_names(module: nn.Module) -> list[str]:
    """Paths of the layers of a component with weights and activations quantized, and of its quantized attentions."""
    from quest_deploy.quantize.attention import quantized_attentions
    from quest_deploy.quantize.layers import ActivationQuantizer

    layers = [
        name
        for name, layer in _quantized_layers(module).items()
        if isinstance(layer.quantizer, ActivationQuantizer)
    ]
    return layers + [
        f"{name}.{product}"
        for name, attention in quantized_attentions(module).items()
        for product in attention.products()
    ]


def weight_only_layer_names(module: nn.Module) -> list[str]:
    """Paths of the layers of a component with quantized weights and float activations."""
    from quest_deploy.quantize.layers import ActivationQuantizer

    return [
        name
        for name, layer in _quantized_layers(module).items()
        if not isinstance(layer.quantizer, ActivationQuantizer)
    ]


def _quantized_layers(module: nn.Module) -> dict[str, QuantizedLayer]:
    """Those that a component runs."""
    from quest_deploy.quantize.insert import quantized_layers

    return {name: layer for name, layer in quantized_layers(module).items() if runs(module, name)}


def copy_configuration(source: Path, output: Path) -> None:
    """Copy what makes an ONNX directory self-contained: configurations, tokenizer, safety checker, licence."""
    for folder in family_of(source).companions:
        copy_tree(source / folder, output / folder)
    index = read_config(source / INDEX)
    carried = copy_safety(source, output, index)
    write_json(output / INDEX, index_of_carried(index, carried))
    copy_notices(source, output)
    if (source / QUANTIZATION_NAME).is_file():
        shutil.copyfile(source / QUANTIZATION_NAME, output / QUANTIZATION_NAME)
    for name, path in config_paths(source).items():
        (output / name).mkdir(exist_ok=True)
        shutil.copyfile(path, output / name / "config.json")


def check_mode(source: Path, config: ExportConfig) -> str:
    """The stage of `source`.

    Raises:
        ArtifactError: `source` cannot be used.
        ExportError: it is neither a model nor a checkpoint, or does not go with the mode.
    """
    stage = stage_of(source)
    if stage not in ("model", "checkpoint"):
        raise ExportError(
            f"{source}: got an artifact of stage '{stage}', expected a diffusers model or a checkpoint; "
            "give the directory that `quest-deploy finetune` wrote"
        )
    if config.mode != "none" and stage == "model":
        raise ExportError(
            f"{source}: got a model without quantizers, mode '{config.mode}' expects a checkpoint; "
            "run `quest-deploy finetune` first, or export in full precision with --mode none"
        )
    if config.mode == "none" and stage == "checkpoint":
        raise ExportError(
            f"{source}: got a quantized checkpoint, mode 'none' expects the full-precision model; "
            "export the model that it was made from, or use --mode int8"
        )
    return stage


def load_source(source: Path, config: ExportConfig) -> LoadedModel:
    """What is exported, with large weights left in their files.

    Raises:
        ArtifactError: `source` cannot be used.
        ExportError: mode and source do not go together.
    """
    if check_mode(source, config) == "model":
        return load_model(source, deferred=True)
    from quest_deploy.quantize.checkpoint import load_checkpoint
    from quest_deploy.quantize.insert import quantized_layers

    model = load_checkpoint(source, deferred=True)
    if config.mode == "int4-weight-only":
        if not any(layer.weight_bits == INT4_BITS for layer in quantized_layers(model.denoiser).values()):
            logger.warning(
                "no weight of %s has 4 bits, so that int4-weight-only stores all of them in 8; finetune with "
                "weight_bits: 4 for less",
                source,
            )
        drop_activation_quantizers(model.denoiser)
    return model


def _report(progress: Progress | None, stage: str, completed: int, total: int, message: str = "") -> None:
    if progress is not None:
        progress(ProgressEvent(stage=stage, completed=completed, total=total, message=message))

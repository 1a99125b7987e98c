"""A quantized checkpoint on disk: a diffusers directory whose denoiser is codes and scales.

``quest.json`` says what each layer is, and each operand of a quantized attention; ``quest.safetensors`` in the
denoiser's folder holds, by layer name, ``codes`` (two to a byte for 4 bits), ``weight_scale`` [c_out],
``bias`` [c_out], ``group_scale`` [G] and ``row`` [c_in], by operand ``group_scale``, and under ``rest.`` every tensor
of the denoiser that is not quantized. Time-embedding tables are among those; ``quest.json`` has their ``knots``, and
``ties`` of tensors to others that are the same. A quantized text encoder or autoencoder is stored in the same way.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quest_deploy.artifacts import read_artifact
from quest_deploy.config import Recipe, to_dict
from quest_deploy.errors import ArtifactError, CalibrationError, StaleArtifactError
from quest_deploy.files import give_usual_mode, read_json, write_json
from quest_deploy.manifest import QUANTIZATION_NAME
from quest_deploy.model.carried import copy_notices, copy_part, copy_safety
from quest_deploy.model.components import parameters_frozen
from quest_deploy.model.deferred import DEFERRED_BYTES, META, StoredFile, defer, fill
from quest_deploy.model.families import DIFFUSERS, TRANSFORMERS
from quest_deploy.model.load import LoadedModel, load_directory
from quest_deploy.model.spec import family_of
from quest_deploy.quantize.attention import OperandQParams, insert_attention, operand_quantizers
from quest_deploy.quantize.context import Knots
from quest_deploy.quantize.insert import LayerQParams, insert, quantized_layers, replace_layers
from quest_deploy.quantize.layers import ActivationQuantizer, QuantizedLayer, TimestepContext
from quest_deploy.quantize.pack import pack_int4, unpack_int4
from quest_deploy.quantize.static import BITS, static_context
from quest_deploy.quantize.structure import rebuild, structure
from quest_deploy.quantize.tables import place_tables, time_tables, unused_layers

SCHEMA_VERSION = 4
# Version 1 had no quantized attention, split layers or quantized companions; 2 no time tables; 3 no rotated layers.
READABLE_VERSIONS = (1, 2, 3, SCHEMA_VERSION)
WEIGHTS = "quest.safetensors"
REST = "rest."
MALFORMED = (AttributeError, RuntimeError, TypeError, ValueError)
LIBRARIES = (DIFFUSERS, TRANSFORMERS)


def freeze(denoiser: nn.Module) -> None:
    """Turn every quantized layer into its codes and tables."""
    for layer in quantized_layers(denoiser).values():
        if not layer.frozen:
            layer.freeze()
    for quantizer in operand_quantizers(denoiser).values():
        if not quantizer.frozen:
            quantizer.freeze()


def layer_tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    """What is stored of one frozen layer."""
    codes = layer.weight_codes()
    tensors: dict[str, Tensor] = {
        "codes": pack_int4(codes) if layer.weight_bits == 4 else codes,
        "weight_scale": layer.weight_scale(),
    }
    if layer.bias is not None:
        tensors["bias"] = layer.bias.detach()
    if layer.quantizer is not None:
        # Copies: layers that read one tensor may share the quantizer, and safetensors stores no tensor twice.
        tensors["group_scale"] = layer.quantizer.group_scale().clone()
        if layer.quantizer.row is not None:
            tensors["row"] = layer.quantizer.row.clone()
    return tensors


def describe_layer(layer: QuantizedLayer, activation_bits: int) -> dict[str, Any]:
    """The entry of one layer in ``quest.json``."""
    quantizer = layer.quantizer
    return {
        "kind": type(layer).__name__.removeprefix("Quantized"),
        "shape": list(layer.weight_codes().shape),
        "weight_bits": layer.weight_bits,
        "activation_bits": None if quantizer is None else activation_bits,
        "qmin": None if quantizer is None else quantizer.qmin,
        "qmax": None if quantizer is None else quantizer.qmax,
        "groups": 0 if quantizer is None else quantizer.num_groups,
        "channel_wise": quantizer is not None and quantizer.row is not None,
    }


def describe_operand(quantizer: ActivationQuantizer) -> dict[str, Any]:
    """The entry of one operand of a quantized attention in ``quest.json``."""
    return {"qmin": quantizer.qmin, "qmax": quantizer.qmax, "groups": quantizer.num_groups}


def save_checkpoint(
    folder: Path,
    model: LoadedModel,
    denoiser: nn.Module,
    *,
    recipe: Recipe,
    activation_bits: dict[str, int],
    context: TimestepContext,
    history: dict[str, Any],
    companions: Mapping[str, nn.Module] = MappingProxyType({}),
) -> None:
    """Write everything but the manifest into `folder`.

    Args:
        folder: An empty directory.
        model: The full-precision model, whose other components are copied.
        denoiser: Frozen quantized denoiser.
        recipe: What was done.
        activation_bits: By layer name.
        context: The timestep groups.
        history: Losses, for people to read.
        companions: Text encoder and autoencoder where they are quantized (and frozen), by folder.
    """
    layers, operands = quantized_layers(denoiser), operand_quantizers(denoiser)
    for name, part in parts(model).items():
        source = model.path / name
        if name == model.family.denoiser:
            write_component(folder / name, denoiser)
        elif name in companions:
            write_component(folder / name, companions[name])
        elif source.is_dir() and name not in model.changed:
            copy_part(source, folder / name, model.family.library_of(name))
        else:
            part.save_pretrained(folder / name)
    index = model_index(model)
    if carried := copy_safety(model.path, folder, model.index):
        index |= {**carried, "requires_safety_checker": model.index.get("requires_safety_checker", True)}
    write_json(folder / "model_index.json", index)
    write_json(
        folder / QUANTIZATION_NAME,
        {
            "schema_version": SCHEMA_VERSION,
            "method": "QuEST, arXiv 2402.03666",
            "recipe": to_dict(recipe),
            "boundaries": context.boundaries.tolist(),
            "layers": {name: describe_layer(layer, activation_bits[name]) for name, layer in layers.items()},
            **structure(denoiser),
            "ties": tied(denoiser),
            **_describe_tables(denoiser, context),
            "attention": {name: describe_operand(operand) for name, operand in operands.items()},
            "companions": {name: _describe_companion(module) for name, module in companions.items()},
            "history": history,
        },
    )
    copy_notices(model.path, folder)


def other_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that belong to no quantized layer or operand, by name."""
    inside = tuple(f"{name}." for name in (*quantized_layers(module), *operand_quantizers(module)))
    return {name: value for name, value in module.state_dict().items() if not name.startswith(inside)}


def tied(module: nn.Module) -> dict[str, str]:
    """Which of :func:`other_tensors` is another one before it, as T5's embeddings are: that one's name, by its own."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    others, first = parameters.keys() & other_tensors(module).keys(), dict[int, str]()
    names = {name: first.setdefault(id(one), name) for name, one in parameters.items() if name in others}
    return {name: known for name, known in names.items() if known != name}


def write_component(folder: Path, module: nn.Module) -> None:
    """Write the configuration of a component whose quantized layers are frozen, and all of its tensors."""
    tensors: dict[str, Tensor] = {}
    for name, layer in quantized_layers(module).items():
        tensors.update({f"{name}.{key}": value for key, value in layer_tensors(layer).items()})
    operands = operand_quantizers(module)
    tensors.update({f"{name}.group_scale": operand.group_scale() for name, operand in operands.items()})
    ties = tied(module)
    tensors |= {f"{REST}{name}": value for name, value in other_tensors(module).items() if name not in ties}
    settings: Any = module.config
    config = settings.to_dict() if hasattr(settings, "to_dict") else settings
    folder.mkdir()
    # Both libraries add where the model was loaded from, which would make the bytes depend on it.
    config = {key: value for key, value in config.items() if key != "_name_or_path"}
    write_json(folder / "config.json", config)
    save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, folder / WEIGHTS)
    give_usual_mode(folder / WEIGHTS)


def _describe_companion(module: nn.Module) -> dict[str, Any]:
    layers = quantized_layers(module).items()
    return {"layers": {name: describe_layer(layer, BITS) for name, layer in layers}, "ties": tied(module)}


def _describe_tables(denoiser: nn.Module, context: TimestepContext) -> dict[str, Any]:
    return {
        "knots": None if context.knots is None else context.knots.timesteps.tolist(),
        "tables": {name: list(table.table.shape) for name, table in time_tables(denoiser).items()},
        "unused": unused_layers(denoiser),
    }


def parts(model: LoadedModel) -> dict[str, Any]:
    """Everything of a pipeline that has a folder of its own, by folder."""
    family = model.family
    found = {family.denoiser: model.denoiser, "scheduler": model.scheduler}
    if family.controlnet is not None:
        found[family.controlnet] = model.controlnet
    if family.autoencoder is not None:
        found[family.autoencoder] = model.vae
    for part in family.text:
        found |= {part.name: model.text_encoders[part.name], part.tokenizer: model.tokenizers[part.name]}
    return found


def model_index(model: LoadedModel) -> dict[str, Any]:
    """``model_index.json`` of a pipeline with the model's components; no safety checker is among them."""
    family = model.family
    index: dict[str, Any] = {"_class_name": family.pipeline}
    text = {name for part in family.text for name in (part.name, part.tokenizer)}
    for name, part in parts(model).items():
        # transformers has the text encoders and their tokenizers.
        index[name] = ["transformers" if name in text else "diffusers", type(part).__name__]
    if family.pipeline == "StableDiffusionPipeline":
        index |= dict.fromkeys(("feature_extractor", "image_encoder", "safety_checker"), [None, None])
        index["requires_safety_checker"] = False
    elif family.has_text:
        # Settings of the pipeline, and text encoders that this model does without.
        left_out = {
            name: value
            for name, value in model.index.items()
            if name not in index and (not isinstance(value, list) or value == [None, None])
        }
        index |= left_out
    if model.classes is not None and model.classes.names:
        labels: dict[str, str] = {}
        for label, number in model.classes.names.items():
            known = labels.get(str(number))
            labels[str(number)] = label if known is None else f"{known}, {label}"
        index["id2label"] = labels
    return index


def load_checkpoint(path: str | Path, *, deferred: bool = False) -> LoadedModel:
    """A checkpoint as a model whose denoiser has frozen quantized layers.

    Args:
        path: The checkpoint.
        deferred: Leave large weights in their files (:mod:`quest_deploy.model.deferred`).

    Raises:
        ArtifactError: the checkpoint is missing or corrupt.
        StaleArtifactError: it was written by another version.
    """
    folder = Path(path)
    read_artifact(folder, stage="checkpoint")
    summary = read_json(folder / QUANTIZATION_NAME)
    if summary.get("schema_version") not in READABLE_VERSIONS:
        raise StaleArtifactError(
            f"{folder / QUANTIZATION_NAME}: got schema version {summary.get('schema_version')}, "
            f"expected {' or '.join(map(str, READABLE_VERSIONS))}; "
            "finetune the model again with this version of quest-deploy"
        )
    try:
        home = folder / family_of(folder).denoiser
        components = {home.name: _denoiser(home, summary, deferred)}
        for name, part in summary.get("companions", {}).items():
            components[name] = _companion(folder, name, part, deferred)
    except (OSError, SafetensorError, CalibrationError, KeyError, *MALFORMED) as error:
        raise ArtifactError(
            f"{folder}: is not a complete checkpoint ({type(error).__name__}: {error}); finetune the model again"
        ) from error
    return load_directory(folder, deferred=deferred, **components)


def _denoiser(home: Path, summary: dict[str, Any], deferred: bool) -> nn.Module:
    import diffusers
    from accelerate import init_empty_weights

    config, tensors = read_json(home / "config.json"), _stored(home, deferred)
    with init_empty_weights(include_buffers=False):
        denoiser: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
    knots = summary.get("knots")
    context = TimestepContext(
        torch.tensor(summary["boundaries"], dtype=torch.float32),
        None if knots is None else Knots(torch.tensor(knots, dtype=torch.float32)),
    )
    rebuild(denoiser, summary)
    entries = summary["layers"]
    insert(denoiser, {name: _qparams(entry, tensors, name) for name, entry in entries.items()}, context)
    tables = {name: torch.zeros(shape) for name, shape in summary.get("tables", {}).items()}
    place_tables(denoiser, tables, summary.get("unused", ()), context)
    operands = summary.get("attention", {})
    insert_attention(
        denoiser, {name: _operand(entry, tensors, name) for name, entry in operands.items()}, context
    )
    return _filled(denoiser, summary, tensors)


def _companion(folder: Path, name: str, part: dict[str, Any], deferred: bool) -> nn.Module:
    """A quantized text encoder or autoencoder."""
    from accelerate import init_empty_weights

    library, class_name = read_json(folder / "model_index.json")[name]
    if library not in LIBRARIES:
        raise ValueError(f"{name!r} is a class of {library!r}, expected one of {' or '.join(LIBRARIES)}")
    kind: Any = getattr(importlib.import_module(library), class_name)
    config = read_json(folder / name / "config.json")
    with init_empty_weights(include_buffers=False):
        if library == "transformers":
            module: nn.Module = kind(kind.config_class.from_dict(config))
        else:
            module = kind.from_config(config)
    tensors = _stored(folder / name, deferred)
    qparams = {layer: _qparams(entry, tensors, layer) for layer, entry in part["layers"].items()}
    replace_layers(module, qparams, static_context())
    return _filled(module, part, tensors)


def _filled(module: nn.Module, part: dict[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """`module`, whose quantizers are in place, with the stored codes, scales and other tensors.

    Args:
        module: Its float tensors are on "meta".
        part: What ``quest.json`` says of it: its layers, and its ties, if any.
        tensors: Of the component; of a :class:`StoredFile`, large ones stay in it.
    """
    ties = part.get("ties", {})
    state = {name: ties.get(name, name) for name in other_tensors(module)}
    rest, needed = {name.removeprefix(REST) for name in tensors if name.startswith(REST)}, {*state.values()}
    missing, unexpected = sorted(needed - rest), sorted(rest - needed)
    if missing or unexpected:
        raise KeyError(f"tensors missing: {missing[:3]}, unexpected: {unexpected[:3]}")
    for name, layer in quantized_layers(module).items():
        _fill_layer(layer, name, part["layers"][name]["shape"], tensors)
    for name, quantizer in operand_quantizers(module).items():
        quantizer.freeze(tensors[f"{name}.group_scale"])
    if isinstance(tensors, StoredFile):
        fill(module, {name: tensors.stored(f"{REST}{stored}") for name, stored in state.items()})
    else:
        found = {name: tensors[f"{REST}{stored}"] for name, stored in state.items()}
        module.load_state_dict(found, strict=False, assign=True)
        for name, stored in ties.items():
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, module.get_parameter(stored))
    return parameters_frozen(module)


def _fill_layer(layer: QuantizedLayer, name: str, shape: list[int], tensors: Mapping[str, Tensor]) -> None:
    key = f"{name}.codes"

    def read() -> Tensor:
        return codes_of(tensors[key])

    def codes_of(stored: Tensor) -> Tensor:
        codes = unpack_int4(stored, shape) if layer.weight_bits == 4 else stored
        if list(codes.shape) != shape:
            raise ValueError(f"{name!r} has codes {list(codes.shape)}, expected {shape}")
        return codes

    if list(layer.weight.shape) != shape:
        raise ValueError(f"{name!r} has codes {shape}, expected {list(layer.weight.shape)}")
    deferred = isinstance(tensors, StoredFile) and math.prod(shape) >= DEFERRED_BYTES
    codes = torch.empty(shape, dtype=torch.int8, device=META) if deferred else read()
    layer.freeze(codes, tensors[f"{name}.weight_scale"], tensors.get(f"{name}.group_scale"))
    if isinstance(tensors, StoredFile) and deferred:
        # Read by a handle of its own, which lets go of the file's pages.
        stored = tensors.stored(key)
        defer(layer, "codes", tuple(shape), torch.int8, lambda: codes_of(stored.read()))
    if layer.bias is not None:
        layer.bias = nn.Parameter(tensors[f"{name}.bias"])


def _stored(folder: Path, deferred: bool) -> Mapping[str, Tensor]:
    file = folder / WEIGHTS
    return StoredFile(file) if deferred else load_file(file)


def _qparams(entry: dict[str, Any], tensors: Mapping[str, Tensor], name: str) -> LayerQParams:
    quantized_input = entry["activation_bits"] is not None
    return LayerQParams(
        weight_bits=entry["weight_bits"],
        weight_scale=tensors[f"{name}.weight_scale"],
        activation_bits=entry["activation_bits"],
        group_scale=tensors[f"{name}.group_scale"] if quantized_input else None,
        qmin=entry["qmin"] if quantized_input else 0,
        qmax=entry["qmax"] if quantized_input else 0,
        row=tensors[f"{name}.row"] if entry["channel_wise"] else None,
    )


def _operand(entry: dict[str, Any], tensors: Mapping[str, Tensor], name: str) -> OperandQParams:
    return OperandQParams(group_scale=tensors[f"{name}.group_scale"], qmin=entry["qmin"], qmax=entry["qmax"])

"""Loads ONNX files of any origin for lint: no weights are read, symbolic dimensions get sizes, shapes are inferred."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import onnx
import onnx.inliner
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import TensorProto

from quest_deploy.errors import ArtifactError, QuestDeployError
from quest_deploy.export.lint.report import Finding
from quest_deploy.export.lint.rules.problem import OPENVINO
from quest_deploy.export.passes.strip_metadata import WITHOUT_INFERENCE
from quest_deploy.model.denoisers import SIDE, is_packed
from quest_deploy.model.families import VAE_DECODER
from quest_deploy.model.spec import (
    component_configs,
    component_specs,
    family_of,
    latent_size,
    token_count,
    vae_scale_factor,
)
from quest_deploy.model.tensors import base_of

logger = logging.getLogger(__name__)

_FIRST_AXIS = "lint/first_axis"
# What other exporters call the dimensions of quest_deploy.model.spec.
ALIASES = {
    "batch_size": "batch",
    "sequence_length": "sequence",
    "height_latent": "height",
    "width_latent": "width",
}


def find_files(path: Path) -> dict[str, Path]:
    """The ONNX file of every component: `path` itself, or those in it and one level below.

    Raises:
        ArtifactError: there is none.
    """
    if path.is_dir():
        files = sorted({*path.glob("*.onnx"), *path.glob("*/*.onnx")})
        if not files:
            raise ArtifactError(
                f"'{path}' holds no .onnx file, nor do its subdirectories; give the directory that "
                "`quest-deploy export` made, or an ONNX file"
            )
        own = Path(os.path.abspath(path)).name
        found: dict[str, Path] = {}
        for file in files:
            relative = file.relative_to(path)
            name = str(relative.with_suffix("")).removesuffix("/model")
            name = own if name == "model" else name
            # Both `unet.onnx` and `unet/model.onnx` may be there.
            found[str(relative) if name in found else name] = file
        return found
    if not path.exists():
        raise ArtifactError(f"'{path}' does not exist; give an ONNX file or a directory with one")
    return {Path(os.path.abspath(path)).parent.name if path.stem == "model" else path.stem: path}


def read_proto(path: Path) -> onnx.ModelProto:
    """Parse a file without its external data.

    Raises:
        ArtifactError: it cannot be read, or is not ONNX.
    """
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise ArtifactError(
            f"'{path}': cannot be read ({error.strerror or error}); check the file and its permissions"
        ) from error
    except (DecodeError, ValueError) as error:
        raise ArtifactError(f"'{path}' is corrupt or no ONNX file; copy or export it again") from error
    # A truncated protobuf can still parse, as any prefix that ends on a field does.
    if not proto.graph.node or not proto.opset_import:
        raise ArtifactError(
            f"'{path}' is corrupt or no ONNX file: it holds {len(proto.graph.node)} nodes and "
            f"{len(proto.opset_import)} operator sets, expected at least one of each; copy or export it again"
        )
    return proto


def written_out(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`proto` without functions of its own, whose products nobody would see; those of another operator set stay."""
    if not proto.functions:
        return proto
    try:
        return onnx.inliner.inline_local_functions(proto)
    except (RuntimeError, ValueError) as error:
        logger.debug("functions are not written out", exc_info=error)
        return proto


def check_functions(
    component: str, proto: onnx.ModelProto, left: onnx.ModelProto, target: str
) -> Iterator[Finding]:
    """Tell of functions that a file defines itself.

    1. OpenVINO reads none: they break.
    2. For other targets, a warning where one could not be written out: what it computes is not looked at.

    Args:
        component: Of the model.
        proto: As the file has it.
        left: With functions written out.
        target: The runtime.
    """
    breaks = target == OPENVINO
    unseen = {(function.domain, function.name) for function in left.functions}
    for function in proto.functions:
        named = f"function '{function.domain}.{function.name}'"
        if breaks:
            what = f"{named} is the file's own, which OpenVINO does not read; write it out with onnx.inliner"
        elif (function.domain, function.name) in unseen:
            what = (
                f"{named} is of another operator set than the graph, so that its products are not looked at; export "
                "it again with one operator set"
            )
        else:
            continue
        yield Finding(
            rule="own-function",
            severity="error" if breaks else "warning",
            breaks=breaks,
            component=component,
            node="",
            message=what,
        )


def to_ir(proto: onnx.ModelProto, path: Path) -> ir.Model:
    """The graph as :mod:`onnx_ir` has it; external data is mapped when somebody reads it.

    Raises:
        ArtifactError: the graph makes no sense.
    """
    try:
        model = ir.from_proto(proto)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ArtifactError(f"'{path}': its graph cannot be read ({first}); export it again") from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    follow_links(model, path.parent)
    return model


def follow_links(model: ir.Model, folder: Path) -> None:
    """Let what lies in `folder` by its name be read where a link leads, in place.

    Runtimes do, and scales and zero-points that cannot be read hide what is wrong with them; :mod:`onnx_ir` refuses
    links out of the folder, and files with several hard links, as copies of some tools are.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and is_named_in(folder, str(tensor.location)):
            value.const_value = ir.ExternalTensor(
                os.path.abspath(folder / tensor.location),
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=str(tensor.name),
            )


def is_named_in(folder: Path, location: str) -> bool:
    """Whether a place of external data lies in `folder` by its name, wherever links lead."""
    return Path(os.path.abspath(folder / location)).is_relative_to(os.path.abspath(folder))


def default_dimensions(root: Path) -> dict[str, int]:
    """Sizes of the symbolic dimensions for one image at the model's own size, as far as its configuration says."""
    sizes = {"batch": 1, "steps": 1}
    configs = {file.parent.name: read_json(file) for file in root.glob("*/config.json")}
    # Of other tools, too: what is written otherwise than here only leaves a size out.
    for name in ("unet", "transformer"):
        if configs.get(name, {}).get("sample_size") is not None:
            with contextlib.suppress(TypeError, ValueError):
                sizes["height"], sizes["width"] = latent_size(configs[name])
    with contextlib.suppress(KeyError, TypeError, ValueError):
        sizes["sequence"] = int(configs["text_encoder"]["max_position_embeddings"])
    decoder = configs.get("vae_decoder", {})
    if "block_out_channels" in decoder and "height" in sizes:
        with contextlib.suppress(TypeError):
            factor = vae_scale_factor(decoder)
            sizes |= {"image_height": factor * sizes["height"], "image_width": factor * sizes["width"]}
    # What is read above does not tell how many tokens a denoiser is told of by several encoders, nor packed latents.
    with contextlib.suppress(QuestDeployError, KeyError, TypeError, ValueError):
        sizes |= pipeline_dimensions(root)
    return {name: size for name, size in sizes.items() if size > 0}


def pipeline_dimensions(root: Path) -> dict[str, int]:
    """Those of a pipeline of a known kind, by the configurations of all its components."""
    family, configs = family_of(root), component_configs(root)
    denoiser, sizes = configs[family.denoiser], {}
    if family.has_text:
        sizes["sequence"] = token_count(family, component_specs(root))
    if is_packed(denoiser):
        sizes["height"], sizes["width"] = height, width = latent_size(denoiser)
        sizes["image_tokens"] = (height // SIDE) * (width // SIDE)
        factor = vae_scale_factor(configs.get(VAE_DECODER))
        sizes |= {"image_height": factor * height, "image_width": factor * width}
    return sizes


def read_json(path: Path) -> dict:
    """A JSON object, or nothing: configuration only helps to count here."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def resolve_shapes(
    proto: onnx.ModelProto, sizes: Mapping[str, int]
) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Put sizes in for symbolic dimensions and infer every shape that follows.

    Returns:
        The model, and the size that was taken for each symbol of its inputs; a symbol that `sizes` lacks counts as 1.
    """
    used: dict[str, int] = {}
    stored = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        for dimension in value.type.tensor_type.shape.dim:
            # Some exporters write -1 for what they leave open.
            known = dimension.HasField("dim_value") and dimension.dim_value >= 0
            if value.name in stored or known:
                continue
            name = dimension.dim_param
            size = size_of(name, sizes)
            if name:
                used[name] = size
            dimension.dim_value = size
    for value in (*proto.graph.value_info, *proto.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in used:
                dimension.dim_value = used[dimension.dim_param]
            elif dimension.dim_param or dimension.dim_value < 0:
                dimension.ClearField("value")
    return infer_shapes(proto), used


def size_of(name: str, sizes: Mapping[str, int]) -> int:
    """The size of a symbol of a graph's inputs, by its own name or the one that it stands for; 1 if nobody knows."""
    if name in sizes:
        return sizes[name]
    base, factor = known_as(name)
    return max(1, int(sizes[base] * factor)) if base in sizes else 1


def known_as(name: str) -> tuple[str, Fraction]:
    """What this package calls a dimension, and how many times as long as that it is."""
    try:
        base, factor = base_of(name)
    except (ValueError, ZeroDivisionError):
        base, factor = name, Fraction(1)
    return ALIASES.get(base, base), factor


def infer_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Every shape that follows from the inputs'.

    onnx forgets shapes in three places, which stand as simpler operators while shapes are inferred:
    GroupNormalization, which it looks at as a composition of other operators, ONNX Runtime's MultiHeadAttention, which
    it does not know, and a Reshape of one number to a vector, which torch puts into computed shapes.
    """
    nodes = proto.graph.node
    kept = {index: copy_of(node) for index, node in enumerate(nodes) if node.op_type in WITHOUT_INFERENCE}
    for index in kept:
        stand_in(nodes[index], "Identity")
    first = inferred(proto)
    numbers = {value.name for value in first.graph.value_info if is_number(value)}
    for index, node in enumerate(nodes):
        if node.op_type == "Reshape" and node.input[0] in numbers:
            kept[index] = copy_of(node)
            stand_in(node, "Unsqueeze", _FIRST_AXIS)
    proto.graph.initializer.append(onnx.helper.make_tensor(_FIRST_AXIS, TensorProto.INT64, [1], [0]))
    result = inferred(proto)
    for index, node in kept.items():
        result.graph.node[index].CopyFrom(node)
    del result.graph.initializer[-1]
    return result


def copy_of(node: onnx.NodeProto) -> onnx.NodeProto:
    """A node of its own."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


def stand_in(node: onnx.NodeProto, op_type: str, *inputs: str) -> None:
    """Make another operator of a node, which keeps its first input and its output."""
    node.op_type, node.domain = op_type, ""
    del node.input[1:], node.attribute[:]
    node.input.extend(inputs)


def inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`proto` with the shapes that onnx infers, or as it is where onnx cannot."""
    try:
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        logger.debug("shape inference failed", exc_info=error)
        return proto


def is_number(value: onnx.ValueInfoProto) -> bool:
    """Whether a value is known to have no dimensions."""
    return value.type.tensor_type.HasField("shape") and not value.type.tensor_type.shape.dim


def check_external_data(component: str, proto: onnx.ModelProto, path: Path, target: str) -> Iterator[Finding]:
    """Find tensors whose data lies in a file that is missing, too short, or outside the model's directory.

    1. Fires once a file, with the first tensor that misses it.
    2. For OpenVINO, a link that leads out of the directory, as in the hub's cache, leads outside.
    3. Must not fire on tensors inside the ONNX file.
    """
    seen: set[str] = set()
    for tensor in proto.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        location = entry.get("location", "")
        if (
            location in seen
            or (problem := data_problem(path.parent, location, entry, links=target != OPENVINO)) is None
        ):
            continue
        seen.add(location)
        yield Finding(
            rule="external-data-missing",
            severity="error",
            breaks=True,
            component=component,
            node="",
            message=f"tensor '{tensor.name}' lies in '{location}', {problem}; copy that file next to '{path.name}'",
        )


def data_problem(folder: Path, location: str, entry: Mapping[str, str], *, links: bool) -> str | None:
    """What is wrong with one reference to external data, where the runtime follows `links` out of the folder or not."""
    file = folder / location
    inside = is_named_in(folder, location) and (links or file.resolve().is_relative_to(folder.resolve()))
    if not location or not inside:
        return "which is not inside the model's directory"
    if not file.is_file():
        return "which does not exist"
    try:
        needed = int(entry.get("offset", "0")) + int(entry.get("length", "0"))
    except ValueError:
        return "at a place that is no number"
    size = file.stat().st_size
    return f"which has {size} bytes where {needed} are needed" if size < needed else None

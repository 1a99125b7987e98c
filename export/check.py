"""What must hold of an ONNX file before anyone trusts it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from quest_deploy.errors import ArtifactError, ExportError
from quest_deploy.export.passes import fuse_attention
from quest_deploy.export.passes.block_int4 import BLOCKS
from quest_deploy.model.spec import ComponentSpec, TensorSpec

STANDARD_DOMAINS = ("", "ai.onnx")
# Beside the standard's operators: FuseAttention's, which OpenVINO and TensorRT for RTX read, too.
OTHER_OPERATORS = {(fuse_attention.DOMAIN, fuse_attention.OPERATOR)}
STORED, COMPUTED = "stored", "computed"
PRODUCTS = ("Conv", "MatMul", "Gemm")
# Of the codes of a gated layer, see SplitGatedLayers.
SECOND_HALF = "/1"
ABSOLUTE_PATH = re.compile(r"(?:^|[\s\"'=:(])(?:/[\w.+-]+){2,}|[A-Za-z]:\\")


@dataclass(frozen=True, kw_only=True)
class GraphSummary:
    """What is in one ONNX file.

    Attributes:
        size_bytes: Of the file and its external data.
        opset: Version of the standard operator set.
        nodes: Number of nodes.
        operators: How many nodes of each operator.
        quantized_products: Conv, MatMul and Gemm whose two operands come from DequantizeLinear.
        weight_only_products: Those whose weight alone does.
        stay_int8: Of those, the layers whose weights are no blocks of INT4, with the reason.
    """

    size_bytes: int
    opset: int
    nodes: int
    operators: dict[str, int]
    quantized_products: int
    weight_only_products: int
    stay_int8: dict[str, str]


def read_onnx(path: Path, *, load_weights: bool = True) -> onnx.ModelProto:
    """Parse an ONNX file.

    Raises:
        ArtifactError: it is missing, truncated or not ONNX.
    """
    try:
        model = onnx.load(str(path), load_external_data=load_weights)
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read ({error.strerror or error}); run `quest-deploy export` again"
        ) from error
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise ArtifactError(
            f"{path}: is corrupt or no ONNX file ({_first_line(error)}); run `quest-deploy export` again"
        ) from error
    # A truncated protobuf can still parse, as any prefix that ends on a field does.
    if not model.graph.node or not model.opset_import:
        raise ArtifactError(
            f"{path}: holds no graph ({path.stat().st_size} bytes), expected an ONNX model; "
            "run `quest-deploy export` again"
        )
    return model


def check_file(
    path: Path,
    spec: ComponentSpec,
    *,
    opset: int | None = None,
    quantized_layers: int | None = None,
    weight_only_layers: int | None = None,
) -> GraphSummary:
    """Check one exported component.

    Args:
        path: The ``.onnx`` file; external data lies next to it.
        spec: The inputs and outputs that it must have.
        opset: The operator set it must use; None accepts any.
        quantized_layers: How many layers' products must be quantized; None accepts any number.
        weight_only_layers: How many must have integer weights and float activations; None accepts any number.

    Raises:
        ArtifactError: the file cannot be parsed.
        ExportError: the graph is not what was asked for.
    """
    model = read_onnx(path, load_weights=False)
    _check_structure(path)
    _check_clean(path, model)
    inferred = _infer(path, model)
    _check_interface(path, "input", inferred.graph.input, spec.inputs)
    _check_interface(path, "output", inferred.graph.output, spec.outputs)
    _check_types_known(path, inferred)
    summary = summarize(path, model)
    if opset is not None and summary.opset != opset:
        raise ExportError(f"{path}: got opset {summary.opset}, expected {opset}; report this")
    # The two products of a gated layer are one layer's.
    halves = gated_layers(model.graph)
    found = summary.quantized_products - halves[False]
    if quantized_layers is not None and found != quantized_layers:
        raise ExportError(
            f"{path}: {found} products are quantized, expected {quantized_layers} "
            "(one for each quantized layer); report this, with the recipe"
        )
    found = summary.weight_only_products - halves[True]
    if weight_only_layers is not None and found != weight_only_layers:
        raise ExportError(
            f"{path}: {found} products have integer weights and float activations, expected "
            f"{weight_only_layers}; report this, with the recipe"
        )
    return summary


def summarize(path: Path, model: onnx.ModelProto) -> GraphSummary:
    """Count what is in `model`, which was read from `path`."""
    files = {path, *(path.parent / name for name in _external_files(model))}
    operators = Counter(node.op_type for node in model.graph.node)
    return GraphSummary(
        size_bytes=sum(file.stat().st_size for file in files),
        opset=max(entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS),
        nodes=len(model.graph.node),
        operators=dict(sorted(operators.items())),
        quantized_products=quantized_products(model.graph),
        weight_only_products=weight_only_products(model.graph),
        stay_int8=stay_int8(model.graph),
    )


def quantized_products(graph: onnx.GraphProto) -> int:
    """How many products read quantized codes on both sides: activations behind QuantizeLinear, weights stored."""
    return sum(None not in sides for _, sides in _products(graph))


def weight_only_products(graph: onnx.GraphProto) -> int:
    """How many products read stored codes as their second operand alone."""
    return sum(sides == (None, STORED) for _, sides in _products(graph))


def gated_layers(graph: onnx.GraphProto) -> dict[bool, int]:
    """How many layers have two products, see SplitGatedLayers; by whether only their weights are quantized."""
    producer = {name: node for node in graph.node for name in node.output}
    halves: Counter[bool] = Counter()
    for node, sides in _products(graph):
        dequantize = _dequantizer(node.input[1], producer)
        if sides[1] != STORED or dequantize is None:
            continue
        halves[sides[0] is None] += _stored(dequantize, producer).endswith(SECOND_HALF)
    return {weight_only: halves[weight_only] for weight_only in (False, True)}


def stay_int8(graph: onnx.GraphProto) -> dict[str, str]:
    """The layers with float activations whose weights are stored as codes of a byte each, and why."""
    producer = {name: node for node in graph.node for name in node.output}
    dims = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    found = {}
    for node, sides in _products(graph):
        dequantize = _dequantizer(node.input[1], producer)
        if sides != (None, STORED) or dequantize is None or _block_size(dequantize):
            continue
        shape = dims.get(_stored(dequantize, producer), [])
        if node.op_type == "Conv":
            reason = "a convolution: runtimes keep INT4 weights of matrix products alone"
        elif len(shape) == 2 and shape[0] % BLOCKS[-1]:
            reason = f"{shape[0]} inputs are no multiple of {BLOCKS[-1]}, the smallest block"
        else:
            reason = "8-bit weights"
        found[node.name.rpartition("/")[0] or node.name] = reason
    return found


def _stored(dequantize: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto]) -> str:
    """The initializer of a weight's codes; packed for ONNX Runtime, they pass a Cast."""
    packed = producer.get(dequantize.input[0])
    return dequantize.input[0] if packed is None else packed.input[0]


def _block_size(dequantize: onnx.NodeProto) -> int:
    return next((int(one.i) for one in dequantize.attribute if one.name == "block_size"), 0)


def _dequantizer(value: str, producer: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The DequantizeLinear behind `value`; in fp16 and bf16 graphs a Cast may stand between, see LowerPrecision."""
    node = producer.get(value)
    if node is not None and node.op_type == "Cast":
        node = producer.get(node.input[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _products(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, tuple[str | None, str | None]]]:
    """Every product, with what lies behind its two operands: stored codes, codes of an activation, or floats (None)."""
    producer = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name for tensor in graph.initializer}

    def codes_behind(value: str) -> str | None:
        node = _dequantizer(value, producer)
        if node is None:
            return None
        source = producer.get(node.input[0])
        if source is None:
            return STORED if node.input[0] in stored else None
        if source.op_type == "Cast" and source.input[0] in stored:
            return STORED
        return COMPUTED if source.op_type == "QuantizeLinear" else None

    for node in graph.node:
        if node.op_type in PRODUCTS:
            yield node, (codes_behind(node.input[0]), codes_behind(node.input[1]))


def _check_structure(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise ExportError(
            f"{path}: onnx.checker refuses it ({_first_line(error)}); export it again, and report this if it persists"
        ) from error


def _check_clean(path: Path, model: onnx.ModelProto) -> None:
    foreign = sorted(
        {
            f"{node.domain}.{node.op_type}"
            for node in model.graph.node
            if node.domain not in STANDARD_DOMAINS and (node.domain, node.op_type) not in OTHER_OPERATORS
        }
    )
    if foreign or model.functions:
        raise ExportError(
            f"{path}: holds {foreign or 'model-local functions'}, expected standard ONNX, and no other operator than "
            f"{', '.join('.'.join(one) for one in sorted(OTHER_OPERATORS))}; report this"
        )
    for text in _texts(model):
        if ABSOLUTE_PATH.search(text):
            raise ExportError(f"{path}: holds an absolute path ({text[:80]!r}), expected none; report this")


def _texts(model: onnx.ModelProto) -> Iterator[str]:
    """Every free text of the model."""
    graph = model.graph
    yield from (model.doc_string, graph.doc_string, graph.name)
    for holder in (
        model,
        graph,
        *graph.node,
        *graph.initializer,
        *graph.input,
        *graph.output,
        *graph.value_info,
    ):
        yield getattr(holder, "doc_string", "")
        yield getattr(holder, "name", "")
        for entry in holder.metadata_props:
            yield f"{entry.key}={entry.value}"
    for tensor in graph.initializer:
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")


def _infer(path: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise ExportError(f"{path}: types do not fit ({_first_line(error)}); report this") from error


def _check_interface(
    path: Path, kind: str, values: list[onnx.ValueInfoProto], tensors: tuple[TensorSpec, ...]
) -> None:
    got = [(value.name, _dtype(value), _shape(value)) for value in values]
    expected = [(tensor.name, tensor.dtype, list(tensor.shape)) for tensor in tensors]
    if got != expected:
        raise ExportError(
            f"{path}: got {kind}s {got}, expected {expected}; export the component again from its own model"
        )


def _check_types_known(path: Path, model: onnx.ModelProto) -> None:
    known = {
        value.name for value in (*model.graph.value_info, *model.graph.output) if _shape(value) is not None
    }
    unknown = sorted(name for node in model.graph.node for name in node.output if name and name not in known)
    if unknown:
        raise ExportError(
            f"{path}: inference finds no type and rank for {len(unknown)} values (first: {unknown[0]!r}); report this"
        )


def _dtype(value: onnx.ValueInfoProto) -> str:
    return (
        TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower().replace("float", "float32")
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
        else TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
    )


def _shape(value: onnx.ValueInfoProto) -> list[int | str] | None:
    tensor = value.type.tensor_type
    if not tensor.elem_type or not tensor.HasField("shape"):
        return None
    return [
        dimension.dim_value if dimension.HasField("dim_value") else dimension.dim_param
        for dimension in tensor.shape.dim
    ]


def _external_files(model: onnx.ModelProto) -> set[str]:
    return {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

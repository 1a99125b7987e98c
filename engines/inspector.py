"""What a built engine is made of: TensorRT's engine inspector as one row for each layer.

The format is that which NVIDIA documents for TensorRT 10 (``Format/Datatype`` of each tensor) and 11 (``Datatype`` and
``Format`` apart). Types and tactics are there only where the engine was built with detailed profiling verbosity;
otherwise layers have names alone. Types of tensors whose sizes are not fixed are there only for a context with shapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quest_deploy.engines.trt_plan import LoadedPlan, Refusal
from quest_deploy.errors import ArtifactError
from quest_deploy.model.spec import ComponentSpec

DataType = Literal["int8", "int4", "fp8", "fp4", "bf16", "fp16", "fp32", "other", "unknown"]

_TYPES: tuple[tuple[str, DataType], ...] = (
    (r"\bint8\b", "int8"),
    (r"\bint4\b", "int4"),
    (r"\b(fp8|float8|e4m3)", "fp8"),
    (r"\b(fp4|float4|e2m1)", "fp4"),
    (r"\b(bf16|bfloat16)\b", "bf16"),
    (r"\b(fp16|half)\b", "fp16"),
    (r"\b(fp32|float)\b", "fp32"),
)
_SOURCE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# Behind the names of what is there for another optimization profile than the first.
_PROFILE = re.compile(r" \[profile \d+\]$")
# What stands for the type of a tensor where shapes are not set.
_NOT_TOLD = "N/A"
# Layers that TensorRT made of whole regions: the types at their edges say nothing about the products inside.
_REGION = re.compile(r"ForeignNode|Myelin", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class EngineLayer:
    """One layer of a built engine.

    Attributes:
        name: TensorRT's own.
        kind: Its type of layer, for example "CaskConvolution"; empty where it is not told.
        precision: The type of its first input, which it multiplies; "unknown" for a region of many operators.
        weights: The type its weights are stored in; "unknown" where it has none or does not tell.
        tactic: The kernel's name; empty where it is not told.
        sources: The ONNX nodes that it computes.
    """

    name: str
    kind: str
    precision: DataType
    weights: DataType
    tactic: str
    sources: tuple[str, ...]


def inspect_plan(plan: LoadedPlan, spec: ComponentSpec) -> tuple[EngineLayer, ...]:
    """The layers of a deserialized engine as it runs the optimal shapes of its first profile.

    Args:
        plan: The engine.
        spec: What it takes and gives.

    Raises:
        ArtifactError: the inspector's answer is not what is documented.
        EngineBuildError: too little memory on the GPU.
        Refusal: TensorRT does not take the shapes.
    """
    assert plan.engine is not None
    context = plan.create_context()
    for tensor in spec.inputs:
        _, best, _ = plan.engine.get_tensor_profile_shape(tensor.name, 0)
        if not context.set_input_shape(tensor.name, tuple(best)):
            raise Refusal(f"TensorRT refused {tensor.name} {list(best)}")
    inspector = plan.engine.create_engine_inspector()
    inspector.execution_context = context
    return parse_layers(inspector.get_engine_information(plan.library.LayerInformationFormat.JSON))


def parse_layers(information: str) -> tuple[EngineLayer, ...]:
    """The inspector's JSON as layers, in the order in which they run.

    Raises:
        ArtifactError: it is no JSON, or holds no list of layers.
    """
    try:
        content = json.loads(information)
    except json.JSONDecodeError as error:
        raise _unknown_format(f"no JSON ({error})") from error
    layers = content.get("Layers") if isinstance(content, dict) else None
    if not isinstance(layers, list):
        raise _unknown_format("JSON without a list of layers")
    return tuple(_parse_layer(layer) for layer in layers)


def _parse_layer(layer: Any) -> EngineLayer:
    if isinstance(layer, str):
        return EngineLayer(
            name=layer, kind="", precision="unknown", weights="unknown", tactic="", sources=_names(layer)
        )
    if not isinstance(layer, dict) or not isinstance(layer.get("Name"), str):
        raise _unknown_format(f"a layer without a name ({str(layer)[:80]})")
    name, kind = layer["Name"], str(layer.get("LayerType", ""))
    weights = layer.get("Weights")
    sources = tuple(dict.fromkeys(_SOURCE.findall(str(layer.get("Metadata", "")))))
    return EngineLayer(
        name=name,
        kind=kind,
        precision="unknown" if _REGION.search(f"{kind} {name}") else _precision(layer.get("Inputs")),
        weights=type_in(str(weights.get("Type", ""))) if isinstance(weights, dict) else "unknown",
        tactic=str(layer.get("TacticName", "")),
        sources=sources or _names(name),
    )


def _names(name: str) -> tuple[str, ...]:
    """The nodes in a layer's own name, which joins those that were fused."""
    return tuple(part.strip() for part in _PROFILE.sub("", name).split(" + "))


def _precision(inputs: Any) -> DataType:
    """The type of the first input; others may be summands that were fused."""
    first = inputs[0] if isinstance(inputs, list) and inputs else None
    return _type_of(first) if isinstance(first, dict) else "unknown"


def _type_of(tensor: Mapping[str, Any]) -> DataType:
    combined = tensor.get("Format/Datatype")
    return type_in(str(combined if combined is not None else tensor.get("Datatype", "")))


def type_in(text: str) -> DataType:
    """The type that a description such as "Row major linear FP16 format" names."""
    if not text or text.startswith(_NOT_TOLD):
        return "unknown"
    for pattern, kind in _TYPES:
        if re.search(pattern, text, re.IGNORECASE):
            return kind
    return "other"


def _unknown_format(what: str) -> ArtifactError:
    return ArtifactError(
        f"TensorRT's engine inspector gave {what}, expected the JSON that NVIDIA documents for TensorRT 10 and 11; "
        "this version is not known yet: report it with the output of `quest-deploy doctor`"
    )

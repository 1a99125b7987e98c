"""ONNX directories that another tool wrote: what their graphs take, fitted to what the pipeline gives.

Exporters agree on names (optimum-onnx's), not on types and ranks: a timestep is a scalar or a vector, an integer or a
float, token ids have 32 or 64 bits, latents 16 or 32. Torch is not imported here.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quest_deploy.artifacts import Artifact
from quest_deploy.errors import ArtifactError
from quest_deploy.model.spec import TIMESTEP, ComponentSpec, TensorSpec, component_specs

logger = logging.getLogger(__name__)

ONNX_NAME = "model.onnx"
FLOATS, INTEGERS = ("float32", "float16", "float64"), ("int64", "int32")
# Nothing reads it of the text encoder of a Stable Diffusion; some exporters leave it out.
OPTIONAL_OUTPUTS = ("pooler_output",)
AGAIN = "export the model again with a dynamic batch and optimum-onnx's names, or with `quest-deploy export`"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """One component of a directory that another tool wrote.

    Attributes:
        spec: What the pipeline gives and takes; a size that the graph fixes is a number.
        graph: What the graph takes and gives, under the same symbols.
    """

    spec: ComponentSpec
    graph: ComponentSpec


def is_foreign(source: Artifact) -> bool:
    """Whether another tool wrote an `onnx` directory."""
    return bool(source.manifest.details.get("foreign"))


def fitted_components(source: Artifact) -> dict[str, Fitted]:
    """The components of an `onnx` directory of another tool, by name; none for one of quest-deploy.

    Raises:
        ArtifactError: a graph is missing, corrupt, or takes something that the pipeline does not give.
    """
    if not is_foreign(source):
        return {}
    found = {}
    for name, spec in component_specs(source.path).items():
        found[name] = fit(spec, read_graph(name, source.path / name / ONNX_NAME))
    logger.info("'%s' has no manifest: read as ONNX of another tool", source.path)
    return found


def read_graph(name: str, path: Path) -> ComponentSpec:
    """What a graph takes and gives, by its own declaration; external data is not read.

    Raises:
        ArtifactError: the file is missing or is not ONNX.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except OSError as error:
        raise ArtifactError(
            f"'{path}': cannot be read ({error.strerror}); a directory needs the graphs of all components"
        ) from error
    except DecodeError as error:
        raise ArtifactError(f"'{path}' is not an ONNX file; copy or export it again") from error
    stored = {tensor.name for tensor in graph.initializer}
    return ComponentSpec(
        name=name,
        inputs=tuple(_declared(value) for value in graph.input if value.name not in stored),
        outputs=tuple(_declared(value) for value in graph.output),
    )


def _declared(value: Any) -> TensorSpec:
    import onnx

    kind = value.type.tensor_type
    name = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
    shape = tuple(size.dim_value or size.dim_param or "?" for size in kind.shape.dim)
    return TensorSpec(
        name=value.name, dtype={"float": "float32", "double": "float64"}.get(name, name), shape=shape
    )


def fit(spec: ComponentSpec, graph: ComponentSpec) -> Fitted:
    """Match a graph with the component that it is.

    Raises:
        ArtifactError: names the input or output that is missing, unknown, or of a type or shape that does not fit.
    """
    inputs = _matched(spec, graph.inputs, spec.inputs, "input")
    unknown = [tensor for tensor in graph.inputs if tensor.name not in inputs]
    if unknown:
        listed = ", ".join(f"'{tensor.name}' ({_shown(tensor)})" for tensor in unknown)
        raise ArtifactError(
            f"{spec.name}: the graph takes {listed}, which is not understood; expected "
            f"{', '.join(tensor.name for tensor in spec.inputs)}; {AGAIN}"
        )
    outputs = _matched(spec, graph.outputs, spec.outputs, "output")
    return Fitted(
        spec=ComponentSpec(
            name=spec.name,
            inputs=tuple(_fixed(tensor, inputs[tensor.name]) for tensor in spec.inputs),
            outputs=tuple(tensor for tensor in spec.outputs if tensor.name in outputs),
        ),
        graph=ComponentSpec(name=spec.name, inputs=tuple(inputs.values()), outputs=tuple(outputs.values())),
    )


def _matched(
    spec: ComponentSpec, found: Sequence[TensorSpec], wanted: Sequence[TensorSpec], kind: str
) -> dict[str, TensorSpec]:
    """Each of `wanted` as the graph has it, under the symbols of `wanted`."""
    by_name = {tensor.name: tensor for tensor in found}
    matched = {}
    for tensor in wanted:
        got = by_name.get(tensor.name)
        if got is None:
            if kind == "output" and tensor.name in OPTIONAL_OUTPUTS:
                continue
            raise ArtifactError(
                f"{spec.name}: the graph has no {kind} '{tensor.name}', only {', '.join(sorted(by_name))}; {AGAIN}"
            )
        problem = _type_problem(tensor, got) or _shape_problem(tensor, got)
        if problem is not None:
            raise ArtifactError(f"{spec.name} {kind} '{tensor.name}': {problem}; {AGAIN}")
        matched[tensor.name] = dataclasses.replace(got, shape=_shape(tensor, got))
    return matched


def _type_problem(wanted: TensorSpec, got: TensorSpec) -> str | None:
    floats, integers = wanted.dtype in FLOATS, wanted.dtype in INTEGERS
    allowed = (*(FLOATS if floats else ()), *(INTEGERS if integers or wanted.name == TIMESTEP else ()))
    if got.dtype in allowed:
        return None
    return f"the graph has {got.dtype}, expected one of {', '.join(allowed)}"


def _shape_problem(wanted: TensorSpec, got: TensorSpec) -> str | None:
    if wanted.name == TIMESTEP and not got.shape:
        return None
    if len(got.shape) != len(wanted.shape):
        return f"the graph has shape {list(got.shape)}, expected {list(wanted.shape)}"
    for size, expected in zip(got.shape, wanted.shape, strict=True):
        if isinstance(size, int) and (
            expected == "batch" or (isinstance(expected, int) and size != expected)
        ):
            return f"the graph has shape {list(got.shape)}, expected {list(wanted.shape)}"
    return None


def _shape(wanted: TensorSpec, got: TensorSpec) -> tuple[int | str, ...]:
    if not got.shape:
        return ()
    return tuple(
        size if isinstance(size, int) else symbol
        for size, symbol in zip(got.shape, wanted.shape, strict=True)
    )


def _fixed(wanted: TensorSpec, got: TensorSpec) -> TensorSpec:
    """`wanted` with the sizes that the graph fixes; how many timesteps it takes is looked at when it runs."""
    return wanted if wanted.name == TIMESTEP else dataclasses.replace(wanted, shape=got.shape)


def _shown(tensor: TensorSpec) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def to_json(fitted: Mapping[str, Fitted]) -> dict[str, Any]:
    """For the manifest of engines, which hold no graph any more."""
    return {name: dataclasses.asdict(component) for name, component in fitted.items()}


def from_json(content: Mapping[str, Any]) -> dict[str, Fitted]:
    """The inverse of :func:`to_json`."""
    return {
        name: Fitted(spec=_spec_from(component["spec"]), graph=_spec_from(component["graph"]))
        for name, component in content.items()
    }


def _spec_from(content: Mapping[str, Any]) -> ComponentSpec:
    sides = {
        side: tuple(TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in content[side])
        for side in ("inputs", "outputs")
    }
    return ComponentSpec(name=content["name"], **sides)

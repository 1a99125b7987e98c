"""`quest-deploy inspect`: what an artifact or model holds, without running it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quest_deploy.commands.verb import Result, format_size, format_table, verb

if TYPE_CHECKING:
    from quest_deploy.model.spec import TensorSpec

_SHOWN_OPERATORS = 8
_LAYER_KEYS = ("kind", "shape", "weight_bits", "activation_bits", "qmin", "qmax", "groups", "channel_wise")


@click.command(short_help="What an artifact or model holds.")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Hash every file again, also those known to be unchanged.")
@verb()
def inspect(*, path: Path, verify: bool) -> Result:
    """Show what PATH (a model or any artifact) holds: sizes, inputs, outputs, quantizers, operators.

    The hashes of an artifact are verified on the way.
    """
    data = describe(path, verify=verify)
    return Result(data=data, text=render(data))


def describe(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """Everything that `inspect` knows about `path`, as JSON types."""
    from quest_deploy.artifacts import hash_directory, read_artifact, stage_of
    from quest_deploy.manifest import QUANTIZATION_NAME

    stage = stage_of(path)
    data: dict[str, Any] = {"path": str(path), "stage": stage}
    if stage == "model":
        if path.is_file():
            data["tensors"] = count_tensors(path)
        data["digest"] = hash_directory(path)
        files = _sizes(path)
    else:
        artifact = read_artifact(path, verify=verify)
        manifest = artifact.manifest
        files = {name: entry.size_bytes for name, entry in manifest.files.items()}
        data |= {
            "digest": artifact.digest,
            "config": manifest.config,
            "details": manifest.details,
            "inputs": manifest.inputs,
            "tools": manifest.tools,
        }
    data["size_bytes"] = sum(files.values())
    data["files"] = len(files)
    if stage in ("model", "checkpoint", "onnx", "engines") and path.is_dir():
        foreign = stage == "onnx" and bool(data["details"].get("foreign"))
        data["components"] = _components(path, files, exported=stage in ("onnx", "engines"), foreign=foreign)
    if stage == "onnx":
        for name, component in data["components"].items():
            component["graph"] = describe_graph(path / name / "model.onnx")
    if stage == "engines":
        from quest_deploy.engines.run_record import read_runs
        from quest_deploy.engines.up_to_date import PLAN_NAME, check_reports

        check_reports(artifact)
        for name, component in data["components"].items():
            plan = manifest.files[f"{name}/{PLAN_NAME}"]
            component["runs"] = read_runs(path / name, plan.sha256)
    if (path / QUANTIZATION_NAME).is_file():
        data["quantization"] = summarize_layers(path / QUANTIZATION_NAME)
    return data


def count_tensors(path: Path) -> int:
    """How many tensors a safetensors file holds.

    Raises:
        ArtifactError: it is none, or corrupt.
    """
    from safetensors import SafetensorError, safe_open

    from quest_deploy.errors import ArtifactError

    try:
        with safe_open(path, framework="numpy") as stored:
            return len(stored.keys())
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"'{path}' is corrupt or no safetensors file ({error}); copy it anew") from error


def _sizes(path: Path) -> dict[str, int]:
    from quest_deploy.files import is_hidden, list_files

    if path.is_file():
        return {path.name: path.stat().st_size}
    return {
        name: (path / name).stat().st_size for name in list_files(path, follow=True) if not is_hidden(name)
    }


def _components(
    path: Path, files: dict[str, int], *, exported: bool, foreign: bool
) -> dict[str, dict[str, Any]]:
    from quest_deploy.engines.foreign import ONNX_NAME, read_graph
    from quest_deploy.model.spec import component_specs, config_paths

    components = {}
    # Models and checkpoints keep the whole autoencoder in a folder of another name.
    folders = {} if exported else {name: file.parent.name for name, file in config_paths(path).items()}
    for name, spec in component_specs(path).items():
        folder = folders.get(name, name)
        # Other tools choose types and shapes of their own.
        spec = read_graph(name, path / name / ONNX_NAME) if foreign else spec
        components[name] = {
            "size_bytes": sum(size for file, size in files.items() if file.startswith(f"{folder}/")),
            "inputs": [_tensor(tensor) for tensor in spec.inputs],
            "outputs": [_tensor(tensor) for tensor in spec.outputs],
        }
    return components


def _tensor(tensor: TensorSpec) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}


def describe_graph(path: Path) -> dict[str, Any]:
    """Operators, opset and weights by type of an ONNX file; external data is not read.

    Raises:
        ArtifactError: the file is not ONNX.
    """
    import onnx
    from google.protobuf.message import DecodeError

    from quest_deploy.errors import ArtifactError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ArtifactError(
            f"'{path}' is not an ONNX file ({error}); run `quest-deploy export` again"
        ) from error
    weights: Counter[str] = Counter()
    for initializer in model.graph.initializer:
        kind = onnx.TensorProto.DataType.Name(initializer.data_type).lower()
        weights[kind] += math.prod(initializer.dims)
    return {
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "nodes": len(model.graph.node),
        "operators": dict(Counter(node.op_type for node in model.graph.node).most_common()),
        "initializer_elements": dict(weights.most_common()),
    }


def summarize_layers(path: Path) -> dict[str, Any]:
    """How many layers of the denoiser have which bits, and each layer's own, from ``quest.json``.

    Raises:
        ArtifactError: the file is not what `finetune` writes.
    """
    from quest_deploy.artifacts import read_json
    from quest_deploy.errors import ArtifactError

    content = read_json(path)
    try:
        layers = {name: {key: layer[key] for key in _LAYER_KEYS} for name, layer in content["layers"].items()}
        recipe = content["recipe"]["name"]
        groups = len(content["boundaries"]) + 1
        tables = {name: list(shape) for name, shape in content.get("tables", {}).items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"'{path}' does not describe quantized layers ({error!r}); run `quest-deploy finetune` again"
        ) from error
    counts: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    for layer in layers.values():
        name = f"W{layer['weight_bits']}A{layer['activation_bits'] or 'float'}"
        counts[name] += 1
        elements[name] += math.prod(layer["shape"])
    return {
        "recipe": recipe,
        "timestep_groups": groups,
        "layers_by_bits": dict(counts.most_common()),
        "weights_by_bits": {name: elements[name] for name, _ in counts.most_common()},
        "channel_wise_layers": sum(bool(layer["channel_wise"]) for layer in layers.values()),
        "time_tables": tables,
        "layers": layers,
    }


def render(data: dict[str, Any]) -> str:
    """The description as text."""
    blocks = [
        f"{data['path']}: {data['stage']}, {data['files']} files, {format_size(data['size_bytes'])}, "
        f"digest {data['digest'][:12]}"
    ]
    if data.get("config"):
        blocks.append(
            _block("Configuration", [(key, _short(value)) for key, value in data["config"].items()])
        )
    if data.get("components"):
        rows = []
        for name, component in data["components"].items():
            rows.append((name, format_size(component["size_bytes"])))
            rows += [("", f"{tensor['name']} {_shape(tensor)}") for tensor in component["inputs"]]
            rows += [("", f"-> {tensor['name']} {_shape(tensor)}") for tensor in component["outputs"]]
            rows += [("", _run(run)) for run in component.get("runs", ())]
        blocks.append(_block("Components", rows))
        graphs = [(name, item["graph"]) for name, item in data["components"].items() if "graph" in item]
        if graphs:
            blocks.append(_block("Graphs", [(name, *_graph_cells(graph)) for name, graph in graphs]))
    if data.get("quantization"):
        blocks.append(_block("Quantized layers of the denoiser", _quantization_rows(data["quantization"])))
    if data.get("details"):
        blocks.append(_block("Details", [(key, _short(value)) for key, value in data["details"].items()]))
    if data.get("tools"):
        blocks.append("Made with " + ", ".join(f"{name} {number}" for name, number in data["tools"].items()))
    return "\n\n".join(blocks)


def _quantization_rows(quantization: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (name, f"{count} layers", f"{quantization['weights_by_bits'][name]:,} weights")
        for name, count in quantization["layers_by_bits"].items()
    ]
    rows.append(("recipe", quantization["recipe"], f"{quantization['timestep_groups']} timestep groups"))
    if quantization["time_tables"]:
        sizes = quantization["time_tables"].values()
        rows.append(
            (
                "time tables",
                f"{len(sizes)} layers",
                f"{sum(map(math.prod, sizes)):,} values at {next(iter(sizes))[0]} knots",
            )
        )
    if quantization["channel_wise_layers"]:
        rows.append(
            ("channel-wise", f"{quantization['channel_wise_layers']} layers", "one row of scales each")
        )
    return rows


def _block(title: str, rows: Sequence[tuple[str, ...]]) -> str:
    table = format_table(rows).replace("\n", "\n  ")
    return f"{title}\n  {table}"


def _short(value: Any, limit: int = 90) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _shape(tensor: dict[str, Any]) -> str:
    return f"{tensor['dtype']}[{', '.join(map(str, tensor['shape']))}]"


def _run(run: dict[str, str]) -> str:
    return (
        f"ran on {run['gpu']} (compute capability {run['compute_capability']}, driver {run['driver']}) with version "
        f"{run['library_version']}, last {run['date']}"
    )


def _graph_cells(graph: dict[str, Any]) -> tuple[str, str, str]:
    operators = list(graph["operators"].items())
    shown = ", ".join(f"{count} {name}" for name, count in operators[:_SHOWN_OPERATORS])
    rest = f", {len(operators) - _SHOWN_OPERATORS} more kinds" if len(operators) > _SHOWN_OPERATORS else ""
    weights = ", ".join(f"{count:,} {kind}" for kind, count in graph["initializer_elements"].items())
    return f"{graph['nodes']} nodes", shown + rest, f"weights: {weights}"

"""Every architecture in every export mode: what is quantized, how far the runtimes are from torch, what they choose.

The models are those of the tests: the real architectures, with a few thousand random weights. So the shares of
multiply-accumulates are those of small layers, and only the bundled reference model draws anything.
"""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.environment import git, header
from benchmarks.settings import MODEL, Settings, one_update
from benchmarks.stages import PACKAGE, QUANTIZER, identity, made_by
from benchmarks.tables import MISSING, Table, number, yes
from quest_deploy.artifacts import read_json, write_json
from quest_deploy.files import hash_mapping
from quest_deploy.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from quest_deploy.config import ExportConfig

NAME = "modes"
REFERENCE = "reference"
QUICK = ("pixart-alpha",)
PROMPTS, STEPS, GUIDANCE_SCALE = 8, 2, 3.0
# What makes the random models.
MODELS = "tests/families"
# Of rows that do not say.
FORMER_PROMPTS = 2
PRODUCTS = ("Conv", "MatMul", "Gemm", "MultiHeadAttention")
ORT_FUSED = (
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "DynamicQuantizeMatMul",
    "QLinearConv",
    "QLinearMatMul",
    "MultiHeadAttention",
)
OPENVINO_PRODUCTS = ("Convolution", "FullyConnected", "MatMul", "Deconvolution")


@dataclass(frozen=True)
class Variant:
    """An export mode and the type of the float operators."""

    mode: str
    dtype: str

    @property
    def label(self) -> str:
        """As the tables call it."""
        return f"{self.mode}, {self.dtype}"

    def config(self, target: str) -> ExportConfig:
        """The configuration for `target`."""
        from quest_deploy.config import ExportConfig

        return ExportConfig(mode=self.mode, dtype=self.dtype, target=target)  # type: ignore[arg-type]


VARIANTS = (
    Variant("int8", "fp32"),
    Variant("int8", "fp16"),
    Variant("int4-weight-only", "fp32"),
    Variant("none", "fp32"),
)


def run(settings: Settings) -> dict[str, Any]:
    """Export every architecture in every mode; what was measured with this code before is taken as it is."""
    from tests.families import models, text_models

    kinds = QUICK if settings.quick else (REFERENCE, *text_models.TEXT_MAKERS, *models.MAKERS)
    return {**header(settings), "kinds": rows(settings, kinds)}


def rows(settings: Settings, kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A row for each of `kinds` and each mode, with the commit that it was measured at."""
    found: dict[str, dict[str, Any]] = {}
    digest = hash_mapping(made_by((*PACKAGE, MODELS)))
    for kind, variant in itertools.product(kinds, VARIANTS):
        folder = settings.work / NAME / kind
        record = folder / f"{variant.mode}-{variant.dtype}.json"
        known = read_json(record) if record.is_file() else {}
        if known.get("sources") != digest:
            print(f"\n{kind}, {variant.label}", flush=True)
            row = measure(kind, variant, folder)
            known = {"sources": digest, "row": {**row, "commit": git("rev-parse", "HEAD")}}
            write_json(record, known)
        found.setdefault(kind, {})[variant.label] = known["row"]
    return found


def measure_again(settings: Settings, kinds: Sequence[str]) -> None:
    """Replace the rows of some kinds in the result file; the others stay, and the table says so."""
    file = settings.results / f"{NAME}.json"
    result = read_json(file)
    result["kinds"] |= rows(settings, kinds)
    write_json(file, result)


def measure(kind: str, variant: Variant, folder: Path) -> dict[str, Any]:
    """Export one model in one mode for both targets, run what runs here, and build the rest."""
    from quest_deploy.config import ParityConfig
    from quest_deploy.export.lint import lint
    from quest_deploy.export.to_onnx import export
    from quest_deploy.parity import compare

    model = _model(kind, folder)
    checkpoint = _checkpoint(model, folder)
    source = model if variant.mode == "none" else checkpoint
    name = f"{variant.mode}-{variant.dtype}"
    onnx = folder / f"{name}-onnxruntime"
    written = export(source, onnx, variant.config("onnxruntime"), overwrite=True)
    config = ParityConfig(num_prompts=PROMPTS, steps=STEPS, guidance_scale=GUIDANCE_SCALE)
    via = () if variant.mode == "none" else (checkpoint,)
    result = compare(model, onnx, folder / f"{name}-parity", config, via=via, overwrite=True)
    # The last rung is the exported one.
    gates = [gate for gate in result.gates if gate.rung == result.gates[-1].rung]
    denoiser = _denoiser(onnx)
    components = written.manifest.details["components"]
    products = components[denoiser]["operators"]
    return {
        "prompts": PROMPTS,
        "products": sum(products.get(kind, 0) for kind in PRODUCTS),
        "quantized_products": components[denoiser]["quantized_products"],
        "weight_only_products": components[denoiser]["weight_only_products"],
        "share_of_macs": lint(onnx / denoiser / "model.onnx", "onnxruntime").summary()["share_of_macs"],
        "gates": {
            gate.quantity: {"measured": _finite(gate.measured), "limit": gate.limit, "passed": gate.passed}
            for gate in gates
        },
        "onnxruntime_fused": _onnxruntime_kernels(onnx / denoiser / "model.onnx", folder),
        "openvino": _openvino_kernels(onnx / denoiser / "model.onnx"),
        "tensorrt_rtx": _build(source, variant, folder / f"{name}-tensorrt-rtx"),
    }


def _model(kind: str, folder: Path) -> Path:
    from tests.families import models, text_models

    if kind == REFERENCE:
        return MODEL
    path, record, made_from = folder / "model", folder / "model.json", made_by((MODELS,))
    if not record.is_file() or read_json(record) != made_from:
        shutil.rmtree(path, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        save = text_models.save_text_model if kind in text_models.TEXT_MAKERS else models.save_model
        save(kind, path)
        write_json(record, made_from)
    return path


def _checkpoint(model: Path, folder: Path) -> Path:
    from quest_deploy.config import FinetuneConfig, to_dict
    from quest_deploy.quantize.finetune import finetune

    path, recipe = folder / "checkpoint", one_update(weight_bits=4, batch_size=2)
    record = folder / "checkpoint.json"
    made_from = {
        "model": identity(model),
        **made_by(QUANTIZER),
        "recipe": hash_mapping(to_dict(recipe)),
    }
    if not (path / MANIFEST_NAME).is_file() or not record.is_file() or read_json(record) != made_from:
        finetune(model, path, FinetuneConfig(recipe=recipe), overwrite=True)
        write_json(record, made_from)
    return path


def _denoiser(onnx: Path) -> str:
    from quest_deploy.model.spec import family_of

    return family_of(onnx).denoiser


def _onnxruntime_kernels(file: Path, folder: Path) -> dict[str, int]:
    """How many products ONNX Runtime fused into each of its integer kernels."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    kernels = Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)
    return {kernel: kernels[kernel] for kernel in ORT_FUSED if kernels[kernel]}


def _openvino_kernels(file: Path) -> dict[str, int] | str:
    """How many products OpenVINO computes, and how many of them in int8; its words where it refuses the graph."""
    import openvino

    core = openvino.Core()
    try:
        compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        return str(error).strip().splitlines()[-1][:200]
    kinds = [*primitives(compiled)]
    return {"products": len(kinds), "int8": sum(kind.lower().endswith("_i8") for kind in kinds)}


def primitives(compiled: Any) -> Iterator[str]:
    """The kernel of every product in a model that OpenVINO compiled."""
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: str(getattr(value, "value", value)) for key, value in node.get_rt_info().items()}
        if info["layerType"] in OPENVINO_PRODUCTS:
            yield info["primitiveType"]


def _build(source: Path, variant: Variant, onnx: Path) -> dict[str, Any]:
    """Whether TensorRT for RTX builds all engines of the same mode."""
    from quest_deploy.config import BuildConfig, ShapeRange
    from quest_deploy.engines.trt_build import build_engine
    from quest_deploy.errors import QuestDeployError
    from quest_deploy.export.to_onnx import export

    export(source, onnx, variant.config("tensorrt-rtx"), overwrite=True)
    config = BuildConfig(batch=ShapeRange(min=1, opt=1, max=1))
    try:
        build_engine(onnx, onnx.with_name(f"{onnx.name}-engines"), config, overwrite=True)
    except QuestDeployError as error:
        return {"builds": False, "message": str(error)[:300]}
    return {"builds": True}


def _finite(value: float | None) -> float | str | None:
    if value is None or value != value:
        return None
    return "identical" if value == float("inf") else value


def tables(result: dict[str, Any]) -> list[Table]:
    """One row for each architecture and mode."""
    rows = [
        (kind, label, row) for kind, variants in result["kinds"].items() for label, row in variants.items()
    ]
    return [
        Table(
            title="Architectures and export modes",
            columns=(
                "architecture",
                "mode",
                "products quantized",
                "multiply-accumulates in INT8",
                "in float with INT4 weights",
                "in float",
                "gates kept",
                "lowest SNR, dB",
                "codes that differ",
                "fused by ONNX Runtime",
                "int8 in OpenVINO",
                "TensorRT for RTX builds",
            ),
            rows=tuple(_cells(kind, label, row) for kind, label, row in rows),
            labels=2,
            note="Of the denoiser: W4A8 after one update in each phase, exported for ONNX Runtime (engines: for "
            "TensorRT for RTX, built without a GPU and not run). `reference` is the bundled model, the others "
            "have a few thousand random weights. Products are convolutions and matrix products, those of "
            "attention among them; their shares are what the preflight expects of ONNX Runtime at the model's "
            "own size. Gates and SNR are those of `quest-deploy parity` against torch, over all components; with "
            f"{_prompts(result)} prompts that random weights make pictures of, the change of image PSNR is partly luck."
            + _later(result),
        )
    ]


def _prompts(result: dict[str, Any]) -> str:
    """How many the rows have, as text."""
    found = {
        row.get("prompts", FORMER_PROMPTS)
        for variants in result["kinds"].values()
        for row in variants.values()
    }
    return " or ".join(str(count) for count in sorted(found))


def _later(result: dict[str, Any]) -> str:
    """Which rows were measured at another commit than the rest."""
    others = {
        kind: row["commit"]
        for kind, variants in result["kinds"].items()
        for row in variants.values()
        if row.get("commit") not in (None, result["commit"])
    }
    return "".join(
        f" Rows of {kind} were measured at another commit, `{commit[:12]}`."
        for kind, commit in others.items()
    )


def _cells(kind: str, label: str, row: dict[str, Any]) -> tuple[str, ...]:
    shares, gates, found = row["share_of_macs"], row["gates"], row["openvino"]
    quantized = row["quantized_products"] + row["weight_only_products"]
    # A gate that was not measured is not kept.
    failed = sorted(name for name, gate in gates.items() if gate["passed"] is not True)
    decibels = [gate["measured"] for name, gate in gates.items() if "SNR" in name and "PSNR" not in name]
    finite = [value for value in decibels if isinstance(value, float)]
    codes = gates.get("int8 codes that differ", {}).get("measured")
    fused = ", ".join(f"{count} {kernel}" for kernel, count in row["onnxruntime_fused"].items())
    return (
        kind,
        label,
        f"{quantized} of {row['products']}",
        *(f"{100 * shares[execution]:.0f} %" for execution in ("int8", "int4 storage", "float")),
        ", ".join([yes(not failed), *failed]),
        number(min(finite), 1) if finite else "identical" if decibels else MISSING,
        MISSING if codes is None else f"{codes:.1e}",
        fused or "none",
        found if isinstance(found, str) else f"{found['int8']} of {found['products']}",
        yes(row["tensorrt_rtx"]["builds"]),
    )


if __name__ == "__main__":
    # python -m benchmarks.modes KIND...: measure these again, after a change that touches them alone.
    import sys

    measure_again(Settings(), sys.argv[1:])

"""After a build: did TensorRT do what lint promised? Layer by layer, from the engine's own inspector."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quest_deploy.artifacts import Artifact, read_artifact
from quest_deploy.config import TensorRTBackend
from quest_deploy.engines.inspector import EngineLayer, inspect_plan
from quest_deploy.engines.layer_times import plan_specs
from quest_deploy.engines.libraries import import_tensorrt
from quest_deploy.engines.trt_plan import run_errors
from quest_deploy.engines.trt_runtime import check_flavour, check_gpu, load_plans
from quest_deploy.errors import QuestDeployError
from quest_deploy.export.lint import lint
from quest_deploy.export.lint.report import Execution, Layer

logger = logging.getLogger(__name__)

Verdict = Literal["kept", "better", "worse", "unknown"]
VERDICTS: tuple[Verdict, ...] = ("kept", "better", "worse", "unknown")
_FLOATS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One product: what was promised, and what the engine has.

    Attributes:
        component: Of the model.
        name: Of the ONNX node.
        promised: What lint said.
        layer: What computes it; None where no layer of the engine names it.
        verdict: "unknown" where the engine does not tell.
    """

    component: str
    name: str
    promised: Execution
    layer: EngineLayer | None
    verdict: Verdict

    def describe(self) -> str:
        """In one line."""
        found = "no layer of its own" if self.layer is None else f"{self.layer.precision} {self.layer.tactic}"
        return f"{self.component}: {self.name} was promised {self.promised}, and is {found.rstrip()}"


@dataclass(frozen=True, kw_only=True)
class Proof:
    """All products of a model; true where none is worse than promised and the engine told about one at least."""

    rows: tuple[Comparison, ...]

    def __bool__(self) -> bool:
        counts = self.counts()
        return not counts["worse"] and bool(counts["kept"] + counts["better"])

    def counts(self) -> dict[Verdict, int]:
        """Products by verdict."""
        found = Counter(row.verdict for row in self.rows)
        return {verdict: found[verdict] for verdict in VERDICTS}

    def describe(self) -> str:
        """In one sentence, and a line for each product that is worse than promised."""
        counts = self.counts()
        said = (
            f"of {len(self.rows)} products {counts['kept']} run as lint promised, {counts['better']} in lower "
            f"precision, {counts['worse']} in higher; of {counts['unknown']} the engines do not tell"
        )
        return "\n".join([said, *(row.describe() for row in self.rows if row.verdict == "worse")])

    def to_json(self) -> dict[str, Any]:
        """In JSON types."""
        return {
            "ok": bool(self),
            "counts": self.counts(),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }


def prove_here(engines: Artifact, onnx_dir: Path) -> Proof | None:
    """:func:`prove` right after the build; None where that cannot be told, which is logged: the engines are whole."""
    try:
        return prove(engines.path, onnx_dir, backend=engines.manifest.config["backend"])
    except QuestDeployError as error:
        logger.warning("what became of the engines' layers is not known: %s", error)
        return None


def prove(engine_dir: Path, onnx_dir: Path, *, backend: TensorRTBackend) -> Proof:
    """Compare built engines with what lint says about the graphs they were built from. Needs the GPU that runs them.

    Args:
        engine_dir: An `engines` artifact.
        onnx_dir: The `onnx` artifact it was built from.
        backend: The flavour that built it.

    Raises:
        MissingDependencyError: no GPU, no CUDA build of torch, or no TensorRT.
        ArtifactError: a directory that cannot be trusted, or an inspector of a format that is not known.
        StaleArtifactError: this TensorRT or GPU cannot load the plans.
        EngineBuildError: too little memory on the GPU.
        EngineRunError: TensorRT refuses the shapes that an engine was built for.
    """
    source = read_artifact(Path(engine_dir), stage="engines")
    check_flavour(source.path, str(source.manifest.config.get("backend")), backend)
    check_gpu(source.path)
    library = import_tensorrt(backend)
    promised = lint(onnx_dir, target=backend).layers
    rows: list[Comparison] = []
    specs = plan_specs(source)
    for name, plan in load_plans(source, library, backend).items():
        with plan, run_errors(name):
            if source.manifest.config.get("weight_streaming"):
                plan.stream_weights(0)  # they may be more than the GPU holds, and nothing runs
            found = inspect_plan(plan, specs[name])
        rows += compare([layer for layer in promised if layer.component == name], found)
    return Proof(rows=tuple(rows))


def compare(promised: Iterable[Layer], found: Sequence[EngineLayer]) -> list[Comparison]:
    """One row for each product of one component.

    A node may appear in several layers (its weights are prepared in one, reformatted in another); the one that names a
    precision counts, and among those the last, which is where the product itself is.
    """
    by_node: dict[str, EngineLayer] = {}
    for layer in found:
        for node in layer.sources:
            known = by_node.get(node)
            if known is None or layer.precision != "unknown" or known.precision == "unknown":
                by_node[node] = layer
    return [
        Comparison(
            component=layer.component,
            name=layer.name,
            promised=layer.execution,
            layer=by_node.get(layer.name),
            verdict=judge(layer.execution, by_node.get(layer.name)),
        )
        for layer in promised
    ]


def judge(promised: Execution, layer: EngineLayer | None) -> Verdict:
    """Whether a layer keeps what was promised for its product."""
    if layer is None or layer.precision not in ("int8", *_FLOATS):
        return "unknown"
    if promised == "int8":
        return "kept" if layer.precision == "int8" else "worse"
    if layer.precision == "int8":
        return "better"
    if promised != "int4 storage" or layer.weights == "int4":
        return "kept"
    return "unknown" if layer.weights == "unknown" else "worse"

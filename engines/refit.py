"""Puts weights into engines that were built without: the `refit` stage, on the machine that runs them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quest_deploy.artifacts import Artifact, check_output, read_artifact
from quest_deploy.engines.libraries import check_tensorrt, gpus, import_tensorrt, title_of
from quest_deploy.engines.replace import with_plans
from quest_deploy.engines.trt_build import ONNX_NAME, PLAN_NAME, is_stripped
from quest_deploy.engines.trt_log import make_log
from quest_deploy.engines.trt_runtime import make_runtime, stale
from quest_deploy.engines.up_to_date import check_reports, graph_digest
from quest_deploy.errors import ArtifactError, EngineBuildError, MissingDependencyError, StaleArtifactError


def refit(engine_dir: Path, onnx_dir: Path, output: Path, *, overwrite: bool = False) -> Artifact:
    """Write engines with the weights of the graphs that they were built from.

    Args:
        engine_dir: An `engines` artifact without weights.
        onnx_dir: The `onnx` artifact that it was built from.
        output: The `engines` artifact to write; may be `engine_dir`.
        overwrite: Replace what lies at `output`.

    Raises:
        MissingDependencyError: no GPU, or no TensorRT.
        ArtifactError: a directory that cannot be used, or engines that have their weights.
        StaleArtifactError: other graphs, or engines that this TensorRT or GPU cannot load.
        EngineBuildError: TensorRT does not take the weights.
    """
    source = read_artifact(Path(engine_dir), stage="engines")
    graphs = read_artifact(Path(onnx_dir), stage="onnx")
    check_output(Path(output), stage="engines", overwrite=overwrite)
    check_refittable(source, graphs)
    if not gpus():
        raise MissingDependencyError(
            f"putting weights into the engines in '{source.path}' needs the NVIDIA GPU that will run them, and this "
            "machine offers none (no NVIDIA driver); run refit there"
        )
    backend = str(source.manifest.config.get("backend"))
    check_tensorrt(backend)
    library = import_tensorrt(backend)
    reports = source.manifest.details["components"]
    with TemporaryDirectory(prefix="quest-deploy-refit-") as place:
        plans = {}
        for name in [name for name, report in reports.items() if is_stripped(report)]:
            plans[name] = Path(place) / f"{name}.plan"
            content = refit_plan(library, source, name, graphs.path / name / ONNX_NAME)
            plans[name].write_bytes(content)
        done = dict.fromkeys(plans, {"verified": True, "weights_stripped": False})
        verified = all(name in plans or reports[name]["verified"] for name in reports)
        return with_plans(
            source, Path(output), plans, done, overwrite=overwrite, weights_stripped=False, verified=verified
        )


def check_refittable(source: Artifact, graphs: Artifact) -> None:
    """Check that engines lack weights, and that these are the graphs they were built from.

    Raises:
        ArtifactError: they do not lack them, or their manifest is damaged.
        StaleArtifactError: other graphs; other weights in an engine would give other numbers, or none.
    """
    check_reports(source)
    details = source.manifest.details
    if not details.get("weights_stripped"):
        raise ArtifactError(
            f"the engines in '{source.path}' hold their weights already; use them as they are"
        )
    for name, report in details["components"].items():
        if is_stripped(report) and report.get("graph_digest") != graph_digest(graphs.manifest, name):
            raise StaleArtifactError(
                f"{name}: '{graphs.path}' holds another graph or other weights than the engine in '{source.path}' was "
                "built from; give the directory it was built from, or build the engines again with "
                "`quest-deploy build-engine`"
            )


def refit_plan(library: Any, source: Artifact, component: str, graph: Path) -> memoryview:
    """One component's plan with the weights of its graph.

    Raises:
        StaleArtifactError: this TensorRT or GPU cannot load the plan.
        EngineBuildError: TensorRT does not take the weights.
    """
    backend, version = source.manifest.config["backend"], str(library.__version__)
    log, runtime = make_log(library), make_runtime(library, source.manifest.config)
    engine = runtime.deserialize_cuda_engine((source.path / component / PLAN_NAME).read_bytes())
    if engine is None:
        raise stale(component, source, version, log.errors)
    refitter = library.Refitter(engine, log)
    parser = library.OnnxParserRefitter(refitter, log)
    content = None
    # By its path, so that weights in a file beside the graph are found.
    if parser.refit_from_file(str(graph)) and refitter.refit_cuda_engine():
        config = engine.create_serialization_config()
        config.clear_flag(library.SerializationFlag.EXCLUDE_WEIGHTS)
        content = engine.serialize_with_config(config)
    if content is None:
        missing = ", ".join(refitter.get_missing_weights()[:3])
        said = "; ".join([*log.errors, *([f"missing: {missing}"] if missing else [])])
        raise EngineBuildError(
            f"{component}: {title_of(backend)} {version} cannot put the weights of '{graph}' into its engine "
            f"({said or 'it gives no reason'}); build the engines without --strip-weights"
        )
    return memoryview(content)

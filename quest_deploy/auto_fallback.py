"""`build-engine --auto-fallback`: products that are slower in low precision than in floats stay in floats.

Whether int8 pays is a matter of a product's size and of this GPU's kernels, so it is measured: the engine as it was
asked for beside one of the same graph without quantizers, layer by layer. What is slower is built again without
quantizers around it, and kept if the whole component has become faster.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quest_deploy.artifacts import Artifact, read_artifact
from quest_deploy.config import BuildConfig, ProgressEvent
from quest_deploy.engines import trt_build
from quest_deploy.engines.libraries import gpus
from quest_deploy.engines.replace import with_plans
from quest_deploy.engines.trt_build import ONNX_NAME, PLAN_NAME
from quest_deploy.errors import MissingDependencyError, QuestDeployError

logger = logging.getLogger(__name__)

Progress = Callable[[ProgressEvent], None]

RESULT = "auto_fallback"
"""Of a component in the manifest: what was measured, and ``left_in_float``."""


def build_engine(
    onnx_dir: Path,
    output: Path,
    config: BuildConfig,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Build engines as :func:`quest_deploy.engines.trt_build.build_engine`, then measure and fall back if asked to.

    Raises:
        MissingDependencyError: to be measured, engines need a GPU, and there is none that torch can use.
        QuestDeployError: of the type of what went wrong; engines that were built already are kept, and say so.
    """
    if config.auto_fallback:
        check_measurable(Path(output))
    engines = trt_build.build_engine(onnx_dir, output, config, progress=progress, overwrite=overwrite)
    if not config.auto_fallback:
        return engines
    try:
        return fall_back(engines, read_artifact(Path(onnx_dir), stage="onnx"), config, progress)
    except QuestDeployError as error:
        raise type(error)(
            f"--auto-fallback: {error}. The engines in '{output}' are whole, as they are without it; the same command "
            "goes on from there"
        ) from error


def check_measurable(output: Path) -> None:
    """Find out before minutes of building that nothing can be measured here.

    Raises:
        MissingDependencyError: there is no GPU, or torch cannot use it.
    """
    if not gpus():
        raise MissingDependencyError(
            "--auto-fallback times the engines it builds and needs a GPU that can run them, and this machine offers "
            "none (no NVIDIA driver); nothing was built or changed: run it on the machine that will draw, or leave "
            "--auto-fallback out here"
        )
    from quest_deploy.engines.trt_runtime import check_gpu

    check_gpu(output)


def fall_back(
    engines: Artifact, source: Artifact, config: BuildConfig, progress: Progress | None = None
) -> Artifact:
    """Measure the components that were not yet, and replace the engines that are faster with some products in floats.

    A component that memory did not suffice for is left as it is, which is logged.

    Args:
        engines: An `engines` artifact, which is written again with what was measured.
        source: The `onnx` artifact it was built from.
        config: It was built with.
        progress: Told how far the further engines are.
    """
    from quest_deploy.engines.layer_times import plan_specs
    from quest_deploy.export.quantized import graph_products
    from quest_deploy.fallback_trial import Subject, UnlikeEnginesError, check_built_alike, measure, say

    plans: dict[str, Path] = {}
    reports: dict[str, dict[str, Any]] = {}
    specs = plan_specs(engines)
    with TemporaryDirectory(prefix="quest-deploy-fallback-") as place:
        for name, report in engines.manifest.details["components"].items():
            graph = source.path / name / ONNX_NAME
            if RESULT in report or not any(product.removable for product in graph_products(graph)):
                continue
            subject = Subject(
                name=name,
                graph=graph,
                spec=specs[name],
                profiles=report["profiles"],
                config=config,
                progress=progress,
            )
            try:
                check_built_alike("its engine", report)
                trial = measure(subject, engines.path / name / PLAN_NAME, Path(place) / name)
            except UnlikeEnginesError as error:
                logger.warning("%s: not measured: %s", name, error)
                continue
            say(name, trial)
            reports[name] = {RESULT: trial.to_json()}
            if trial.mixed is not None and trial.is_worth_it:
                plans[name] = trial.mixed.plan
                reports[name] |= trial.mixed.report
        if not reports:
            return engines
        told = {"auto_fallback": True}
        return with_plans(engines, engines.path, plans, reports, config=told, overwrite=True)

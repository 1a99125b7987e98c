"""The `build-engine` stage: an ONNX directory becomes TensorRT engines, one plan for each component."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quest_deploy.artifacts import Artifact, artifact_digest, check_output, read_artifact, write_artifact
from quest_deploy.config import BuildConfig, to_dict
from quest_deploy.engines import ladder
from quest_deploy.engines.arithmetic import RTX_BY_DEFAULT
from quest_deploy.engines.foreign import fitted_components, is_foreign, to_json
from quest_deploy.engines.graph_form import check_graph, tell_target
from quest_deploy.engines.libraries import (
    check_targets,
    check_tensorrt,
    driver_version,
    gpus,
    import_tensorrt,
    title_of,
)
from quest_deploy.engines.profiles import Profile, all_profiles
from quest_deploy.engines.run_record import copy_records
from quest_deploy.engines.timing_cache import check_place_of_timing_cache, used_timing_cache
from quest_deploy.engines.trt_process import Progress
from quest_deploy.engines.up_to_date import PLAN_NAME as PLAN_NAME
from quest_deploy.engines.up_to_date import (
    companions_digest,
    component_of_graph,
    differences,
    existing_engines,
    graph_digest,
    in_words,
    reports_of,
)
from quest_deploy.errors import ArtifactError, EngineBuildError, MissingDependencyError
from quest_deploy.files import check_name
from quest_deploy.lock import locked
from quest_deploy.model.merged import merged_details

logger = logging.getLogger(__name__)

ONNX_NAME = "model.onnx"
BUILDER_OPTIONS = (
    "optimization_level",
    "workspace_mb",
    "version_compatible",
    "hardware_compatible",
    "compute_capabilities",
    "weight_streaming",
    "strip_weights",
)

# What a pipeline reads beside the engines, of all that other tools leave there.
_COMPANION_SUFFIXES = (".json", ".txt", ".md", ".model", ".safetensors", "")
_AHEAD_OF_TIME = "any (ahead of time)"


def build_engine(
    onnx_dir: Path,
    output: Path,
    config: BuildConfig,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Build the engines of an exported model, or those of them that an earlier build has not left at `output`.

    Args:
        onnx_dir: An `onnx` artifact, or ONNX of another tool in the same layout.
        output: The `engines` artifact to write. One that is up to date is left as it is.
        config: Backend and the shapes that the engines must accept.
        progress: Called with 100 units for each component that is built.
        overwrite: Bring an engines artifact at `output` up to date; engines that nothing changed for are kept.

    Raises:
        MissingDependencyError: the library is absent, or the GPU that TensorRT builds on, or that it needs in order to
            leave weights out.
        ArtifactError: `onnx_dir` cannot be trusted, or `output` cannot be written.
        ConfigError: a requested size does not fit the model, another process is building into `output`, engines cannot
            be built for the GPUs asked for, or the timing cache cannot be used.
        EngineBuildError: TensorRT does not take a graph.
    """
    # What no build can write to is told before anything else; what lies there is judged once nobody else changes it.
    check_output(Path(output), stage="engines", overwrite=True)
    check_place_of_timing_cache(config, Path(onnx_dir), Path(output))
    check_tensorrt(config.backend)
    if config.backend == "tensorrt" and not gpus():
        raise MissingDependencyError(
            "TensorRT builds engines only on the GPU that will run them, and this machine offers none (no NVIDIA "
            "driver); build there, or ahead of time with --backend tensorrt-rtx"
        )
    check_targets(config)
    source = read_artifact(Path(onnx_dir), stage="onnx")
    fitted = fitted_components(source)
    graphs = {name: component.graph for name, component in fitted.items()}
    profiles = all_profiles(source.path, config, graphs)
    with locked(lock_of(Path(output)), Path(output), "build-engine"):
        kept = reusable(source, Path(output), profiles, config, overwrite=overwrite)
        if kept is None:
            logger.info("%s is up to date", output)
            return read_artifact(output, stage="engines")
        wanted = {name: own for name, own in profiles.items() if name not in kept}
        for name in wanted:
            check_name(source.path / name / ONNX_NAME, "TensorRT")
            check_graph(name, source.path / name / ONNX_NAME, config.backend)
        if wanted:
            tell_target(source, config.backend)
        with write_artifact(
            output,
            stage="engines",
            config=to_dict(config),
            inputs={"onnx": source.digest},
            sources={"onnx": (source.path, artifact_digest)},
            overwrite=overwrite,
        ) as writer:
            copy_companions(source, writer.path)
            for name in kept:
                copy_plan(Path(output), name, writer.path)
            built = {}
            if wanted:
                built = run_job(make_job(source.path, writer.path, wanted, config), progress, config)
            writer.details.update(make_details(source, profiles, config, built, kept))
            if fitted:
                writer.details["interfaces"] = to_json(fitted)
        return read_artifact(output, stage="engines")


def reusable(
    source: Artifact,
    output: Path,
    profiles: Mapping[str, Sequence[Profile]],
    config: BuildConfig,
    *,
    overwrite: bool,
) -> dict[str, dict[str, Any]] | None:
    """What the manifest at `output` says about the engines there that serve again; None where everything is up to date.

    Raises:
        ArtifactError: something lies at `output` that is not up to date, and `overwrite` is not given.
    """
    existing = existing_engines(output)
    check_output(output, stage="engines", overwrite=overwrite or existing is not None)
    if existing is None:
        return {}
    why = changes(existing, source, profiles, config)
    built = reports_of(existing.manifest)
    same = {name: report for name, report in built.items() if name in profiles and name not in why}
    for name, report in same.items():
        if report.get("fallback"):
            logger.warning(
                "%s: kept as it was built for want of memory, with %s; with a larger --memory-limit than then, or in "
                "another directory, it is built anew",
                name,
                ", ".join(report["fallback"]),
            )
    if not why:
        return None
    if not overwrite:
        raise ArtifactError(
            f"output '{output}' exists already and is not up to date ({in_words(why)}); add --overwrite to build again "
            "what changed, or choose another"
        )
    logger.info("not up to date: %s", in_words(why))
    return same


def lock_of(output: Path) -> Path:
    """The file that a process locks while it builds into `output`."""
    output = output.resolve()
    return output.with_name(f".{output.name}.build-engine.lock")


def changes(
    existing: Artifact, source: Artifact, profiles: Mapping[str, Sequence[Profile]], config: BuildConfig
) -> dict[str, str]:
    """What has to be built again, and why."""
    target = target_of(config)
    if config.hardware_compatible != "none":
        target.pop("target_gpu", None)  # where they are built, and not all that loads them
    return differences(
        existing.manifest,
        source.manifest,
        {name: [profile_to_json(profile) for profile in own] for name, own in profiles.items()},
        json.loads(json.dumps(to_dict(config))),
        options=("backend", *BUILDER_OPTIONS),
        library=f"{title_of(config.backend)} {import_tensorrt(config.backend).__version__}",
        target=target,
        # Kernels are chosen by time: under this GPU's own driver, unless they are for other GPUs. TensorRT for RTX
        # compiles them where they run.
        driver=driver_version()
        if (config.backend, config.hardware_compatible) == ("tensorrt", "none")
        else "",
    )


def copy_plan(existing: Path, component: str, output: Path) -> None:
    """Copy one engine of an earlier build, with what its runs left."""
    (output / component).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(existing / component / PLAN_NAME, output / component / PLAN_NAME)
    copy_records(existing / component, output / component)


def copy_companions(source: Artifact, output: Path) -> None:
    """Copy what a pipeline needs beside the engines: tokenizer, scheduler and configuration files."""
    for name in source.manifest.files:
        others = is_foreign(source) and Path(name).suffix not in _COMPANION_SUFFIXES
        if component_of_graph(source.manifest, name) is None and not others:
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / name, output / name)


def make_job(
    onnx_dir: Path, output: Path, profiles: Mapping[str, Sequence[Profile]], config: BuildConfig
) -> dict[str, Any]:
    """What the building process is told.

    Raises:
        ConfigError: the timing cache cannot be read or written.
    """
    timing_cache = used_timing_cache(config)
    return {
        "backend": config.backend,
        "timing_cache": None if timing_cache is None else str(timing_cache.absolute()),
        "components": [
            {
                "name": name,
                "onnx": str((onnx_dir / name / ONNX_NAME).absolute()),
                "plan": str((output / name / PLAN_NAME).absolute()),
                "profiles": [profile_to_json(profile) for profile in own],
                "options": {name: getattr(config, name) for name in BUILDER_OPTIONS},
            }
            for name, own in profiles.items()
        ],
        "memory_limit_bytes": None if config.memory_limit_gb is None else round(config.memory_limit_gb * 1e9),
    }


def run_job(
    job: Mapping[str, Any], progress: Progress | None, config: BuildConfig
) -> dict[str, dict[str, Any]]:
    """Build all components of a job; the worker's reports.

    Raises:
        MissingDependencyError: without a driver, TensorRT cannot leave weights out.
        EngineBuildError: TensorRT does not take a graph.
    """
    try:
        return ladder.build(job, progress, jobs=config.jobs)
    except EngineBuildError as error:
        # What TensorRT for RTX 1.7 says of graphs that it builds with their weights.
        if config.strip_weights and not gpus() and "CUDA_SUCCESS" in str(error):
            raise MissingDependencyError(
                f"--strip-weights: {title_of(config.backend)} {import_tensorrt(config.backend).__version__} needs an "
                "NVIDIA driver to leave weights out, and this machine has none; build on a machine with a GPU, or "
                "leave --strip-weights out"
            ) from error
        raise


def build_one(
    component: str,
    onnx_dir: Path,
    output: Path,
    profiles: Sequence[Mapping[str, Any]],
    config: BuildConfig,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build one engine outside of any artifact, for profiles in JSON types; what the worker reports about it.

    Raises:
        EngineBuildError: TensorRT does not take the graph.
    """
    (output / component).mkdir(parents=True, exist_ok=True)
    job = make_job(onnx_dir, output, {component: ()}, config)
    job["components"][0]["profiles"] = list(profiles)
    built = ladder.build(job, progress)[component]
    return {key: value for key, value in built.items() if key != "tensorrt_version"}


def profile_to_json(profile: Profile) -> dict[str, dict[str, list[int]]]:
    """A profile in JSON types."""
    return {
        name: {edge: list(shape) for edge, shape in dataclasses.asdict(ranges).items()}
        for name, ranges in profile.items()
    }


def make_details(
    source: Artifact,
    profiles: Mapping[str, Sequence[Profile]],
    config: BuildConfig,
    built: Mapping[str, Mapping[str, Any]],
    kept: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """What the manifest says about the engines: with what, for what, from what, how large, how long.

    Args:
        source: The `onnx` artifact.
        profiles: Of every component.
        config: Of the build.
        built: The worker's reports, by component.
        kept: What the manifest of an earlier build says about the components that were not built again.
    """
    reports = {**kept, **built}
    components = {
        name: {
            "profiles": [profile_to_json(profile) for profile in profiles[name]],
            **{key: value for key, value in reports[name].items() if key != "tensorrt_version"},
            **({"memory_limit_gb": config.memory_limit_gb} if name in built else {}),
            "weights_stripped": config.strip_weights if name in built else is_stripped(reports[name]),
            "requested_profiles": [profile_to_json(profile) for profile in profiles[name]],
            "plan": f"{name}/{PLAN_NAME}",
            "onnx_sha256": source.manifest.files[f"{name}/{ONNX_NAME}"].sha256,
            "graph_digest": graph_digest(source.manifest, name),
        }
        for name in profiles
    }
    return {
        "library": title_of(config.backend),
        "library_version": str(import_tensorrt(config.backend).__version__),
        "strongly_typed": True,
        "precision": precision_of(source),
        "dtype": source.manifest.config.get("dtype", "fp32"),
        "lowering": source.manifest.config.get("mode", "none"),
        **target_of(config),
        **merged_details(source.manifest),
        "driver": driver_version(),
        "companions_digest": companions_digest(source.manifest),
        "verified": all(report["verified"] for report in reports.values()),
        "weights_stripped": any(map(is_stripped, components.values())),
        "components": components,
        "seconds": round(sum(report["seconds"] for report in reports.values()), 3),
        "size_bytes": sum(report["size_bytes"] for report in reports.values()),
    }


def is_stripped(report: Mapping[str, Any]) -> bool:
    """Whether an engine lacks its weights, by what the manifest says about it."""
    return bool(report.get("weights_stripped", False))


def target_of(config: BuildConfig) -> dict[str, str]:
    """Which GPUs the engines are made for, as the manifest says it."""
    if config.backend == "tensorrt-rtx":
        capabilities = ", ".join(config.compute_capabilities) or RTX_BY_DEFAULT
        return {"target_gpu": _AHEAD_OF_TIME, "compute_capability": capabilities}
    gpu = gpus()[0]
    capability = gpu.compute_capability
    others = {
        "none": capability,
        "ampere-plus": "8.0 and later",
        "same-compute-capability": f"{capability}, any GPU",
    }
    return {"target_gpu": gpu.name, "compute_capability": others[config.hardware_compatible]}


def precision_of(source: Artifact) -> str:
    """The arithmetic of the denoiser, as the export chose it: TensorRT follows the graph's types."""
    if is_foreign(source):
        return "as in the graph, which another tool wrote"
    mode, dtype = source.manifest.config.get("mode", "none"), source.manifest.config.get("dtype", "fp32")
    return str(dtype) if mode == "none" else f"{mode} (Q/DQ), {dtype} elsewhere"

"""Engines: what runs a component. Building them, loading them, and choosing among them by what lies on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quest_deploy.artifacts import read_manifest, stage_of
from quest_deploy.config import BACKENDS, DEFAULT_RUN, TENSORRT_BACKENDS, RunConfig
from quest_deploy.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from quest_deploy.engines.base import Engine

_BACKENDS_OF = {
    "model": ("torch",),
    "checkpoint": ("torch",),
    "onnx": ("onnxruntime", "openvino"),
    "engines": ("tensorrt", "tensorrt-rtx"),
}


def resolve_backend(path: Path, backend: str | None) -> str:
    """The backend that runs what lies at `path`: the one asked for, or the one it was made for.

    Raises:
        ArtifactError: nothing at `path` can be run.
        ConfigError: the backend asked for cannot run it.
    """
    stage = stage_of(path)
    if stage not in _BACKENDS_OF:
        raise ArtifactError(
            f"'{path}' holds {stage}, expected a model, checkpoint, onnx or engines directory; nothing in it can be run"
        )
    allowed = _BACKENDS_OF[stage]
    if backend is None:
        return str(read_manifest(path).config.get("backend")) if stage == "engines" else allowed[0]
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend not in allowed:
        raise ConfigError(
            f"backend {backend} cannot run '{path}', which is of stage '{stage}' (run by {' or '.join(allowed)}); "
            f"{_NEXT_STEP[backend]}"
        )
    return backend


_NEXT_STEP = {
    "torch": "give it the model or checkpoint directory",
    "onnxruntime": "give it a directory made with `quest-deploy export --target onnxruntime`",
    "openvino": "give it a directory made with `quest-deploy export --target onnxruntime`",
    "tensorrt": "build engines with `quest-deploy build-engine --backend tensorrt`",
    "tensorrt-rtx": "build engines with `quest-deploy build-engine --backend tensorrt-rtx`",
}


def load_engines(
    path: Path, *, backend: str | None = None, threads: int | None = None, run: RunConfig = DEFAULT_RUN
) -> dict[str, Engine]:
    """Load every component at `path`, ready to run.

    Args:
        path: A model, checkpoint, `onnx` or `engines` directory.
        backend: What runs it; None chooses by what it is.
        threads: Threads of ONNX Runtime or OpenVINO; None leaves the choice to it.
        run: What else some of them can be told.

    Raises:
        ArtifactError: the directory cannot be trusted or cannot be run.
        ConfigError: the backend does not fit the directory, or has no execution providers.
        MissingDependencyError: a library or a GPU is absent.
    """
    # Each runtime is imported when it is wanted: torch takes seconds, and TensorRT is optional.
    chosen = resolve_backend(path, backend)
    check_run(chosen, run)
    if chosen == "torch":
        from quest_deploy.engines.torch_runtime import load_torch_engines

        return load_torch_engines(path)
    if chosen == "onnxruntime":
        from quest_deploy.engines.ort_runtime import load_ort_engines

        return load_ort_engines(path, threads=threads, provider=run.provider)
    if chosen == "openvino":
        from quest_deploy.engines.openvino_runtime import load_openvino_engines

        return load_openvino_engines(path, threads=threads)
    from quest_deploy.engines.trt_runtime import load_tensorrt_engines

    return load_tensorrt_engines(
        path,
        backend="tensorrt" if chosen == "tensorrt" else "tensorrt-rtx",
        graphs=run.cuda_graphs,
        weights_gb=run.gpu_weights_gb,
    )


def check_run(backend: str, run: RunConfig) -> None:
    """Refuse what a backend does not have: execution providers, CUDA graphs, weights that stay in host memory.

    Raises:
        ConfigError: it has none.
    """
    if run.gpu_weights_gb is not None and backend not in TENSORRT_BACKENDS:
        raise ConfigError(
            f"gpu_weights_gb is {run.gpu_weights_gb:g}, but only TensorRT engines stream weights and {backend} runs "
            "this; leave --gpu-weights out"
        )
    if not run.cuda_graphs and backend not in TENSORRT_BACKENDS:
        raise ConfigError(
            f"cuda_graphs is off, but only TensorRT engines have them and {backend} runs this; leave --no-cuda-graphs "
            "out"
        )
    if run.provider is not None and backend != "onnxruntime":
        raise ConfigError(
            f"provider is {run.provider}, but only onnxruntime has execution providers and {backend} runs this; "
            "leave --provider out, or use --backend onnxruntime on an ONNX directory"
        )

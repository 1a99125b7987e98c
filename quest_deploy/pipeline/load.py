"""Opening any artifact as a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quest_deploy.artifacts import stage_of
from quest_deploy.config import DEFAULT_RUN, LoraConfig, RunConfig
from quest_deploy.engines import check_run, load_engines, resolve_backend
from quest_deploy.engines.base import device_of
from quest_deploy.engines.torch_runtime import TorchEngine, load_torch_model, torch_engines
from quest_deploy.errors import ArtifactError, ConfigError
from quest_deploy.model.conditioning import load_tokenizer
from quest_deploy.model.families import TextKind, TextPart
from quest_deploy.model.libraries import LOADING, class_of, import_libraries
from quest_deploy.model.load import LoadedModel
from quest_deploy.model.lora import merge_loras
from quest_deploy.model.spec import classes_of, component_configs, component_specs, family_of, read_config
from quest_deploy.pipeline.request import own_scheduler
from quest_deploy.pipeline.text_to_image import Pipeline

CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
TOKENIZERS: dict[TextKind, tuple[str, ...]] = {
    "clip": CLIP_TOKENIZERS,
    "clip-projection": CLIP_TOKENIZERS,
    "t5": ("T5Tokenizer", "T5TokenizerFast"),
    "gemma": ("GemmaTokenizer", "GemmaTokenizerFast"),
}


def load_pipeline(
    path: str | Path,
    *,
    backend: str | None = None,
    threads: int | None = None,
    run: RunConfig = DEFAULT_RUN,
    weights_only: bool = False,
    loras: Sequence[LoraConfig] = (),
) -> Pipeline:
    """Open whatever lies at `path`, ready to draw.

    Args:
        path: A model, checkpoint, `onnx` or `engines` directory.
        backend: What runs it; None chooses by what it is.
        threads: CPU threads; None leaves the choice to the runtime.
        run: What else some runtimes can be told.
        weights_only: Leave the activations of a checkpoint's denoiser in float, as `export --mode int4-weight-only`
            does.
        loras: Merged into a full-precision model that torch runs.

    Raises:
        ArtifactError: the directory cannot be trusted or cannot be run.
        ConfigError: the backend does not fit the directory.
        MissingDependencyError: a library or a GPU is absent.
        ModelLoadError: the model cannot be loaded.
    """
    path = Path(path)
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}, expected at least 1")
    chosen = resolve_backend(path, backend)
    check_run(chosen, run)
    import_libraries()
    if chosen == "torch":
        with LOADING:
            model = load_torch_model(path)
            merge_loras(model, loras)
            if weights_only:
                from quest_deploy.quantize.weight_only import drop_activation_quantizers

                drop_activation_quantizers(model.denoiser)
            return _torch_pipeline(path, model, threads)
    engines = load_engines(path, backend=chosen, threads=threads, run=run)
    return Pipeline(
        path=path.resolve(),
        stage=stage_of(path),
        backend=chosen,
        device=device_of(next(iter(engines.values()))),
        family=family_of(path),
        classes=classes_of(path),
        engines=engines,
        tokenizers={part.name: _load_tokenizer(path, part) for part in family_of(path).text},
        scheduler=own_scheduler(path),
        configs=component_configs(path),
    )


def _torch_pipeline(path: Path, model: LoadedModel, threads: int | None) -> Pipeline:
    engines = torch_engines(model, component_specs(model.path), threads=threads)
    denoiser = engines[model.family.denoiser]
    assert isinstance(denoiser, TorchEngine)
    return Pipeline(
        path=path.resolve(),
        stage=stage_of(path),
        backend="torch",
        device=denoiser.device,
        family=model.family,
        classes=model.classes,
        engines=engines,
        tokenizers=model.tokenizers,
        scheduler=model.scheduler,
        configs=component_configs(model.path),
    )


def _load_tokenizer(path: Path, part: TextPart) -> Any:
    kind, known = _class_in_index(path, part.tokenizer), TOKENIZERS[part.kind]
    if kind not in known:
        raise ArtifactError(f"'{path}': the {part.tokenizer} is a {kind}, expected one of {', '.join(known)}")
    try:
        return load_tokenizer(path / part.tokenizer, part, class_of("transformers", kind))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"'{path / part.tokenizer}' cannot be loaded ({error}); restore the directory from its source"
        ) from error


def _class_in_index(path: Path, component: str) -> str:
    entry = read_config(path / "model_index.json").get(component)
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)):
        raise ArtifactError(
            f"'{path / 'model_index.json'}': '{component}' is {entry!r}, expected a library and a class; "
            "restore the directory from its source"
        )
    return entry[1]

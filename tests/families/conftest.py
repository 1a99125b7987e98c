"""A tiny model of each kind, quantized, and exported for ONNX Runtime: made once for all tests here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from quest_deploy.config import ExportConfig, FinetuneConfig, PhaseConfig, Recipe
from quest_deploy.model.load import LoadedModel, load_model

KINDS = ("dit", "class-unet", "ldm", "ddpm")
PHASE = {"steps": 1, "batch_size": 2}
RECIPE = Recipe(
    name="tiny",
    weight_bits=4,
    activation_bits=8,
    calibration_prompts=2,
    validation_prompts=1,
    calibration_steps=2,
    initializer="nearest",
    temporal=PhaseConfig(layers="temporal", **PHASE),
    sensitive=PhaseConfig(layers="all", **PHASE),
)


def _module(name: str) -> ModuleType:
    # Tests are imported by path, so a module beside them has no name of its own.
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"family_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def models() -> ModuleType:
    """Makers of tiny models that read no text."""
    return _module("models")


@pytest.fixture(scope="session")
def text_models() -> ModuleType:
    """Makers of tiny models that read text."""
    _module("text_parts")
    return _module("text_models")


@pytest.fixture(scope="session")
def model_of(
    tmp_path_factory: pytest.TempPathFactory, models: ModuleType, text_models: ModuleType
) -> Callable[[str], Path]:
    """The diffusers directory of each kind."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            path = tmp_path_factory.mktemp(kind) / "model"
            save = text_models.save_text_model if kind in text_models.TEXT_MAKERS else models.save_model
            made[kind] = save(kind, path)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def loaded(model_of: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    """Each kind in memory; shared, so never changed."""
    made: dict[str, LoadedModel] = {}

    def get(kind: str) -> LoadedModel:
        if kind not in made:
            made[kind] = load_model(model_of(kind))
        return made[kind]

    return get


@pytest.fixture(scope="session")
def checkpoint_of(model_of: Callable[[str], Path]) -> Callable[[str], Path]:
    """Each kind at W4A8, finetuned for a step in each phase."""
    from quest_deploy.quantize.finetune import finetune

    def get(kind: str) -> Path:
        path = model_of(kind).with_name("checkpoint")
        if not path.exists():
            finetune(model_of(kind), path, FinetuneConfig(recipe=RECIPE))
        return path

    return get


@pytest.fixture(scope="session")
def onnx_of(checkpoint_of: Callable[[str], Path]) -> Callable[[str, str], Path]:
    """Each kind exported for a target."""
    from quest_deploy.export.to_onnx import export

    def get(kind: str, target: str) -> Path:
        path = checkpoint_of(kind).with_name(target)
        if not path.exists():
            export(checkpoint_of(kind), path, ExportConfig(target=target))
        return path

    return get

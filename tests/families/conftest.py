"""A tiny model of each kind, quantized, and exported for ONNX Runtime: made once for all tests here."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from quest_deploy.config import ExportConfig, FinetuneConfig, ParityConfig, PhaseConfig, Recipe
from quest_deploy.model.load import LoadedModel, load_model
from quest_deploy.parity import compare
from quest_deploy.parity.gates import Gate
from quest_deploy.quantize.insert import quantizable_layers
from tests.families import models as no_text
from tests.families import text_models as text

Watch = Callable[[LoadedModel, Iterable[str]], contextlib.AbstractContextManager[dict[str, Tensor]]]
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


@pytest.fixture(scope="session")
def models() -> ModuleType:
    """Makers of tiny models that read no text."""
    return no_text


@pytest.fixture(scope="session")
def text_models() -> ModuleType:
    """Makers of tiny models that read text."""
    return text


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


@pytest.fixture
def altered(model_of: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a model of that kind, where one of its JSON files says something else."""

    def make(kind: str, file: str, **changes: Any) -> Path:
        copy = tmp_path / f"altered {kind}"
        if not copy.exists():
            shutil.copytree(model_of(kind), copy)
        (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | changes))
        return copy

    return make


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


@pytest.fixture
def outputs_at() -> Watch:
    """What layers of a denoiser answer while the body runs, by name."""

    @contextlib.contextmanager
    def watch(model: LoadedModel, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, args, output: seen.update({name: output})

        layers = quantizable_layers(model.denoiser)
        handles = [layers[name].register_forward_hook(keep(name)) for name in names]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    return watch


@pytest.fixture
def deployment_gates(
    model_of: Callable[[str], Path],
    checkpoint_of: Callable[[str], Path],
    onnx_of: Callable[[str, str], Path],
    tmp_path: Path,
) -> Callable[[str], dict[str, Gate]]:
    """The gates of each kind in ONNX Runtime against torch, by quantity."""

    def get(kind: str) -> dict[str, Gate]:
        result = compare(
            model_of(kind),
            onnx_of(kind, "onnxruntime"),
            tmp_path / "parity",
            ParityConfig(num_prompts=2, steps=2, guidance_scale=3.0),
            via=(checkpoint_of(kind),),
        )
        return {gate.quantity: gate for gate in result.gates if gate.rung == "onnx"}

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

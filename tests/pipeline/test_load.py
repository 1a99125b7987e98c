"""Opening artifacts: the right backend by default, and a refusal that names the command where it does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quest_deploy.errors import ArtifactError, ConfigError
from quest_deploy.model.families import TextPart
from quest_deploy.pipeline import load_pipeline
from quest_deploy.pipeline.load import _load_tokenizer
from quest_deploy.pipeline.request import own_scheduler


def test_a_model_runs_on_torch(tiny_model: Path) -> None:
    with load_pipeline(tiny_model) as pipeline:
        assert (pipeline.stage, pipeline.backend) == ("model", "torch")


def test_onnx_runs_on_onnx_runtime(tiny_onnx: Path) -> None:
    with load_pipeline(tiny_onnx) as pipeline:
        assert (pipeline.stage, pipeline.backend, pipeline.device.type) == ("onnx", "onnxruntime", "cpu")


def test_onnx_brings_the_tokenizer_and_the_scheduler_of_its_model(tiny_model: Path, tiny_onnx: Path) -> None:
    with load_pipeline(tiny_model) as model, load_pipeline(tiny_onnx) as exported:
        assert exported.tokenizer("a red heart").input_ids == model.tokenizer("a red heart").input_ids
        assert type(exported.scheduler) is type(model.scheduler)
        assert exported.scheduler.config == model.scheduler.config


@pytest.mark.parametrize(
    ("backend", "command"),
    [
        ("onnxruntime", "quest-deploy export --target onnxruntime"),
        ("tensorrt-rtx", "quest-deploy build-engine --backend tensorrt-rtx"),
    ],
)
def test_a_backend_that_cannot_run_a_model_names_what_makes_it_one_that_can(
    tiny_model: Path, backend: str, command: str
) -> None:
    with pytest.raises(ConfigError, match=f"backend {backend} cannot run .* stage 'model' .*`{command}`"):
        load_pipeline(tiny_model, backend=backend)


def test_an_unknown_backend_is_refused_with_the_known_ones(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="backend is 'jax', expected one of torch, onnxruntime"):
        load_pipeline(tiny_model, backend="jax")


def test_no_threads_are_refused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="threads is 0, expected at least 1"):
        load_pipeline(tiny_model, threads=0)


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def rewrite(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_tokenizer_of_another_kind_is_refused(model: Path) -> None:
    rewrite(model / "model_index.json", tokenizer=["transformers", "T5Tokenizer"])
    with pytest.raises(ArtifactError, match="the tokenizer is a T5Tokenizer, expected one of CLIPTokenizer"):
        _load_tokenizer(model, TextPart())


def test_an_index_without_a_tokenizer_is_refused(model: Path) -> None:
    rewrite(model / "model_index.json", tokenizer=None)
    with pytest.raises(ArtifactError, match="'tokenizer' is None, expected a library and a class"):
        _load_tokenizer(model, TextPart())


def test_a_damaged_tokenizer_is_refused(model: Path) -> None:
    shutil.rmtree(model / "tokenizer")
    with pytest.raises(ArtifactError, match="tokenizer/vocab.json' is missing; restore"):
        _load_tokenizer(model, TextPart())


def test_a_scheduler_that_diffusers_does_not_have_is_refused(model: Path) -> None:
    rewrite(model / "model_index.json", scheduler=["diffusers", "PickleScheduler"])
    with pytest.raises(ConfigError, match="'PickleScheduler' is unknown"):
        own_scheduler(model)

"""The safety checker travels with the model, and blackens what it flags as diffusers does."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from quest_deploy.artifacts import Artifact
from quest_deploy.config import ExportConfig, FinetuneConfig, GenerateConfig
from quest_deploy.engines.trt_build import copy_companions
from quest_deploy.errors import ArtifactError, ModelLoadError
from quest_deploy.export.to_onnx import copy_configuration, export
from quest_deploy.model.carried import copy_safety
from quest_deploy.model.load import load_model
from quest_deploy.pipeline import generate, load_pipeline
from quest_deploy.pipeline.images import to_pil
from quest_deploy.pipeline.safety import load_safety_checker
from quest_deploy.quantize.checkpoint import model_index
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.recipe import load_recipe

CPU = torch.device("cpu")
CONFIG = GenerateConfig(prompts=("red heart", "snowman"), steps=1, seed=5)
FILES = {
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "feature_extractor/preprocessor_config.json",
}
# Cosines lie in [-1, 1].
ALWAYS, NEVER = -2.0, 2.0


def make_checker(folder: Path) -> None:
    """A `StableDiffusionSafetyChecker` of a few thousand weights."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(vision_config=vision, projection_dim=6)
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(folder / "feature_extractor")


def set_thresholds(model: Path, value: float) -> None:
    """Thresholds of all concepts: the checker flags what is nearer than that to one of them."""
    file = model / "safety_checker" / "model.safetensors"
    tensors = load_file(file)
    tensors |= {
        name: torch.full_like(tensor, value) for name, tensor in tensors.items() if name.endswith("_weights")
    }
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def checked_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with a safety checker that flags nothing, and with the texts that go with a model."""
    torch.manual_seed(0)
    path = shutil.copytree(tiny_model, tmp_path_factory.mktemp("checked") / "model")
    make_checker(path)
    set_thresholds(path, NEVER)
    index = json.loads((path / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (path / "model_index.json").write_text(json.dumps(index))
    for name in ("LICENSE-MODEL.txt", "Notice.md", "README.md"):
        (path / name).write_text(f"{name} of the model\n")
    return path


@pytest.fixture
def copy(tmp_path: Path, checked_model: Path) -> Callable[[float], Path]:
    """Makes a copy with other thresholds."""

    def make(threshold: float) -> Path:
        path = shutil.copytree(checked_model, tmp_path / "model")
        set_thresholds(path, threshold)
        return path

    return make


@pytest.fixture
def pickled(copy: Callable[[float], Path]) -> Path:
    """A model whose safety checker comes as a pickle."""
    path = copy(NEVER)
    (path / "safety_checker" / "model.safetensors").rename(path / "safety_checker" / "pytorch_model.bin")
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, checked_model: Path, tiny_recipe: Path) -> Artifact:
    output = tmp_path_factory.mktemp("checked") / "checkpoint"
    recipe = load_recipe(str(tiny_recipe))
    return finetune(checked_model, output, FinetuneConfig(recipe=recipe, prompts=("rocket", "pizza")))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, checkpoint: Artifact) -> Artifact:
    return export(checkpoint.path, tmp_path_factory.mktemp("checked") / "onnx", ExportConfig())


def pixels(images: Artifact, index: int = 0) -> np.ndarray:
    with Image.open(images.path / f"image-{index:05}.png") as image:
        return np.asarray(image)


def metadata(images: Artifact) -> dict[str, str]:
    with Image.open(images.path / "image-00000.png") as image:
        return dict(image.text)


def test_what_is_flagged_is_black_and_said_to_be(
    copy: Callable[[float], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        images = generate(copy(ALWAYS), tmp_path / "images", CONFIG)
    assert not pixels(images, 0).any() and not pixels(images, 1).any()
    assert metadata(images)["safety_checker"].startswith("flagged")
    assert images.manifest.details["safety_checker"] is True
    assert [image["flagged"] for image in images.manifest.details["images"]] == [True, True]
    assert "the safety checker flagged 2 of 2 images, which are black: image-00000.png" in caplog.text


def test_what_passes_is_what_the_unchecked_pipeline_draws(
    checked_model: Path, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        images = generate(checked_model, tmp_path / "checked", CONFIG)
    without = generate(tiny_model, tmp_path / "without", CONFIG)
    assert np.array_equal(pixels(images), pixels(without)) and pixels(images).any()
    assert (metadata(images)["safety_checker"], metadata(without)["safety_checker"]) == (
        "passed",
        "not asked",
    )
    assert without.manifest.details["safety_checker"] is False
    assert "flagged 0 of 2 images" in caplog.text


def test_it_can_be_switched_off(copy: Callable[[float], Path], tmp_path: Path) -> None:
    config = GenerateConfig(prompts=("red heart",), steps=1, safety_checker=False)
    images = generate(copy(ALWAYS), tmp_path / "images", config)
    assert pixels(images).any() and images.manifest.config["safety_checker"] is False


def test_it_says_what_the_pipeline_of_diffusers_says(copy: Callable[[float], Path]) -> None:
    from diffusers import StableDiffusionPipeline

    path = copy(NEVER)
    checker = load_safety_checker(path, CPU)
    pictures = torch.rand(6, 3, 16, 16)
    theirs = StableDiffusionPipeline.from_pretrained(path)
    prepared = checker.processor([to_pil(picture) for picture in pictures], return_tensors="pt").pixel_values
    with torch.no_grad():
        embeds = checker.module.visual_projection(checker.module.vision_model(prepared)[1])
    nearness = torch.cosine_similarity(embeds, embeds[:1])
    # Every concept is the first picture, and half of the pictures are near enough.
    for module in (checker.module, theirs.safety_checker):
        module.concept_embeds.data[:] = embeds[0]
        module.concept_embeds_weights.data[:] = nearness.median() + 0.001
    ours, flags = checker.check(pictures)
    want, expected = theirs.run_safety_checker(pictures * 2 - 1, CPU, torch.float32)
    assert flags == list(expected) and flags[0] and not all(flags)
    assert torch.equal(ours == 0, want == 0)
    assert torch.equal(ours[~torch.tensor(flags)], pictures[~torch.tensor(flags)])


def test_checking_leaves_the_images_given_alone(copy: Callable[[float], Path]) -> None:
    pictures = torch.rand(2, 3, 16, 16)
    before = pictures.clone()
    checked, flags = load_safety_checker(copy(ALWAYS), CPU).check(pictures)
    assert flags == [True, True] and not checked.any()
    assert torch.equal(pictures, before)


def test_a_checkpoint_brings_it(checkpoint: Artifact, tmp_path: Path) -> None:
    assert FILES | {"LICENSE-MODEL.txt", "Notice.md", "README.md"} <= checkpoint.manifest.files.keys()
    images = generate(checkpoint.path, tmp_path / "images", CONFIG)
    assert images.manifest.details["safety_checker"] is True


@pytest.mark.thorough
def test_an_export_brings_it(exported: Artifact, tmp_path: Path) -> None:
    assert FILES | {"LICENSE-MODEL.txt", "Notice.md", "README.md"} <= exported.manifest.files.keys()
    images = generate(exported.path, tmp_path / "images", CONFIG)
    assert (images.manifest.details["safety_checker"], metadata(images)["safety_checker"]) == (True, "passed")


@pytest.mark.thorough
def test_engines_bring_it(exported: Artifact, tmp_path: Path) -> None:
    copy_companions(exported, tmp_path / "engines")
    assert load_safety_checker(tmp_path / "engines", CPU) is not None
    assert (tmp_path / "engines" / "LICENSE-MODEL.txt").is_file()


def test_another_precision_of_the_weights_stays_behind(copy: Callable[[float], Path], tmp_path: Path) -> None:
    path = copy(NEVER)
    weights = path / "safety_checker" / "model.safetensors"
    shutil.copyfile(weights, weights.with_name("model.fp16.safetensors"))
    (tmp_path / "onnx").mkdir()
    copy_configuration(path, tmp_path / "onnx")
    got = {file.name for file in (tmp_path / "onnx" / "safety_checker").iterdir()}
    assert got == {"config.json", "model.safetensors"}


def test_a_pickled_checker_is_left_behind_with_a_warning(
    pickled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "onnx"
    output.mkdir()
    copy_configuration(pickled, output)
    assert "left behind, so images will not be checked" in caplog.text
    assert "pytorch_model.bin' is a pickle" in caplog.text and "convert it in a sandbox" in caplog.text
    assert not (output / "safety_checker").exists() and not (output / "feature_extractor").exists()
    index = json.loads((output / "model_index.json").read_text())
    assert (index["safety_checker"], index["requires_safety_checker"]) == ([None, None], False)
    assert load_safety_checker(output, CPU) is None


def test_a_checkpoint_does_not_name_a_checker_that_was_left_behind(
    pickled: Path, checkpoint: Artifact, tmp_path: Path
) -> None:
    model = load_model(pickled)
    carried = json.loads((checkpoint.path / "model_index.json").read_text())
    assert carried["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    assert copy_safety(pickled, tmp_path, model.index) == {}
    assert model_index(model)["safety_checker"] == [None, None]


def test_drawing_with_a_model_refuses_a_pickled_checker(pickled: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is a pickle .*--no-safety-checker"):
        generate(pickled, tmp_path / "images", CONFIG)
    assert not (tmp_path / "images").exists()


def test_a_checker_that_is_named_and_missing_is_refused(copy: Callable[[float], Path]) -> None:
    path = copy(NEVER)
    shutil.rmtree(path / "safety_checker")
    with pytest.raises(ArtifactError, match=r"safety_checker' is missing, .*--no-safety-checker"):
        load_safety_checker(path, CPU)


def test_a_checker_that_lacks_a_tensor_is_refused(copy: Callable[[float], Path]) -> None:
    path = copy(NEVER)
    file = path / "safety_checker" / "model.safetensors"
    tensors = load_file(file)
    del tensors["concept_embeds"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="1 tensors of the StableDiffusionSafetyChecker are missing"):
        load_safety_checker(path, CPU)


@pytest.mark.parametrize(
    ("part", "entry", "message"),
    [
        (
            "safety_checker",
            ["deepfloyd_if", "IFSafetyChecker"],
            "safety_checker is IFSafetyChecker, expected",
        ),
        ("feature_extractor", None, "feature_extractor is None, expected CLIPImageProcessor"),
    ],
)
def test_a_checker_of_another_kind_is_refused(
    copy: Callable[[float], Path], part: str, entry: Any, message: str
) -> None:
    path = copy(NEVER)
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {part: entry}))
    with pytest.raises(ArtifactError, match=message):
        load_safety_checker(path, CPU)


@pytest.mark.parametrize(("wanted", "black"), [(True, True), (False, False)])
def test_the_drop_in_has_it_unless_told_otherwise(
    copy: Callable[[float], Path], wanted: bool, black: bool
) -> None:
    with load_pipeline(copy(ALWAYS)) as opened:
        pipeline = opened.as_diffusers(safety_checker=wanted)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline("red heart", num_inference_steps=1, output_type="np").images
    assert (not images.any()) is black


def test_the_drop_in_does_without_it_neither_from_another_working_directory_nor_when_it_is_gone(
    copy: Callable[[float], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy(ALWAYS)
    monkeypatch.chdir(path.parent)
    with load_pipeline(Path(path.name)) as opened:
        monkeypatch.chdir("/")
        assert opened.as_diffusers().safety_checker is not None
        shutil.rmtree(path)
        with pytest.raises(ArtifactError, match="model_index.json"):
            opened.as_diffusers()

"""The generate stage: what it writes, and that it writes the same again."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from quest_deploy.artifacts import Artifact, hash_directory
from quest_deploy.config import GenerateConfig, RunConfig
from quest_deploy.errors import ArtifactError, ConfigError, StaleArtifactError
from quest_deploy.pipeline import Pipeline, generate, load_pipeline
from quest_deploy.pipeline.stage import sheet_columns

CONFIG = GenerateConfig(
    prompts=("red heart", "snowman"),
    negative_prompt="blue",
    steps=2,
    guidance_scale=3.0,
    seed=5,
    num_images=2,
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Artifact:
    return generate(tiny_model, tmp_path_factory.mktemp("drawn") / "images", CONFIG)


def test_it_writes_an_image_each_and_a_contact_sheet(drawn: Artifact) -> None:
    assert sorted(drawn.manifest.files) == [
        "contact-sheet.png",
        *(f"image-{index:05}.png" for index in range(4)),
    ]


def test_the_manifest_tells_how_the_runtime_was_told_to_run(tiny_onnx: Path, tmp_path: Path) -> None:
    config = GenerateConfig(prompts=("red heart",), steps=1)
    done = generate(tiny_onnx, tmp_path / "images", config, run=RunConfig(provider="cpu"), threads=1)
    details = done.manifest.details
    assert details["run"] == {"provider": "cpu", "cuda_graphs": True, "gpu_weights_gb": None}
    assert details["threads"] == 1


def test_images_have_the_models_size(drawn: Artifact) -> None:
    with Image.open(drawn.path / "image-00000.png") as image:
        assert image.size == (16, 16)


def test_the_metadata_is_enough_to_draw_the_image_again(
    drawn: Artifact, tiny_model: Path, tmp_path: Path
) -> None:
    with Image.open(drawn.path / "image-00003.png") as image:
        text = dict(image.text)
        pixels = image.tobytes()
    again = GenerateConfig(
        prompts=(text["prompt"],),
        negative_prompt=text["negative_prompt"],
        seed=int(text["seed"]),
        steps=int(text["steps"]),
        guidance_scale=float(text["guidance_scale"]),
        scheduler=text["scheduler"],
        # The same batch of four, of which the first is the image.
        num_images=4,
    )
    repeated = generate(tiny_model, tmp_path / "again", again, backend=text["backend"])
    with Image.open(repeated.path / "image-00000.png") as image:
        worst = max(abs(a - b) for a, b in zip(image.tobytes(), pixels, strict=True))
    # Another place in the batch may change the last bits of a convolution.
    assert worst <= 1


def test_the_metadata_names_what_drew_it(drawn: Artifact, tiny_model: Path) -> None:
    with Image.open(drawn.path / "image-00002.png") as image:
        text = image.text
    assert (text["prompt"], text["seed"], text["backend"]) == ("snowman", "7", "torch")
    assert (text["scheduler"], text["model_digest"]) == ("DDIMScheduler", hash_directory(tiny_model))
    assert text["software"].startswith("quest-deploy ")


def test_the_manifest_has_prompt_seed_and_seconds_of_every_image(drawn: Artifact) -> None:
    details = drawn.manifest.details
    assert [(image["prompt"], image["seed"]) for image in details["images"]] == [
        ("red heart", 5), ("red heart", 6), ("snowman", 7), ("snowman", 8),
    ]  # fmt: skip
    assert all(image["seconds"] > 0 for image in details["images"])
    assert details["seconds_per_image"] > 0 and details["backend"] == "torch"


def test_the_same_request_gives_the_same_artifact(drawn: Artifact, tiny_model: Path, tmp_path: Path) -> None:
    assert generate(tiny_model, tmp_path / "images", CONFIG).digest == drawn.digest


def test_onnx_is_named_by_its_digest(tiny_onnx: Path, tmp_path: Path) -> None:
    from quest_deploy.artifacts import read_artifact

    config = GenerateConfig(prompts=("cat",), steps=1, height=24, width=40)
    images = generate(tiny_onnx, tmp_path / "images", config)
    assert images.manifest.inputs == {"source": read_artifact(tiny_onnx).digest}
    with Image.open(images.path / "image-00000.png") as image:
        assert (image.size, image.text["backend"]) == ((40, 24), "onnxruntime")


def test_a_model_that_is_replaced_while_it_is_loaded_draws_nothing_under_the_others_name(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")

    def load(path: Path, **options: Any) -> Pipeline:
        pipeline = load_pipeline(path, **options)
        (path / "unet" / "README.md").write_text("another")
        return pipeline

    monkeypatch.setattr("quest_deploy.pipeline.stage.load_pipeline", load)
    with pytest.raises(StaleArtifactError, match="was changed while it was loaded"):
        generate(tmp_path / "model", tmp_path / "images", CONFIG)
    assert not (tmp_path / "images").exists()


def test_a_negative_prompt_without_guidance_is_told(
    tiny_onnx: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        generate(tiny_onnx, tmp_path / "with", GenerateConfig(prompts=("a",), negative_prompt="b", steps=1))
        assert "negative prompt" not in caplog.text
        without = GenerateConfig(prompts=("a",), negative_prompt="b", steps=1, guidance_scale=1.0)
        generate(tiny_onnx, tmp_path / "without", without)
    assert "the guidance scale is not above 1, so the negative prompt has no effect" in caplog.text


def test_a_refused_request_leaves_nothing_behind(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown"):
        generate(tiny_model, tmp_path / "images", GenerateConfig(prompts=("a",), scheduler="no"))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_the_model_is_loaded(drawn: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="exists already; add --overwrite"):
        generate(tmp_path / "no model", drawn.path, CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ()}, "no prompt was given"),
        ({"scheduler": "no"}, "scheduler 'no' is unknown"),
        ({"steps": 2000}, "cannot make a schedule of 2000 steps"),
    ],
    ids=["prompt", "scheduler", "steps"],
)
def test_what_the_model_cannot_draw_is_refused_before_it_is_loaded(
    change: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("quest_deploy.pipeline.stage.load_pipeline")
    with pytest.raises(ConfigError, match=message):
        generate(tiny_model, tmp_path / "images", dataclasses.replace(CONFIG, **change))


def test_the_manifest_is_plain_json(drawn: Artifact) -> None:
    assert json.loads((drawn.path / "manifest.json").read_text())["stage"] == "images"


@pytest.mark.parametrize(
    ("cells", "num_images", "columns"),
    [(1, 1, 1), (2, 1, 2), (9, 1, 3), (96, 1, 8), (10, 2, 4), (8, 8, 8), (20, 20, 5)],
)
def test_the_sheet_is_about_square_with_a_prompts_images_in_one_row(
    cells: int, num_images: int, columns: int
) -> None:
    assert sheet_columns(cells, num_images) == columns

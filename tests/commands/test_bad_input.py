"""Bad input at every stage, through the command line: one message, exit code 1, nothing half-written left."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from quest_deploy.commands import main
from quest_deploy.engines.libraries import gpus

FAST = ("--steps", "2", "--guidance-scale", "2")
WEIGHTS = {"onnx": "unet/model.onnx", "checkpoint": "unet/quest.safetensors"}


def refuse(place: Path, verb: str, *arguments: object) -> str:
    """Run a verb that has to refuse its input: its message. Nothing may appear in `place`, its output's directory."""
    place.mkdir()
    output = () if verb == "inspect" else ("-o", str(place / "out"))
    done = CliRunner().invoke(main, [verb, *map(str, arguments), *output])
    message = done.stderr.strip().splitlines()[-1]
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    assert message.startswith("Error: ")
    assert "unexpected" not in message
    assert "Traceback" not in done.stderr
    assert list(place.iterdir()) == []
    return message


def flip_bit(file: Path, position: float = 0.5) -> None:
    """Flip one bit, `position` of the way into the file."""
    data = bytearray(file.read_bytes())
    data[int(position * (len(data) - 1))] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    """Keep the first half."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def set_version(artifact: Path, version: object) -> None:
    file = artifact / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": version}))


# Damaged artifacts: what each verb that reads one says

READERS = [
    ("export", "checkpoint"),
    ("generate", "checkpoint"),
    ("parity", "checkpoint"),
    ("inspect", "checkpoint"),
    ("build-engine", "onnx"),
    ("generate", "onnx"),
    ("parity", "onnx"),
    ("inspect", "onnx"),
]
# Name -> (damage to (artifact, its main weight file), part of the message).
DAMAGE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing": (lambda artifact, file: shutil.rmtree(artifact), "does not exist"),
    "no manifest": (lambda artifact, file: (artifact / "manifest.json").unlink(), "has no manifest.json"),
    "corrupt manifest": (
        lambda artifact, file: (artifact / "manifest.json").write_text("{]"),
        "not valid JSON",
    ),
    "truncated manifest": (lambda artifact, file: truncate(artifact / "manifest.json"), "not valid JSON"),
    "newer version": (
        lambda artifact, file: set_version(artifact, 2),
        "schema version 2, this quest-deploy reads 1",
    ),
    "wrong version": (
        lambda artifact, file: set_version(artifact, "one"),
        "schema version 'one', expected 1",
    ),
    "missing weights": (lambda artifact, file: file.unlink(), "{file} is missing"),
    "truncated weights": (lambda artifact, file: truncate(file), "{file} is truncated"),
    "bit-flipped weights": (lambda artifact, file: flip_bit(file), "{file} has changed"),
    "corrupt configuration": (
        lambda artifact, file: (artifact / "unet" / "config.json").write_text("{"),
        "unet/config.json is truncated",
    ),
    "foreign file": (
        lambda artifact, file: (artifact / "unet" / "x.json").write_text("{}"),
        "not in the manifest",
    ),
}


@pytest.mark.parametrize(
    ("name", "verb", "stage"),
    [
        pytest.param(name, *reader, id=f"{name}-{'-'.join(reader)}")
        for name in DAMAGE
        for reader in READERS
        # Without a manifest, graphs in full precision are those of any other tool.
        if (name, reader[1]) != ("no manifest", "onnx")
    ],
)
def test_damaged_artifact(
    verb: str, stage: str, name: str, tmp_path: Path, tiny_model: Path, request: pytest.FixtureRequest
) -> None:
    artifact = shutil.copytree(request.getfixturevalue(f"tiny_{stage}"), tmp_path / "artifact")
    damage, message = DAMAGE[name]
    damage(artifact, artifact / WEIGHTS[stage])
    arguments: dict[str, tuple[object, ...]] = {
        "generate": (artifact, "a prompt", *FAST),
        "parity": (tiny_model, artifact, *FAST, "--num-prompts", 1),
    }
    got = refuse(tmp_path / "place", verb, *arguments.get(verb, (artifact,)))
    assert message.format(file=WEIGHTS[stage]) in got


@pytest.mark.parametrize(
    ("verb", "needed", "made_by"),
    [("build-engine", "onnx", "quest-deploy export")],
)
def test_artifact_of_the_wrong_stage(
    verb: str, needed: str, made_by: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    message = refuse(tmp_path / "place", verb, tiny_checkpoint)
    assert f"stage 'checkpoint', expected stage '{needed}'" in message
    assert made_by in message


# Damaged models: they have no manifest, so what a verb can find is what does not parse

MODEL_READERS = ("finetune", "export", "generate", "parity", "inspect")
UNET = "unet/diffusion_pytorch_model.safetensors"
MODEL_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "model"),
    "empty directory": (lambda m: [shutil.rmtree(m), m.mkdir()], "model_index.json"),
    "corrupt index": (lambda m: (m / "model_index.json").write_text("{]"), "model_index.json"),
    "other pipeline": (
        lambda m: (m / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}'),
        "got a KandinskyPipeline, expected one of StableDiffusionPipeline",
    ),
    "missing configuration": (lambda m: (m / "unet" / "config.json").unlink(), "unet/config.json"),
    "truncated configuration": (lambda m: truncate(m / "unet" / "config.json"), "unet/config.json"),
}
WEIGHT_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing weights": (lambda m: (m / UNET).unlink(), "unet: holds no diffusion_pytorch_model.safetensors"),
    "truncated weights": (lambda m: truncate(m / UNET), UNET),
    "bit-flipped header": (lambda m: flip_bit(m / UNET, 0.0), UNET),
    "pickled weights": (
        lambda m: [(m / UNET).unlink(), (m / "unet" / "pytorch_model.bin").write_bytes(pickle.dumps({}))],
        "is a pickle (.bin)",
    ),
}


def read_model(place: Path, verb: str, model: object, sound_model: Path) -> str:
    arguments: dict[str, tuple[object, ...]] = {
        "generate": (model, "a prompt", *FAST),
        "parity": (model, sound_model, *FAST, "--num-prompts", 1),
    }
    return refuse(place, verb, *arguments.get(verb, (model,)))


@pytest.mark.parametrize("verb", MODEL_READERS)
@pytest.mark.parametrize("name", MODEL_DAMAGE)
def test_damaged_model(verb: str, name: str, tmp_path: Path, model: Path, tiny_model: Path) -> None:
    damage, message = MODEL_DAMAGE[name]
    damage(model)
    assert message in read_model(tmp_path / "place", verb, model, tiny_model)


@pytest.mark.parametrize("verb", ["finetune", "export", "generate", "parity"])
@pytest.mark.parametrize("name", WEIGHT_DAMAGE)
def test_damaged_weights(verb: str, name: str, tmp_path: Path, model: Path, tiny_model: Path) -> None:
    damage, message = WEIGHT_DAMAGE[name]
    damage(model)
    assert message in read_model(tmp_path / "place", verb, model, tiny_model)


@pytest.mark.parametrize("verb", MODEL_READERS)
@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".pt", ".bin"])
def test_pickled_checkpoint(verb: str, suffix: str, tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(pickle.dumps({"state_dict": {}}))
    message = read_model(tmp_path / "place", verb, file, tiny_model)
    assert f"is a pickle ({suffix})" in message
    assert "save_file" in message


# Options


def test_unknown_recipe(tmp_path: Path, tiny_model: Path) -> None:
    message = refuse(tmp_path / "place", "finetune", tiny_model, "--recipe", "w3a3")
    assert "w3a3" in message
    for known in ("w8a8", "w4a8", "w4a4"):
        assert known in message


@pytest.mark.parametrize("content", ["", "{", "- 1", "bits: 3", "\x00", "!!python/object/apply:os.getcwd []"])
def test_recipe_file_that_is_no_recipe(content: str, tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    message = refuse(tmp_path / "place", "finetune", tiny_model, "--recipe", tmp_path / "mine.yaml")
    assert "recipe" in message
    assert "mine" in message


@pytest.mark.parametrize("verb", ["generate", "parity"])
def test_unknown_scheduler(verb: str, tmp_path: Path, tiny_model: Path, tiny_onnx: Path) -> None:
    what = (tiny_onnx, "a prompt") if verb == "generate" else (tiny_model, tiny_onnx, "--num-prompts", 1)
    message = refuse(tmp_path / "place", verb, *what, "--steps", 2, "--scheduler", "eulr")
    assert "scheduler 'eulr' is unknown" in message
    assert "euler" in message


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        (["generate", "x", "a prompt", "--backend", "cuda"], "'onnxruntime'"),
        (["build-engine", "x", "--backend", "onnxruntime"], "'tensorrt-rtx'"),
        (["export", "x", "--target", "openvino"], "'tensorrt-rtx'"),
    ],
)
def test_unknown_backend_is_a_usage_error_with_the_choices(
    arguments: list[str], choices: str, tmp_path: Path
) -> None:
    done = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert choices in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_provider_that_is_not_here(tmp_path: Path, tiny_onnx: Path) -> None:
    message = refuse(tmp_path / "p", "generate", tiny_onnx, "rocket", "--provider", "cuda", *FAST)
    assert "CUDAExecutionProvider" in message and "ask for the CPU provider" in message


def test_provider_of_a_runtime_that_has_none(tmp_path: Path, tiny_model: Path) -> None:
    message = refuse(tmp_path / "p", "generate", tiny_model, "rocket", "--provider", "cpu", *FAST)
    assert "provider is cpu, but only onnxruntime has execution providers" in message


def test_backend_that_cannot_run_the_artifact(tmp_path: Path, tiny_onnx: Path) -> None:
    message = refuse(tmp_path / "place", "generate", tiny_onnx, "a prompt", "--backend", "tensorrt-rtx")
    assert "tensorrt-rtx" in message


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "0", "steps is 0, expected at least 1"),
        ("--seed", "-1", "seed is -1, expected at least 0"),
        ("--height", "63", "height is 63, expected a positive multiple of 8"),
        ("--seed", str(2**64), "seed is 18446744073709551616, expected at most 18446744073709551615"),
        ("--guidance-scale", "nan", "guidance_scale is nan"),
        ("--guidance-scale", "inf", "guidance_scale is inf, expected a finite number"),
        ("--negative-prompt", "caf\udce9", r"negative_prompt 'caf\udce9' is not UTF-8 text"),
    ],
)
def test_option_out_of_range(option: str, value: str, message: str, tmp_path: Path, tiny_onnx: Path) -> None:
    assert message in refuse(tmp_path / "place", "generate", tiny_onnx, "a prompt", option, value)


def test_prompt_of_another_encoding(tmp_path: Path, tiny_onnx: Path) -> None:
    message = refuse(tmp_path / "place", "generate", tiny_onnx, "tea", "caf\udce9")
    assert r"prompt 'caf\udce9' is not UTF-8 text" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "no prompt"),
        (b"# only\n\n", "no prompt"),
        (b"\xff\xfe\x00", "binary data"),
    ],
    ids=["missing", "empty", "comments", "binary"],
)
@pytest.mark.parametrize("verb", ["finetune", "generate", "parity"])
def test_prompt_file(
    verb: str, content: bytes | None, message: str, tmp_path: Path, tiny_model: Path
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    option = ("--prompts-file" if verb == "generate" else "--prompts", file)
    what = (tiny_model, tiny_model) if verb == "parity" else (tiny_model,)
    assert message in refuse(tmp_path / "place", verb, *what, *option)


def test_two_sources_of_prompts_are_a_usage_error(tmp_path: Path) -> None:
    prompts = ["a prompt", "--prompts-file", "x"]
    done = CliRunner().invoke(main, ["generate", "x", *prompts, "-o", str(tmp_path / "out")])
    assert (done.exit_code, "--prompts-file" in done.stderr) == (2, True)


def test_no_prompt_for_a_model_that_reads_text(tmp_path: Path, tiny_model: Path) -> None:
    assert "no prompt was given" in refuse(tmp_path / "place", "generate", tiny_model)


def test_profile_that_is_upside_down(tmp_path: Path, tiny_onnx: Path) -> None:
    message = refuse(tmp_path / "place", "build-engine", tiny_onnx, "--min-batch", 4, "--max-batch", 2)
    assert "expected 1 <= min <= opt <= max" in message


@pytest.mark.parametrize(
    "content", [None, "{", "[1]", "w8a8: 3"], ids=["missing", "corrupt", "list", "number"]
)
def test_budget_that_is_no_budget(content: str | None, tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "budget.yaml"
    if content is not None:
        file.write_text(content)
    message = refuse(tmp_path / "place", "parity", tiny_model, tiny_model, "--budget", file, *FAST)
    assert "budget.yaml" in message


# Outputs


@pytest.mark.parametrize(
    "arguments",
    [
        ("finetune", "MODEL"),
        ("export", "MODEL"),
        ("build-engine", "MODEL"),
        ("generate", "MODEL", "a prompt"),
        ("parity", "MODEL", "MODEL"),
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_output_with_files_of_the_user_is_left_alone(
    arguments: tuple[str, ...], flags: tuple[str, ...], tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    words = [str(tiny_model) if word == "MODEL" else word for word in arguments]
    done = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "out"), *flags])
    assert done.exit_code == 1
    assert "is not empty and holds no artifact, so it is left alone" in done.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["thesis.tex"]

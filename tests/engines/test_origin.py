"""What a manifest says about where engines were built, and the command that makes the same engines here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from quest_deploy import auto_fallback
from quest_deploy.artifacts import Artifact
from quest_deploy.commands import main
from quest_deploy.config import BuildConfig, ProfileConfig, ShapeRange, to_dict
from quest_deploy.engines.libraries import Gpu
from quest_deploy.engines.origin import build_options, differing, options_here, read_config
from quest_deploy.engines.trt_runtime import tell_other_gpu
from quest_deploy.errors import ConfigError
from quest_deploy.manifest import Manifest

RANGE, SIZE = ShapeRange(min=64, opt=128, max=256), ShapeRange(min=64, opt=64, max=64)
CONFIGS = {
    "default": BuildConfig(),
    "sizes": BuildConfig(batch=ShapeRange(min=2, opt=3, max=8), height=RANGE, width=SIZE),
    "profiles": BuildConfig(
        static=True,
        more_profiles=(
            ProfileConfig(static=True, batch=ShapeRange(min=1, opt=1, max=1)),
            ProfileConfig(static=True, height=RANGE, sequence=RANGE),
        ),
    ),
    "TensorRT": BuildConfig(
        backend="tensorrt",
        optimization_level=0,
        workspace_mb=5,
        hardware_compatible="ampere-plus",
        version_compatible=True,
    ),
    "TensorRT for RTX": BuildConfig(
        compute_capabilities=("8.6", "12.0"), weight_streaming=True, strip_weights=True
    ),
    "fallback": BuildConfig(auto_fallback=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_options_make_the_configuration_that_they_are_of(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[BuildConfig] = []

    def keep(onnx_dir, output, config, **_):
        got.append(config)
        raise ConfigError("enough")

    monkeypatch.setattr(auto_fallback, "build_engine", keep)
    done = CliRunner().invoke(main, ["build-engine", "onnx", "-o", "engines", *build_options(config).split()])
    assert got == [config], done.output


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_is_read_as_it_was_written(config: BuildConfig) -> None:
    assert read_config(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    "damage", [{"batch": 3}, {"more_profiles": ["x"]}, {"jobs": "x"}, {"height": {"min": 1}}]
)
def test_a_damaged_configuration_is_the_default_one_of_its_backend(damage: dict) -> None:
    assert read_config({"backend": "tensorrt", **damage}) == BuildConfig(backend="tensorrt")


def test_engines_are_made_for_the_gpu_that_is_here_and_with_their_weights() -> None:
    gpu = Gpu(name="NVIDIA A10", compute_capability="8.6")
    others = BuildConfig(compute_capabilities=("12.0",), strip_weights=True)
    assert options_here(others, gpu) == "--backend tensorrt-rtx --compute-capability 8.6"


@pytest.mark.parametrize(
    ("backend", "capability", "options"),
    [
        ("tensorrt-rtx", "7.5", "--backend tensorrt-rtx --compute-capability 7.5"),
        ("tensorrt-rtx", "12.1", "--backend tensorrt-rtx"),
        ("tensorrt", "7.5", "--backend tensorrt"),
    ],
)
def test_engines_for_a_gpu_that_the_default_leaves_out_are_made_for_it(
    backend: str, capability: str, options: str
) -> None:
    gpu = Gpu(name="NVIDIA X", compute_capability=capability)
    assert options_here(BuildConfig(backend=backend), gpu) == options


@pytest.mark.parametrize(("backend", "covered"), [("tensorrt-rtx", False), ("tensorrt", True)])
def test_engines_for_rtx_run_on_fewer_gpus_than_earlier_manifests_say(backend: str, covered: bool) -> None:
    details = {"library": "X", "library_version": "1", "compute_capability": "8.0 and later"}
    config = BuildConfig(
        backend=backend, hardware_compatible="none" if backend == "tensorrt-rtx" else "ampere-plus"
    )
    found = differing(details, config, "X 1", Gpu(name="NVIDIA H200", compute_capability="9.0"), "")
    said = "for compute capability 8.0, 8.6, 8.9, 12.0 and later (this is 9.0)"
    assert found == ([] if covered else [said])


@pytest.mark.parametrize(
    ("config", "gpu", "told"),
    [
        (BuildConfig(backend="tensorrt", static=True), "NVIDIA L4", True),
        (BuildConfig(backend="tensorrt", static=True), "NVIDIA L40S", False),
        (BuildConfig(backend="tensorrt", hardware_compatible="same-compute-capability"), "NVIDIA L4", False),
        (BuildConfig(), "NVIDIA L4", False),
    ],
    ids=["another", "the same", "for others", "for none in particular"],
)
def test_engines_that_load_on_another_model_of_gpu_are_told(
    config: BuildConfig, gpu: str, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = Manifest(
        schema_version=1, stage="engines", config=to_dict(config), details={"target_gpu": "NVIDIA L40S"},
        inputs={}, tools={}, files={},
    )  # fmt: skip
    source = Artifact(path=Path("engines"), manifest=manifest, digest="")
    tell_other_gpu(source, Gpu(name=gpu, compute_capability="8.9"))
    expected = "built on NVIDIA L40S, .* this is NVIDIA L4: .* --backend tensorrt --static`"
    assert bool(re.search(expected, caplog.text)) is bool(caplog.records) is told

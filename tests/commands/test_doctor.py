"""What doctor concludes from what it found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

from quest_deploy.commands import doctor as module
from quest_deploy.commands import main
from quest_deploy.commands.doctor import (
    PACKAGES,
    Ability,
    Package,
    explain_recipes,
    find_abilities,
    find_gpus,
    find_packages,
    render_gpus,
    render_recipes,
    run_probe,
)
from quest_deploy.engines import libraries
from quest_deploy.engines.libraries import Gpu


def installed(**changes: Package) -> dict[str, Package]:
    """Every library at version 1.0, but for `changes`."""
    return {name: changes.get(name, package(name)) for name in PACKAGES}


def package(name: str, version: str | None = "1.0", problem: str = "", note: str = "") -> Package:
    return Package(name=name, version=version, purpose=PACKAGES[name], problem=problem, note=note)


def ability(
    name: str, packages: dict[str, Package], driver_problem: str = "", gpus: Sequence[Gpu] = ()
) -> Ability:
    return next(item for item in find_abilities(packages, gpus, driver_problem) if item.name == name)


def on_gpu(name: str, capability: str, *, cuda: bool = True) -> Ability:
    """An ability of a machine with such a GPU, and with a CUDA build of torch or another."""
    gpu = Gpu(name="NVIDIA X", compute_capability=capability)
    torch = package("torch", note=gpu.name if cuda else "")
    return ability(name, installed(torch=torch), gpus=[gpu])


def test_tensorrt_rtx_builds_without_a_gpu_but_does_not_run() -> None:
    build = ability("build-engine --backend tensorrt-rtx", installed(), "no NVIDIA driver")
    run = ability("generate --backend tensorrt-rtx", installed(), "no NVIDIA driver")
    assert (build.possible, run.possible) == (True, False)
    assert build.sentence == "TensorRT for RTX 1.0 can build engines here"
    assert run.sentence == "TensorRT for RTX 1.0 cannot run engines here: no NVIDIA driver"


def test_tensorrt_needs_the_gpu_to_build() -> None:
    assert not ability("build-engine --backend tensorrt", installed(), "no NVIDIA driver").possible
    assert ability("build-engine --backend tensorrt", installed()).possible


@pytest.mark.parametrize(
    ("name", "version", "old"),
    [
        ("onnxruntime", "1.30.0", True),
        ("onnxruntime", "1.32.0", False),
        ("openvino", "2026.3.1", True),
        ("openvino", "2026.4.1", False),
    ],
)
def test_a_runtime_that_is_too_old_for_some_exports_is_told(name: str, version: str, old: bool) -> None:
    found = ability(f"generate --backend {name}", installed(**{name: package(name, version)}))
    assert found.possible
    assert (f"pip install --upgrade {name}" in found.sentence) is old


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_engines_run_where_the_gpu_and_torch_take_them(backend: str) -> None:
    verb = f"generate --backend {backend}"
    assert on_gpu(verb, "8.9").possible
    without = on_gpu(verb, "8.9", cuda=False)
    assert not without.possible
    assert "cannot run engines here: torch 1.0 cannot use the GPU; install a CUDA build" in without.sentence
    assert on_gpu(f"build-engine --backend {backend}", "8.9", cuda=False).possible


def test_tensorrt_does_nothing_before_turing() -> None:
    for verb in ("build-engine", "generate"):
        found = on_gpu(f"{verb} --backend tensorrt", "6.1")
        assert not found.possible
        assert "NVIDIA X has compute capability 6.1, it wants 7.5 or later" in found.sentence
        assert on_gpu(f"{verb} --backend tensorrt", "7.5").possible


@pytest.mark.parametrize("capability", ["6.1", "8.7", "9.0", "10.3"])
def test_tensorrt_rtx_runs_nothing_on_gpus_that_it_does_not_support(capability: str) -> None:
    run = on_gpu("generate --backend tensorrt-rtx", capability)
    build = on_gpu("build-engine --backend tensorrt-rtx", capability)
    why = f"it does not support NVIDIA X, of compute capability {capability}"
    assert (run.possible, build.possible) == (False, True)
    assert run.sentence.endswith(f"cannot run engines here: {why}")
    assert build.sentence.endswith(f"can build engines here, for other GPUs alone: {why}")


def test_tensorrt_rtx_is_told_of_turing() -> None:
    run = on_gpu("generate --backend tensorrt-rtx", "7.5")
    build = on_gpu("build-engine --backend tensorrt-rtx", "7.5")
    assert run.possible and run.sentence.endswith("that were built with --compute-capability 7.5")
    assert build.possible and build.sentence.endswith("for this GPU only with --compute-capability 7.5")


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_missing_library_names_the_extra(backend: str) -> None:
    name = backend.replace("-", "_")
    found = ability(f"build-engine --backend {backend}", installed(**{name: package(name, version=None)}))
    assert not found.possible
    assert f"{name} is not installed; pip install 'quest-deploy[{backend}]'" in found.sentence


def test_library_that_does_not_import_is_not_promised() -> None:
    broken = package("onnxruntime", problem="ImportError: libfoo.so.1: cannot open shared object file")
    found = ability("generate --backend onnxruntime", installed(onnxruntime=broken))
    assert not found.possible
    assert "libfoo.so.1" in found.sentence


@pytest.mark.parametrize("verb", ["finetune", "export", "generate --backend torch"])
def test_no_torch_no_model(verb: str) -> None:
    found = ability(verb, installed(torch=package("torch", version=None)))
    assert (found.possible, found.sentence) == (False, "torch is not installed")


def test_library_that_crashes_is_a_problem_and_not_a_crash() -> None:
    note, problem = run_probe("import os; os.abort()")
    assert (note, problem) == ("", "ended with code -6")


def test_stubs_are_not_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """tensorrt-stubs, which the type checker needs, installs no tensorrt."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(module, "PACKAGES", {"tensorrt": "build-engine"})
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        assert find_packages()["tensorrt"].version is None


def test_word_that_is_no_compute_capability_is_refused_before_libraries_are_probed() -> None:
    done = CliRunner().invoke(main, ["doctor", "--compute-capability", "ada"])
    assert done.exit_code == 1
    assert "compute capability is 'ada', expected one like 8.9" in done.stderr


def test_recipes_are_explained_as_text() -> None:
    text = render_recipes(explain_recipes("8.9"))
    assert text.startswith("On a GPU of compute capability 8.9:\n  w8a8: 8-bit weights")
    assert "size and speed of w8a8" in text and "(nearest: w8a8)" in text


def test_without_a_gpu_the_option_is_named() -> None:
    assert "--compute-capability 8.9" in render_recipes({})


@pytest.mark.timeout(300)
def test_doctor_on_this_machine() -> None:
    done = CliRunner().invoke(main, ["doctor", "--json", "--compute-capability", "12.0"])
    found = json.loads(done.stdout)
    assert done.exit_code == 0
    assert found["packages"]["torch"]["usable"]
    assert {item["name"]: item["possible"] for item in found["abilities"]}["export"]
    assert list(found["recipes"]) == ["12.0"]
    assert bool(found["gpus"]) != bool(found["driver_problem"])


def test_gpus_are_described_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Gpu(name="NVIDIA RTX 5090", compute_capability="12.0", memory_bytes=32 * 10**9)
    monkeypatch.setattr(libraries, "gpus", lambda: [known])
    monkeypatch.setenv("PATH", "")
    found, problem = find_gpus()
    assert (found, problem) == ([known], "")
    shown = render_gpus([asdict(gpu) for gpu in found], "580.2")
    assert shown == "NVIDIA RTX 5090 (compute capability 12.0, 32.0 GB), driver 580.2"
    assert render_gpus([], "580.2") == ""


def test_probes_import_nothing_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shadow.py").write_text("print('run')")
    monkeypatch.chdir(tmp_path)
    assert run_probe("import shadow") == ("", "ModuleNotFoundError: No module named 'shadow'")

from __future__ import annotations

import ctypes
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from quest_deploy.config import BuildConfig
from quest_deploy.engines import libraries
from quest_deploy.errors import ConfigError, MissingDependencyError


@pytest.mark.parametrize(("backend", "module"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, backend: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'quest-deploy\[{backend}\]'"):
        libraries.check_tensorrt(backend)


def test_type_stubs_alone_are_not_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "only_stubs").mkdir()
    (tmp_path / "only_stubs" / "__init__.pyi").write_text("x: int\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(libraries._MODULES, "tensorrt", "only_stubs")
    with pytest.raises(MissingDependencyError, match="only_stubs"):
        libraries.check_tensorrt("tensorrt")


def test_library_whose_shared_objects_are_broken_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken_trt.py").write_text(
        "raise OSError('libnvinfer.so.10: cannot open shared object file')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(libraries._MODULES, "tensorrt", "broken_trt")
    with pytest.raises(MissingDependencyError, match=r"cannot be imported \(libnvinfer"):
        libraries.import_tensorrt("tensorrt")


def test_other_backends_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected one of tensorrt, tensorrt-rtx"):
        libraries.check_tensorrt("onnxruntime")


def test_no_driver_means_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert libraries.gpus() == []
    assert libraries.driver_version() == ""


class Driver:
    """A driver that knows one GPU."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: object) -> int:
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, device: object, index: int) -> int:
        return 0

    def cuDeviceGetName(self, name: ctypes.Array, size: int, device: object) -> int:
        name.value = b"NVIDIA RTX 5090"
        return 0

    def cuDeviceTotalMem_v2(self, size: object, device: object) -> int:
        size._obj.value = 32 * 10**9
        return 0

    def cuDeviceGetAttribute(self, value: object, attribute: int, device: object) -> int:
        value._obj.value = {75: 12, 76: 0}[attribute]
        return 0


def test_gpu_is_described_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    known = libraries.Gpu(name="NVIDIA RTX 5090", compute_capability="12.0", memory_bytes=32 * 10**9)
    assert libraries.gpus() == [known]


def test_driver_that_does_not_start_offers_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Driver):
        def cuInit(self, flags: int) -> int:
            return 100

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Failing())
    assert libraries.gpus() == []


class Management:
    """A management library that knows the driver's version, or does not."""

    def __init__(self, *, starts: bool = True, answers: bool = True) -> None:
        self.starts, self.answers = starts, answers

    def nvmlInit_v2(self) -> int:
        return 0 if self.starts else 1

    def nvmlSystemGetDriverVersion(self, text: ctypes.Array[ctypes.c_char], size: int) -> int:
        text.value = b"580.95.05"
        return 0 if self.answers else 1

    def nvmlShutdown(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("library", "version"),
    [(Management(), "580.95.05"), (Management(starts=False), ""), (Management(answers=False), "")],
    ids=["known", "not-loaded", "refused"],
)
def test_driver_version_is_what_the_driver_says(
    monkeypatch: pytest.MonkeyPatch, library: Management, version: str
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert libraries.driver_version() == version


@pytest.mark.parametrize(("capability", "refused"), [("7.5", True), ("8.0", False), ("12.0", False)])
def test_engines_for_ampere_and_later_are_not_built_on_earlier_gpus(
    monkeypatch: pytest.MonkeyPatch, capability: str, refused: bool
) -> None:
    gpu = libraries.Gpu(name="NVIDIA T4", compute_capability=capability)
    monkeypatch.setattr(libraries, "gpus", lambda: [gpu])
    monkeypatch.setattr(libraries, "check_capabilities", lambda backend, wanted: None)
    config = BuildConfig(backend="tensorrt", hardware_compatible="ampere-plus")
    expected = pytest.raises(ConfigError, match="T4 has compute capability 7.5") if refused else nullcontext()
    with expected:
        libraries.check_targets(config)


@pytest.mark.parametrize(
    ("package", "version", "old"),
    [
        ("onnxruntime", "1.22.1", True),
        ("onnxruntime", "1.31.0", False),
        ("onnxruntime", "1.100.0+cu130", False),
        ("openvino", "2026.3.0-22451-8a17657b995-releases/2026/3", True),
        ("openvino", "2026.4.1-22982-e213a147257-releases/2026/4", False),
    ],
)
def test_errors_of_versions_that_lack_something_tell_it(package: str, version: str, old: bool) -> None:
    assert (f"pip install --upgrade {package}" in libraries.age_of(package, version)) is old


def test_the_versions_are_those_that_are_installed_with_quest_deploy(repository: Path) -> None:
    wanted = re.findall(r'"(\w+)>=([\d.]+)(.*)"', (repository / "pyproject.toml").read_text())
    here = {package: least for package, least, marker in wanted if "<" not in marker}
    for package, least in libraries.TRIED_FROM.items():
        assert here[package] == ".".join(map(str, least))

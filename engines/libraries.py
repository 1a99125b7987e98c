"""Which accelerator libraries and GPUs this machine has, asked without initialising torch or building anything."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

from quest_deploy.config import TENSORRT_BACKENDS, BuildConfig
from quest_deploy.errors import ConfigError, MissingDependencyError

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}

TRIED_FROM = {"onnxruntime": (1, 31), "openvino": (2026, 4)}
"""The first versions that run every export, as pyproject.toml has them; earlier ones may be there all the same."""

TENSOR_FLOAT = "NVIDIA_TF32_OVERRIDE"
"""What NVIDIA's libraries ask the environment when they are loaded; "0" keeps them from rounding to TensorFloat-32."""

AMPERE = 8
"""Major number of its compute capability."""

# CUDA driver API: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_MAJOR_ATTRIBUTE, _MINOR_ATTRIBUTE = 75, 76
# NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE.
_NVML_VERSION_BYTES = 80


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU that the driver offers. `memory_bytes` is 0 where that is not known."""

    name: str
    compute_capability: str
    memory_bytes: int = 0


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs that this process may use; empty without a driver.

    Asks the driver's library itself, because a CPU build of torch sees no GPU even where there is one.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    return [_describe(driver, index) for index in range(count.value)]


def _describe(driver: ctypes.CDLL, index: int) -> Gpu:
    device, value, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    parts = []
    for attribute in (_MAJOR_ATTRIBUTE, _MINOR_ATTRIBUTE):
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        parts.append(str(value.value))
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=".".join(parts),
        memory_bytes=memory.value,
    )


def driver_version() -> str:
    """The NVIDIA driver's version, such as "580.95.05", as its management library gives it; "" where it gives none."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ""
    text = ctypes.create_string_buffer(_NVML_VERSION_BYTES)
    if library.nvmlInit_v2() != 0:
        return ""
    known = library.nvmlSystemGetDriverVersion(text, len(text)) == 0
    library.nvmlShutdown()
    return text.value.decode(errors="replace") if known else ""


def without_cuda(torch_version: str) -> str:
    """What to do about a torch that cannot use the GPU that is there: it has no CUDA, or one that is too new."""
    driver = driver_version()
    which = f" that driver {driver} runs, or a newer driver" if driver else ""
    return f"torch {torch_version} cannot use the GPU; install a CUDA build of torch{which} (https://pytorch.org/get-started)"


def age_of(package: str, version: str) -> str:
    """What an error of `package` adds, behind a space, where its version is earlier than exports need; "" otherwise."""
    least = TRIED_FROM[package]
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= least:
        return ""
    wanted = ".".join(map(str, least))
    python = " with Python 3.11 or later" if package == "onnxruntime" else ""
    upgrade = f"`pip install --upgrade {package}`{python}"
    return f" [{package} {version} is too old: some exports need {wanted}, run {upgrade}]"


def title_of(backend: str) -> str:
    """The product's name, for messages."""
    return _TITLES[backend]


def check_tensorrt(backend: str) -> None:
    """Check that a TensorRT flavour and Polygraphy are installed, without importing them.

    Raises:
        ConfigError: not a TensorRT backend.
        MissingDependencyError: names the extra to install.
    """
    if backend not in TENSORRT_BACKENDS:
        raise ConfigError(f"backend is {backend!r}, expected one of {', '.join(TENSORRT_BACKENDS)}")
    for module, title in ((_MODULES[backend], title_of(backend)), ("polygraphy", "Polygraphy")):
        if not _is_installed(module):
            raise MissingDependencyError(
                f"{title} is not installed (no module '{module}'); "
                f"run `pip install 'quest-deploy[{backend}]'`"
            )


def _is_installed(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return False
    # Type stubs leave a directory without code, which Python finds as a namespace package: it has no origin.
    return spec is not None and spec.origin is not None


def import_tensorrt(backend: str) -> ModuleType:
    """The TensorRT module of a backend.

    Raises:
        MissingDependencyError: not installed, or its shared libraries cannot be loaded.
    """
    check_tensorrt(backend)
    try:
        return importlib.import_module(_MODULES[backend])
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"{title_of(backend)} is installed but cannot be imported ({error}); "
            f"run `pip install --force-reinstall 'quest-deploy[{backend}]'`"
        ) from error


def supported_capabilities(backend: str) -> list[str]:
    """The compute capabilities that TensorRT for RTX can be told to build for, such as "8.6"; none of TensorRT."""
    named = getattr(import_tensorrt(backend), "ComputeCapability", None)
    names = [] if named is None else [name for name in named.__members__ if re.fullmatch(r"SM\d\d+", name)]
    return [capability_of(name) for name in names]


def capability_of(name: str) -> str:
    """The compute capability that the library calls `name`: "8.6" of "SM86"."""
    digits = name.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1]}"


def check_targets(config: BuildConfig) -> None:
    """Check that engines can be built for the GPUs that are asked for.

    Raises:
        ConfigError: the library knows no such compute capability, or this GPU cannot build for the others.
    """
    check_capabilities(config.backend, config.compute_capabilities)
    found = gpus()
    if config.hardware_compatible != "ampere-plus" or not found:
        return
    if int(found[0].compute_capability.partition(".")[0]) < AMPERE:
        raise ConfigError(
            f"--hardware-compatible ampere-plus: {title_of(config.backend)} builds such engines on Ampere and later "
            f"GPUs alone, and {found[0].name} has compute capability {found[0].compute_capability}; build on another "
            "GPU, or leave it out"
        )


def check_capabilities(backend: str, wanted: Iterable[str]) -> None:
    """Check that engines can be built for these compute capabilities.

    Raises:
        ConfigError: names those that the library has.
    """
    supported = supported_capabilities(backend)
    unknown = [capability for capability in wanted if capability not in supported]
    if unknown:
        raise ConfigError(
            f"compute capability {', '.join(unknown)}: {title_of(backend)} {import_tensorrt(backend).__version__} "
            f"builds for {', '.join(supported)} alone; pass --compute-capability with one of them"
        )

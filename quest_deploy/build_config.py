"""How engines are built: shapes, and what TensorRT's builder is told. Used through :mod:`quest_deploy.config`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from quest_deploy.checks import at_least, one_of, raise_if_any
from quest_deploy.errors import ConfigError

TensorRTBackend = Literal["tensorrt", "tensorrt-rtx"]
HardwareCompatibility = Literal["none", "ampere-plus", "same-compute-capability"]

TENSORRT_BACKENDS: tuple[str, ...] = get_args(TensorRTBackend)
HARDWARE_COMPATIBILITIES: tuple[str, ...] = get_args(HardwareCompatibility)
MAX_OPTIMIZATION_LEVEL = 5

MAX_SIZE = 2**31 - 1
"""Of a dimension, which TensorRT counts in 32 bits."""

MAX_WORKSPACE_MB = 2**31 - 1
"""More than any GPU has; TensorRT fails at the bytes that 63 bits do not hold."""

MAX_MEMORY_GB = 1e9
"""More than any machine has, and far from what floats cannot hold."""

_CAPABILITY = re.compile(r"\d+\.\d")


@dataclass(frozen=True, kw_only=True)
class ShapeRange:
    """Minimum, optimum and maximum of one dynamic dimension of an optimization profile."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if max(map(abs, (self.min, self.opt, self.max))) > MAX_SIZE:
            raise ConfigError(
                f"shape range: expected sizes of at most {MAX_SIZE}, where TensorRT's 32 bits end (guidance doubles a "
                "batch); build for fewer images or smaller ones"
            )
        if not 1 <= self.min <= self.opt <= self.max:
            raise ConfigError(
                f"shape range {self.min}..{self.opt}..{self.max}: expected 1 <= min <= opt <= max"
            )


PROFILE_RANGES = ("batch", "height", "width", "sequence")
"""The fields of a profile that are ranges."""


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What one optimization profile must be able to draw.

    Attributes:
        batch: Images; guidance doubles them for the denoiser.
        height: In pixels; None for the model's own.
        width: In pixels; None for the model's own.
        sequence: Text tokens that the denoiser is told of; None for as many as the pipeline gives it. For embeddings of
            other lengths, by the Python API.
        static: Whether the denoiser and the autoencoder accept their optimal shapes alone, with both branches of
            guidance where there are two; text encoders keep their ranges.
    """

    batch: ShapeRange = field(default_factory=lambda: ShapeRange(min=1, opt=1, max=4))
    height: ShapeRange | None = None
    width: ShapeRange | None = None
    sequence: ShapeRange | None = None
    static: bool = False


@dataclass(frozen=True, kw_only=True)
class BuildConfig(ProfileConfig):
    """How ONNX becomes TensorRT engines. Shapes are those of the first optimization profile.

    Attributes:
        backend: The TensorRT flavour.
        timing_cache: File of timings of earlier builds, read and added to (TensorRT only).
        more_profiles: Optimization profiles beside the first; an engine chooses the nearest at run time.
        optimization_level: 0 (builds fastest) to 5 (runs fastest); None for the library's own.
        workspace_mb: The most scratch memory that a kernel may use, in 2^20 bytes; None for no limit.
        version_compatible: Whether later versions of the library load the engines, too (TensorRT only).
        hardware_compatible: Which other GPUs load them (TensorRT only).
        compute_capabilities: Of the GPUs that engines are made for, for example "8.6"; none means 8.0, 8.6, 8.9,
            12.0 and later (TensorRT for RTX only).
        weight_streaming: Whether weights may stay in host memory while an engine runs.
        strip_weights: Whether plans are written without weights, to be put in by `refit` on the machine that runs them.
        auto_fallback: Whether products that are measured to be slower in low precision than in floats stay in floats
            (:mod:`quest_deploy.auto_fallback`).
        jobs: Components that are built at a time.
        memory_limit_gb: The most memory of this machine that building may take, in 10^9 bytes; None for no limit. Where
            it does not suffice, a component is built with a lower optimization level, then a smaller workspace, then
            its optimal shapes alone.
    """

    backend: TensorRTBackend = "tensorrt-rtx"
    timing_cache: str | None = None
    more_profiles: tuple[ProfileConfig, ...] = ()
    optimization_level: int | None = None
    workspace_mb: int | None = None
    version_compatible: bool = False
    hardware_compatible: HardwareCompatibility = "none"
    compute_capabilities: tuple[str, ...] = ()
    weight_streaming: bool = False
    strip_weights: bool = False
    auto_fallback: bool = False
    jobs: int = 1
    memory_limit_gb: float | None = None

    def __post_init__(self) -> None:
        problems: list[str] = []
        one_of(problems, "backend", self.backend, TENSORRT_BACKENDS)
        one_of(problems, "hardware_compatible", self.hardware_compatible, HARDWARE_COMPATIBILITIES)
        level = self.optimization_level
        if level is not None and not 0 <= level <= MAX_OPTIMIZATION_LEVEL:
            problems.append(f"optimization_level is {level}, expected 0 to {MAX_OPTIMIZATION_LEVEL}")
        if self.workspace_mb is not None and not 1 <= self.workspace_mb <= MAX_WORKSPACE_MB:
            problems.append(f"workspace_mb is {self.workspace_mb}, expected 1 to {MAX_WORKSPACE_MB}")
        at_least(problems, 1, jobs=self.jobs)
        if self.memory_limit_gb is not None and not 0 < self.memory_limit_gb <= MAX_MEMORY_GB:
            problems.append(
                f"memory_limit_gb is {self.memory_limit_gb}, expected more than 0 and at most {MAX_MEMORY_GB:.0f}"
            )
        bad = [text for text in self.compute_capabilities if not _CAPABILITY.fullmatch(text)]
        if bad:
            problems.append(
                f"compute_capabilities has {', '.join(bad)}, expected numbers such as 8.6 or 12.0"
            )
        if self.backend == "tensorrt" and self.compute_capabilities:
            problems.append(
                "compute_capabilities is for TensorRT for RTX; TensorRT builds for the GPU of this machine, and for "
                "others by hardware_compatible"
            )
        if self.backend == "tensorrt-rtx" and self.hardware_compatible != "none":
            problems.append(
                "hardware_compatible is for TensorRT; TensorRT for RTX builds for 8.0, 8.6, 8.9, 12.0 "
                "and later, or for compute_capabilities"
            )
        if self.backend == "tensorrt-rtx" and self.version_compatible:
            problems.append(
                "version_compatible is for TensorRT; TensorRT for RTX has no lean runtime for other versions"
            )
        if self.strip_weights and self.auto_fallback:
            problems.append(
                "auto_fallback runs the engines it builds, and with strip_weights they cannot run; choose one of them"
            )
        raise_if_any(problems, "build-engine")

    def profiles(self) -> tuple[ProfileConfig, ...]:
        """Every optimization profile, the first one first."""
        return (self, *self.more_profiles)

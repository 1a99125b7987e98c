"""One frozen dataclass per stage: validated when made, written into the stage's manifest.

Every violation found in one configuration is reported in one :class:`ConfigError`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from quest_deploy.build_config import PROFILE_RANGES as PROFILE_RANGES
from quest_deploy.build_config import TENSORRT_BACKENDS as TENSORRT_BACKENDS
from quest_deploy.build_config import BuildConfig as BuildConfig
from quest_deploy.build_config import ProfileConfig as ProfileConfig
from quest_deploy.build_config import ShapeRange as ShapeRange
from quest_deploy.build_config import TensorRTBackend as TensorRTBackend
from quest_deploy.checks import are_text as are_text
from quest_deploy.checks import at_least as at_least
from quest_deploy.checks import count_of as count_of
from quest_deploy.checks import is_whole as is_whole
from quest_deploy.checks import one_of as one_of
from quest_deploy.checks import raise_if_any as raise_if_any
from quest_deploy.checks import seeds_fit as seeds_fit
from quest_deploy.checks import whole_at_least as whole_at_least
from quest_deploy.recipe_config import BitsOverride as BitsOverride
from quest_deploy.recipe_config import PhaseConfig as PhaseConfig
from quest_deploy.recipe_config import Precision as Precision
from quest_deploy.recipe_config import Recipe as Recipe
from quest_deploy.recipe_config import StaticMode as StaticMode
from quest_deploy.recipe_config import Targets as Targets

Target = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
Mode = Literal["int8", "int4-weight-only", "none"]
Dtype = Literal["fp32", "fp16", "bf16"]
Backend = Literal["torch", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
Provider = Literal["cpu", "cuda", "tensorrt"]

TARGETS: tuple[str, ...] = get_args(Target)
MODES: tuple[str, ...] = get_args(Mode)
DTYPES: tuple[str, ...] = get_args(Dtype)
BACKENDS: tuple[str, ...] = get_args(Backend)
PROVIDERS: tuple[str, ...] = get_args(Provider)
# More than any GPU has; bytes beyond it would leave TensorRT's integers.
MAX_GPU_WEIGHTS_GB = 100_000


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types, for manifests."""
    return dataclasses.asdict(config)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """How a model or checkpoint becomes ONNX.

    Attributes:
        target: Which runtime's form to write.
        mode: What becomes of the quantizers.
        dtype: Of the float operators. Scales, and what decides codes, are float32 in any case.
        opset: ONNX operator set; a quantized graph in fp16 or bf16 has 23 at least.
    """

    target: Target = "onnxruntime"
    mode: Mode = "int8"
    dtype: Dtype = "fp32"
    opset: int = 21

    def __post_init__(self) -> None:
        problems: list[str] = []
        one_of(problems, "target", self.target, TARGETS)
        one_of(problems, "mode", self.mode, MODES)
        one_of(problems, "dtype", self.dtype, DTYPES)
        if self.opset not in (21, 22, 23):
            problems.append(f"opset is {self.opset}, expected 21, 22 or 23")
        raise_if_any(problems, "export")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What some of the runtimes can be told besides what they run.

    Attributes:
        provider: ONNX Runtime's execution provider; None takes CUDA where it can run, else the CPU.
        cuda_graphs: Whether TensorRT engines run shapes that come again as captured CUDA graphs.
        gpu_weights_gb: Of the weights of each TensorRT engine built with weight streaming, how much lies on the GPU, in
            10^9 bytes; the rest comes from host memory at every run. None lets TensorRT go by the free memory.
    """

    provider: Provider | None = None
    cuda_graphs: bool = True
    gpu_weights_gb: float | None = None

    def __post_init__(self) -> None:
        problems: list[str] = []
        if self.provider is not None:
            one_of(problems, "provider", self.provider, PROVIDERS)
        if self.gpu_weights_gb is not None:
            before = len(problems)
            at_least(problems, 0, gpu_weights_gb=self.gpu_weights_gb)
            if len(problems) == before and self.gpu_weights_gb > MAX_GPU_WEIGHTS_GB:
                problems.append(
                    f"gpu_weights_gb is {self.gpu_weights_gb:g}, expected at most {MAX_GPU_WEIGHTS_GB:,}"
                )
        raise_if_any(problems, "run")


DEFAULT_RUN = RunConfig()


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """One request. Image `i` of prompt `p` has seed `seed + p * num_images + i`.

    A class-conditional model takes names or numbers of classes for prompts; an unconditional one takes none.
    `safety_checker` has images checked where the model brings a checker, and replaces what it flags by black images.
    """

    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    steps: int = 25
    guidance_scale: float = 7.5
    scheduler: str | None = None
    seed: int = 0
    num_images: int = 1
    height: int | None = None
    width: int | None = None
    batch_size: int = 4
    safety_checker: bool = True

    def __post_init__(self) -> None:
        problems: list[str] = []
        whole_at_least(problems, 1, steps=self.steps, num_images=self.num_images, batch_size=self.batch_size)
        at_least(problems, 0, guidance_scale=self.guidance_scale)
        are_text(problems, "prompt", self.prompts)
        are_text(problems, "negative_prompt", (self.negative_prompt,))
        images = self.num_images if is_whole(self.num_images) else 1
        seeds_fit(problems, self.seed, max(1, count_of(self.prompts)) * images)
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and not (is_whole(value) and value >= 8 and value % 8 == 0):
                problems.append(f"{name} is {value!r}, expected a positive multiple of 8 pixels")
        raise_if_any(problems, "generate")


HELD_OUT_SEED = 1000
"""Where the noise of comparisons begins: finetuning takes the seeds from 0, one for each calibration prompt."""


@dataclass(frozen=True, kw_only=True)
class ParityConfig:
    """Which prompts two artifacts are compared on, and how.

    `prompts` empty means what the model's kind suggests: the packaged held-out list, every class in turn, or none.
    With `debug_engines`, TensorRT engines are built once more with their codes marked, and compared layer by layer.
    """

    prompts: tuple[str, ...] = ()
    num_prompts: int = 16
    steps: int = 25
    guidance_scale: float = 3.0
    scheduler: str | None = None
    seed: int = HELD_OUT_SEED
    batch_size: int = 8
    budget: str | None = None
    debug_engines: bool = False

    def __post_init__(self) -> None:
        problems: list[str] = []
        whole_at_least(
            problems, 1, num_prompts=self.num_prompts, steps=self.steps, batch_size=self.batch_size
        )
        at_least(problems, 0, guidance_scale=self.guidance_scale)
        are_text(problems, "prompt", self.prompts)
        number = self.num_prompts if is_whole(self.num_prompts) else 1
        seeds_fit(problems, self.seed, count_of(self.prompts) or number)
        raise_if_any(problems, "parity")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is drawn while time is measured, and how often.

    Attributes:
        prompts: Or classes; none for an unconditional model.
        steps: Denoising steps.
        guidance_scale: Of classifier-free guidance.
        scheduler: By name; None for the model's own.
        height: In pixels; None for the model's own.
        width: In pixels; None for the model's own.
        num_images: For each prompt.
        batch_size: Images at a time.
        runs: Measured runs of a process.
        warmup: Runs before them.
        rounds: How often the subjects take turns, each time in a new process.
        threads: CPU threads; None leaves the choice to the runtime.
    """

    prompts: tuple[str, ...] = ()
    steps: int = 25
    guidance_scale: float = 7.5
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None
    num_images: int = 1
    batch_size: int = 1
    runs: int = 3
    warmup: int = 1
    rounds: int = 3
    threads: int | None = None

    def __post_init__(self) -> None:
        problems: list[str] = []
        whole_at_least(problems, 1, runs=self.runs, rounds=self.rounds)
        whole_at_least(problems, 0, warmup=self.warmup)
        if self.threads is not None:
            whole_at_least(problems, 1, threads=self.threads)
        raise_if_any(problems, "bench")
        GenerateConfig(**self.request())

    def request(self) -> dict[str, Any]:
        """The fields of :class:`GenerateConfig`."""
        names = (
            "prompts",
            "steps",
            "guidance_scale",
            "scheduler",
            "height",
            "width",
            "num_images",
            "batch_size",
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class ProgressEvent:
    """How far a stage is: `completed` of `total` units of `stage`, with the latest figures."""

    stage: str
    completed: int
    total: int
    message: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A LoRA that is merged into the model before anything else.

    Attributes:
        file: A ``.safetensors`` file.
        scale: What its change of the weights is multiplied by.
    """

    file: str
    scale: float = 1.0

    @property
    def path(self) -> Path:
        """Where the file is."""
        return Path(self.file)

    def __post_init__(self) -> None:
        problems: list[str] = []
        if self.path.suffix != ".safetensors":
            problems.append(f"file is {self.file!r}, expected a .safetensors file: others may hold code")
        if not math.isfinite(self.scale):
            problems.append(f"scale is {self.scale}, expected a finite number")
        raise_if_any(problems, "LoRA")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One finetuning run. Prompt `i` starts from the noise of seed `seed + i`.

    `prompts` empty means what the model's kind suggests: the packaged list, every class in turn, or none. `device` is
    "cpu", "cuda", or "cuda:N". `loras` are merged into the model first, in their order.
    """

    recipe: Recipe
    prompts: tuple[str, ...] = ()
    seed: int = 0
    device: str = "cpu"
    loras: tuple[LoraConfig, ...] = ()

    def __post_init__(self) -> None:
        problems: list[str] = []
        seeds_fit(problems, self.seed, self.recipe.calibration_prompts)
        are_text(problems, "prompt", self.prompts)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            problems.append(f"device is {self.device!r}, expected cpu, cuda or cuda:N")
        if 0 < count_of(self.prompts) < self.recipe.calibration_prompts:
            problems.append(
                f"{len(self.prompts)} prompts were given, "
                f"recipe {self.recipe.name} calibrates on {self.recipe.calibration_prompts}"
            )
        raise_if_any(problems, "finetune")

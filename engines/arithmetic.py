"""What a recipe means on a GPU: which numbers are stored, and which arithmetic they meet in.

From NVIDIA's support matrices (TensorRT 10, TensorRT for RTX 1.5) and from what the libraries say and their builders
take (``docs/results.md``, ``docs/lint.md``); nothing of it was measured on a GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quest_deploy.errors import ConfigError

Capability = tuple[int, int]
"""A compute capability, for example (8, 9)."""

# TensorRT 10 has dropped what came before Turing.
TENSORRT_FROM: Capability = (7, 5)
# Xavier and Turing brought INT8 to tensor cores; Volta's multiply fp16 alone.
INT8_TENSOR_CORES_FROM: Capability = (7, 2)
BF16_FROM: Capability = (8, 0)
FP8_FROM: Capability = (8, 9)
FP4_FROM: Capability = (10, 0)
RTX_TYPES: dict[Capability, bool] = {
    (7, 5): False,
    (8, 6): True,
    (8, 9): True,
    (12, 0): True,
    (12, 1): True,
}
"""The types that TensorRT for RTX lists: whether with INT8 and INT4 weights."""
RTX_BY_DEFAULT = "8.0, 8.6, 8.9, 12.0 and later"
"""Where an engine of TensorRT for RTX runs that is for no GPUs in particular, as version 1.7 says it."""
RTX_WHERE_ASKED: Capability = (7, 5)
"""What TensorRT for RTX builds for only where it is told to."""


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What one recipe or export mode means on a GPU.

    Attributes:
        recipe: Its name.
        runs: Whether TensorRT has the arithmetic it is made for.
        sentence: In plain words.
        nearest: The recipe with the same arithmetic, or the one to take where this does not run.
    """

    recipe: str
    runs: bool
    sentence: str
    nearest: str


def parse_capability(text: str) -> Capability:
    """``"8.9"`` as (8, 9).

    Raises:
        ConfigError: not two numbers with a point between them.
    """
    if not (found := re.fullmatch(r"(\d{1,2})\.(\d)", text.strip())):
        raise ConfigError(
            f"compute capability is {text!r}, expected one like 8.9 (developer.nvidia.com/cuda-gpus)"
        )
    return int(found[1]), int(found[2])


def meanings(capability: Capability) -> list[Meaning]:
    """Every packaged recipe, and weights alone in INT4, on a GPU of this compute capability."""
    if capability < TENSORRT_FROM:
        return [_without_tensorrt(name) for name in ("w8a8", "w4a8", "w4a4", "int4-weight-only")]
    return [
        Meaning(
            recipe="w8a8",
            runs=True,
            sentence="8-bit weights and activations meet on INT8 tensor cores",
            nearest="w8a8",
        ),
        Meaning(
            recipe="w4a8",
            runs=True,
            sentence="4-bit weights, of convolutions too, are stored as INT8 and meet 8-bit activations on INT8 tensor "
            "cores: engine size and speed of w8a8; only checkpoints and ONNX for ONNX Runtime are smaller",
            nearest="w8a8",
        ),
        Meaning(
            recipe="w4a4",
            runs=True,
            sentence="4-bit values of both sides are INT8 codes on INT8 tensor cores: size and speed of w8a8, at less "
            "image quality; INT4 tensor cores, where the GPU has them, are not used",
            nearest="w8a8",
        ),
        _weights_alone(capability),
    ]


def _without_tensorrt(recipe: str) -> Meaning:
    return Meaning(
        recipe=recipe,
        runs=False,
        sentence=f"TensorRT wants compute capability {_text(TENSORRT_FROM)} or later: only `--backend torch` runs it "
        "here, which computes the same numbers in float, at no gain of speed",
        nearest="none: run the model in full precision with --backend torch",
    )


def _weights_alone(capability: Capability) -> Meaning:
    kind = "fp16 or bf16" if capability >= BF16_FROM else "fp16"
    return Meaning(
        recipe="int4-weight-only",
        runs=True,
        sentence="INT4 is storage only: weights of matrix products stay in 4 bits in memory and are multiplied in "
        f"{kind}; it saves memory and its bandwidth, not arithmetic (export --mode int4-weight-only)",
        nearest="int4-weight-only",
    )


def remarks(capability: Capability) -> list[str]:
    """What holds for all recipes on such a GPU."""
    found = []
    if capability < INT8_TENSOR_CORES_FROM:
        found.append(
            f"INT8 tensor cores came with compute capability {_text(INT8_TENSOR_CORES_FROM)}; none here"
        )
    if capability < BF16_FROM:
        found.append(f"bf16 came with compute capability {_text(BF16_FROM)}: export with --dtype fp16")
    floats = [name for name, since in (("FP8", FP8_FROM), ("FP4", FP4_FROM)) if capability >= since]
    if floats:
        found.append(f"{' and '.join(floats)} of this GPU are not used: all recipes are of integers")
    if capability >= TENSORRT_FROM:
        found.append(_in_tensorrt_rtx(capability))
    return [
        *found,
        "this is what NVIDIA documents and the builders take; nothing of it was measured on a GPU",
    ]


def covers(said: str, capability: str) -> bool:
    """Whether a manifest's compute capabilities ("8.6, 12.0", "8.6, any GPU", "8.0, 12.0 and later") hold this one."""
    *named, last = said.split(", ")
    if not last.endswith(" and later"):
        return capability in (*named, last)
    return capability in named or parse_capability(last.removesuffix(" and later")) <= parse_capability(
        capability
    )


def rtx_runs(capability: Capability) -> bool:
    """Whether TensorRT for RTX runs engines on such a GPU."""
    return capability == RTX_WHERE_ASKED or covers(RTX_BY_DEFAULT, _text(capability))


def _in_tensorrt_rtx(capability: Capability) -> str:
    if not rtx_runs(capability):
        seen = " and refused to load engines on it (version 1.7, an H200)" if capability == (9, 0) else ""
        return (
            f"TensorRT for RTX does not support this compute capability (it supports {_text(RTX_WHERE_ASKED)}, "
            f"{RTX_BY_DEFAULT}){seen}: use --backend tensorrt"
        )
    if capability not in RTX_TYPES:
        return (
            "TensorRT for RTX runs engines on this GPU, and does not list which types it has there: compare with "
            "--backend tensorrt"
        )
    if not RTX_TYPES[capability]:
        return "TensorRT for RTX lists neither INT8 nor INT4 for this GPU: use --backend tensorrt"
    return (
        "TensorRT for RTX lists INT8 and INT4 for weights alone; it builds INT8 products, but whether they run on INT8 "
        "tensor cores is not documented: compare with --backend tensorrt"
    )


def _text(capability: Capability) -> str:
    return ".".join(map(str, capability))

"""Run an engines directory with CUDA graphs and without, and print what that took as JSON.

python -m scripts.gpu_measure ENGINES
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from quest_deploy.artifacts import read_manifest
from quest_deploy.config import RunConfig
from quest_deploy.errors import QuestDeployError

STEPS, GUIDANCE_SCALE, RUNS = 20, 3.0, 5
PROMPT = "rocket"
# Of the largest latent: a graph replays the kernels that ran without it.
DIFFERENCE = 1e-3


def measure(path: Path, *, graphs: bool) -> tuple[list[float], Any, int]:
    """Seconds of each denoising loop after the first two, latents of the last, [1, c, h, w], and graphs captured."""
    import torch

    from quest_deploy.pipeline import load_pipeline

    seconds: list[float] = []
    with load_pipeline(path, run=RunConfig(cuda_graphs=graphs)) as pipeline:
        positive, negative = pipeline.encode([PROMPT]), pipeline.encode([""])
        noise = pipeline.initial_noise([0])
        for _ in range(2 + RUNS):
            torch.cuda.synchronize()
            started = time.perf_counter()
            latents = pipeline.denoise(noise, positive, negative, steps=STEPS, guidance_scale=GUIDANCE_SCALE)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        denoiser = pipeline.engines[pipeline.family.denoiser]
        return seconds[2:], latents.cpu(), getattr(denoiser, "captured", 0)


def compare_graphs(path: Path) -> dict[str, Any]:
    """Time both, and compare what they drew. `ok` says that engines ran, `problems` what is wrong with their graphs."""
    plain, without, _ = measure(path, graphs=False)
    captured, within, count = measure(path, graphs=True)
    difference = float((without - within).abs().max())
    problems = []
    if not count:
        problems.append("no CUDA graph of the denoiser was captured")
    if not difference <= DIFFERENCE * float(without.abs().max()):
        problems.append(f"with CUDA graphs latents differ by up to {difference:.3g}")
    medians = {"plain_s": statistics.median(plain), "graphs_s": statistics.median(captured)}
    return {
        "steps": STEPS,
        "plain": plain,
        "graphs": captured,
        **medians,
        "times_as_fast_with_graphs": medians["plain_s"] / medians["graphs_s"],
        "captured": count,
        "largest_difference": difference if math.isfinite(difference) else None,  # NaN is no JSON
        "problems": problems,
        "ok": bool(within.isfinite().all()),
    }


def compare_layers(path: Path, onnx: Path) -> dict[str, Any]:
    """Each product of the graphs: what lint promised, and what the engine has."""
    from quest_deploy.after_build import prove

    backend = str(read_manifest(path).config["backend"])
    return prove(path, onnx, backend="tensorrt" if backend == "tensorrt" else "tensorrt-rtx").to_json()


def main() -> int:
    """Print one JSON object; exit code 1 where its `ok` is false."""
    paths = [Path(word) for word in sys.argv[1:]]
    try:
        found = compare_graphs(*paths) if len(paths) == 1 else compare_layers(*paths)
    except QuestDeployError as error:
        found = {"ok": False, "error": {"type": type(error).__name__, "message": str(error)}}
    print(json.dumps(found))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

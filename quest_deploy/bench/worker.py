"""Measures one subject in this process: a job as JSON on standard input, its figures as the last line of output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quest_deploy.artifacts import read_json
from quest_deploy.bench.subject import ERROR
from quest_deploy.config import GenerateConfig, RunConfig
from quest_deploy.engines.base import Closing
from quest_deploy.errors import QuestDeployError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quest_deploy.engines.base import Engine
    from quest_deploy.pipeline import Pipeline

STATUS = Path("/proc/self/status")


@dataclass
class TimedEngine(Closing):
    """An engine that notes how long each call takes.

    Attributes:
        engine: The engine.
        synchronize: Waits for the device.
        seconds: One figure for each call.
    """

    engine: Engine
    synchronize: Callable[[], None]
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spec = self.engine.spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run once."""
        self.synchronize()
        started = time.perf_counter()
        outputs = self.engine(**inputs)
        self.synchronize()
        self.seconds.append(time.perf_counter() - started)
        return outputs

    def close(self) -> None:
        """Free everything."""
        self.engine.close()


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """Draw the same images several times.

    Returns:
        `loops`, the seconds of each run; `calls`, by component, for each run the seconds of its calls; `images`, how
        many a run draws; `memory_bytes`; and what ran it.

        `memory_bytes` of the process: `imports`, what it takes before it loads the subject, the classes of the model
        imported whichever runtime runs it, and `peak`, the most that it ever takes beyond that. `device_peak`, None
        where the CPU draws: the most that the GPU has in use after
        loading and after each run, beyond what it has before loading. Runtimes keep what they draw with, so it counts
        weights, activations, workspaces and CUDA graphs, whoever allocates them; not what loading frees again, nor the
        CUDA context. It is the whole device's: what other processes have there must not change meanwhile.
    """
    import torch

    from quest_deploy.pipeline import load_pipeline
    from quest_deploy.pipeline.request import check_prompts

    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    _import_runtime(job["backend"])
    _import_classes(Path(job["path"]))
    # Before the host's: the first question makes the CUDA context, which then counts for no subject on either side.
    used_before = gpu_bytes_in_use()
    baseline = memory_bytes("VmRSS")
    run = RunConfig(**job["run"])
    with load_pipeline(job["path"], backend=job["backend"], threads=job["threads"], run=run) as pipeline:
        config = GenerateConfig(**job["request"])
        check_prompts(pipeline.family, pipeline.classes, config)
        synchronize = _synchronize(pipeline.device)
        if job["half"] is not None:
            halve_components(pipeline, {"fp16": torch.float16, "bf16": torch.bfloat16}[job["half"]])
        if job["compiled"]:
            compile_components(pipeline)
        timed = {name: TimedEngine(engine, synchronize) for name, engine in pipeline.engines.items()}
        pipeline.engines = dict(timed)
        # What loading and halving left to torch's allocator is not needed to draw.
        torch.cuda.empty_cache()
        used = [gpu_bytes_in_use()]
        for _ in range(job["warmup"]):
            _draw(pipeline, config)
            used.append(gpu_bytes_in_use())
        loops: list[float] = []
        calls: dict[str, list[list[float]]] = {name: [] for name in timed}
        for _ in range(job["runs"]):
            for engine in timed.values():
                engine.seconds.clear()
            synchronize()
            started = time.perf_counter()
            images = _draw(pipeline, config)
            synchronize()
            loops.append(time.perf_counter() - started)
            used.append(gpu_bytes_in_use())
            for name, engine in timed.items():
                calls[name].append([*engine.seconds])
        device = pipeline.device
    return {
        "loops": loops,
        "calls": calls,
        "images": images,
        "memory_bytes": {
            "imports": baseline,
            "peak": memory_bytes("VmHWM") - baseline,
            "device_peak": max(used) - used_before if device.type == "cuda" else None,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def _draw(pipeline: Pipeline, config: GenerateConfig) -> int:
    """Draw everything once; how many images that was."""
    from quest_deploy.pipeline.draw import draw_batch, make_jobs

    jobs = make_jobs(config)
    for start in range(0, len(jobs), config.batch_size):
        draw_batch(pipeline, config, jobs[start : start + config.batch_size], lambda images: None)
    return len(jobs)


def halve_components(pipeline: Pipeline, dtype: torch.dtype) -> None:
    """Let torch run every component in half precision."""
    from quest_deploy.engines.torch_runtime import InHalf, TorchEngine

    for engine in pipeline.engines.values():
        assert isinstance(engine, TorchEngine) and engine.module is not None
        engine.module = InHalf(engine.module, engine.spec, dtype)


def compile_components(pipeline: Pipeline) -> None:
    """Let torch.compile compile every component, at its first call."""
    import torch

    from quest_deploy.engines.torch_runtime import TorchEngine

    for engine in pipeline.engines.values():
        assert isinstance(engine, TorchEngine) and engine.module is not None
        engine.module = torch.compile(engine.module)  # type: ignore[assignment]


def _import_classes(path: Path) -> None:
    """Import what a model's ``model_index.json`` names: torch loads it with the model, and graphs do without most."""
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    index = read_json(path / "model_index.json") if path.is_dir() else {}
    for entry in index.values():
        if isinstance(entry, list) and len(entry) == 2 and entry[0] in libraries:
            getattr(libraries[entry[0]], str(entry[1]), None)


def _import_runtime(backend: str) -> None:
    if backend == "onnxruntime":
        import onnxruntime  # noqa: F401
    elif backend == "openvino":
        import openvino  # noqa: F401


def _synchronize(device: Any) -> Callable[[], None]:
    import torch

    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None


def gpu_bytes_in_use() -> int:
    """What all processes together hold of the GPU that torch uses; 0 where it can use none."""
    import torch

    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def memory_bytes(name: str, status: Path = STATUS) -> int:
    """A field of this process's status in Linux, for example "VmRSS" (now) or "VmHWM" (at most so far)."""
    for line in status.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise ValueError(f"{status}: has no {name}")


def main() -> int:
    """Read a job, measure, and print the figures or one message."""
    job = json.load(sys.stdin)
    try:
        result = measure(job)
    except QuestDeployError as error:
        result = {ERROR: str(error)}
    except RuntimeError as error:
        if not job["compiled"]:
            raise
        # The compiler's own errors are many; the first line names the cause.
        result = {
            ERROR: f"torch.compile failed: {(str(error).strip().splitlines() or ['no message'])[0][:300]}"
        }
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How long each layer of a built engine takes, from TensorRT's own profiler. Needs the GPU that runs it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quest_deploy.artifacts import Artifact
from quest_deploy.config import BuildConfig
from quest_deploy.engines.debug_engine import load_plan
from quest_deploy.engines.foreign import from_json
from quest_deploy.engines.inspector import EngineLayer, inspect_plan
from quest_deploy.engines.libraries import import_tensorrt
from quest_deploy.engines.trt_context import ShapedContext, shapes_of
from quest_deploy.engines.trt_plan import run_errors
from quest_deploy.engines.trt_runtime import TensorRTEngine
from quest_deploy.files import hash_file
from quest_deploy.model.spec import ComponentSpec, component_specs

# The first runs compile kernels and bring the clocks up.
WARM_UP_RUNS = 10
RUNS = 50


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """One engine.

    Attributes:
        layers: What it is made of.
        ms: The median time of one run in each layer, by the layer's name.
    """

    layers: tuple[EngineLayer, ...]
    ms: Mapping[str, float]

    @property
    def total_ms(self) -> float:
        """Of one run: the sum over layers, without what lies between them."""
        return sum(self.ms.values())


def plan_specs(source: Artifact) -> dict[str, ComponentSpec]:
    """What the engines of an `engines` artifact take and give; those of another tool's graphs as the graphs say."""
    fitted = from_json(source.manifest.details.get("interfaces", {}))
    return {
        name: fitted[name].graph if name in fitted else spec
        for name, spec in component_specs(source.path).items()
    }


def time_layers(plan: Path, spec: ComponentSpec, config: BuildConfig) -> LayerTimes:
    """Run an engine on made-up inputs of its first profile's optimal shapes, and time its layers.

    Args:
        plan: The engine's file.
        spec: What it takes and gives.
        config: It was built with.

    Raises:
        StaleArtifactError: this GPU cannot load the engine.
        EngineBuildError: too little memory on the GPU.
        EngineRunError: TensorRT or the GPU refuses.
    """
    library = import_tensorrt(config.backend)
    with run_errors(spec.name), load_plan(plan, spec, config) as engine:
        assert engine.plan is not None and engine.plan.engine is not None
        if config.backend == "tensorrt-rtx":
            # Else it runs fallback kernels until better ones are compiled in the background.
            engine.plan.compile_at_run_time(library, plan.parent, hash_file(plan))
        return LayerTimes(
            layers=inspect_plan(engine.plan, engine.spec),
            ms=profile(library, engine, made_up_inputs(engine)),
        )


def made_up_inputs(engine: TensorRTEngine) -> dict[str, Tensor]:
    """Seeded noise in floats and zeros in integers, which any table has an entry for."""
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for tensor in engine.spec.inputs:
        shape, dtype = engine.profiles[0][tensor.name].opt, getattr(torch, tensor.dtype)
        noise = torch.randn(shape, generator=generator) if dtype.is_floating_point else torch.zeros(shape)
        inputs[tensor.name] = noise.to(engine.device, dtype)
    return inputs


def profile(library: Any, engine: TensorRTEngine, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Milliseconds by layer: medians over the runs after the first. A layer that reports more than once a run adds up.

    Raises:
        Refusal: TensorRT refuses.
    """
    assert engine.plan is not None and engine.memory is not None
    caller = torch.cuda.current_stream()
    with engine.memory.borrow(caller) as block:
        block.take(caller)
        # A context of its own and no captured graph: TensorRT times layers only where it enqueues them one by one.
        shaped = ShapedContext(engine.spec, engine.plan, block)
        shaped.set_shapes(shapes_of(inputs), 0, caller)
        outputs = shaped.make_outputs(engine.device)
        shaped.bind(inputs, outputs)
        for _ in range(WARM_UP_RUNS):
            shaped.run(caller)
        caller.synchronize()
        profiler = make_profiler(library)
        shaped.context.profiler = profiler
        runs = []
        for _ in range(RUNS):
            profiler.ms = Counter()
            shaped.run(caller)
            caller.synchronize()
            runs.append(profiler.ms)
        return medians(runs)


def make_profiler(library: Any) -> Any:
    """A TensorRT profiler that adds up what it is told, in its `ms`."""

    class Profiler(library.IProfiler):
        def __init__(self) -> None:
            library.IProfiler.__init__(self)
            self.ms: Counter[str] = Counter()

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.ms[layer_name] += ms  # type: ignore[assignment]  # a Counter of anything that adds up

    return Profiler()


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each layer, in the order of the first run that names it."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: statistics.median(run.get(name, 0.0) for run in runs) for name in names}

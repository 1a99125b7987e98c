"""Integer codes that enter each quantized operation, compared between two runtimes.

The upper rung runs as it is. The lower one is given the upper rung's codes for every product and says which codes it
would have chosen itself, so that a flip is counted where it happens and does not cascade into the layers behind it.
Left alone, one flip changes the noise prediction of a W8A8 denoiser by as much as 33 to 40 dB below the signal (torch
against itself with latents moved by 1e-5), which says nothing about the runtime.
Latents, timestep and embeddings are the upper rung's, for a few prompts (without guidance, which only doubles the
batch) at the first, the middle and the last step: codes take as much memory as all activations of the denoiser. A text
encoder or decoder that is quantized is compared in the same way, on the prompts and on the final latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from quest_deploy.config import TENSORRT_BACKENDS, TensorRTBackend
from quest_deploy.engines.ort_runtime import CPU_PROVIDER, with_options
from quest_deploy.metrics import CodeFlips, code_flips, snr_db
from quest_deploy.model.components import first_device, without_variance
from quest_deploy.model.families import VAE_DECODER
from quest_deploy.model.products import float32_products
from quest_deploy.parity.measure import Trace
from quest_deploy.quantize.grid import dequantize
from quest_deploy.quantize.layers import ActivationQuantizer

if TYPE_CHECKING:
    from onnx import ModelProto

    from quest_deploy.pipeline import Pipeline

CODE_PROMPTS = 2
CODES_SUFFIX = "/codes"
GRAPH = "model.onnx"

Codes = Mapping[str, Tensor]
"""int8 codes by the module path of their quantizer."""

RunGraph = Callable[["ModelProto", Path, Sequence[Mapping[str, Tensor]]], list[dict[str, Tensor]]]
"""Runs a graph, with large weights in a folder, on several inputs by name; gives its outputs by name."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a component is given, by input name in its order; `component` is "" for the denoiser."""

    component: str
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class CodeRun:
    """What a component did with one probe: the codes that it chose, and its output.

    Attributes:
        codes: None at all where it is not quantized.
        output: The noise prediction [n, c, h, w], embeddings [n, l, d] or pixels [n, c, H, W].
        component: "" for the denoiser.
        others: Outputs behind the first, such as pooled embeddings.
    """

    codes: Codes
    output: Tensor
    component: str = ""
    others: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerFlips:
    """What differs in front of one layer."""

    layer: str
    flips: CodeFlips


@dataclass(frozen=True, kw_only=True)
class FlipReport:
    """All layers, in the order of the denoiser's modules.

    Attributes:
        layers: Those whose codes both runtimes show.
        noise_snr_db: Noise prediction of both runtimes, every product given the same codes, float64 [probes, n].
        companions_snr_db: The same of other components that are quantized, float64 [n] by name.
        unmatched: Quantizers that only one of them shows. A graph shows equal ones that read one tensor once: those
            are not counted here.
    """

    layers: tuple[LayerFlips, ...]
    noise_snr_db: Tensor
    companions_snr_db: Mapping[str, Tensor] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()

    @property
    def total(self) -> CodeFlips:
        """Over all layers."""
        return sum((layer.flips for layer in self.layers), CodeFlips(places=0, differing=0, max_difference=0))

    @property
    def worst(self) -> LayerFlips:
        """The layer with the largest share of differing codes."""
        return max(self.layers, key=lambda layer: layer.flips.fraction)


def make_probes(pipeline: Pipeline, trace: Trace, prompts: Sequence[str]) -> tuple[Probe, ...]:
    """What the components are given for the first of `prompts`: the denoiser at the first, middle and last step."""
    last = len(trace.timesteps) - 1
    told = {name: value[:CODE_PROMPTS] for name, value in trace.positive.items()}
    probes = []
    for step in sorted({0, last // 2, last}):
        latents, timestep = trace.latents[step][:CODE_PROMPTS], trace.timesteps[step].reshape(1)
        inputs = pipeline.denoiser_inputs(
            latents, timestep, pipeline.complete(told, latents, trace.guidance_scale)
        )
        probes.append(Probe(component="", inputs=inputs))
    for part in pipeline.family.text:
        tokens = pipeline.text_encoders.tokens(part, prompts[:CODE_PROMPTS])
        probes.append(Probe(component=part.name, inputs=tokens))
    if VAE_DECODER in pipeline.engines:
        scaled = pipeline.unscaled(trace.final[:CODE_PROMPTS])
        probes.append(Probe(component=VAE_DECODER, inputs={"latent_sample": scaled}))
    return tuple(probes)


def compare_codes(upper: Sequence[CodeRun], lower: Sequence[CodeRun]) -> FlipReport | str:
    """Compare two runtimes, one run for each probe; says why where they have no layer in common."""
    totals: dict[str, CodeFlips] = {}
    unmatched: set[str] = set()
    noise, companions = [], {}
    for above, below in zip(upper, lower, strict=True):
        missing = below.codes.keys() - above.codes.keys()
        missing |= {
            name for name in above.codes.keys() - below.codes.keys() if not _is_shared(name, above, below)
        }
        unmatched |= {_place(above, name) for name in missing}
        for layer, codes in above.codes.items():
            if layer in below.codes:
                flips, place = code_flips(codes, below.codes[layer]), _place(above, layer)
                totals[place] = totals[place] + flips if place in totals else flips
        if not above.component:
            noise.append(snr_db(above.output, below.output))
        elif above.codes:
            pairs = zip((above.output, *above.others), (below.output, *below.others), strict=True)
            companions[above.component] = torch.stack([snr_db(*pair) for pair in pairs]).amin(dim=0)
    if not totals:
        return "the two runtimes show no quantizer of the same name"
    return FlipReport(
        layers=tuple(LayerFlips(layer=layer, flips=flips) for layer, flips in totals.items()),
        noise_snr_db=torch.stack(noise),
        companions_snr_db=companions,
        unmatched=tuple(sorted(unmatched)),
    )


def _place(run: CodeRun, layer: str) -> str:
    """A layer's name; the denoiser's stand alone."""
    return f"{run.component}.{layer}" if run.component else layer


def _is_shared(name: str, above: CodeRun, below: CodeRun) -> bool:
    codes = above.codes[name]
    return any(
        other in below.codes and values.shape == codes.shape and torch.equal(values, codes)
        for other, values in above.codes.items()
    )


def take_codes(
    pipeline: Pipeline,
    trace: Trace,
    prompts: Sequence[str],
    forced: Sequence[Codes] | None = None,
    debug: Path | None = None,
) -> tuple[CodeRun, ...] | str:
    """The codes that a rung's components choose on each probe, or why this runtime does not show them.

    Args:
        pipeline: The rung.
        trace: What is given to its components, as `make_probes` has it.
        prompts: Of the trace.
        forced: Codes that every product uses instead of the chosen ones, one mapping for each probe.
        debug: The ONNX directory that TensorRT engines were built from, to build engines that show their codes.
    """
    engines = pipeline.backend in TENSORRT_BACKENDS
    if engines and debug is None:
        return (
            f"{pipeline.backend} quantizes inside fused kernels and shows no codes; --debug-engines, with the ONNX "
            "directory they were built from as --via, builds engines that do"
        )
    if not engines and pipeline.backend not in ("torch", "onnxruntime"):
        return f"{pipeline.backend} quantizes inside fused kernels and shows no codes"
    probes = make_probes(pipeline, trace, prompts)
    runs: list[CodeRun] = []
    for component in dict.fromkeys(probe.component for probe in probes):
        chosen = [index for index, probe in enumerate(probes) if probe.component == component]
        inputs = [probes[index].inputs for index in chosen]
        given = None if forced is None else [forced[index] for index in chosen]
        name = component or pipeline.denoiser_spec.name
        if debug is not None and engines:
            found = engine_codes(
                debug / name / GRAPH, inputs, given, cast("TensorRTBackend", pipeline.backend)
            )
        else:
            found = _component_codes(pipeline, name, inputs, given)
        if isinstance(found, str):
            return found
        runs += [replace(run, component=component) for run in found]
    return tuple(runs)


def _component_codes(
    pipeline: Pipeline, name: str, inputs: Sequence[Mapping[str, Tensor]], forced: Sequence[Codes] | None
) -> tuple[CodeRun, ...] | str:
    engine: Any = pipeline.engines[name]
    if pipeline.backend == "onnxruntime":
        return onnxruntime_codes(pipeline.path / name / GRAPH, inputs, forced, providers_of(engine))
    given: Sequence[Codes | None] = [None] * len(inputs) if forced is None else forced
    return tuple(torch_codes(engine.module, one, codes) for one, codes in zip(inputs, given, strict=True))


@torch.no_grad()
def torch_codes(denoiser: nn.Module, inputs: Mapping[str, Tensor], forced: Codes | None = None) -> CodeRun:
    """Run a component once on `inputs`, in their order, and read the codes off its quantizers' outputs.

    Those are scale times code.
    """
    chosen: dict[str, Tensor] = {}

    def watch(path: str, quantizer: ActivationQuantizer) -> Any:
        def hook(module: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor | None]) -> Any:
            values, unscale = outputs
            scale = quantizer.tables()[0]
            # A quotient of scale * code and scale is within half a unit in the last place of the code.
            chosen[path] = (values / scale).round().to(torch.int8).cpu()
            if forced is None or path not in forced:
                return None
            return dequantize(forced[path].to(values.device), scale), unscale

        return quantizer.register_forward_hook(hook)

    quantizers = [
        (path, module) for path, module in denoiser.named_modules() if isinstance(module, ActivationQuantizer)
    ]
    handles = [watch(path, quantizer) for path, quantizer in quantizers]
    try:
        device = first_device(denoiser)
        # As the rung draws.
        with float32_products("ieee"):
            output, *others = denoiser(*(tensor.to(device) for tensor in inputs.values()))
    finally:
        for handle in handles:
            handle.remove()
    return CodeRun(
        codes=chosen,
        output=_prediction(output.cpu(), inputs),
        others=tuple(other.cpu() for other in others),
    )


def _prediction(output: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """A denoiser's output, which is as large as its first input, without the variance that it may have learned."""
    first = next(iter(inputs.values()))
    same = output.ndim == first.ndim and output.shape[2:] == first.shape[2:]
    return without_variance(output, first.shape[1]) if same else output


def onnxruntime_codes(
    onnx_path: Path,
    probes: Sequence[Mapping[str, Tensor]],
    forced: Sequence[Codes] | None = None,
    providers: Sequence[Any] = (CPU_PROVIDER,),
) -> tuple[CodeRun, ...] | str:
    """Run a component's graph on each of `probes`, its inputs by name, with the execution providers that draw.

    The output of every QuantizeLinear is made an output of the graph.
    """
    return _graph_codes(onnx_path, probes, forced, partial(_run_onnxruntime, providers=providers))


def providers_of(engine: Any) -> list[Any]:
    """The execution providers of an engine of ONNX Runtime, with what they were told.

    Its inputs may be fitted to another tool's graph.
    """
    inner = getattr(engine, "engine", engine)
    return with_options(inner.session.get_providers(), inner.device.index or 0)


def engine_codes(
    onnx_path: Path,
    probes: Sequence[Mapping[str, Tensor]],
    forced: Sequence[Codes] | None,
    backend: TensorRTBackend,
) -> tuple[CodeRun, ...] | str:
    """The same of a TensorRT engine, which is built for it from the graph with its codes as inputs and outputs.

    Raises:
        MissingDependencyError: no GPU, no CUDA build of torch, or no TensorRT.
        EngineBuildError: TensorRT does not take the graph in this form.
    """
    from quest_deploy.engines import debug_engine

    def run(
        graph: ModelProto, weights: Path, calls: Sequence[Mapping[str, Tensor]]
    ) -> list[dict[str, Tensor]]:
        return debug_engine.run_graph(graph, weights, calls, backend=backend)

    return _graph_codes(onnx_path, probes, forced, run)


def _graph_codes(
    onnx_path: Path, probes: Sequence[Mapping[str, Tensor]], forced: Sequence[Codes] | None, run: RunGraph
) -> tuple[CodeRun, ...] | str:
    import onnx

    from quest_deploy.export.codes import code_names, force_codes, forced_name, mark_codes

    # Weights beyond 2 GB stay in the file next to the graph, where the runtime is told to look for them.
    graph = onnx.load(onnx_path, load_external_data=False)
    names = code_names(graph)
    paths = [name.removesuffix(CODES_SUFFIX) for name in names]
    given = {} if forced is None else forced[0]
    unknown = [path for path in paths if forced is not None and path not in given]
    if unknown:
        return f"the graph quantizes at {unknown[0]}, where the rung above does not"
    own = [output.name for output in graph.graph.output]
    graph = mark_codes(graph) if forced is None else force_codes(graph)
    calls = [dict(probe) for probe in probes]
    if forced is not None:
        for call, codes in zip(calls, forced, strict=True):
            call |= {forced_name(name): codes[path] for name, path in zip(names, paths, strict=True)}
    return tuple(
        CodeRun(
            codes={path: outputs[name] for name, path in zip(names, paths, strict=True)},
            output=_prediction(outputs[own[0]], probe),
            others=tuple(outputs[name] for name in own[1:]),
        )
        for probe, outputs in zip(probes, run(graph, onnx_path.parent, calls), strict=True)
    )


def _run_onnxruntime(
    graph: ModelProto,
    weights: Path,
    calls: Sequence[Mapping[str, Tensor]],
    *,
    providers: Sequence[Any] = (CPU_PROVIDER,),
) -> list[dict[str, Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # As the engine runs it: float products of integer weights stay float.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(weights.resolve())
    )
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), sess_options=options, providers=list(providers)
    )
    names = [output.name for output in graph.graph.output]
    return [
        {
            name: torch.from_numpy(value)
            for name, value in zip(
                names, session.run(names, {key: one.cpu().numpy() for key, one in call.items()}), strict=True
            )
        }
        for call in calls
    ]

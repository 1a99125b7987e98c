"""One torch component -> one clean ONNX graph in memory."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass
from torch import Tensor, nn
from torch.export import Dim

from quest_deploy.errors import ExportError
from quest_deploy.export.lazy import read_when_written
from quest_deploy.export.passes.block_int4 import BlockInt4
from quest_deploy.export.passes.canonical_names import CanonicalNames
from quest_deploy.export.passes.expand_timestep import ExpandTimestep
from quest_deploy.export.passes.fold_rows import FoldRows
from quest_deploy.export.passes.fold_weight_transpose import FoldWeightTranspose
from quest_deploy.export.passes.fuse_attention import FuseAttention
from quest_deploy.export.passes.lower_precision import LowerPrecision
from quest_deploy.export.passes.name_dimensions import NameDimensions
from quest_deploy.export.passes.pack_int4 import PackInt4
from quest_deploy.export.passes.permute_einsum import PermuteEinsum
from quest_deploy.export.passes.remove_no_ops import RemoveNoOps
from quest_deploy.export.passes.split_gated_layers import SplitGatedLayers
from quest_deploy.export.passes.strip_metadata import StripMetadata
from quest_deploy.export.passes.transpose_keys import TransposeKeys
from quest_deploy.export.passes.transpose_weights import TransposeWeights
from quest_deploy.export.passes.unshare_dequantize import UnshareDequantize
from quest_deploy.export.passes.unshare_quantize import UnshareQuantize
from quest_deploy.export.qdq import translation_table
from quest_deploy.export.wrap import keep_tiny_addends, remove_idle_squeezes, traceable
from quest_deploy.model.components import ControlNet, Denoiser
from quest_deploy.model.deferred import stood_in
from quest_deploy.model.spec import ComponentSpec, TensorSpec
from quest_deploy.model.tensors import base_of

logger = logging.getLogger(__name__)

# diffusers branches on batch >= 64 to copy a tensor (a workaround that changes no value), so torch wants to know on
# which side of it the batch lies. The graph has no trace of it, and takes any batch.
MAX_TRACED_BATCH = 63
EXAMPLE_BATCH = 2
# Multiples of the latent's granularity; distinct, so that no two dimensions can be mistaken for one.
EXAMPLE_HEIGHT, EXAMPLE_WIDTH = 4, 6
MAX_GRANULES = 1024

# The first whose DequantizeLinear has an output_dtype.
OUTPUT_DTYPE_OPSET = 23
# The first whose convolutions take bfloat16.
BFLOAT16_OPSET = 22
Fragile = Callable[[ir.Model], Collection[str]]

# torch.__trace is torch's own record for its developers; where the root logger listens, it doubles the time.
NOISY_LOGGERS = ("torch.onnx", "torch.__trace", "onnx_ir", "onnxscript")


def component_graph(
    module: nn.Module,
    spec: ComponentSpec,
    *,
    granularity: int,
    opset: int,
    target: str,
    dtype: str = "fp32",
    fragile: Fragile = lambda model: (),
) -> ir.Model:
    """Trace a component and clean its graph.

    Args:
        module: The component; takes and gives the tensors of `spec`, in its order.
        spec: Names, types and dimensions.
        granularity: What latent height and width are multiples of (a U-Net halves them at every level).
        opset: ONNX operator set.
        target: Which runtime's form to write ("onnxruntime" packs 4-bit weights).
        dtype: Of the float operators: "fp32", "fp16" or "bf16".
        fragile: Names the nodes of the float32 graph that stay in float32.

    Raises:
        ExportError: torch cannot trace or translate the module.
    """
    with quiet_torch(), traceable(module), stood_in(module) as readers:
        try:
            program = torch.export.export(
                module,
                tuple(_example(tensor, granularity) for tensor in spec.inputs),
                dynamic_shapes=_dynamic_shapes(
                    spec, granularity, variadic=isinstance(module, Denoiser | ControlNet)
                ),
                strict=False,
            )
            remove_idle_squeezes(program.graph_module)
            keep_tiny_addends(program.graph_module)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                custom_translation_table=translation_table(),
                optimize=False,
                verbose=False,
            )
            if exported is None:
                raise ExportError(f"{spec.name}: torch returned no ONNX program; expected one, report this")
            read_when_written(exported.model, readers)
            TransposeWeights()(exported.model)
            exported.optimize()
        except (RuntimeError, TypeError, ValueError, torch.onnx.OnnxExporterError) as error:
            raise ExportError(
                f"{spec.name}: torch cannot export it ({_summary(error)}); "
                "run with --verbose for the full message, and report it with the model's configuration"
            ) from error
    model = clean(exported.model, spec, target)
    if dtype != "fp32":
        model = lower_precision(model, dtype, fragile(model))
    return StripMetadata()(model).model


def clean(model: ir.Model, spec: ComponentSpec, target: str) -> ir.Model:
    """Apply the passes of `target` to a freshly exported graph, in place; types are still known afterwards."""
    passes: list[ir.passes.PassBase] = [
        ExpandTimestep(),
        FoldWeightTranspose(),
        RemoveNoOps(),
        FoldRows(),
        TransposeKeys(),
        PermuteEinsum(),
        *([SplitGatedLayers(), FuseAttention()] if target == "onnxruntime" else []),
        UnshareDequantize(),
        BlockInt4(),
        RemoveUnusedNodesPass(),
    ]
    if target == "onnxruntime":
        passes += [UnshareQuantize(), PackInt4()]
    passes += [TopologicalSortPass(), NameDimensions(spec), CanonicalNames()]
    result = ir.passes.Sequential(*passes)(model)
    result.model.graph.name = spec.name
    return result.model


def lower_precision(model: ir.Model, dtype: str, keep: Collection[str]) -> ir.Model:
    """`model` with float operators in `dtype`, but for those called in `keep`; operator set 23 if it is quantized.

    bfloat16 needs 22 in any case.
    """
    from onnxscript.version_converter import convert_version

    opset = model.graph.opset_imports[""]
    if any(node.op_type == "DequantizeLinear" for node in model.graph):
        # In older ones a scale has the type of what it scales.
        opset = max(OUTPUT_DTYPE_OPSET, opset)
    elif dtype == "bf16":
        opset = max(BFLOAT16_OPSET, opset)
    convert_version(model, opset)
    passes: list[ir.passes.PassBase] = [
        LowerPrecision(dtype, keep),
        RemoveUnusedNodesPass(),
        TopologicalSortPass(),
    ]
    return ir.passes.Sequential(*passes)(model).model


def _example(tensor: TensorSpec, granularity: int) -> Tensor:
    sizes = {
        "batch": EXAMPLE_BATCH,
        # The timestep is traced with the batch's dimension; ExpandTimestep widens it afterwards.
        "steps": EXAMPLE_BATCH,
        "height": EXAMPLE_HEIGHT * granularity,
        "width": EXAMPLE_WIDTH * granularity,
        "sequence": 8,
        "image_tokens": EXAMPLE_HEIGHT * EXAMPLE_WIDTH,
    }
    shape = [size if isinstance(size, int) else _scaled(size, sizes) for size in tensor.shape]
    return torch.zeros(shape, dtype=getattr(torch, tensor.dtype))


def _scaled(symbol: str, sizes: Mapping[str, int]) -> int:
    base, factor = base_of(symbol)
    return int(sizes[base] * factor)


def _dynamic_shapes(spec: ComponentSpec, granularity: int, *, variadic: bool) -> tuple[Any, ...]:
    batch = Dim("batch", max=MAX_TRACED_BATCH)
    symbols = {
        "batch": batch,
        "steps": batch,
        "sequence": Dim("sequence"),
        "image_tokens": Dim("image_tokens"),
    }
    granules = {
        "height": Dim("height_granules", max=MAX_GRANULES),
        "width": Dim("width_granules", max=MAX_GRANULES),
    }

    def dimension(size: str) -> Any:
        base, factor = base_of(size)
        return int(factor * granularity) * granules[base] if base in granules else symbols[base]

    shapes = tuple(
        {axis: dimension(size) for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in spec.inputs
    )
    # Denoisers and ControlNets take their inputs as one variadic argument.
    return (shapes,) if variadic else shapes


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Send what the exporter warns about to this module's logger, at debug level."""
    levels = {name: logging.getLogger(name).level for name in NOISY_LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    for warning in caught:
        logger.debug("%s: %s", warning.category.__name__, warning.message)


def _summary(error: Exception) -> str:
    logger.debug("torch could not export", exc_info=error)
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

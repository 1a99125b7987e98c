"""Make the int8 codes that enter each product visible, and replaceable."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

QUANTIZE = "QuantizeLinear"


def code_names(model: onnx.ModelProto) -> list[str]:
    """Names of all codes, in graph order: ``<path of the quantizer in the torch component>/codes``.

    Of QuantizeLinear nodes with the same inputs (see UnshareQuantize) the first stands for all.
    """
    return list(dict.fromkeys(_names(model).values()))


def _names(model: onnx.ModelProto) -> dict[str, str]:
    """For the output of every QuantizeLinear, that of the first with the same inputs."""
    first: dict[tuple[str, ...], str] = {}
    quantizers = [node for node in model.graph.node if node.op_type == QUANTIZE]
    return {node.output[0]: first.setdefault(tuple(node.input), node.output[0]) for node in quantizers}


def mark_codes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` that also returns the codes of every quantizer.

    The new outputs (int8, in the order of :func:`code_names`) follow the model's own. So the codes of two rungs can be
    compared layer by layer. A quantizer that several layers share appears once, under the first.
    """
    marked = _copy(model)
    present = {value.name for value in marked.graph.output}
    for name in code_names(model):
        if name not in present:
            marked.graph.output.append(helper.make_tensor_value_info(name, TensorProto.INT8, None))
    return marked


def force_codes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` that takes the codes which enter its products, and returns those it would have chosen.

    Every product computes with the given codes (new int8 inputs ``<code name>/forced``, in the order of
    :func:`code_names`), while QuantizeLinear still answers for the values that reach it. Fed with the codes of another
    rung, a code that differs is a difference made since the last product: it does not cascade into later layers.
    """
    forced = mark_codes(model)
    names = _names(model)
    for node in forced.graph.node:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = forced_name(names[name])
    for name in code_names(model):
        forced.graph.input.append(helper.make_tensor_value_info(forced_name(name), TensorProto.INT8, None))
    return forced


def forced_name(name: str) -> str:
    """The input of :func:`force_codes` that stands in for the codes `name`."""
    return f"{name}/forced"


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied

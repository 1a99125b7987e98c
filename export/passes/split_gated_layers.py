"""Make the two halves of a gated unit by two products, so that nothing splits what one product made."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from quest_deploy.export.lazy import mapped, sizes_of
from quest_deploy.export.nodes import is_alone, is_constant, twin

# What the gate's half goes through: GEGLU, SwiGLU.
ACTIVATIONS = {"Gelu", "Sigmoid", "Swish"}


@dataclass(frozen=True)
class _Layer:
    """A linear layer whose output is split.

    Attributes:
        product: The MatMul.
        dequantize: Its weight, DequantizeLinear(codes [k, n], scale [n]).
        steps: What follows the product, in order: sums with a bias and products with factors.
    """

    product: ir.Node
    dequantize: ir.Node
    steps: tuple[ir.Node, ...]


class SplitGatedLayers(ir.passes.InPlacePass):
    """``value, gate = Split(MatMul(x, W) + b)`` becomes ``value = MatMul(x, W1) + b1``, ``gate = MatMul(x, W2) + b2``.

    For OpenVINO, whose Split is a copy, and which computes the gate's activation as it stores a product. Each half has
    the columns of the codes, their scales and their part of the bias: every number stays the same.

    1. Fires on a ``Split`` in two equal parts along the last axis, one of which goes to an activation (GEGLU, SwiGLU),
       behind a product with integer codes [k, n] and a scale for each output [n]; sums with a constant bias and
       products with a factor for each sample may lie between.
    2. Must not fire where anything else reads what is split, the product or its codes; where a part is a graph output;
       on blocks of codes; on float weights (ONNX Runtime's own fusions for Stable Diffusion look for the Split); nor on
       a Split of anything but such a layer (adaptive norms, convolutions).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rule to `model`."""
        modified = False
        for node in list(model.graph):
            if node.op_type != "Split" or not _is_gated(node) or (layer := _layer_of(node)) is None:
                continue
            for index, output in enumerate(node.outputs):
                output.replace_all_uses_with(_part(model.graph, node, layer, index))
            model.graph.remove([node, *reversed(layer.steps), layer.product, layer.dequantize], safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _is_gated(split: ir.Node) -> bool:
    whole, parts = split.inputs[0], split.outputs
    if len(parts) != 2 or len(split.inputs) != 1 or whole is None or whole.shape is None:
        return False
    if split.attributes.get_int("axis", 0) not in (-1, len(whole.shape) - 1):
        return False
    if any(part.is_graph_output() for part in parts):
        return False
    return any(use.node.op_type in ACTIVATIONS for part in parts for use in part.uses())


def _layer_of(split: ir.Node) -> _Layer | None:
    steps: list[ir.Node] = []
    value = split.inputs[0]
    while is_alone(value) and (node := value.producer()) is not None:  # type: ignore[union-attr]
        if node.op_type == "MatMul":
            return _product(node, tuple(reversed(steps)))
        beside = [other for other in node.inputs if other is not None and _is_constant_for_parts(other, node)]
        if len(beside) != 1 or len(node.inputs) != 2:
            return None
        steps.append(node)
        value = node.inputs[1 - node.inputs.index(beside[0])]
    return None


def _is_constant_for_parts(value: ir.Value, node: ir.Node) -> bool:
    """A bias [..., n], or a factor that is the same for all outputs."""
    if node.op_type == "Add":
        return is_constant(value)
    shape = value.shape if value.const_value is None else value.const_value.shape
    return node.op_type == "Mul" and shape is not None and all(size == 1 for size in shape[-1:])


def _product(node: ir.Node, steps: tuple[ir.Node, ...]) -> _Layer | None:
    weight = node.inputs[1]
    dequantize = weight.producer() if weight is not None and is_alone(weight) else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or len(dequantize.inputs) != 2:
        return None
    codes, scale = dequantize.inputs
    if not (is_constant(codes) and is_constant(scale) and is_alone(codes)):
        return None
    sizes = sizes_of(codes.const_value)  # type: ignore[union-attr, arg-type]
    plain = dequantize.attributes.get_int("block_size", 0) == 0
    by_output = dequantize.attributes.get_int("axis", 1) in (1, -1)
    of_outputs = sizes_of(scale.const_value) == sizes[1:]  # type: ignore[union-attr, arg-type]
    return _Layer(node, dequantize, steps) if len(sizes) == 2 and plain and by_output and of_outputs else None


def _part(graph: ir.Graph, split: ir.Node, layer: _Layer, index: int) -> ir.Value:
    """The value of one half, made by nodes of its own."""

    def again(node: ir.Node, inputs: list[ir.Value | None], shape: ir.Shape | None) -> ir.Value:
        made = twin(node, inputs=inputs)
        made.outputs[0].shape = shape
        graph.insert_before(split, made)
        return made.outputs[0]

    codes, scale = (_half(graph, one, index) for one in layer.dequantize.inputs)
    weight = again(layer.dequantize, [codes, scale], None if codes is None else codes.shape)
    shape = split.outputs[index].shape
    before, value = layer.product.outputs[0], again(layer.product, [layer.product.inputs[0], weight], shape)
    for step in layer.steps:
        inputs = [value if one is before else _half(graph, one, index) for one in step.inputs]
        before, value = step.outputs[0], again(step, inputs, shape)
    return value


def _half(graph: ir.Graph, value: ir.Value | None, index: int) -> ir.Value | None:
    """One half of the last axis of an initializer, as one of its own; anything else, or a single value, as it is."""
    if (
        value is None
        or value.const_value is None
        or not (sizes := sizes_of(value.const_value))
        or sizes[-1] == 1
    ):
        return value
    half = sizes[-1] // 2
    shape, name = (*sizes[:-1], half), f"{value.name}/{index}"
    tensor = mapped(
        value.const_value,
        lambda values: values[..., index * half : (index + 1) * half],
        shape=shape,
        name=name,
    )
    own = ir.Value(name=name, type=value.type, shape=ir.Shape(shape), const_value=tensor)
    graph.register_initializer(own)
    return own

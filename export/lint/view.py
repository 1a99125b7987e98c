"""Products, their operands and the quantizers in between, as the rules want to see them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import onnx_ir as ir

from quest_deploy.export.lint.macs import ATTENTIONS, count_macs

CONVOLUTIONS = ("Conv", "ConvTranspose")
MATRIX_PRODUCTS = ("MatMul", "Gemm")
# Products that hold their quantization themselves, without Q/DQ nodes around them.
INTEGER_PRODUCTS = (
    *("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulNBits"),
    *("MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
)
# What ONNX Runtime's optimizer makes of products in float.
FUSED_PRODUCTS = ("FusedMatMul", "FusedGemm", "FusedConv", "NhwcConv")
PRODUCTS = (
    *(*CONVOLUTIONS, *MATRIX_PRODUCTS, *INTEGER_PRODUCTS, *FUSED_PRODUCTS),
    *(*ATTENTIONS, "Einsum"),
)
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"

FOUR_BITS = (ir.DataType.INT4, ir.DataType.UINT4)
EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)
SIXTEEN_BITS = (ir.DataType.INT16, ir.DataType.UINT16)
FLOAT8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)

# Operators that only move values, so that quantizing before or behind them is the same.
MOVES = ("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")

Origin = Literal["stored", "quantized", "external", "computed"]
Granularity = Literal["tensor", "channel", "block"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Dequantizer:
    """A DequantizeLinear and where its codes come from.

    Attributes:
        node: The node itself.
        kind: Type of the codes.
        stored_kind: The type they are stored in, before a Cast unpacks them.
        origin: The codes are constants, made by a QuantizeLinear, inputs of the graph, or computed otherwise.
        quantizer: The QuantizeLinear, where there is one.
        codes_through: Operators between the codes' origin and the node.
        granularity: One scale in all, one a channel of `axis`, or one a block of it.
        axis: Counted from the front; None where the rank is unknown, or for one scale in all.
        block_size: Elements that share a scale along `axis`; 0 without blocks.
    """

    node: ir.Node
    kind: ir.DataType | None
    stored_kind: ir.DataType | None
    origin: Origin
    quantizer: ir.Node | None
    codes_through: tuple[str, ...]
    granularity: Granularity
    axis: int | None
    block_size: int

    def describe(self) -> str:
        """Type and blocks of the codes, for tables."""
        name = "?" if self.kind is None else self.kind.name.lower()
        if self.stored_kind not in (None, self.kind):
            name = f"{name} in {self.stored_kind.name.lower()}"
        return f"{name}/{self.block_size}" if self.granularity == "block" else name


@dataclass(frozen=True, eq=False, kw_only=True)
class Operand:
    """One side of a product.

    Attributes:
        value: What the product reads.
        is_weight: It follows from constants alone, or from stored codes.
        dequantizer: The DequantizeLinear that it comes from, if only operators that move or cast values lie in between.
        through: Those operators, seen from the product.
    """

    value: ir.Value
    is_weight: bool
    dequantizer: Dequantizer | None
    through: tuple[ir.Node, ...]

    @property
    def float_type(self) -> ir.DataType | None:
        """The type that the product computes in: DequantizeLinear gives its scale's, if no attribute says otherwise.

        Inference is not asked where a quantizer stands right before the product: before opset 19 it says float32 for
        any scale, while runtimes that take such graphs give the scale's type.
        """
        if self.dequantizer is None or self.through:
            return self.value.dtype
        chosen, scale = integer(self.dequantizer.node, "output_dtype", 0), self.dequantizer.node.inputs[1]
        return ir.DataType(chosen) if chosen else None if scale is None else scale.dtype

    def describe(self) -> str:
        """What it is stored or quantized as."""
        if self.dequantizer is not None:
            return self.dequantizer.describe()
        return "float" if self.value.dtype is None else self.value.dtype.name.lower()

    def scale_axis(self) -> int | None:
        """The axis of the product's operand that channels or blocks lie along; None where it cannot be told."""
        if self.dequantizer is None or self.dequantizer.axis is None:
            return None
        axis = self.dequantizer.axis
        for node in reversed(self.through):
            if node.op_type == "Transpose" and "perm" in node.attributes:
                axis = list(node.attributes["perm"].as_ints()).index(axis)
            elif node.op_type not in ("Identity", "Cast"):
                return None
        return axis


@dataclass(frozen=True, eq=False, kw_only=True)
class Product:
    """One Conv, Gemm, MatMul or operator that holds one."""

    node: ir.Node
    operands: tuple[Operand, ...]
    macs: int | None

    @cached_property
    def dequantizers(self) -> tuple[Dequantizer, ...]:
        """Those of the operands that have one."""
        return tuple(operand.dequantizer for operand in self.operands if operand.dequantizer is not None)

    @property
    def weight(self) -> Operand | None:
        """The operand that is constant, the second one first."""
        return next((operand for operand in reversed(self.operands) if operand.is_weight), None)

    @property
    def is_convolution(self) -> bool:
        """Whether TensorRT makes a convolution of it."""
        return self.node.op_type in CONVOLUTIONS

    def both_quantized(self) -> bool:
        """Whether both operands come from codes."""
        return len(self.operands) == len(self.dequantizers) == 2

    def channel_axis(self, operand: Operand) -> int | None:
        """The axis of `operand` along which a scale leaves the sum."""
        left = operand is self.operands[0]
        rank = len(operand.value.shape) if operand.value.shape is not None else None
        if self.node.op_type == "Conv":
            return 1 if left else 0
        if self.node.op_type == "ConvTranspose":
            return 1
        if self.node.op_type == "Gemm":
            flag = self.node.attributes.get("transA" if left else "transB")
            transposed = flag is not None and flag.as_int() != 0
            return int(transposed) if left else int(not transposed)
        return None if rank is None else rank - 2 if left else rank - 1

    def along_the_sum(self, operand: Operand) -> bool:
        """Whether scales by channel or block lie along another axis than the one that leaves the sum."""
        axis, wanted = operand.scale_axis(), self.channel_axis(operand)
        return axis is not None and wanted is not None and axis != wanted

    def nodes(self) -> Iterator[ir.Node]:
        """The product and every quantizer around it: a finding on one of them concerns the product."""
        yield self.node
        for dequantizer in self.dequantizers:
            yield dequantizer.node
            if dequantizer.quantizer is not None:
                yield dequantizer.quantizer
        for value in self.node.inputs[2:]:
            if value is not None and (producer := value.producer()) is not None:
                yield producer


@dataclass(frozen=True, eq=False, kw_only=True)
class View:
    """One graph, looked at."""

    component: str
    model: ir.Model
    opset: int
    products: tuple[Product, ...]
    quantizers: tuple[ir.Node, ...]
    dequantizers: tuple[Dequantizer, ...]

    @cached_property
    def readers(self) -> dict[int, tuple[Product, ...]]:
        """The products that a node (by id) belongs to."""
        found: dict[int, tuple[Product, ...]] = {}
        for product in self.products:
            for node in product.nodes():
                found[id(node)] = (*found.get(id(node), ()), product)
        return found

    @property
    def linear_nodes(self) -> tuple[ir.Node, ...]:
        """Every QuantizeLinear and DequantizeLinear."""
        return (*self.quantizers, *(dequantizer.node for dequantizer in self.dequantizers))


def look_at(component: str, model: ir.Model) -> View:
    """Find the products and quantizers of a graph and of the graphs inside it. Nodes without a name get one."""
    nodes = list(model.graph.all_nodes())
    name_nodes(nodes)
    known = {id(node): describe(node) for node in nodes if node.op_type == DEQUANTIZE}
    return View(
        component=component,
        model=model,
        opset=model.opset_imports.get("", 0),
        products=tuple(
            Product(
                node=node,
                operands=tuple(operand(value, known) for value in operands_of(node)),
                macs=count_macs(node),
            )
            for node in nodes
            if node.op_type in PRODUCTS
        ),
        quantizers=tuple(node for node in nodes if node.op_type == QUANTIZE),
        dequantizers=tuple(known.values()),
    )


def name_nodes(nodes: list[ir.Node]) -> None:
    """Give every node a name of its own, so that a finding can name it."""
    taken: set[str] = set()
    for index, node in enumerate(nodes):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}#{index}"
        taken.add(node.name)


def is_read_by(value: ir.Value, op_type: str) -> bool:
    """Whether some reader of `value` is of this type."""
    return any(use.node.op_type == op_type for use in value.uses())


def operands_of(node: ir.Node) -> tuple[ir.Value, ...]:
    """The two factors of a product that Q/DQ nodes may stand before."""
    if node.op_type in (*INTEGER_PRODUCTS, *FUSED_PRODUCTS):
        return ()
    wanted = node.inputs[:3] if node.op_type in ATTENTIONS else node.inputs[:2]
    return tuple(value for value in wanted if value is not None)


def operand(value: ir.Value, known: dict[int, Dequantizer]) -> Operand:
    """What lies between a product and its operand's codes."""
    source, through = walk_up(value, (*MOVES, "Cast"))
    producer = source.producer()
    dequantizer = None if producer is None else known.get(id(producer))
    return Operand(
        value=value,
        is_weight=is_constant(value) or (dequantizer is not None and dequantizer.origin == "stored"),
        dequantizer=dequantizer,
        through=through if dequantizer is not None else (),
    )


def walk_up(value: ir.Value, moves: tuple[str, ...] = MOVES) -> tuple[ir.Value, tuple[ir.Node, ...]]:
    """The value that `value` was moved from, and the nodes that did it, the nearest first."""
    through = []
    while (node := value.producer()) is not None and node.op_type in moves and node.inputs[0] is not None:
        through.append(node)
        value = node.inputs[0]
    return value, tuple(through)


def describe(node: ir.Node) -> Dequantizer:
    """A DequantizeLinear, its codes' origin, and the shape of its scale."""
    codes = node.inputs[0]
    if codes is None:
        raise ValueError(f"{node.name} has no input")
    # A Cast of stored codes unpacks them; Gather picks rows.
    source, through = walk_up(codes, (*MOVES, "Cast", "Gather"))
    producer = source.producer()
    quantizer = producer if producer is not None and producer.op_type == QUANTIZE else None
    made = quantized_type(quantizer) if quantizer is not None else source.dtype
    axis, block_size = axis_of(node), integer(node, "block_size", 0)
    scale = node.inputs[1]
    elements = None if scale is None or scale.shape is None else size_of(scale)
    granularity: Granularity = "channel"
    if block_size:
        granularity = "block"
    elif elements == 1:
        granularity = "tensor"
    return Dequantizer(
        node=node,
        kind=codes.dtype or made,
        stored_kind=made,
        origin=origin_of(source, quantizer),
        quantizer=quantizer,
        codes_through=tuple(step.op_type for step in through),
        granularity=granularity,
        axis=None if granularity == "tensor" else axis,
        block_size=block_size,
    )


def quantized_type(node: ir.Node) -> ir.DataType:
    """What a QuantizeLinear makes: its zero-point's type, its attribute, or uint8 as the standard says."""
    point = node.inputs[2] if len(node.inputs) > 2 else None
    if point is not None and point.dtype is not None:
        return point.dtype
    chosen = integer(node, "output_dtype", 0)
    return ir.DataType(chosen) if chosen else ir.DataType.UINT8


def origin_of(source: ir.Value, quantizer: ir.Node | None) -> Origin:
    """Where codes come from; float constants behind a QuantizeLinear count as quantized."""
    if quantizer is not None:
        return "quantized"
    if is_constant(source):
        return "stored"
    return "external" if source.producer() is None else "computed"


def axis_of(node: ir.Node) -> int | None:
    """The axis of a quantizer's scale, counted from the front."""
    axis = integer(node, "axis", 1)
    value = node.inputs[0]
    if axis >= 0:
        return axis
    return None if value is None or value.shape is None else axis + len(value.shape)


def integer(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def size_of(value: ir.Value) -> int | None:
    """Number of elements, where the shape is known."""
    if value.shape is None or not all(isinstance(size, int) for size in value.shape):
        return None
    return int(np.prod([int(size) for size in value.shape if isinstance(size, int)], dtype=np.int64))


def is_constant(value: ir.Value) -> bool:
    """Whether `value` follows from initializers and Constant nodes alone."""
    waiting, seen = [value], set()
    while waiting:
        current = waiting.pop()
        if id(current) in seen or current.is_initializer():
            continue
        seen.add(id(current))
        node = current.producer()
        if node is None:
            return False
        waiting += [item for item in node.inputs if item is not None]
    return True


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of an initializer or Constant node; None for anything else, or where they cannot be read."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return None
    try:
        return tensor.numpy()
    except (OSError, ValueError):  # external data that is missing or too short: a finding of its own
        return None

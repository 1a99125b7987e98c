"""Two engines of one graph, in low precision and in floats, compared product by product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quest_deploy.engines.inspector import EngineLayer
from quest_deploy.engines.layer_times import LayerTimes
from quest_deploy.export.quantized import GraphProduct

# Medians of the same kernel differ by about that much from one context to the next, so this is no claim about less.
MARGIN = 1.05
# What RemoveQuantizers puts in front of a product is called after it.
_INSERTED = "/float/"


@dataclass(frozen=True, kw_only=True)
class ProductTimes:
    """Products that are compared together, because an engine computes them in one layer.

    Attributes:
        products: Names of the ONNX nodes.
        low_ms: The layers of them in the quantized engine; None where none of its layers names them.
        float_ms: Those in the engine without quantizers, likewise.
    """

    products: tuple[str, ...]
    low_ms: float | None
    float_ms: float | None

    @property
    def is_measured(self) -> bool:
        """Whether both engines tell."""
        return self.low_ms is not None and self.float_ms is not None

    @property
    def is_slower(self) -> bool:
        """Whether low precision takes longer, beyond what measurements vary by."""
        return self.low_ms is not None and self.float_ms is not None and self.low_ms > MARGIN * self.float_ms

    def to_json(self) -> dict[str, Any]:
        """In JSON types."""
        return {"products": list(self.products), "low_ms": self.low_ms, "float_ms": self.float_ms}


def compare(products: Sequence[GraphProduct], low: LayerTimes, full: LayerTimes) -> list[ProductTimes]:
    """The time of each quantized product in both engines.

    The time of a layer that TensorRT fused from several nodes counts for every product in it. Products that share a
    layer in either engine cannot be told apart by time, nor be taken out of low precision one by one on the strength of
    it: they are one row, whose times are sums over all layers with any of them. Layers that do nothing but quantize,
    dequantize or cast count for the products that read them. Where such a node is fused into something else, an
    activation function for instance, its time is not told and counts for nobody.

    Args:
        products: All products of the quantized graph.
        low: The engine of that graph.
        full: The engine of the graph with the quantizers of all removable products taken out.
    """
    owners = Owners(products)
    groups = {name: name for name in owners.removable}
    for layer in (*low.layers, *full.layers):
        first, *others = owners.of(layer) or ("",)
        for other in others:
            groups[_root(groups, other)] = _root(groups, first)
    members: dict[str, list[str]] = {}
    for name in owners.removable:
        members.setdefault(_root(groups, name), []).append(name)
    sums = [_sums(owners, groups, times) for times in (low, full)]
    return [
        ProductTimes(products=tuple(names), low_ms=sums[0].get(root), float_ms=sums[1].get(root))
        for root, names in members.items()
    ]


class Owners:
    """Which quantized products a layer works for."""

    def __init__(self, products: Sequence[GraphProduct]) -> None:
        self.removable = tuple(product.name for product in products if product.removable)
        self._names = {product.name for product in products}
        self._quantizers: dict[str, tuple[str, ...]] = {}
        for product in products:
            if product.removable:
                for node in product.quantizers:
                    self._quantizers[node] = (*self._quantizers.get(node, ()), product.name)

    def of(self, layer: EngineLayer) -> tuple[str, ...]:
        """Names of the products that a layer computes, or quantizes for and nothing else."""
        inside = [name for name in layer.sources if name in self._names]
        if inside:
            return tuple(name for name in inside if name in self.removable)
        readers = [self._readers(node) for node in layer.sources]
        return tuple(dict.fromkeys(name for names in readers for name in names)) if all(readers) else ()

    def _readers(self, node: str) -> tuple[str, ...]:
        if node in self._quantizers:
            return self._quantizers[node]
        product = node.rpartition(_INSERTED)[0]
        return (product,) if product in self.removable else ()


def _root(groups: dict[str, str], name: str) -> str:
    while groups[name] != name:
        name = groups[name]
    return name


def _sums(owners: Owners, groups: dict[str, str], times: LayerTimes) -> dict[str, float]:
    """Milliseconds by group; a layer that was not timed counts for nobody."""
    found: dict[str, float] = {}
    for layer in times.layers:
        names = owners.of(layer)
        if names and layer.name in times.ms:
            root = _root(groups, names[0])
            found[root] = found.get(root, 0.0) + times.ms[layer.name]
    return found

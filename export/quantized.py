"""Which products of an ONNX graph are quantized, and the same graph with some of them in floats."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from quest_deploy.export.lint.read import infer_shapes, read_proto, to_ir, written_out
from quest_deploy.export.lint.view import Product, look_at
from quest_deploy.export.passes.remove_quantizers import RemoveQuantizers, is_removable
from quest_deploy.export.passes.strip_metadata import StripMetadata
from quest_deploy.export.to_onnx import save


@dataclass(frozen=True, kw_only=True)
class GraphProduct:
    """One product of a graph.

    Attributes:
        name: Of the node.
        quantizers: Names of the QuantizeLinear and DequantizeLinear nodes around it.
        removable: Whether it is quantized, and can be taken out of low precision.
    """

    name: str
    quantizers: tuple[str, ...]
    removable: bool


def graph_products(path: Path) -> tuple[GraphProduct, ...]:
    """Every product of an ONNX file.

    Raises:
        ArtifactError: it is not ONNX.
    """
    model = _read(path)
    return tuple(
        GraphProduct(
            name=str(product.node.name),
            quantizers=_quantizers(product),
            removable=is_removable(product, model.graph),
        )
        for product in look_at(path.parent.name, model).products
    )


def without_quantizers(path: Path, products: Collection[str], output: Path) -> None:
    """Write an ONNX file in which the named products compute in floats; all else is as it was.

    Args:
        path: The ONNX file.
        products: Names, as :func:`graph_products` gives them.
        output: Where to write; its directory is made, and large weights go to a file beside it.

    Raises:
        ArtifactError: `path` is not ONNX.
    """
    passes = ir.passes.Sequential(RemoveQuantizers(products), RemoveUnusedNodesPass(), StripMetadata())
    model = passes(_read(path)).model
    output.parent.mkdir(parents=True, exist_ok=True)
    save(model, output)


def _read(path: Path) -> ir.Model:
    """A graph with the types of its values, as far as they can be told; weights stay in their file."""
    return to_ir(infer_shapes(written_out(read_proto(path))), path)


def _quantizers(product: Product) -> tuple[str, ...]:
    names = [str(node.name) for node in product.nodes() if node is not product.node]
    return tuple(dict.fromkeys(names))

"""Times made up, names as TensorRT's inspector gives them."""

from __future__ import annotations

import pytest

from quest_deploy.engines.inspector import EngineLayer
from quest_deploy.engines.layer_times import LayerTimes
from quest_deploy.export.quantized import GraphProduct
from quest_deploy.product_times import ProductTimes, compare


def product(name: str, *quantizers: str, removable: bool = True) -> GraphProduct:
    return GraphProduct(name=name, quantizers=quantizers or (f"{name}/Q", f"{name}/DQ"), removable=removable)


def times(**layers: float) -> LayerTimes:
    """Layers called after the nodes in them, with ``_and_`` between, as Python's names allow."""
    sources = {name: tuple(name.replace("_Q", "/Q").split("_and_")) for name in layers}
    made = [
        EngineLayer(name=name, kind="", precision="int8", weights="unknown", tactic="", sources=nodes)
        for name, nodes in sources.items()
    ]
    return LayerTimes(layers=tuple(made), ms=layers)


def rows(low: LayerTimes, full: LayerTimes, *products: GraphProduct) -> dict[str, tuple]:
    found = compare(products or (product("a"), product("b")), low, full)
    return {" ".join(row.products): (row.low_ms, row.float_ms) for row in found}


def test_each_product_has_its_layer_in_both() -> None:
    found = rows(times(a=1.0, b=2.0, other=9.0), times(a=0.5, b=4.0))
    assert found == {"a": (1.0, 0.5), "b": (2.0, 4.0)}


def test_product_in_several_layers_has_their_sum() -> None:
    assert rows(times(a=1.0, a_and_relu=0.5), times(a=2.0), product("a")) == {"a": (1.5, 2.0)}


def test_products_of_one_layer_are_compared_together() -> None:
    assert rows(times(a=1.0, b=2.0), times(a_and_b=2.5)) == {"a b": (3.0, 2.5)}
    assert rows(times(a_and_b=3.0), times(a=1.0, b=1.0)) == {"a b": (3.0, 2.0)}


def test_layers_that_quantize_alone_count_for_their_readers() -> None:
    assert rows(times(a_Q=0.25, a=1.0), times(a=2.0), product("a")) == {"a": (1.25, 2.0)}


def test_quantizers_fused_into_something_else_count_for_nobody() -> None:
    assert rows(times(relu_and_a_Q=5.0, a=1.0), times(relu=5.0, a=2.0), product("a")) == {"a": (1.0, 2.0)}


def test_quantizer_of_the_next_product_does_not_join_two() -> None:
    assert rows(times(a_and_b_Q=1.0, b=1.0), times(a=2.0, b=2.0)) == {"a": (1.0, 2.0), "b": (1.0, 2.0)}


def test_casts_in_front_of_a_float_product_count_for_it() -> None:
    cast = EngineLayer(
        name="cast", kind="", precision="fp32", weights="unknown", tactic="", sources=("a/float/0/cast",)
    )
    full = times(a=1.0)
    full = LayerTimes(layers=(*full.layers, cast), ms={"a": 1.0, "cast": 0.125})
    assert rows(times(a=1.0), full, product("a")) == {"a": (1.0, 1.125)}


def test_product_that_an_engine_does_not_name_is_not_measured() -> None:
    (row,) = compare([product("a")], times(a=1.0), times(b=0.1))
    assert (row.low_ms, row.float_ms) == (1.0, None)
    assert not row.is_measured and not row.is_slower


def test_layer_that_the_profiler_did_not_name_has_no_time() -> None:
    low = LayerTimes(layers=times(a=1.0).layers, ms={"another name": 1.0})
    (row,) = compare([product("a")], low, times(a=0.5))
    assert not row.is_measured


def test_products_in_floats_are_left_out() -> None:
    found = rows(times(a_and_b=1.0), times(a_and_b=2.0), product("a"), product("b", removable=False))
    assert found == {"a": (1.0, 2.0)}


@pytest.mark.parametrize(("low_ms", "slower"), [(0.9, False), (1.04, False), (1.06, True)])
def test_slower_is_more_than_measurements_vary_by(low_ms: float, slower: bool) -> None:
    assert ProductTimes(products=("a",), low_ms=low_ms, float_ms=1.0).is_slower is slower

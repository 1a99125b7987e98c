"""An Einsum that moves axes becomes a Transpose; others stay."""

from __future__ import annotations

import numpy as np
import pytest

from quest_deploy.export.passes.permute_einsum import PermuteEinsum
from tests.export.passes.test_fold_rows import graph, operators, run

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
MOVES = """
moves (float[n, 3, 4] x) => (float y) {
    y = Einsum<equation = "EQUATION">(x)
}"""


@pytest.mark.parametrize("equation", ["abc->cab", "abc -> acb"])
def test_a_permutation_is_a_transpose(equation: str) -> None:
    model = graph(MOVES.replace("EQUATION", equation))
    assert PermuteEinsum()(model).modified
    assert operators(model) == ["Transpose"] and model.graph.outputs[0].name == "y"
    np.testing.assert_array_equal(run(model, X)[0], np.einsum(equation, X))


@pytest.mark.parametrize("equation", ["abc->ab", "abb->ab", "...c->c...", "abc", "abc->abbc"])
def test_anything_else_stays(equation: str) -> None:
    model = graph(MOVES.replace("EQUATION", equation))
    assert not PermuteEinsum()(model).modified
    assert operators(model) == ["Einsum"]


def test_products_stay() -> None:
    model = graph(MOVES.replace("EQUATION", "abc,abc->abc").replace("(x)\n", "(x, x)\n"))
    assert not PermuteEinsum()(model).modified

"""Distances between time embeddings: closed forms."""

from __future__ import annotations

import pytest
import torch

from quest_deploy.analyze.temporal import compare_outputs, confusion, embedding_layer
from quest_deploy.quantize.insert import Role


def test_relative_error_and_cosine_of_a_scaled_and_a_turned_output() -> None:
    true = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    got = torch.tensor([[[6.0, 8.0], [0.0, 1.0]]])
    result = compare_outputs({"layer": true}, {"layer": got})["layer"]
    assert result["relative_error"] == pytest.approx([1.0, 2**0.5], rel=1e-4)
    assert result["cosine"] == pytest.approx([1.0, 0.0], abs=1e-6)


def test_true_embeddings_are_mistaken_for_none_other() -> None:
    true = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    result = confusion(true, true + 1e-3)
    assert result["nearest"] == list(range(5))
    assert result["mistaken"] == 0.0


def test_swapped_embeddings_are_mistaken_for_each_other() -> None:
    true = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    result = confusion(true, true[:, [1, 0, 2, 3]])
    assert result["nearest"] == [1, 0, 2, 3]
    assert result["mistaken"] == 0.5
    assert result["distance"][0][1] == pytest.approx(0.0, abs=1e-6)


ROLES: dict[str, Role] = {
    "in": "boundary",
    "t1": "temporal",
    "t2": "temporal",
    "t3": "temporal",
    "x": "other",
}


@pytest.mark.parametrize(
    ("run_order", "expected"),
    [
        (["t1", "t2", "in", "x", "t3"], "t2"),
        (["in", "t1", "t2", "x", "t3"], "t2"),
        (["in", "x"], None),
        (["in", "t1"], "t1"),
    ],
    ids=["before all", "after the first convolution", "no time", "at the end"],
)
def test_time_embedding_is_the_last_before_the_network(run_order: list[str], expected: str | None) -> None:
    assert embedding_layer(run_order, ROLES) == expected


def test_the_nearest_is_nearest_whatever_its_size() -> None:
    """Distances are shown relative to the true embedding's size, which must not choose it."""
    true = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    result = confusion(true, torch.tensor([[[1.4, 0.0], [2.0, 0.0]]]))
    assert result["nearest"] == [0, 1]
    assert result["mistaken"] == 0.0
    assert result["distance"][0] == pytest.approx([0.4, 0.3], rel=1e-4)

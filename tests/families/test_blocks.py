"""Parts of models of every kind: what they are given, where that is not one row for each sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import blocks
from quest_deploy.quantize.calibrate import record_trajectories

SIZES = "adaln_single.emb.resolution_embedder.linear_1"


@pytest.mark.parametrize("at_once", [None, 1])
@torch.no_grad()
def test_layers_that_are_given_height_and_width_have_both_rows_of_each_sample(
    at_once: int | None, loaded: Callable[[str], LoadedModel]
) -> None:
    model = loaded("pixart-sized")
    data = record_trajectories(
        model, ("a rocket", "pizza"), steps=2, guidance_scale=3.0, seed=0, batch_size=2
    )
    pairs = blocks.chosen_pairs(data, 2, 0)
    samples = blocks.collect(model.denoiser, model.denoiser, SIZES, data, pairs, at_once)
    # Two prompts, two steps, two branches.
    assert (samples.timestep.numel(), samples.rows) == (8, 2)
    few = samples.batch(torch.tensor([5, 0, 3]))
    assert few.targets[0].shape[0] == 6
    for some in (samples, few):
        answer = model.denoiser.get_submodule(SIZES)(*some.args, **some.kwargs)
        torch.testing.assert_close(answer, some.targets[0], rtol=1e-5, atol=1e-6)

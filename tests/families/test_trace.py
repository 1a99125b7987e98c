"""What carries time, and where a network begins and ends, found in every kind of denoiser."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quest_deploy.config import FinetuneConfig
from quest_deploy.model.components import predict
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.finetune import prepare
from quest_deploy.quantize.insert import quantizable_layers
from quest_deploy.quantize.recipe import PAPER, load_recipe
from quest_deploy.quantize.select import select
from quest_deploy.quantize.trace import trace

ENDS = {
    "dit": {"pos_embed.proj", "proj_out_2"},
    "class-unet": {"conv_in", "conv_out"},
    "ldm": {"conv_in", "conv_out"},
    "ddpm": {"conv_in", "conv_out"},
}
CARRIERS = {"dit": ("timestep_embedder.", "norm1.linear", "proj_out_1")}
OF_A_UNET = ("time_embedding.", "time_emb_proj")


@pytest.mark.parametrize("kind", ENDS)
def test_both_ends_of_the_network_are_found(kind: str, loaded: Callable[[str], LoadedModel]) -> None:
    roles = trace(loaded(kind)).roles
    assert {name for name, role in roles.items() if role == "boundary"} == ENDS[kind]


@pytest.mark.parametrize("kind", ENDS)
def test_layers_fed_by_the_timestep_alone_are_found(kind: str, loaded: Callable[[str], LoadedModel]) -> None:
    roles = trace(loaded(kind)).roles
    carriers = CARRIERS.get(kind, OF_A_UNET)
    expected = {name for name in roles if any(part in f"{name}." for part in carriers)}
    assert {name for name, role in roles.items() if role == "temporal"} == expected
    assert list(roles) == list(quantizable_layers(loaded(kind).denoiser))


@pytest.mark.parametrize(
    ("kind", "conditions"), [("dit", {"class_labels"}), ("class-unet", {"class_labels"}), ("ddpm", set())]
)
def test_what_else_they_depend_on_is_found(
    kind: str, conditions: set[str], loaded: Callable[[str], LoadedModel]
) -> None:
    assert trace(loaded(kind)).conditions == conditions


@pytest.mark.parametrize("kind", ["class-unet", "ldm", "ddpm"])
def test_time_projections_of_a_unet_are_those_of_its_residual_blocks(
    kind: str, loaded: Callable[[str], LoadedModel]
) -> None:
    roles = trace(loaded(kind)).roles
    assert select(roles, "time-projections") == select(roles, "*.time_emb_proj")


def test_time_projections_of_a_dit_are_its_modulations(loaded: Callable[[str], LoadedModel]) -> None:
    roles = trace(loaded("dit")).roles
    assert select(roles, "time-projections") == select(roles, ("*.norm1.linear", "proj_out_1"))


@pytest.mark.parametrize("recipe", PAPER)
def test_the_published_settings_fit_a_dit(recipe: str, model_of: Callable[[str], Path]) -> None:
    _, found, config = prepare(model_of("dit"), FinetuneConfig(recipe=load_recipe(recipe)))
    sensitive = select(found.roles, config.recipe.sensitive.layers)
    parts = {".".join(name.split(".")[2:]) for name in sensitive}
    feed_forward, attention = {"ff.net.0.proj", "ff.net.2"}, {f"attn1.to_{part}" for part in "qkv"}
    assert (
        parts
        == {
            "paper-sd": feed_forward,
            "paper-cldm": feed_forward | attention,
            "paper-uncond": attention,
        }[recipe]
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dit", "class-unet", "ddpm"])
def test_the_temporal_path_alone_gives_what_the_whole_network_computes(
    kind: str,
    loaded: Callable[[str], LoadedModel],
    outputs_at: Callable[..., AbstractContextManager[dict[str, Tensor]]],
) -> None:
    model = loaded(kind)
    found = trace(model)
    config = model.denoiser.config
    sample: Tensor = torch.randn(4, config.in_channels, config.sample_size, config.sample_size)
    timestep = torch.tensor([3.0, 500.5, 501.0, 999.0])
    conditioning = {"class_labels": torch.tensor([0, 2, 1, 3])} if found.conditions else {}
    with outputs_at(model, found.ends) as seen:
        predict(model.denoiser, sample, timestep, conditioning)
    alone = found.temporal_outputs(model.denoiser, timestep, conditioning, None)
    assert len(alone) > 2
    for name, output in zip(found.ends, alone, strict=True):
        assert torch.equal(output, seen[name]), name


def test_tracing_leaves_no_hook_behind(loaded: Callable[[str], LoadedModel]) -> None:
    denoiser = loaded("dit").denoiser
    trace(loaded("dit"))
    layers = quantizable_layers(denoiser).values()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)

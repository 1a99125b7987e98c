"""What carries time and where the network begins and ends, in denoisers that are told of texts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from quest_deploy.model.components import call_denoiser
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.example import BATCH, example_inputs
from quest_deploy.quantize.select import select
from quest_deploy.quantize.trace import trace

UNET = ({"conv_in", "conv_out"}, ("time_embedding.linear", "time_emb_proj"))
PIXART = ({"pos_embed.proj", "proj_out"}, ("timestep_embedder.", "adaln_single.linear"))
NORMS = ("timestep_embedder.", ".norm1.linear", ".norm1_context.linear", ".norm.linear", "norm_out.linear")
JOINT = ({"pos_embed.proj", "proj_out"}, NORMS)
FLUX = ({"x_embedder", "proj_out"}, NORMS)
SANA = ({"patch_embed.proj", "proj_out"}, ("timestep_embedder.", "time_embed.linear"))
# Both ends, what carries time, and what else that depends on.
KINDS = {
    "sd2": (*UNET, set()),
    "sdxl": (*UNET, {"text_embeds", "time_ids"}),
    "sdxl-refiner": (*UNET, {"text_embeds", "time_ids"}),
    "lcm": (*UNET, {"timestep_cond"}),
    "inpaint": (*UNET, set()),
    "controlnet": (*UNET, set()),
    "pixart-alpha": (*PIXART, set()),
    "pixart-sized": (*PIXART, {"resolution", "aspect_ratio"}),
    "sd3": (*JOINT, {"pooled_projections"}),
    "sd35": (*JOINT, {"pooled_projections"}),
    "flux-dev": (*FLUX, {"pooled_projections", "guidance"}),
    "flux-schnell": (*FLUX, {"pooled_projections"}),
    "sana": (*SANA, set()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_ends_carriers_and_conditions_are_found(kind: str, loaded: Callable[[str], LoadedModel]) -> None:
    ends, carriers, conditions = KINDS[kind]
    found = trace(loaded(kind))
    assert {name for name, role in found.roles.items() if role == "boundary"} == ends
    expected = {name for name in found.roles if any(part in f".{name}." for part in carriers)}
    assert {name for name, role in found.roles.items() if role == "temporal"} == expected
    assert found.conditions == conditions


@pytest.mark.parametrize(
    ("kind", "projections"),
    [
        ("sdxl", "*.time_emb_proj"),
        ("controlnet", "*.time_emb_proj"),
        # The embedded time itself meets the latents as well, in the last modulation.
        ("pixart-alpha", ("adaln_single.linear", "adaln_single.emb.timestep_embedder.linear_2")),
        ("sd3", ("*.norm1.linear", "*.norm1_context.linear", "norm_out.linear")),
        ("flux-dev", ("*.norm1.linear", "*.norm1_context.linear", "*.norm.linear", "norm_out.linear")),
    ],
)
def test_time_projections_are_the_layers_that_tell_the_latents_the_time(
    kind: str, projections: str | tuple[str, ...], loaded: Callable[[str], LoadedModel]
) -> None:
    roles = trace(loaded(kind)).roles
    assert select(roles, "time-projections") == select(roles, projections)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind",
    ["sdxl", pytest.param("lcm", marks=pytest.mark.thorough), "pixart-sized", "sd3", "flux-dev", "sana"],
)
def test_the_temporal_path_alone_gives_what_the_whole_network_computes(
    kind: str,
    loaded: Callable[[str], LoadedModel],
    outputs_at: Callable[..., AbstractContextManager[dict[str, Tensor]]],
) -> None:
    model = loaded(kind)
    found = trace(model)
    inputs: dict[str, Tensor] = {
        name: torch.rand(value.shape).to(value.dtype)
        for name, value in example_inputs(model.denoiser_spec, model.denoiser.config).items()
    }
    sample, timestep, *rest = inputs
    inputs[timestep] = torch.linspace(0, 1, BATCH) * (1 if kind.startswith("flux") else 999)
    with outputs_at(model, found.ends) as seen:
        call_denoiser(model.denoiser, inputs[sample], inputs[timestep], {name: inputs[name] for name in rest})
    conditions = {name: inputs[name] for name in found.conditions}
    alone = found.temporal_outputs(model.denoiser, inputs[timestep], conditions, None)
    assert len(alone) > 1
    for name, output in zip(found.ends, alone, strict=True):
        assert torch.equal(output, seen[name]), name

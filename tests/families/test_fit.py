"""A recipe that asks for what a model does not have is refused before anything is recorded, and told all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.config import BitsOverride, FinetuneConfig, PhaseConfig
from quest_deploy.errors import ConfigError
from quest_deploy.quantize import calibrate
from quest_deploy.quantize.estimate import estimate
from quest_deploy.quantize.finetune import finetune, prepare
from tests.families.conftest import RECIPE

STILL = PhaseConfig(layers="none", steps=1, learning_rate_scales=0.0)
UNFIT: dict[str, tuple[str, dict[str, Any], str]] = {
    "text encoder": ("ldm", {"text_encoder": "w8a8"}, "no text encoder; set text_encoder to null"),
    "autoencoder": ("ddpm", {"vae_decoder": "w8a8"}, "no autoencoder; set vae_decoder to null"),
    "nothing to train": ("ddpm", {"temporal": STILL}, "the temporal phase has steps but nothing to train"),
    "plain attention": ("sd3", {"attention_bits": 8}, "no attention of a supported kind; set attention_bits"),
}


def config(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig(recipe=dataclasses.replace(RECIPE, **changes))


@pytest.mark.parametrize("verb", ["finetune", "dry run"])
@pytest.mark.parametrize(("kind", "changes", "message"), UNFIT.values(), ids=UNFIT)
def test_what_the_model_does_not_have_is_refused_before_recording(
    kind: str,
    changes: dict[str, Any],
    message: str,
    verb: str,
    model_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrate, "record_trajectories", lambda *args, **options: pytest.fail("recorded"))
    with pytest.raises(ConfigError, match=message):
        if verb == "finetune":
            finetune(model_of(kind), tmp_path / "out", config(**changes))
        else:
            estimate(model_of(kind), config(**changes))
    assert not list(tmp_path.iterdir())


def test_gradient_checkpointing_that_the_denoiser_does_not_offer_is_refused(
    model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DModel

    monkeypatch.setattr(UNet2DModel, "_supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match="UNet2DModel of diffusers has no gradient checkpointing"):
        prepare(model_of("ddpm"), config(gradient_checkpointing=True))


def test_looking_for_gradient_checkpointing_leaves_the_model_without_it(
    model_of: Callable[[str], Path],
) -> None:
    loaded, _, _ = prepare(model_of("ddpm"), config(gradient_checkpointing=True))
    assert not loaded.denoiser.is_gradient_checkpointing


def test_everything_that_does_not_fit_is_told_at_once(model_of: Callable[[str], Path]) -> None:
    small = PhaseConfig(layers=("auto", "third.*"), steps=1, auto_share=1e-6)
    unfit = config(
        overrides=(
            BitsOverride(layers="first.*", weight_bits=8),
            BitsOverride(layers="second.*", weight_bits=8),
            BitsOverride(layers="attention-and-feed-forward", weight_bits=8),
        ),
        # Classes reach the layers of a DiT that carry time.
        temporal_path="table",
        temporal=PhaseConfig(layers="auto", steps=1),
        sensitive=small,
        text_encoder="w8a8",
    )
    with pytest.raises(ConfigError) as caught:
        prepare(model_of("dit"), unfit)
    told = str(caught.value)
    assert told.startswith("recipe tiny: ")
    for part in (
        "layers 'first.*', 'second.*', 'third.*' stand for no layer",
        "temporal_path is table",
        "temporal.layers is auto, and there are no quantized layers of that kind",
        "sensitive.auto_share is 1e-06",
        "the model has no text encoder",
    ):
        assert part in told, part

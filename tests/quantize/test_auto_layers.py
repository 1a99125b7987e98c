"""`layers: auto`: the worst layers within their share, measured once."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quest_deploy.artifacts import read_artifact
from quest_deploy.config import FinetuneConfig, PhaseConfig, ProgressEvent, Recipe
from quest_deploy.errors import ConfigError
from quest_deploy.manifest import QUANTIZATION_NAME
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import auto_layers
from quest_deploy.quantize.auto_layers import any_layers, check_auto, choose, choose_layers
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.insert import LayerQParams, quantizable_layers
from quest_deploy.quantize.resume import WorkDirectory
from quest_deploy.quantize.select import select
from quest_deploy.quantize.trace import Trace

NONE = PhaseConfig(layers="none", steps=0)
AUTO = PhaseConfig(layers="auto", steps=1, batch_size=1)
WORST = "up_blocks.1.resnets.0.conv2"
WORST_OF_TIME = "mid_block.resnets.0.time_emb_proj"


def config(temporal: PhaseConfig = NONE, sensitive: PhaseConfig = AUTO, **changes: Any) -> FinetuneConfig:
    recipe = {
        "name": "auto",
        "weight_bits": 8,
        "activation_bits": 8,
        "calibration_prompts": 4,
        "validation_prompts": 1,
        "calibration_steps": 2,
        "initializer": "nearest",
    }
    return FinetuneConfig(recipe=Recipe(**(recipe | changes), temporal=temporal, sensitive=sensitive))


@pytest.fixture
def damaged(qparams: Callable[[int, int], dict[str, LayerQParams]]) -> dict[str, LayerQParams]:
    """Good scales for all layers but two, whose weights keep a few codes."""
    found = qparams(8, 8)
    for name in (WORST, WORST_OF_TIME):
        found[name] = dataclasses.replace(found[name], weight_scale=found[name].weight_scale * 60)
    return found


@pytest.fixture
def run(
    float_model: LoadedModel,
    traced: Trace,
    recorded: CalibrationSet,
    damaged: dict[str, LayerQParams],
    work: WorkDirectory,
) -> Callable[..., tuple[FinetuneConfig, dict[str, Any]]]:
    def choose(
        given: FinetuneConfig, progress: Callable[[ProgressEvent], None] = lambda event: None
    ) -> tuple[FinetuneConfig, dict[str, Any]]:
        return choose_layers(float_model.denoiser, traced.roles, recorded, damaged, {}, given, work, progress)

    return choose


def test_each_phase_chooses_the_layer_that_was_made_worst(run: Callable) -> None:
    both, chosen = run(config(temporal=AUTO))
    assert next(iter(chosen["auto"]["sensitive"])) == WORST
    assert next(iter(chosen["auto"]["temporal"])) == WORST_OF_TIME
    assert set(both.recipe.sensitive.layers) == chosen["auto"]["sensitive"].keys()


def test_phases_choose_among_their_own_kind_and_keep_their_share(
    run: Callable, traced: Trace, float_model: LoadedModel
) -> None:
    share = 0.1
    phase = dataclasses.replace(AUTO, auto_share=share)
    _, chosen = run(config(temporal=phase, sensitive=phase))
    sizes = {name: layer.weight.numel() for name, layer in quantizable_layers(float_model.denoiser).items()}
    for which, found in chosen["auto"].items():
        assert 0 < sum(sizes[name] for name in found) <= share * sum(sizes.values())
        assert {traced.roles[name] == "temporal" for name in found} == {which == "temporal"}


def test_what_the_layers_were_is_left_as_it_was(run: Callable, float_model: LoadedModel) -> None:
    before = copy.deepcopy(float_model.denoiser.state_dict())
    run(config())
    assert all(torch.equal(value, before[name]) for name, value in float_model.denoiser.state_dict().items())
    assert not float_model.denoiser._forward_pre_hooks


@pytest.mark.thorough
def test_other_layers_may_be_named_beside_auto(run: Callable) -> None:
    phase = dataclasses.replace(AUTO, layers=("conv_out", "auto"))
    changed, chosen = run(config(sensitive=phase))
    assert changed.recipe.sensitive.layers == ("conv_out", *chosen["auto"]["sensitive"])


def test_nothing_is_measured_where_nothing_is_to_be_chosen(run: Callable, work: WorkDirectory) -> None:
    plain = config(sensitive=dataclasses.replace(AUTO, steps=0))
    assert run(plain) == (plain, {})
    assert not work.names(auto_layers.DAMAGES)


class Stop(Exception):
    """Ends a part from outside."""


def test_an_interrupted_choice_goes_on_and_a_finished_one_is_not_measured_again(
    run: Callable, monkeypatch: pytest.MonkeyPatch, damaged: dict[str, LayerQParams]
) -> None:
    predicted: list[int] = []
    predict = auto_layers.predict
    monkeypatch.setattr(auto_layers, "predict", lambda *given: predicted.append(1) or predict(*given))

    def stop(event: ProgressEvent) -> None:
        if event.completed == 5:
            raise Stop

    with pytest.raises(Stop):
        run(config(), stop)
    assert len(predicted) == 1 + 5
    predicted.clear()
    first = run(config())
    assert len(predicted) == 1 + len(damaged) - 5
    predicted.clear()
    assert run(config()) == first and not predicted


@pytest.mark.thorough
def test_a_measurement_gives_the_same_damages_twice(run: Callable, work: WorkDirectory) -> None:
    _, first = run(config())
    work.drop([auto_layers.DAMAGES])
    _, second = run(config())
    assert second == first


def sizes_of(damages: dict[str, Tensor]) -> dict[str, int]:
    return dict.fromkeys(damages, 10)


def test_the_share_is_of_all_layers() -> None:
    damages = {f"{index}": torch.tensor([float(index)], dtype=torch.float64) for index in range(1, 11)}
    roles = {name: "temporal" if int(name) > 5 else "other" for name in damages}
    assert choose(damages, sizes_of(damages), roles, "sensitive", 0.2) == {"5": 5.0, "4": 4.0}
    assert list(choose(damages, sizes_of(damages), roles, "temporal", 1.0)) == ["10", "9", "8", "7", "6"]


def test_a_share_that_no_layer_fits_is_refused(float_model: LoadedModel, traced: Trace) -> None:
    phase = dataclasses.replace(AUTO, auto_share=1e-9)
    with pytest.raises(ConfigError, match=r"sensitive.auto_share is 1e-09, expected at least .*raise it"):
        check_auto(float_model.denoiser, traced.roles, traced.roles, config(sensitive=phase).recipe)


def test_the_temporal_phase_has_nothing_to_choose_beside_tables(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="temporal.layers is auto, and there are no quantized layers of that"
    ):
        finetune(tiny_model, tmp_path / "out", config(temporal=AUTO, temporal_path="table"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_a_wrong_share_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="auto_share is .*, expected above 0 and at most 1"):
        PhaseConfig(layers="auto", steps=1, auto_share=share)


def test_auto_is_no_pattern_for_bits(traced: Trace) -> None:
    with pytest.raises(ConfigError, match="'auto' stands for no layer"):
        select(traced.roles, "auto")


def test_an_estimate_takes_what_fits(float_model: LoadedModel, traced: Trace) -> None:
    denoiser: nn.Module = float_model.denoiser
    found = any_layers(denoiser, traced.roles, traced.roles, config()).recipe.sensitive.layers
    layers = quantizable_layers(denoiser)
    total = sum(layer.weight.numel() for layer in layers.values())
    assert 0 < sum(layers[name].weight.numel() for name in found) <= 0.2 * total


def test_the_checkpoint_tells_what_was_chosen(tiny_model: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    given = dataclasses.replace(config(), prompts=("a", "b", "c", "d"))
    finetune(tiny_model, tmp_path / "out", given, progress=lambda event: stages.append(event.stage))
    assert "choose layers" in stages
    history = json.loads((tmp_path / "out" / QUANTIZATION_NAME).read_text())["history"]
    assert history["auto"]["sensitive"] and not history["auto"].get("temporal")
    manifest = read_artifact(tmp_path / "out", stage="checkpoint").manifest
    assert manifest.config["recipe"]["sensitive"]["layers"] == "auto"
    assert manifest.details["auto"] == history["auto"]

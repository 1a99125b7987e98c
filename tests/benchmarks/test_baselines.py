from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.baselines import harness, rows
from benchmarks.baselines.held import prediction_loss
from benchmarks.baselines.rows import ROWS, budget, rows_of, variant
from benchmarks.rows import Bench, measured
from benchmarks.settings import Settings
from quest_deploy.config import Recipe, to_dict
from quest_deploy.quantize import adaround
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.recipe import PACKAGED, load_recipe, recipe_from_dict

MADE = ("calibrated", "adaround", "efficientdm")


@pytest.mark.parametrize("name", PACKAGED)
@pytest.mark.parametrize("row", MADE)
def test_a_row_differs_from_quest_in_method_and_not_in_bits_or_data(name: str, row: str) -> None:
    recipe = load_recipe(name)
    made = variant(recipe, row)
    for field in (
        "weight_bits",
        "activation_bits",
        "overrides",
        "calibration_prompts",
        "validation_prompts",
        "calibration_steps",
        "guidance_scale",
    ):
        assert getattr(made, field) == getattr(recipe, field)
    assert recipe_from_dict(to_dict(made)) == made


def test_every_row_has_a_name_of_its_own() -> None:
    names = {variant(load_recipe("w4a4"), row).name for row in MADE}
    assert len(names | {"w4a4"}) == 4


def test_efficientdm_learns_in_low_rank_with_steps_by_timestep_and_nothing_of_quest() -> None:
    recipe = load_recipe("w4a4")
    made = variant(recipe, "efficientdm")
    assert (made.initializer, made.time_aware, made.channel_wise, made.walk_share) == (
        "nearest",
        True,
        False,
        0.0,
    )
    assert made.temporal.steps == 0
    assert made.sensitive.low_rank == 32


def test_adaround_learns_the_rounding_alone() -> None:
    made = variant(load_recipe("w4a8"), "adaround")
    assert (made.initializer, made.time_aware, made.channel_wise) == ("adaround", False, False)
    assert (made.temporal.steps, made.sensitive.steps) == (0, 0)


@pytest.mark.parametrize("name", PACKAGED)
def test_no_baseline_that_learns_has_less_to_learn_from_than_quest(name: str) -> None:
    recipe = load_recipe(name)
    quest = budget(recipe, "quest")["training_samples"]
    assert budget(variant(recipe, "adaround"), "adaround")["training_samples"] >= quest
    assert budget(variant(recipe, "efficientdm"), "efficientdm")["training_samples"] >= quest


def test_samples_are_counted_in_both_branches() -> None:
    recipe = load_recipe("w4a4")
    fields = to_dict(recipe) | {"initializer": "gptq"}
    fields["temporal"] |= {"steps": 7, "network_every": 3, "batch_size": 5}
    fields["temporal"] |= {"walks": 2}
    fields["sensitive"] |= {"steps": 10, "batch_size": 4, "walks": 1}
    small = recipe_from_dict(fields | {"walk_length": 6})
    assert budget(small, "quest")["training_samples"] == (3 * (5 + 12) + 10 * (4 + 6)) * 2
    without = recipe_from_dict(fields | {"walk_share": 0.0})
    assert budget(without, "quest")["training_samples"] == (3 * 5 + 10 * 4) * 2
    rounded = recipe_from_dict(
        fields | {"walk_share": 0.0, "initializer": "adaround", "adaround_iterations": 7}
    )
    assert budget(rounded, "quest")["training_samples"] == (3 * 5 + 10 * 4) * 2 + 7 * 32
    assert budget(small, "minmax") == {
        "prompts": recipe.calibration_prompts,
        "steps": recipe.calibration_steps,
        "calibration_samples": recipe.calibration_prompts * recipe.calibration_steps * 2,
        "training_samples": 0,
    }


def test_model_optimizer_smooths_at_eight_bits_and_searches_below() -> None:
    assert "modelopt-mse" not in rows_of(load_recipe("w8a8"))
    assert "modelopt-smoothquant" not in rows_of(load_recipe("w4a8"))
    assert set(rows_of(load_recipe("w8a8"))) | set(rows_of(load_recipe("w4a4"))) == set(ROWS)


def checkpoint(folder: Path, history: dict) -> Path:
    (folder / "quest.json").write_text(json.dumps({"history": history}))
    return folder


def test_own_loss_of_adaround_is_the_mean_over_blocks(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, {"adaround": {"a": [2.0, 1.0], "b": [4.0, 3.0], "nothing lost": [0.0, 0.0]}})
    assert harness.own_loss(made, "adaround") == {"before": 1.0, "after": 0.625}


def test_own_loss_of_finetuning_goes_from_its_first_phase_to_the_best_of_its_last(tmp_path: Path) -> None:
    temporal = {"validation_loss": [[0, 1.0], [2, 0.9]], "best": 0.9}
    sensitive = {"validation_loss": [[0, 0.9], [2, 0.4], [4, 0.5]], "best": 0.4}
    made = checkpoint(tmp_path, {"temporal": temporal, "sensitive": sensitive})
    assert harness.own_loss(made, "quest") == {"before": 1.0, "after": 0.4}
    assert harness.own_loss(made, "minmax") is None


def test_time_of_an_interrupted_run_is_not_told() -> None:
    assert harness._whole({"resumed": False, "seconds": 3.0}) == 3.0
    assert harness._whole({"resumed": True, "seconds": 3.0}) is None


def figures(mean: float) -> dict:
    return {"psnr_db": {"mean": mean, "per_prompt": [mean - 1, mean + 1]}, "seconds": 2.0, "bits": 4}


def test_a_row_is_measured_once_for_each_seed_and_again_for_another_subject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calls: list[int] = []

    def measure(known: Sequence[SimpleNamespace]) -> Iterator[tuple[dict, torch.Tensor]]:
        for one in known:
            calls.append(one.seed)
            yield figures(10.0 + one.seed), torch.full((1, 3, 2, 2), float(one.seed))

    def ask(subject: int, *seeds: int) -> tuple[dict, torch.Tensor]:
        known = tuple(SimpleNamespace(seed=seed) for seed in seeds)
        bench = Bench(settings=Settings(quick=True), key="conditions", known=known)
        return measured(bench, "row", "row", subject, measure)

    first = ask(1, 5)
    assert ask(1, 5)[0] == first[0]
    assert calls == [5]
    both, images = ask(1, 5, 7)
    assert calls == [5, 7]
    assert both["psnr_db"] == {"mean": 16.0, "per_prompt": [15.0, 17.0], "per_seed": [15.0, 17.0]}
    assert (both["seconds"], both["bits"]) == (4.0, 4)
    assert torch.equal(images, torch.full((1, 3, 2, 2), 5.0))
    ask(2, 5)
    assert calls == [5, 7, 5]


def test_prediction_loss_is_relative_to_what_should_be_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = torch.randn(3, 2, 2, 2, 4, 4)
    data = SimpleNamespace(timesteps=torch.tensor([900.0, 100.0]), num_prompts=3)

    def predicted(pipeline: object, data: object, prompt: torch.Tensor, step: int) -> tuple:
        target = targets[prompt, step].flatten(0, 1)
        return target, target * 1.1

    monkeypatch.setattr("benchmarks.baselines.held.predicted", predicted)
    assert prediction_loss(None, data, batch_size=2) == pytest.approx(0.01, rel=1e-4)


class Two(torch.nn.Module):
    """A denoiser of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.proj_out = torch.nn.Conv2d(2, 2, 1)


def bits_of(recipe: Recipe) -> dict[str, tuple[int, int]]:
    return {"first": (8, 8), "proj_out": (recipe.weight_bits, recipe.activation_bits)}


@pytest.mark.slow  # importing Model-Optimizer takes ten seconds
@pytest.mark.parametrize("name", PACKAGED)
def test_model_optimizer_gives_every_layer_the_bits_of_the_recipe(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("modelopt")
    from benchmarks.baselines import modelopt

    recipe, model = load_recipe(name), Two()
    data = CalibrationSet(
        timesteps=torch.tensor([1.0]),
        latents=torch.randn(2, 1, 2, 4, 4),
        targets=torch.randn(2, 1, 2, 2, 4, 4),
        positive={},
        negative={},
    )

    def run(denoiser: Two, data: CalibrationSet, prompt: torch.Tensor, step: int) -> None:
        denoiser.proj_out(denoiser.first(data.latents[prompt, step]))

    monkeypatch.setattr(modelopt, "run_denoiser", run)
    modelopt.quantize(model, data, bits_of(recipe), "max", 2)
    for layer, (weight, activation) in bits_of(recipe).items():
        quantized = model.get_submodule(layer)
        if name == "w8a8" and layer == "proj_out":
            assert not quantized.weight_quantizer.is_enabled
            continue
        assert (quantized.weight_quantizer.num_bits, quantized.input_quantizer.num_bits) == (
            weight,
            activation,
        )


def test_a_batch_of_adaround_is_what_it_takes() -> None:
    assert rows.ADAROUND_BATCH == adaround.BATCH_SIZE

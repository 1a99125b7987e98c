"""Calibration of models that look at pictures: inpainting models and ControlNets see their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quest_deploy.config import FinetuneConfig, PhaseConfig
from quest_deploy.files import read_json
from quest_deploy.model.components import MASKED, predict
from quest_deploy.model.denoisers import CONTROL, DOWN_RESIDUAL, MID_RESIDUAL
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.calibrate import CalibrationSet, collect_inputs, from_tensors, record_trajectories
from quest_deploy.quantize.estimate import estimate
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.memory import forward_memory, placeholder
from quest_deploy.quantize.pictures import edges, pictures, random_mask, sees_pictures
from tests.families.conftest import RECIPE

PROMPTS = ("rocket", "pizza", "moon")
KINDS = ("inpaint", "controlnet")
Loaded = Callable[[str], LoadedModel]


def record(model: LoadedModel, batch_size: int = 2) -> CalibrationSet:
    return record_trajectories(model, PROMPTS, steps=2, guidance_scale=3.0, seed=0, batch_size=batch_size)


@pytest.fixture(scope="module")
def recorded(loaded: Loaded) -> Callable[[str], CalibrationSet]:
    made: dict[str, CalibrationSet] = {}
    return lambda kind: made.setdefault(kind, record(loaded(kind)))


@pytest.mark.parametrize(
    ("kind", "sees"), [("inpaint", True), ("controlnet", True), ("sd2", False), ("sdxl-refiner", False)]
)
def test_which_models_see_pictures(kind: str, sees: bool, loaded: Loaded) -> None:
    assert sees_pictures(loaded(kind)) == sees


def test_masks_are_boxes_of_many_sizes_and_places() -> None:
    masks = torch.stack([random_mask((16, 24), seed) for seed in range(200)])
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    rows, columns = masks.amax(dim=3), masks.amax(dim=2)
    torch.testing.assert_close(masks, rows[..., None] * columns[..., None, :])
    assert (rows.sum(-1) >= 4).all() and (columns.sum(-1) >= 6).all()
    shares = masks.mean(dim=(1, 2, 3))
    assert (shares == 1).sum() >= 50 and (shares < 0.15).any() and ((shares > 0.4) & (shares < 0.8)).any()
    assert masks.mean(dim=0).min() > 0.26


def test_edges_are_where_a_picture_changes() -> None:
    picture = torch.zeros(3, 8, 8)
    picture[:, :, 5:] = 0.7
    lines = edges(picture)
    assert torch.equal(lines[:, :, 4], torch.ones(3, 8)) and lines.sum() == 24
    assert not edges(torch.full((3, 8, 8), 0.4)).any()


def test_an_inpainting_model_is_calibrated_on_masked_pictures(
    loaded: Loaded, recorded: Callable[[str], CalibrationSet]
) -> None:
    model, data = loaded("inpaint"), recorded("inpaint")
    mask, latents = data.positive[MASKED].split([1, 4], dim=1)
    assert MASKED not in data.negative
    assert set(mask.unique().tolist()) == {0.0, 1.0} and not torch.equal(mask[0], mask[1])
    assert latents.std() > 0
    prompt = torch.tensor([0, 2])
    sample, timestep, told = data.inputs(prompt, torch.tensor([1, 0]))
    none, some = told[MASKED].chunk(2)
    assert torch.equal(none, some) and torch.equal(some, data.positive[MASKED][prompt])
    rows = collect_inputs(model.denoiser, data, prompts_per_step=3, positions=4, seed=0)["conv_in"]
    # Least and largest of the mask, and of what it leaves.
    assert rows[:, -2, 4].tolist() == [0.0, 0.0] and rows[:, -1, 4].tolist() == [1.0, 1.0]
    assert (rows[:, -1, 5:] > rows[:, -2, 5:]).all()


def test_what_is_masked_is_not_seen(loaded: Loaded) -> None:
    model = loaded("inpaint")
    torch.manual_seed(1)
    latents = torch.randn(1, 4, 8, 8)
    found = pictures(model, latents, [3])[MASKED][:, 1:]
    torch.testing.assert_close(pictures(model, -latents, [3])[MASKED][:, 1:], found)
    partly = next(seed for seed in range(99) if random_mask((8, 8), seed).mean() < 0.2)
    assert not torch.allclose(
        pictures(model, -latents, [partly])[MASKED], pictures(model, latents, [partly])[MASKED]
    )


def test_a_controlnet_looks_at_pictures_and_their_edges(
    loaded: Loaded, recorded: Callable[[str], CalibrationSet]
) -> None:
    model, data = loaded("controlnet"), recorded("controlnet")
    shown = data.positive[CONTROL]
    assert shown.shape == (3, 3, 16, 16) and CONTROL not in data.negative
    assert shown.min() >= 0 and shown.max() <= 1
    # The second prompt's seed is odd.
    assert set(shown[1].unique().tolist()) == {0.0, 1.0}
    assert len(shown[0].unique()) > 2 and len(shown[2].unique()) > 2
    step = torch.tensor([1, 0])
    sample, timestep, told = data.inputs(torch.tensor([0, 1]), step)
    residuals = [name for name in told if name.startswith(DOWN_RESIDUAL)]
    assert residuals and CONTROL not in told
    assert model.controlnet is not None
    with torch.no_grad():
        down, mid = model.controlnet(
            sample,
            timestep,
            told["encoder_hidden_states"],
            controlnet_cond=shown[[0, 1, 0, 1]],
            return_dict=False,
        )
    torch.testing.assert_close(told[MID_RESIDUAL], mid)
    for name, value in zip(residuals, down, strict=True):
        torch.testing.assert_close(told[name], value)
    assert mid.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_what_the_model_answers_with_its_pictures(
    kind: str, loaded: Loaded, recorded: Callable[[str], CalibrationSet]
) -> None:
    model, data = loaded(kind), recorded(kind)
    prompt, step = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 1])
    *inputs, target = data.batch(prompt, step)
    again = from_tensors(data.tensors(), control=model.control)
    tensors = {name: value for name, value in data.tensors().items() if name != "targets"}
    computed = from_tensors(tensors, teacher=model.denoiser, control=model.control)
    with torch.no_grad():
        torch.testing.assert_close(predict(model.denoiser, *inputs), target, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(predict(model.denoiser, *again.inputs(prompt, step)), target)
        torch.testing.assert_close(computed.batch(prompt, step)[-1], target, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_recorded_does_not_depend_on_the_batch(
    kind: str, loaded: Loaded, recorded: Callable[[str], CalibrationSet]
) -> None:
    for name, value in record(loaded(kind), batch_size=3).tensors().items():
        torch.testing.assert_close(recorded(kind).tensors()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_placeholder_has_the_shapes_of_what_is_recorded(
    kind: str, loaded: Loaded, recorded: Callable[[str], CalibrationSet]
) -> None:
    model, data = loaded(kind), recorded(kind)
    empty = placeholder(model, FinetuneConfig(recipe=RECIPE, prompts=PROMPTS[:2]))
    assert {name: value.shape[1:] for name, value in empty.tensors().items() if "/" in name} == {
        name: value.shape[1:] for name, value in data.tensors().items() if "/" in name
    }
    assert forward_memory(model.denoiser, data) == forward_memory(model.denoiser, empty)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_finetuning_walks_with_its_pictures_within_a_memory_limit(
    kind: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    phase = PhaseConfig(layers="all", steps=2, batch_size=2, walks=1)
    recipe = replace(
        RECIPE, calibration_steps=3, walk_length=2, memory_limit_gb=1.0, temporal=phase, sensitive=phase
    )
    config = FinetuneConfig(recipe=recipe, prompts=PROMPTS[:2])
    parts, _ = estimate(model_of(kind), config)
    assert all(part.memory_bytes < 1e9 for part in parts)
    finetune(model_of(kind), tmp_path / "checkpoint", config)
    history = read_json(tmp_path / "checkpoint" / "quest.json")["history"]
    assert all(loss > 0 for _, loss in history["sensitive"]["validation_loss"])

"""What a run will take: counted without writing anything."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quest_deploy.config import FinetuneConfig, PhaseConfig
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import estimate as module
from quest_deploy.quantize import estimate_parts, gptq, phases, train
from quest_deploy.quantize.calibrate import CalibrationSet, from_tensors
from quest_deploy.quantize.checkpoint import WEIGHTS, write_component
from quest_deploy.quantize.estimate import PartEstimate, Speed, estimate
from quest_deploy.quantize.estimate_parts import most_on_disk
from quest_deploy.quantize.insert import quantizable_layers, quantized_layers
from quest_deploy.quantize.losses import Objective
from quest_deploy.quantize.memory import PassMemory, pass_memory, size_bytes
from quest_deploy.quantize.operands import (
    AttentionBits,
    any_operands,
    collect_operands,
    initialize_operands,
)
from quest_deploy.quantize.recipe import load_recipe
from quest_deploy.quantize.static import quantize_companions
from quest_deploy.quantize.trace import Trace


@pytest.fixture(scope="module")
def config(tiny_recipe: Path) -> FinetuneConfig:
    return FinetuneConfig(recipe=load_recipe(str(tiny_recipe)), prompts=("rocket", "pizza"))


@pytest.fixture(scope="module")
def found(tiny_model: Path, config: FinetuneConfig) -> tuple[list[PartEstimate], Speed]:
    return estimate(tiny_model, config)


def test_every_part_has_time_memory_and_disk(found: tuple[list[PartEstimate], Speed]) -> None:
    parts = {part.part: part for part in found[0]}
    assert list(parts) == [
        "record trajectories",
        "collect activations",
        "search scales",
        "round weights",
        "finetune temporal layers",
        "finetune sensitive layers",
        "write checkpoint",
    ]
    assert all(part.memory_bytes > 0 for part in parts.values())
    assert all(part.seconds > 0 for name, part in parts.items() if name != "write checkpoint")


def test_the_checkpoint_has_the_size_that_was_told(
    found: tuple[list[PartEstimate], Speed], tiny_checkpoint: Path
) -> None:
    size = sum(path.stat().st_size for path in tiny_checkpoint.rglob("*.safetensors"))
    # A model this small is mostly the headers of its files.
    assert found[0][-1].disk_bytes == pytest.approx(size, rel=0.25)


@pytest.mark.thorough
def test_the_checkpoint_of_a_model_in_half_precision_has_the_size_that_was_told(
    tiny_model: Path,
    tiny_checkpoint: Path,
    found: tuple[list[PartEstimate], Speed],
    config: FinetuneConfig,
    tmp_path: Path,
) -> None:
    half = shutil.copytree(tiny_model, tmp_path / "half")
    saved = 0
    for file in half.glob("*/*.safetensors"):
        before = file.stat().st_size
        save_file({name: value.half() for name, value in load_file(file).items()}, file, {"format": "pt"})
        # What is quantized of the denoiser is stored by its codes, and the rest of it in float32, from either.
        saved += before - file.stat().st_size if file.parent.name != "unet" else 0
    (half / "unet" / "ema.safetensors").write_bytes(bytes(1_000_000))
    told = estimate(half, config)[0][-1].disk_bytes
    assert told == found[0][-1].disk_bytes - saved
    assert saved > 0.1 * told


def test_disk_holds_what_a_part_writes_anew(
    found: tuple[list[PartEstimate], Speed], float_model: LoadedModel
) -> None:
    parts = {part.part: part for part in found[0]}
    (chunk,) = gptq.chunks(float_model.denoiser, list(quantizable_layers(float_model.denoiser)))
    layers = quantizable_layers(float_model.denoiser)
    hessians = sum(gptq.hessian_bytes(layers[name]) for name in chunk)
    assert parts["round weights"].passing_bytes == 2 * hessians
    trained = [part for name, part in parts.items() if name.startswith("finetune")]
    assert all(part.passing_bytes == part.disk_bytes > 0 for part in trained)


def test_a_phase_holds_what_was_recorded_unless_it_is_read_from_disk(
    float_model: LoadedModel,
    recorded: CalibrationSet,
    traced: Trace,
    quantize_tiny: Callable,
    config: FinetuneConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(phases, "pass_memory", lambda *args, **options: PassMemory(fixed=0, each=1))
    student, context = quantize_tiny(8, 8)
    kept = recorded.tensors()
    without = {name: value for name, value in kept.items() if name != "targets"}
    again = from_tensors(without, teacher=float_model.denoiser)
    held = {}
    for targets, data in (("disk", recorded), ("memory", recorded), ("recompute", again)):
        recipe = dataclasses.replace(config.recipe, targets=targets)
        inputs = phases.Inputs(
            model=float_model,
            student=student,
            trace=traced,
            data=data,
            context=context,
            config=dataclasses.replace(config, recipe=recipe),
        )
        held[targets] = phases.phase_memory(inputs, None, "sensitive", recipe.sensitive)[0]
    assert held["memory"] - held["disk"] == size_bytes(kept)
    assert held["recompute"] - held["disk"] == size_bytes(without)


def test_rounding_is_a_loop_over_columns_and_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of so many turns and operations a second, where everything takes longer at first."""
    shapes = {"a": (8, 36), "b": (64, 64), "c": (320, 64), "d": (64, 576)}
    rounded: list[tuple[int, int]] = []

    def seconds(rows: int, columns: int) -> float:
        return 1e-4 * columns + 1e-9 * columns**2 * (columns + rows)

    def seconds_of(run: Callable[[], object], device: torch.device) -> float:
        run()
        return seconds(*rounded[-1]) * (1 if rounded[-1] in rounded[:-1] else 3)

    monkeypatch.setattr(
        gptq, "round_with_compensation", lambda weight, *args: rounded.append(tuple(weight.shape))
    )
    monkeypatch.setattr(estimate_parts, "seconds_of", seconds_of)
    layers = {name: torch.nn.Linear(columns, rows) for name, (rows, columns) in shapes.items()}
    told = estimate_parts._rounding_seconds(layers, [["a", "b", "c"], ["d"]])
    assert told == pytest.approx(sum(seconds(*shapes[name]) for name in "abcd"))
    assert estimate_parts._rounding_seconds(layers, [["b"]]) == pytest.approx(seconds(*shapes["b"]))
    assert estimate_parts._rounding_seconds(layers, []) == 0


def test_most_is_on_disk_while_a_part_runs_or_at_the_end() -> None:
    def part(kept: int, passing: int) -> PartEstimate:
        return PartEstimate(part="", seconds=0, memory_bytes=0, disk_bytes=kept, passing_bytes=passing)

    assert most_on_disk([part(10, 0), part(5, 20), part(7, 0)]) == 35
    assert most_on_disk([part(10, 0), part(5, 20), part(30, 0)]) == 45


@pytest.mark.thorough
def test_attention_that_is_quantized_takes_more(
    tiny_model: Path, config: FinetuneConfig, found: tuple[list[PartEstimate], Speed]
) -> None:
    """Scores and probabilities that pass quantizers are kept for the gradients."""
    recipe = dataclasses.replace(config.recipe, attention_bits=8)
    both = dataclasses.replace(recipe, softmax_bits=8)
    plain, scores, all_of_it = (
        {part.part: part for part in parts}
        for parts in (
            found[0],
            *(estimate(tiny_model, dataclasses.replace(config, recipe=one))[0] for one in (recipe, both)),
        )
    )
    training = [name for name in plain if name.startswith("finetune")]
    for name in training:
        sizes = [parts[name].memory_bytes for parts in (plain, scores, all_of_it)]
        assert sizes[0] < sizes[1] < sizes[2]
    assert "collect attention operands" in scores and "collect attention operands" not in plain


def test_operands_are_those_that_a_run_finds(
    float_model: LoadedModel, recorded: CalibrationSet, config: FinetuneConfig
) -> None:
    recipe = dataclasses.replace(config.recipe, attention_bits=8, softmax_bits=8, softmax_max_keys=20)
    samples = collect_operands(float_model.denoiser, recorded, prompts_per_step=1, values=64, seed=0)
    bits = AttentionBits(operands=8, probabilities=True, max_keys=20)
    wanted = set(initialize_operands(samples, bits, time_aware=True))
    # Attentions over more keys have no codes in their second product.
    count = Counter(name.rpartition(".")[2] for name in wanted)
    assert 0 < count["value"] < count["query"]
    assert set(any_operands(float_model.denoiser, recorded, recipe)) == wanted


@pytest.mark.thorough
def test_parts_that_a_recipe_asks_for_are_told_of(tiny_model: Path, config: FinetuneConfig) -> None:
    recipe = dataclasses.replace(
        config.recipe, collapse_loss_db=0.1, text_encoder="w8a8", vae_decoder="int8-weight-only"
    )
    parts = {part.part: part for part in estimate(tiny_model, dataclasses.replace(config, recipe=recipe))[0]}
    names = ("collapse timestep groups", "quantize text encoder", "quantize decoder")
    assert list(parts)[-4:-1] == list(names)
    assert all(parts[name].seconds > 0 and parts[name].memory_bytes > 0 for name in names)


@pytest.mark.parametrize("field", ["text_encoder", "vae_decoder"])
def test_the_checkpoint_of_quantized_companions_has_the_size_that_was_told(
    float_model: LoadedModel, config: FinetuneConfig, tmp_path: Path, field: str
) -> None:
    """They were counted in float32."""
    recipe = dataclasses.replace(config.recipe, **{field: "int8-weight-only"})
    plain, told = (module._other_bytes(float_model, one) for one in (config.recipe, recipe))
    ((name, part),) = quantize_companions(float_model, dataclasses.replace(config, recipe=recipe)).items()
    write_component(tmp_path / name, part)
    (before,) = (float_model.path / name).glob("*.safetensors")
    after = tmp_path / name / WEIGHTS
    saved = [sum(value.nbytes for value in load_file(file).values()) for file in (before, after)]
    scales = sum(layer.weight_scale().nbytes for layer in quantized_layers(part).values())
    # Headers of files are no weights, and neither are the numbers of positions, which are not stored.
    header = before.stat().st_size - saved[0]
    assert plain - told == pytest.approx(saved[0] - saved[1] + scales + header, rel=0.05)


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are counted, at so many operations a second."""
    monkeypatch.setattr(module, "LONGEST_MEASUREMENT_S", 0.0)
    monkeypatch.setattr(module, "products_per_second", lambda device: 1e6)


@pytest.mark.thorough
def test_adaround_takes_its_updates(tiny_model: Path, config: FinetuneConfig, no_clock: None) -> None:
    found = []
    for iterations in (10, 1010):
        recipe = dataclasses.replace(config.recipe, initializer="adaround", adaround_iterations=iterations)
        parts, speed = estimate(tiny_model, dataclasses.replace(config, recipe=recipe))
        found.append({part.part: part for part in parts}["round weights"])
    # Two steps of two prompts are eight samples, each of them half a pair.
    assert found[1].seconds - found[0].seconds == pytest.approx(1000 * 4 * speed.update_s)


@pytest.mark.thorough
def test_what_would_take_long_is_counted(tiny_model: Path, config: FinetuneConfig, no_clock: None) -> None:
    recipe = dataclasses.replace(config.recipe, memory_limit_gb=0.5, initializer="nearest")
    parts, speed = estimate(tiny_model, dataclasses.replace(config, recipe=recipe))
    assert not speed.measured
    assert speed.update_s == 3 * speed.forward_s > 0
    assert max(part.memory_bytes for part in parts if "finetune" in part.part) <= 5e8


@pytest.mark.thorough
def test_what_is_computed_again_takes_time(tiny_model: Path, config: FinetuneConfig, no_clock: None) -> None:
    phase = PhaseConfig(layers="none", steps=100, batch_size=8, walks=0)
    plain = dataclasses.replace(config.recipe, initializer="nearest", temporal=phase, sensitive=phase)
    found = {}
    for name, again in (
        ("plain", {}),
        ("checkpointed", {"gradient_checkpointing": True}),
        ("recomputed", {"targets": "recompute"}),
    ):
        recipe = dataclasses.replace(plain, **again)
        parts, speed = estimate(tiny_model, dataclasses.replace(config, recipe=recipe))
        own = next(part for part in parts if "sensitive" in part.part)
        found[name] = own.seconds / speed.forward_s
    # Two timesteps of one prompt, nine times.
    judged = 2 * 9
    assert found["plain"] == pytest.approx(100 * 8 * 3 + judged)
    assert found["checkpointed"] == pytest.approx(100 * 8 * 4 + judged)
    assert found["recomputed"] == pytest.approx(100 * 8 * 4 + 2 * judged)


@pytest.mark.thorough
def test_the_teacher_answers_while_the_student_waits_for_its_gradients(
    float_model: LoadedModel, recorded: CalibrationSet, quantize_tiny: Callable
) -> None:
    student, context = quantize_tiny(8, 8)
    student.requires_grad_(True)
    without = {name: value for name, value in recorded.tensors().items() if name != "targets"}
    again = from_tensors(without, teacher=float_model.denoiser)
    objective = Objective(
        raw=torch.empty(0), walks=torch.empty(0), steps=None, walk_length=1, walk_share=0, guidance_scale=3
    )
    kept, computed = (
        pass_memory(student, data, context, objective, walks=False) for data in (recorded, again)
    )
    assert computed.fixed + 8 * computed.each > kept.fixed + 8 * kept.each


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("update_s", "many_s", "more_s"), [(0.2, 0.95, 0.05), (0.2, 4.0, 0.2), (0.2, None, 0.2), (0.4, 0.9, 0.4)]
)
def test_small_networks_take_less_for_pairs_together(
    update_s: float,
    many_s: float | None,
    more_s: float,
    tiny_model: Path,
    config: FinetuneConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None: the machine cannot hold so many."""
    told = iter([0.1, 0.1, update_s, many_s])

    def timed(run: Callable[[], object], device: torch.device) -> float:
        run()
        if (found := next(told)) is None:
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(module, "_timed", timed)
    parts, speed = estimate(tiny_model, config)
    assert (speed.update_s, speed.more_s) == (update_s, pytest.approx(more_s))
    assert speed.update(1) == update_s and speed.update(0.5) == update_s / 2
    assert speed.update(4) == pytest.approx(update_s + 3 * more_s)


@pytest.mark.thorough
def test_validation_is_timed_as_it_runs_in_the_recipes_precision(
    tiny_model: Path, config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = []

    def timed(run: Callable[[], object], device: torch.device) -> float:
        rounds.append(torch.is_autocast_enabled(device.type))
        return float(10 ** len(rounds))

    monkeypatch.setattr(module, "_timed", timed)
    recipe = dataclasses.replace(config.recipe, precision="bfloat16", validation_prompts=1)
    parts, speed = estimate(tiny_model, FinetuneConfig(recipe=recipe, prompts=config.prompts))
    assert (speed.forward_s, speed.judged_s, rounds[:2]) == (10, 100, [False, True])
    phase = recipe.sensitive
    judged = 2 * (train.VALIDATIONS_PER_PHASE + 1)
    found = next(part.seconds for part in parts if part.part == "finetune sensitive layers")
    assert found == phase.steps * speed.update(phase.batch_size) + judged * speed.judged_s

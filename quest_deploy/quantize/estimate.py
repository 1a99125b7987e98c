"""What finetuning will take: time, memory and disk of each part, before any of it runs.

Passes are counted, and one of each kind is timed; where that alone would take long, its operations are counted instead
and divided by the speed of a matrix product. Memory is found without computing anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from quest_deploy.config import FinetuneConfig, PhaseConfig, Recipe
from quest_deploy.model.carried import safety_files
from quest_deploy.model.components import predict
from quest_deploy.model.load import LoadedModel
from quest_deploy.model.products import float32_products
from quest_deploy.model.spec import classes_of, family_of
from quest_deploy.model.weights import weight_files
from quest_deploy.quantize import auto_layers, calibrate, checkpoint, parts, train
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.estimate_parts import (
    PartEstimate,
    Run,
    Speed,
    attention_operands,
    collapsed,
    companion_layers,
    companions,
    layer_choice,
    own_trajectories,
    products_per_second,
    rounding,
    seconds_of,
)
from quest_deploy.quantize.finetune import prepare, with_prompts
from quest_deploy.quantize.insert import quantizable_layers
from quest_deploy.quantize.layers import Quantizable, TimestepContext
from quest_deploy.quantize.memory import (
    GIGABYTE,
    forward_memory,
    held_bytes,
    kept_bytes,
    limit_slices,
    placeholder,
    size_bytes,
    weight_bytes,
    without_trajectories,
    without_values,
)
from quest_deploy.quantize.parallel import ALONE, device_of, place
from quest_deploy.quantize.phases import Inputs, phase_memory, phases
from quest_deploy.quantize.recording import batch_prompts
from quest_deploy.quantize.select import layer_bits
from quest_deploy.quantize.student import any_scales, complete, make_student
from quest_deploy.quantize.tables import make_context, time_tables
from quest_deploy.quantize.walk import Steps, any_steps

LONGEST_MEASUREMENT_S = 20.0
BACKWARD_COST = 3.0
MANY_PAIRS, QUICK_S = 16, 5.0


def estimate(model: str | Path, config: FinetuneConfig) -> tuple[list[PartEstimate], Speed]:
    """What finetuning `model` will take. Nothing is written.

    Raises:
        QuestDeployError: the run itself would be refused.
    """
    if Path(model).is_dir():
        config = with_prompts(config, family_of(Path(model)), classes_of(Path(model)))
    device = device_of(config.device, ALONE)
    loaded, trace, config = prepare(model, config)
    recipe = config.recipe
    data = placeholder(loaded, config, device)
    context = make_context(data.boundaries(), data.timesteps, recipe)
    bits = layer_bits(trace.roles, recipe)
    student = make_student(loaded, any_scales(loaded.denoiser, bits, data), {}, context)
    rounded = without_values(student.requires_grad_(False), context)
    trace = complete(student, loaded, trace, data, context, recipe)
    place(loaded, device)
    student.to(device)
    speed = measure_speed(loaded, student, data, context, recipe)
    weights = weight_bytes(loaded)
    layers = {name: layer for name, layer in quantizable_layers(loaded.denoiser).items() if name in bits}
    kept = kept_bytes(data, recipe.targets)
    held = held_bytes(loaded, data, recipe)
    run = Run(
        model=loaded,
        student=student,
        rounded=rounded,
        data=data,
        context=context,
        config=config,
        layers=layers,
        speed=speed,
        held=held,
        forward=forward_memory(loaded.denoiser, data),
    )
    width = parts.POSITIONS_PER_STEP + calibrate.EXTREME_ROWS
    seen = sum(4 * data.timesteps.numel() * width * layer.weight.shape[1] for layer in layers.values())
    result = [
        PartEstimate(
            part="record trajectories",
            seconds=data.num_prompts * data.timesteps.numel() * speed.forward_s,
            memory_bytes=run.passes(batch_prompts(device)),
            disk_bytes=kept,
            # Batches are joined to one file.
            passing_bytes=kept if recipe.targets == "disk" else 0,
        ),
        PartEstimate(
            part="collect activations",
            seconds=run.shown * speed.forward_s,
            memory_bytes=run.passes(parts.PROMPTS_PER_STEP, seen),
            disk_bytes=seen,
            passing_bytes=seen,
        ),
        PartEstimate(
            part="search scales",
            seconds=_search_seconds(layers, data, config, bits),
            memory_bytes=held + seen,
            disk_bytes=0,
        ),
    ]
    if recipe.attention_bits is not None:
        result.append(attention_operands(run))
    if recipe.initializer != "nearest":
        result.append(rounding(run))
    if auto_layers.asked(recipe):
        result.append(layer_choice(run))
        config = auto_layers.any_layers(loaded.denoiser, trace.roles, bits, config)
    inputs = Inputs(model=loaded, student=student, trace=trace, data=data, context=context, config=config)
    steps = any_steps(loaded, recipe)
    for name, phase in phases(config.recipe):
        if name == "sensitive" and recipe.on_policy_prompts:
            result.append(own_trajectories(run))
        result.append(_phase(inputs, name, phase, speed, steps))
    if recipe.collapse_loss_db:
        result.append(collapsed(run))
    result += companions(run)
    codes = sum(layer.weight.numel() * bits[name][0] // 8 for name, layer in layers.items())
    codes += size_bytes([table.table for table in time_tables(student).values()])
    denoiser = size_bytes([*loaded.denoiser.parameters(), *loaded.denoiser.buffers()])
    # What is not quantized of the denoiser is stored in float32, and other components as they lie on disk.
    every = quantizable_layers(loaded.denoiser)
    # Tables take the place of layers that carry time and are not quantized.
    left_out = [every[name] for name, role in trace.roles.items() if name in layers or role == "temporal"]
    codes += denoiser - size_bytes([layer.weight for layer in left_out])
    result.append(
        PartEstimate(
            part="write checkpoint",
            seconds=0.0,
            memory_bytes=2 * weights,
            disk_bytes=_other_bytes(loaded, recipe) + codes,
        )
    )
    return result, speed


def _other_bytes(loaded: LoadedModel, recipe: Recipe) -> int:
    """Of a checkpoint's other components, and of a safety checker: most are copied as they lie on disk."""
    family, components = loaded.family, checkpoint.parts(loaded)
    quantized = companion_layers(loaded, recipe)
    copied = set(family.weights) - loaded.changed - quantized.keys() if loaded.path.is_dir() else set()
    files = safety_files(loaded.path, loaded.index) if loaded.path.is_dir() else []
    size = 0
    for name in set(family.weights) - {family.denoiser}:
        if name in copied:
            files += weight_files(loaded.path / name, family.library_of(name))
            continue
        part = components[name]
        # In float32, but for codes of a byte.
        size += size_bytes([*part.parameters(), *part.buffers()])
        size -= sum(3 * layer.weight.numel() for layer in quantized.get(name, ()))
    return size + sum(file.stat().st_size for file in files)


def measure_speed(
    model: LoadedModel,
    student: nn.Module,
    data: CalibrationSet,
    context: TimestepContext,
    recipe: Recipe,
) -> Speed:
    """Time one pair, or count its operations where that would take long."""
    bare, shapes = without_values(model.denoiser, context), without_trajectories(data)
    one = torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        predict(bare, *shapes.inputs(one, one))
    expected = counter.get_total_flops() / products_per_second(data.device)
    if expected * (1 + BACKWARD_COST) > LONGEST_MEASUREMENT_S:
        # Checkpointing computes a pass again for its gradients.
        update_s = expected * (BACKWARD_COST + recipe.gradient_checkpointing)
        return Speed(
            forward_s=expected, judged_s=expected, update_s=update_s, more_s=update_s, measured=False
        )

    def forward() -> None:
        with torch.no_grad():
            predict(model.denoiser, *data.inputs(one, one))

    def judge() -> None:
        with torch.no_grad():
            predict(student, *data.inputs(one, one))

    def update(pairs: int = 1) -> None:
        predict(student, *data.inputs(one.expand(pairs), one.expand(pairs))).square().sum().backward()

    student.requires_grad_(True)
    with float32_products("tf32" if recipe.precision == "tf32" else "ieee"):
        forward_s = _timed(forward, data.device)
        with train.autocast(data.device, recipe.precision):
            judged_s = _timed(judge, data.device)
            more_s = update_s = _timed(update, data.device)
            # A small network's single samples leave most of a machine idle. A large one's take long, and all memory.
            if update_s * MANY_PAIRS < QUICK_S:
                with contextlib.suppress(torch.OutOfMemoryError):
                    many_s = _timed(lambda: update(MANY_PAIRS), data.device)
                    more_s = min(update_s, max(0.0, many_s - update_s) / (MANY_PAIRS - 1))
    found = Speed(forward_s=forward_s, judged_s=judged_s, update_s=update_s, more_s=more_s, measured=True)
    student.zero_grad(set_to_none=True)
    student.requires_grad_(False)
    return found


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Once it is warm."""
    seconds_of(run, device)
    return seconds_of(run, device)


def _search_seconds(
    layers: Mapping[str, Quantizable],
    data: CalibrationSet,
    config: FinetuneConfig,
    bits: Mapping[str, tuple[int, int]],
) -> float:
    """Of all layers, from that of the median size."""
    by_size = sorted(layers, key=lambda name: layers[name].weight.numel())
    name = by_size[len(by_size) // 2]
    layer = layers[name]
    width = parts.POSITIONS_PER_STEP + calibrate.EXTREME_ROWS
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(data.timesteps.numel(), width, layer.weight.shape[1], generator=generator)
    spent = seconds_of(
        lambda: parts.initialize_one(layer, rows, bits[name], config.recipe), layer.weight.device
    )
    return spent * sum(other.weight.numel() for other in layers.values()) / layer.weight.numel()


def _phase(inputs: Inputs, name: str, phase: PhaseConfig, speed: Speed, steps: Steps | None) -> PartEstimate:
    recipe, student = inputs.recipe, inputs.student
    count = inputs.data.timesteps.numel()
    walking = steps is not None and steps.starts(recipe.walk_length) > 0
    held, pairs, walks = phase_memory(inputs, steps, name, phase)
    passes = pairs.fixed + pairs.each * phase.batch_size
    if walks is not None and phase.walks:
        passes += walks.fixed + walks.each * phase.walks
    memory = held + passes
    if recipe.memory_limit_gb is not None:
        limit_slices(held, recipe.memory_limit_gb, pairs, walks)
        memory = min(memory, int(recipe.memory_limit_gb * GIGABYTE))
    every = phase.network_every if name == "temporal" else 1
    updates = -(-phase.steps // every)
    update_s, judgements = speed.update(phase.batch_size), 1 + walking
    if recipe.targets == "recompute":
        # The teacher's passes over as many pairs; what walks end in is recorded.
        update_s *= 1 + speed.forward_s / speed.update_s
        judgements += 1
    if walking and phase.walks:
        update_s += recipe.walk_length * speed.update(phase.walks)
    judged = recipe.validation_prompts * count * judgements * (train.VALIDATIONS_PER_PHASE + 1)
    learned = size_bytes(
        train.learned(train.trainable(student, phase, inputs.trace.roles, temporal=name == "temporal"))
    )
    student.requires_grad_(False)
    return PartEstimate(
        part=f"finetune {name} layers",
        seconds=updates * update_s + judged * speed.judged_s,
        memory_bytes=memory,
        # The tensors, the best of them, and Adam's two moments.
        disk_bytes=4 * learned,
        passing_bytes=4 * learned,
    )

"""What those parts of finetuning will take that not every recipe has; see :mod:`quest_deploy.quantize.estimate`."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from quest_deploy.config import FinetuneConfig, Recipe, StaticMode
from quest_deploy.model.components import first_device
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import adaround, auto_layers, collapse, gptq, operands, parts, static
from quest_deploy.quantize.affine import search_weight_scale
from quest_deploy.quantize.attention import OPERANDS
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.initialize import initialize_layer
from quest_deploy.quantize.insert import quantizable_layers
from quest_deploy.quantize.layers import Quantizable, TimestepContext
from quest_deploy.quantize.memory import (
    GIGABYTE,
    PassMemory,
    PeakMemory,
    cached_bytes,
    forward_memory,
    kept_bytes,
    limit_count,
    prompts_at_once,
    size_bytes,
)
from quest_deploy.quantize.recording import batch_prompts, drawing_bytes, own_bytes
from quest_deploy.quantize.sensitivity import BATCH_PAIRS
from quest_deploy.quantize.student import adaround_plans

PRODUCT_SIZE = 512
MOST_OPERATIONS, QUICK_S = 1e11, 1.0


@dataclass(frozen=True, kw_only=True)
class PartEstimate:
    """What one part will take.

    Attributes:
        part: As progress names it.
        seconds: On this machine.
        memory_bytes: The most at once, of tensors.
        disk_bytes: What is kept until the checkpoint is written; of the checkpoint, what it has at last.
        passing_bytes: What lies on disk beside that for a while as the part runs: every file is written in full before
            it takes the place of the one before.
    """

    part: str
    seconds: float
    memory_bytes: int
    disk_bytes: int
    passing_bytes: int = 0


def most_on_disk(parts: Sequence[PartEstimate]) -> int:
    """Bytes, at any time of a run of these parts."""
    kept = itertools.accumulate(part.disk_bytes for part in parts)
    return max(so_far + part.passing_bytes for so_far, part in zip(kept, parts, strict=True))


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of one pair of a prompt and a timestep, both branches.

    Attributes:
        forward_s: Of the full-precision denoiser.
        judged_s: Of the student, in the recipe's precision, without gradients.
        update_s: Of the student with gradients.
        more_s: The same, of each further pair in the same pass.
        measured: Whether they were timed, or follow from the number of operations.
    """

    forward_s: float
    judged_s: float
    update_s: float
    more_s: float
    measured: bool

    def update(self, pairs: float) -> float:
        """Of `pairs` together, with gradients."""
        return self.update_s + (pairs - 1) * self.more_s if pairs >= 1 else pairs * self.update_s


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run will work on.

    Attributes:
        model: Full precision.
        student: Its denoiser with quantized layers and attention, as it is trained.
        rounded: The same as its weights are rounded, attention in float; without values.
        data: The shapes of what will be recorded.
        context: The student's.
        config: Of the run.
        layers: Those that are quantized, of the full-precision denoiser.
        speed: Of a pair.
        held: Bytes of the model and of what is recorded.
        forward: Memory of a pass through the full-precision denoiser.
    """

    model: LoadedModel
    student: nn.Module
    rounded: nn.Module
    data: CalibrationSet
    context: TimestepContext
    config: FinetuneConfig
    layers: Mapping[str, Quantizable]
    speed: Speed
    held: int
    forward: PassMemory

    @property
    def recipe(self) -> Recipe:
        """Of the run."""
        return self.config.recipe

    @property
    def shown(self) -> int:
        """Pairs that layers are calibrated on."""
        return self.data.timesteps.numel() * min(parts.PROMPTS_PER_STEP, self.data.num_prompts)

    def passes(self, most: int, beside: int = 0) -> int:
        """Bytes while so many prompts, or as many as the limit allows, go through the denoiser."""
        prompts = min(
            prompts_at_once(self.model, self.data, self.recipe, most, beside), self.data.num_prompts
        )
        return self.held + beside + self.forward.fixed + self.forward.each * prompts


def attention_operands(run: Run) -> PartEstimate:
    """Where the scales of quantized attention start."""
    count = len(OPERANDS) * len(operands.attentions_of(run.model.denoiser))
    kept = 4 * count * run.data.timesteps.numel() * (operands.VALUES_PER_STEP + 2)
    return PartEstimate(
        part="collect attention operands",
        seconds=run.shown * run.speed.forward_s,
        memory_bytes=run.passes(operands.PROMPTS_PER_STEP) + kept,
        disk_bytes=kept,
    )


def rounding(run: Run) -> PartEstimate:
    """The initializer."""
    found = _adaround if run.recipe.initializer == "adaround" else _gptq
    seconds, memory, passing = found(run)
    return PartEstimate(
        part="round weights",
        seconds=seconds,
        memory_bytes=memory,
        disk_bytes=_weights(run.layers.values()),
        passing_bytes=passing,
    )


def _weights(layers: Iterable[Quantizable]) -> int:
    return size_bytes([layer.weight for layer in layers])


def _gptq(run: Run) -> tuple[float, int, int]:
    chunks = list(gptq.chunks(run.model.denoiser, list(run.layers)))
    plan = parts.plan_rounding(run.model, run.data, list(run.layers), run.recipe)
    own = [some for names in chunks for some in gptq.chunks(run.model.denoiser, names, plan.room)]
    seconds = len(own) * run.shown * run.speed.forward_s + _rounding_seconds(run.layers, chunks)
    passing = 0
    for some in ([run.layers[name] for name in names] for names in own):
        hessians = sum(map(gptq.hessian_bytes, some))
        # Twice while they are gathered; then with the layers that are done.
        passing = max(passing, hessians + max(hessians, 2 * _weights(some)))
    return seconds, plan.memory_bytes, passing


def _rounding_seconds(layers: Mapping[str, Quantizable], chunks: list[list[str]]) -> float:
    """Of all layers, from a small and a large one: for each column, turns of a loop and products of matrices."""
    weights = [layers[name].weight.detach().flatten(1) for chunk in chunks for name in chunk]

    def products(weight: Tensor) -> int:
        rows, columns = weight.shape
        return columns * (columns + rows)

    def column_s(weight: Tensor) -> float:
        with weight.device:
            scale, hessian = torch.full([weight.shape[0]], 0.01), torch.eye(weight.shape[1])
        run = functools.partial(gptq.round_with_compensation, weight, scale, hessian, 8)
        found = seconds_of(run, weight.device)
        # The first is cold, and any may be disturbed.
        for _ in range(2 if found < QUICK_S else 0):
            found = min(found, seconds_of(run, weight.device))
        return found / weight.shape[1]

    by_size = sorted(weights, key=products)
    some = [one for one in by_size if products(one) * one.shape[1] <= MOST_OPERATIONS] or by_size[:1]
    if not some:
        return 0.0
    small, large = some[len(some) // 4], some[-1]
    turn_s, product_s = column_s(small), 0.0
    if further := products(large) - products(small):
        large_s = column_s(large)
        product_s = min(max(0.0, large_s - turn_s) / further, large_s / products(large))
        turn_s = max(0.0, turn_s - products(small) * product_s)
    return sum(one.shape[1] * (turn_s + products(one) * product_s) for one in weights)


def _adaround(run: Run) -> tuple[float, int, int]:
    """Each part learns on its own, so that all of them together take an update of the whole network."""
    plans = adaround_plans(run.rounded, run.model, run.data, run.context, run.recipe)
    branches, samples = run.data.targets.shape[2], adaround.count_samples(run.data)
    # Samples are collected in both networks, halfway through each on average; errors are judged three times.
    passes = (len(plans) + 3) * samples / branches
    update_s = run.speed.update(min(adaround.BATCH_SIZE, samples) / branches)
    memory = max(plan.memory_bytes for plan in plans)
    return passes * run.speed.forward_s + run.recipe.adaround_iterations * update_s, memory, 0


def layer_choice(run: Run) -> PartEstimate:
    """`layers: auto`."""
    steps = min(auto_layers.STEPS, run.data.timesteps.numel())
    measured = steps * min(auto_layers.PROMPTS, run.data.num_prompts)
    rounded = _weights(run.layers.values())
    return PartEstimate(
        part="choose layers",
        seconds=(len(run.layers) + 1) * measured * run.speed.forward_s,
        memory_bytes=run.passes(min(BATCH_PAIRS, measured), rounded),
        disk_bytes=0,
    )


def own_trajectories(run: Run) -> PartEstimate:
    """What the student draws by itself before the sensitive phase."""
    recipe, student, own = run.recipe, run.student, own_bytes(run.data, run.recipe)
    on_disk = recipe.targets == "disk"
    forward = forward_memory(student, run.data, run.context)
    held = drawing_bytes(run.model, student, run.data, recipe)
    most = min(batch_prompts(run.data.device), recipe.on_policy_prompts)
    at_once = limit_count(most, held, recipe.memory_limit_gb, forward)
    pairs = recipe.on_policy_prompts * run.data.timesteps.numel()
    return PartEstimate(
        part="record own trajectories",
        seconds=pairs * (run.speed.forward_s + run.speed.judged_s),
        memory_bytes=held + forward.fixed + forward.each * at_once,
        # One file holds these and the recorded ones.
        disk_bytes=own + (kept_bytes(run.data, recipe.targets) if on_disk else 0),
        passing_bytes=own if on_disk else 0,
    )


def collapsed(run: Run) -> PartEstimate:
    """One activation scale in place of several: as long as if no two quantizers had the same spread."""
    measurements = 2 + len(collapse.grouped(run.student)).bit_length()
    pairs = min(collapse.STEPS, run.data.timesteps.numel()) * run.recipe.validation_prompts
    forward = forward_memory(run.student, run.data, run.context)
    held = run.held + size_bytes([*run.student.parameters(), *run.student.buffers()])
    held += cached_bytes(run.student)
    at_once = limit_count(min(BATCH_PAIRS, pairs), held, run.recipe.memory_limit_gb, forward)
    return PartEstimate(
        part="collapse timestep groups",
        seconds=measurements * pairs * run.speed.forward_s,
        memory_bytes=held + forward.fixed + forward.each * at_once,
        disk_bytes=0,
    )


def companion_layers(model: LoadedModel, recipe: Recipe) -> dict[str, list[Quantizable]]:
    """The layers that are quantized beside the denoiser's, by the folder of the component that has them."""
    found: dict[str, list[Quantizable]] = {}
    for part in model.family.text if recipe.text_encoder else ():
        found[part.name] = list(quantizable_layers(model.text_encoders[part.name]).values())
    if recipe.vae_decoder and model.vae is not None and model.family.autoencoder is not None:
        found[model.family.autoencoder] = list(static.decoder_layers(model.vae).values())
    return found


def companions(run: Run) -> list[PartEstimate]:
    """The text encoders and the decoder, as the recipe wants them.

    Raises:
        ConfigError: the recipe asks for a component that the model does not have, or not even one latent fits.
    """
    model, recipe = run.model, run.recipe
    static.check_companions(model, recipe)
    prompts, result = recipe.calibration_prompts, []
    layers = companion_layers(model, recipe)
    for part in model.family.text if recipe.text_encoder else ():
        encoder = model.text_encoders[part.name]
        with PeakMemory() as memory:
            each_s = seconds_of(lambda: model.conditioner.encode([""]), first_device(encoder))
        pass_bytes = memory.peak * min(static.BATCH_PROMPTS, prompts + 1)
        seconds = (prompts + 1) * each_s
        result.append(
            _companion(run, part.name, encoder, layers[part.name], recipe.text_encoder, seconds, pass_bytes)
        )
    if recipe.vae_decoder is not None:
        assert model.vae is not None and model.family.autoencoder is not None
        each = static.decode_memory(model)
        images = min(prompts, static.MAX_IMAGES)
        decoding = each.fixed + each.each * min(images, static.latents_at_once(model, recipe))
        # The latents are drawn first, within the same limit.
        drawing = run.forward.fixed + run.forward.each * min(images, static.BATCH_PROMPTS)
        if recipe.memory_limit_gb is not None:
            drawing = min(
                drawing, int(recipe.memory_limit_gb * GIGABYTE) - static.held_bytes(model, model.vae)
            )
        pass_bytes = max(decoding, drawing)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            static.decode_shapes(model, 1)
        decode_s = counter.get_total_flops() / products_per_second(torch.device("cpu"))
        seconds = images * (recipe.calibration_steps * run.speed.forward_s + decode_s)
        own = layers[model.family.autoencoder]
        result.append(_companion(run, "decoder", model.vae, own, recipe.vae_decoder, seconds, pass_bytes))
    return result


def _companion(
    run: Run,
    name: str,
    component: nn.Module,
    layers: list[Quantizable],
    mode: StaticMode | None,
    running_s: float,
    pass_bytes: int,
) -> PartEstimate:
    by_size = sorted(layers, key=lambda layer: layer.weight.numel())
    layer = by_size[len(by_size) // 2]
    if mode == "w8a8":
        rows = torch.randn(1, static.BATCH_PROMPTS * static.POSITIONS_PER_BATCH, layer.weight.shape[1])
        search = functools.partial(
            initialize_layer,
            layer,
            rows,
            static.BITS,
            static.BITS,
            method="search",
            time_aware=False,
            channel_wise=run.recipe.channel_wise,
        )
        one_s = seconds_of(search, rows.device)
    else:
        running_s, pass_bytes = 0.0, 0
        one_s = seconds_of(lambda: search_weight_scale(layer.weight, static.BITS), layer.weight.device)
    searched = one_s * sum(other.weight.numel() for other in layers) / layer.weight.numel()
    return PartEstimate(
        part=f"quantize {name.replace('_', ' ')}",
        seconds=running_s + searched,
        memory_bytes=static.held_bytes(run.model, component) + pass_bytes,
        disk_bytes=0,
    )


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """How long it takes, once."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def products_per_second(device: torch.device) -> float:
    """Floating point operations of a matrix product."""
    a = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, device=device)
    seconds_of(lambda: a @ a, device)
    return 2 * PRODUCT_SIZE**3 / seconds_of(lambda: a @ a, device)

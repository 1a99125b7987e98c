"""`layers: auto`: a phase trains the layers whose own quantization damages the noise prediction most.

Each layer is quantized alone, with the scales and the rounded weights that training would start from, and a few samples
of the calibration set are predicted again (:mod:`quest_deploy.quantize.sensitivity`). Under a limit on their weights,
the layers of most damage together are taken, which is nearly the same as those of most damage for each weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy.config import FinetuneConfig, PhaseConfig, ProgressEvent, Recipe
from quest_deploy.errors import ConfigError
from quest_deploy.quantize.allocate import Bits, LayerSensitivity, layers_to_finetune, literal
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.insert import (
    LayerQParams,
    Role,
    channel_axis,
    quantizable_layers,
    timestep_hook,
)
from quest_deploy.quantize.layers import ActivationQuantizer, TimestepContext
from quest_deploy.quantize.resume import Throttle, WorkDirectory
from quest_deploy.quantize.select import AUTO, patterns
from quest_deploy.quantize.sensitivity import (
    BATCH_PAIRS,
    Pairs,
    choose_pairs,
    damage_between,
    predict,
    quantized_alone,
    rounded_weight,
)

STEPS = 4
PROMPTS = 2
DAMAGES = "damages"
PHASES = ("temporal", "sensitive")

Damages = dict[str, Tensor]
"""By layer float64 [s]: mean squared error of the noise prediction over its mean square, at each step."""


def asked(recipe: Recipe) -> dict[str, PhaseConfig]:
    """The phases whose layers are to be chosen, by name."""
    phases = {name: getattr(recipe, name) for name in PHASES}
    return {name: phase for name, phase in phases.items() if phase.steps and AUTO in patterns(phase.layers)}


def candidates(roles: Mapping[str, Role], names: Collection[str], phase: str) -> list[str]:
    """Among which of the quantized layers `names` a phase chooses: its own kind."""
    return [
        name
        for name, role in roles.items()
        if name in names and (role == "temporal") == (phase == "temporal")
    ]


def check_auto(
    denoiser: nn.Module, roles: Mapping[str, Role], names: Collection[str], recipe: Recipe
) -> None:
    """See that every phase that chooses can choose something.

    Args:
        denoiser: Full precision.
        roles: The part that each layer plays.
        names: The layers that are quantized.
        recipe: Whose phases may choose.

    Raises:
        ConfigError: lists the phases that have no layers to choose among, or none as small as their share.
    """
    problems = []
    layers = quantizable_layers(denoiser)
    total = sum(layers[name].weight.numel() for name in names)
    for which, phase in asked(recipe).items():
        sizes = [layers[name].weight.numel() for name in candidates(roles, names, which)]
        if not sizes:
            problems.append(
                f"{which}.layers is auto, and there are no quantized layers of that kind; leave auto out"
            )
        elif min(sizes) > phase.auto_share * total:
            problems.append(
                f"{which}.auto_share is {phase.auto_share:g}, expected at least {min(sizes) / total:.2g}, which the "
                "smallest layer has; raise it"
            )
    if problems:
        raise ConfigError("; ".join(problems))


@torch.no_grad()
def measure_damages(
    denoiser: nn.Module,
    data: CalibrationSet,
    qparams: Mapping[str, LayerQParams],
    rounded: Mapping[str, Tensor],
    pairs: Pairs,
    guidance_scale: float,
    finished: Damages,
    after_layer: Callable[[int], None],
    at_once: int = BATCH_PAIRS,
) -> None:
    """Quantize each layer alone, and add what that does to `finished`.

    Args:
        denoiser: Full-precision diffusers module; its layers are changed and restored.
        data: Recorded trajectories.
        qparams: Scales of the layers.
        rounded: Their weights where rounding moved them off nearest, divided by their channel rows.
        pairs: Which predictions are compared.
        guidance_scale: Of the noise prediction.
        finished: What was measured before; its layers are not measured again.
        after_layer: Told how many layers are done.
        at_once: The most pairs that are run together.
    """
    context = TimestepContext(data.boundaries())
    handle = denoiser.register_forward_pre_hook(timestep_hook(context), with_kwargs=True)
    layers = quantizable_layers(denoiser)
    try:
        reference = predict(denoiser, data, pairs, guidance_scale, at_once)
        for done, (name, found) in enumerate(qparams.items(), start=1):
            if name not in finished:
                layer = layers[name]
                device = layer.weight.device
                given = rounded.get(name, layer.weight).cpu()
                weight = rounded_weight(given, found.weight_scale, found.weight_bits, found.row).to(device)
                assert found.group_scale is not None
                quantizer = ActivationQuantizer(
                    found.group_scale, found.qmin, found.qmax, row=found.row, channel_axis=channel_axis(layer)
                ).to(device)
                with quantized_alone(layer, weight, quantizer, context):
                    prediction = predict(denoiser, data, pairs, guidance_scale, at_once)
                by_step = damage_between(reference, prediction, pairs.steps)["relative_error_by_step"]
                finished[name] = torch.tensor(by_step, dtype=torch.float64)
            after_layer(done)
    finally:
        handle.remove()


def choose(
    damages: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    roles: Mapping[str, Role],
    which: str,
    share: float,
) -> dict[str, float]:
    """The layers that a phase trains, with their mean damage, largest first.

    Args:
        damages: Of all quantized layers.
        sizes: How many weights each of them has.
        roles: The part that each plays.
        which: "temporal" or "sensitive".
        share: Of all weights, how many the chosen ones may have.
    """
    both = Bits(8, 8)  # whatever the layers have: there is one damage for each
    table = [
        LayerSensitivity(
            name=name,
            role=roles[name],
            weights=sizes[name],
            macs=0,
            damage={both: tuple(damages[name].tolist())},
        )
        for name in candidates(roles, damages, which)
    ]
    # The share is of all quantized layers, the table has those of one kind.
    limit = share * sum(sizes[name] for name in damages) / sum(layer.weights for layer in table)
    bits = dict.fromkeys(damages, (8, 8))
    mean = {name: float(damages[name].mean()) for name in layers_to_finetune(table, bits, min(1.0, limit))}
    return dict(sorted(mean.items(), key=lambda entry: -entry[1]))


def choose_layers(
    denoiser: nn.Module,
    roles: Mapping[str, Role],
    data: CalibrationSet,
    qparams: Mapping[str, LayerQParams],
    rounded: Mapping[str, Tensor],
    config: FinetuneConfig,
    work: WorkDirectory,
    progress: Callable[[ProgressEvent], None],
    at_once: int = BATCH_PAIRS,
) -> tuple[FinetuneConfig, dict[str, Any]]:
    """`config` with the names of layers in place of `auto`, and which they are, for the manifest.

    Args:
        denoiser: Full-precision diffusers module.
        roles: The part that each layer plays.
        data: Recorded trajectories.
        qparams: Scales of the layers.
        rounded: As the initializer gives them.
        config: Its recipe, of which nothing is changed but the layers of phases.
        work: Where damages are kept, and found when the run is resumed.
        progress: Told how far it is.
        at_once: The most pairs that are run together.
    """
    wanted = asked(config.recipe)
    if not wanted:
        return config, {}
    saved = work.load(DAMAGES)
    damages: Damages = {} if saved is None else saved[0]
    if damages.keys() < qparams.keys():
        throttle = Throttle(work)

        def after_layer(done: int) -> None:
            if throttle.due() or done == len(qparams):
                work.save(DAMAGES, damages)
            progress(ProgressEvent(stage="choose layers", completed=done, total=len(qparams)))

        pairs = choose_pairs(data, steps=STEPS, prompts=PROMPTS)
        # Prompts that judge the result have no part in it.
        training = data.num_prompts - config.recipe.validation_prompts
        pairs = dataclasses.replace(pairs, prompt=pairs.prompt % training)
        scale = config.recipe.guidance_scale
        measure_damages(denoiser, data, qparams, rounded, pairs, scale, damages, after_layer, at_once)
    # In module order, whatever order a file has them in.
    damages = {name: damages[name] for name in qparams}
    layers = quantizable_layers(denoiser)
    sizes = {name: layers[name].weight.numel() for name in qparams}
    chosen = {
        which: choose(damages, sizes, roles, which, phase.auto_share) for which, phase in wanted.items()
    }
    return with_layers(config, chosen), {"auto": chosen}


def with_layers(config: FinetuneConfig, chosen: Mapping[str, Collection[str]]) -> FinetuneConfig:
    """`config` whose phases name the `chosen` layers in place of `auto`."""
    changed: dict[str, Any] = {}
    for which, names in chosen.items():
        phase: PhaseConfig = getattr(config.recipe, which)
        others = [pattern for pattern in patterns(phase.layers) if pattern != AUTO]
        changed[which] = dataclasses.replace(phase, layers=(*others, *map(literal, names)))
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, **changed))


def any_layers(
    denoiser: nn.Module, roles: Mapping[str, Role], names: Collection[str], config: FinetuneConfig
) -> FinetuneConfig:
    """As `choose_layers` gives it, with as many layers as fit, whichever: for estimates."""
    layers = quantizable_layers(denoiser)
    total = sum(layers[name].weight.numel() for name in names)
    chosen: dict[str, list[str]] = {}
    for which, phase in asked(config.recipe).items():
        left = phase.auto_share * total
        chosen[which] = []
        for name in sorted(candidates(roles, names, which), key=lambda name: layers[name].weight.numel()):
            size = layers[name].weight.numel()
            if size <= left:
                chosen[which].append(name)
                left -= size
    return with_layers(config, chosen)

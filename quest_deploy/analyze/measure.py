"""Everything that an analysis measures, as the content of ``analysis.json``: see :mod:`quest_deploy.analyze.stage`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy.analyze import activations, temporal
from quest_deploy.analyze.config import ACTIVATION_BITS, AnalyzeConfig
from quest_deploy.config import ProgressEvent
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.allocate import Bits, read_table, roles_of, summarize
from quest_deploy.quantize.attention import OperandQParams, insert_attention
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.insert import LayerQParams, Role, insert, quantizable_layers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.operands import find_operands
from quest_deploy.quantize.parts import (
    PROMPTS_PER_STEP,
    initialize_together,
    layer_inputs,
    sharing,
)
from quest_deploy.quantize.resume import Throttle, WorkDirectory
from quest_deploy.quantize.select import for_layer, layer_bits
from quest_deploy.quantize.sensitivity import (
    Entry,
    Pairs,
    choose_pairs,
    damage_between,
    measure_sensitivity,
    predict,
)
from quest_deploy.quantize.trace import Trace

HISTOGRAM_STEPS = 4
HISTOGRAM_LAYERS = 6
Progress = Callable[[ProgressEvent], None]


def measure(
    model: LoadedModel,
    trace: Trace,
    quantized: nn.Module | None,
    data: CalibrationSet,
    config: AnalyzeConfig,
    work: WorkDirectory,
    progress: Progress,
) -> dict[str, Any]:
    """Everything of the document that is measured.

    Args:
        model: Full precision.
        trace: Of its denoiser: the part that each layer plays.
        quantized: The checkpoint's denoiser, or None.
        data: Recorded trajectories.
        config: How much is measured.
        work: Where finished layers are kept.
        progress: Told how far each part is.
    """
    denoiser, roles, timeless = model.denoiser, trace.roles, trace.timeless
    keep = sorted(
        {int(step) for step in torch.linspace(0, data.timesteps.numel() - 1, HISTOGRAM_STEPS).round()}
    )
    observed = {"before": _observe(denoiser, data, keep, config, progress, "full precision")}
    if quantized is not None:
        observed["after"] = _observe(quantized, data, keep, config, progress, "checkpoint")
    run_order = list(observed["before"])
    inputs = layer_inputs(
        model, trace, data, seed=config.seed, report=reporter(progress, "collect activations")
    )
    operands = find_operands(
        denoiser,
        data,
        config.recipe,
        work,
        seed=config.seed,
        report=reporter(progress, "collect attention operands"),
    )
    student = start(denoiser, trace, inputs, operands, data, config, progress)
    pairs = choose_pairs(data, steps=config.sensitivity_steps, prompts=config.sensitivity_prompts)
    entries = _sensitivity(denoiser, data, inputs, roles, pairs, config, work, progress, timeless)
    sensitivity = {
        "bits": [str(bits) for bits in wanted_bits(config)],
        "timesteps": data.timesteps[pairs.step.reshape(pairs.steps, -1)[:, 0]].tolist(),
        "prompts_per_timestep": pairs.step.numel() // pairs.steps,
        "layers": entries,
    }
    models = {"start": student, "checkpoint": quantized}
    worst = worst_layers(observed["before"], entries)
    return {
        "timesteps": data.timesteps.tolist(),
        "run_order": run_order,
        "activations": {
            when: None
            if when not in observed
            else {name: found.summary() for name, found in observed[when].items()}
            for when in ("before", "after")
        },
        "histograms": {
            "steps": keep,
            **{
                when: activations.histograms(observed[when], worst) if when in observed else None
                for when in ("before", "after")
            },
        },
        "temporal": temporal_part(denoiser, models, data, roles, temporal.embedding_layer(run_order, roles)),
        "sensitivity": sensitivity,
        "network": network_part(denoiser, models, data, pairs, config, sensitivity),
    }


@torch.no_grad()
def start(
    denoiser: nn.Module,
    trace: Trace,
    inputs: Mapping[str, Tensor],
    operands: Mapping[str, OperandQParams],
    data: CalibrationSet,
    config: AnalyzeConfig,
    progress: Progress,
) -> nn.Module:
    """A copy of the denoiser quantized by the recipe, before finetuning and rounded to nearest.

    Args:
        denoiser: Full precision.
        trace: The part that each of its layers plays.
        inputs: What each layer was given, from `layer_inputs`.
        operands: Scales of quantized attention, from `find_operands`; empty where it stays in float.
        data: Recorded trajectories.
        config: Holds the recipe.
        progress: Told how far it is.
    """
    student = copy.deepcopy(denoiser)
    qparams: dict[str, LayerQParams] = {}
    bits = layer_bits(trace.roles, config.recipe)
    # Where tables take the place of layers that carry time, those start as exact as the layers themselves.
    layers = {name: layer for name, layer in quantizable_layers(denoiser).items() if name in bits}
    for done, name in enumerate(layers, start=1):
        if name not in qparams:
            recipe = for_layer(config.recipe, name, trace.timeless)
            together = sharing(name, trace, config.recipe, bits)
            qparams |= initialize_together(
                {other: layers[other] for other in together}, inputs[name], bits[name], recipe
            )
        progress(ProgressEvent(stage="search scales", completed=done, total=len(layers)))
    context = TimestepContext(data.boundaries())
    insert(student, qparams, context)
    insert_attention(student, operands, context)
    return student.requires_grad_(False)


def temporal_part(
    denoiser: nn.Module,
    models: Mapping[str, nn.Module | None],
    data: CalibrationSet,
    roles: Mapping[str, Role],
    embedding: str | None,
) -> dict[str, Any]:
    """Quantized against true outputs of the layers that carry time."""
    true = temporal.temporal_outputs(denoiser, data, roles)
    part: dict[str, Any] = {"embedding": embedding}
    for when, model in models.items():
        part[when] = None
        if model is not None:
            got = temporal.temporal_outputs(model, data, roles)
            part[when] = {
                "layers": temporal.compare_outputs(true, got),
                "confusion": None
                if embedding is None or embedding not in got
                else temporal.confusion(true[embedding], got[embedding]),
            }
    return part


@torch.no_grad()
def network_part(
    denoiser: nn.Module,
    models: Mapping[str, nn.Module | None],
    data: CalibrationSet,
    pairs: Pairs,
    config: AnalyzeConfig,
    sensitivity: Mapping[str, Any],
) -> dict[str, Any]:
    """Damage of the whole network quantized, and what the layers' own damages predict for the start."""
    scale = config.recipe.guidance_scale
    reference = predict(denoiser, data, pairs, scale)
    part: dict[str, Any] = {
        when: None
        if model is None
        else damage_between(reference, predict(model, data, pairs, scale), pairs.steps)
        for when, model in models.items()
    }
    table = read_table(sensitivity)
    bits = layer_bits(roles_of(table), config.recipe)
    table = [layer for layer in table if layer.name in bits]
    measured = set(wanted_bits(config))
    known = all(
        Bits(w, a) in measured or {Bits(w, None), Bits(None, a)} <= measured for w, a in bits.values()
    )
    part["predicted_snr_db"] = summarize(table, bits).snr_db if known else None
    return part


def worst_layers(observed: Mapping[str, activations.Activations], entries: list[Entry]) -> list[str]:
    """The layers whose input loses most at the fewest activation bits measured alone; else the most imbalanced."""
    for bits in ACTIVATION_BITS:
        if entries and bits in entries[0]["damage"]:
            ranked = sorted(entries, key=lambda entry: entry["damage"][bits]["snr_db"])
            return [entry["name"] for entry in ranked[:HISTOGRAM_LAYERS]]
    by_time = {name: found.summary()["timestep_imbalance"] for name, found in observed.items()}
    return sorted(by_time, key=lambda name: -by_time[name])[:HISTOGRAM_LAYERS]


def wanted_bits(config: AnalyzeConfig) -> list[Bits]:
    """What each layer is quantized to on its own, each once, however it was written."""
    return list(dict.fromkeys(map(Bits.parse, config.bits)))


def _observe(
    denoiser: nn.Module,
    data: CalibrationSet,
    keep: list[int],
    config: AnalyzeConfig,
    progress: Progress,
    what: str,
) -> dict[str, activations.Activations]:
    return activations.collect_activations(
        denoiser,
        data,
        keep_steps=keep,
        prompts_per_step=PROMPTS_PER_STEP,
        seed=config.seed,
        report=reporter(progress, f"describe activations, {what}"),
    )


def _sensitivity(
    denoiser: nn.Module,
    data: CalibrationSet,
    inputs: Mapping[str, Tensor],
    roles: Mapping[str, Role],
    pairs: Pairs,
    config: AnalyzeConfig,
    work: WorkDirectory,
    progress: Progress,
    timeless: Collection[str],
) -> list[Entry]:
    """The entries of all layers; those that an interrupted run left are taken over."""
    saved = work.load("sensitivity")
    finished: dict[str, Entry] = {} if saved is None else saved[1]["layers"]
    throttle = Throttle(work)

    def after_layer(entry: Entry, done: int, total: int) -> None:
        finished[entry["name"]] = entry
        if throttle.due():
            work.save("sensitivity", {"finished": torch.tensor(done)}, layers=finished)
        progress(
            ProgressEvent(
                stage="quantize each layer alone", completed=done, total=total, message=entry["name"]
            )
        )

    return measure_sensitivity(
        denoiser,
        data,
        inputs,
        config.recipe,
        roles=roles,
        bits=wanted_bits(config),
        pairs=pairs,
        finished=finished,
        after_layer=after_layer,
        timeless=timeless,
    )


def reporter(progress: Progress, stage: str) -> Callable[[int, int], None]:
    """Tells `progress` about (completed, total) of one stage."""
    return lambda completed, total: progress(ProgressEvent(stage=stage, completed=completed, total=total))

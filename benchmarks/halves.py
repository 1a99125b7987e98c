"""What quantized weights alone and quantized activations alone leave of the network's output, before any finetuning.

The scales are those that finetuning starts from, with the recipe's own exceptions. One side is rounded and the other
stays in full precision, channel rows included, so that a figure says how much of the damage is that side's.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from benchmarks.differences import POSITIONS, PROMPTS_PER_STEP, damage, recorded
from benchmarks.environment import header
from benchmarks.settings import MODEL, Settings
from benchmarks.tables import Table, number
from quest_deploy.model.load import load_model
from quest_deploy.quantize.grid import channel_shape
from quest_deploy.quantize.insert import quantizable_layers
from quest_deploy.quantize.layers import ActivationQuantizer, QuantizedLayer, TimestepContext
from quest_deploy.quantize.parts import for_layer, initialize_one, layer_inputs
from quest_deploy.quantize.select import layer_bits
from quest_deploy.quantize.structure import restructure, structure
from quest_deploy.quantize.student import make_student
from quest_deploy.quantize.trace import trace

NAME = "halves"


def run(settings: Settings) -> dict[str, Any]:
    """Measure both sides of every recipe, each alone and together."""
    model = load_model(MODEL)
    heldout, data, inputs = recorded(model, settings)
    recipes: dict[str, dict[str, float]] = {}
    for name in settings.recipes:
        recipe = settings.recipe(name)
        changed, seen = dataclasses.replace(model, denoiser=copy.deepcopy(model.denoiser)), inputs
        restructure(changed, recipe)
        found = trace(changed)
        if any(structure(changed.denoiser).values()):
            seen = layer_inputs(
                changed,
                found,
                data,
                seed=settings.seed,
                prompts_per_step=PROMPTS_PER_STEP,
                positions=POSITIONS,
            )
        layers = quantizable_layers(changed.denoiser)
        qparams = {
            layer: initialize_one(layers[layer], seen[layer], bits, for_layer(recipe, layer, found.timeless))
            for layer, bits in layer_bits(found.roles, recipe).items()
        }
        recipes[name] = {}
        for side, change in SIDES.items():
            student = make_student(changed, qparams, {}, TimestepContext(data.boundaries()))
            change(student)
            recipes[name][side] = damage(student, heldout)
            print(f"{name}, {side}: {recipes[name][side]} dB", flush=True)
    return {
        **header(settings),
        "prompts": heldout.num_prompts,
        "calibration_prompts": data.num_prompts,
        "recipes": recipes,
    }


def float_weights(student: nn.Module) -> None:
    """Leave weights as they are, times their channel row."""
    for layer in student.modules():
        if isinstance(layer, QuantizedLayer):
            layer.rounding = layer.scaled_weight


def float_activations(student: nn.Module) -> None:
    """Leave activations as they are, divided by their channel row."""
    for quantizer in student.modules():
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.register_forward_hook(_unrounded)


def _unrounded(
    quantizer: ActivationQuantizer, args: tuple[Tensor, Tensor], output: Any
) -> tuple[Tensor, None]:
    x = args[0]
    if quantizer.inverse_row is not None:
        x = x * channel_shape(quantizer.inverse_row, x.ndim, quantizer.channel_axis)
    return x, None


SIDES: Mapping[str, Callable[[nn.Module], None]] = {
    "weights": float_activations,
    "activations": float_weights,
    "both": lambda student: None,
}


def tables(result: dict[str, Any]) -> list[Table]:
    """One row for each recipe."""
    return [
        Table(
            title="Noise SNR that rounding leaves, dB",
            columns=("recipe", *SIDES),
            rows=tuple(
                (name.upper(), *(number(result["recipes"][name][side]) for side in SIDES))
                for name in result["settings"]["recipes"]
            ),
            note=f"Of the network's output, over {result['prompts']} held-out prompts, where one side alone is "
            "rounded; nothing is finetuned. Scales from "
            f"{result['calibration_prompts']} calibration prompts, weights rounded to nearest; the recipes' own "
            "exceptions hold.",
        )
    ]

"""How sensitive each layer is to low bits, and whether the layers' own damages predict what mixed precision does."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.environment import header
from benchmarks.settings import MODEL, Settings
from benchmarks.stages import QUANTIZER, made_by
from benchmarks.tables import Table, megabytes, number
from quest_deploy.analyze.config import AnalyzeConfig
from quest_deploy.analyze.measure import start
from quest_deploy.analyze.stage import DOCUMENT, analyze
from quest_deploy.artifacts import read_json
from quest_deploy.config import BitsOverride, Recipe
from quest_deploy.files import hash_mapping
from quest_deploy.model.load import load_model
from quest_deploy.prompts import load_prompts
from quest_deploy.quantize import calibrate
from quest_deploy.quantize.allocate import Budget, allocate, overrides, read_table, summarize
from quest_deploy.quantize.parts import layer_inputs
from quest_deploy.quantize.recipe import load_recipe
from quest_deploy.quantize.recording import BATCH_PROMPTS
from quest_deploy.quantize.select import layer_bits
from quest_deploy.quantize.sensitivity import choose_pairs, damage_between, predict
from quest_deploy.quantize.structure import restructure
from quest_deploy.quantize.trace import trace

NAME = "analysis"
RECIPE = "w4a4"
SHOWN_LAYERS = 10
WEIGHT_BITS = 4.1
ACTIVATION_BITS = (4.25, 4.5, 5.0, 6.0)


def run(settings: Settings) -> dict[str, Any]:
    """Analyze the model, then quantize it to the bits that the analysis chooses."""
    config = configuration(settings)
    # A finished analysis is taken as it is: one of other code or libraries lies elsewhere.
    output = settings.work / f"analysis-{hash_mapping(made_by((*QUANTIZER, 'quest_deploy/analyze')))[:12]}"
    artifact = analyze(MODEL, output, config, progress=None, resume=True)
    document = read_json(artifact.path / DOCUMENT)
    return {
        **header(settings),
        "timesteps": document["sensitivity"]["timesteps"],
        "layers": [
            {
                **{key: layer[key] for key in ("name", "role", "weights", "macs")},
                "snr_db": {bits: round(damage["snr_db"], 2) for bits, damage in layer["damage"].items()},
            }
            for layer in document["sensitivity"]["layers"]
        ],
        "allocations": allocations(config, document),
    }


def configuration(settings: Settings) -> AnalyzeConfig:
    """The default one, for a recipe without overrides; in a quick run for little of everything."""
    config = AnalyzeConfig(
        recipe=dataclasses.replace(load_recipe(RECIPE), overrides=()),
        prompts=load_prompts(default="calibration")[: AnalyzeConfig.num_prompts],
        seed=settings.seed,
    )
    if not settings.quick:
        return config
    return dataclasses.replace(
        config,
        num_prompts=2,
        steps=3,
        sensitivity_prompts=1,
        sensitivity_steps=2,
        bits=("w4", "w8", "a4", "a8"),
    )


def allocations(config: AnalyzeConfig, document: dict[str, Any]) -> list[dict[str, Any]]:
    """What was predicted for several choices of bits, and what they do to the whole network before finetuning."""
    table = read_table(document["sensitivity"])
    uniform, packaged = config.recipe, load_recipe(RECIPE)
    chosen: dict[str, Recipe] = {
        "all layers W4A4": uniform,
        f"packaged recipe {RECIPE}": dataclasses.replace(uniform, overrides=packaged.overrides),
    }
    for activation_bits in ACTIVATION_BITS:
        budget = Budget(average_weight_bits=WEIGHT_BITS, average_activation_bits=activation_bits)
        entries = overrides(table, allocate(table, budget).bits, (4, 4))
        chosen[f"chosen, at most {activation_bits:g}"] = dataclasses.replace(
            uniform, overrides=tuple(BitsOverride(**entry) for entry in entries)
        )
    chosen["all layers W4A8"] = dataclasses.replace(uniform, activation_bits=8)
    measured = whole_network(config, chosen)
    rows = []
    for name, recipe in chosen.items():
        came_to = summarize(table, layer_bits({layer.name: layer.role for layer in table}, recipe))
        rows.append(
            {
                "name": name,
                "average_weight_bits": round(came_to.average_weight_bits, 3),
                "average_activation_bits": round(came_to.average_activation_bits, 3),
                "weight_bytes": came_to.weight_bytes,
                "predicted_snr_db": round(came_to.snr_db, 2),
                "measured_snr_db": round(measured[name], 2),
            }
        )
    return rows


def whole_network(config: AnalyzeConfig, recipes: dict[str, Recipe]) -> dict[str, float]:
    """Noise SNR of the denoiser quantized by each recipe, on the pairs that the sensitivity was measured on."""
    model = load_model(MODEL)
    restructure(model, config.recipe)
    traced = trace(model)
    data = calibrate.record_trajectories(
        model,
        config.prompts,
        steps=config.steps,
        guidance_scale=config.recipe.guidance_scale,
        seed=config.seed,
        batch_size=BATCH_PROMPTS,
    )
    inputs = layer_inputs(model, traced, data, seed=config.seed)
    pairs = choose_pairs(data, steps=config.sensitivity_steps, prompts=config.sensitivity_prompts)
    scale = config.recipe.guidance_scale
    reference = predict(model.denoiser, data, pairs, scale)
    result = {}
    for name, recipe in recipes.items():
        quantized = start(
            model.denoiser,
            traced,
            inputs,
            {},
            data,
            dataclasses.replace(config, recipe=recipe),
            progress=lambda event: None,
        )
        prediction = predict(quantized, data, pairs, scale)
        result[name] = damage_between(reference, prediction, pairs.steps)["step_snr_db"]
    return result


def tables(result: dict[str, Any]) -> list[Table]:
    """The most sensitive layers, and mixed precision."""
    ranked = [
        [
            (f"`{layer['name']}`", number(layer["snr_db"][bits], 1))
            for layer in sorted(result["layers"], key=lambda layer, bits=bits: layer["snr_db"][bits])[
                :SHOWN_LAYERS
            ]
        ]
        for bits in ("a4", "w4")
    ]
    most = tuple(
        (str(place), *activation, *weight)
        for place, (activation, weight) in enumerate(zip(*ranked, strict=True), start=1)
    )
    mixed = tuple(
        (
            row["name"],
            number(row["average_weight_bits"]),
            number(row["average_activation_bits"]),
            megabytes(row["weight_bytes"]),
            number(row["predicted_snr_db"], 1),
            number(row["measured_snr_db"], 1),
        )
        for row in result["allocations"]
    )
    return [
        Table(
            title="Most sensitive layers",
            columns=("", "input at 4 bits", "noise SNR, dB", "weight at 4 bits", "noise SNR, dB"),
            rows=most,
            note=f"One of {len(result['layers'])} layers quantized, all others in full precision: SNR of the guided "
            f"noise prediction, mean over {len(result['timesteps'])} timesteps.",
        ),
        Table(
            title="Mixed precision",
            columns=(
                "bits",
                "weight bits",
                "activation bits",
                "weights",
                "predicted SNR, dB",
                "measured SNR, dB",
            ),
            rows=mixed,
            note="Before finetuning, weights rounded to nearest. Bits are averages over weights and over "
            "multiplications; predicted is from the layers' damages alone.",
        ),
    ]

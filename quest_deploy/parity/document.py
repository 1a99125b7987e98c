"""The content of ``report.json``.

A decibel figure is a number, ``"identical"`` for an exact match (+inf), or null where no figure could be formed (a NaN,
or silence). Lists over prompts follow ``prompts``; lists over steps follow ``timesteps``.

==========================  ==============================================================================
``schema_version``          1
``verdict``                 "passed", "failed", or "incomplete" (nothing failed, but a rung was not run or not judged)
``config``                  the parity configuration
``prompts``, ``seeds``      what was drawn
``timesteps``               of the schedule
``rungs[]``                 from the reference down:
``  name stage path``       ``recipe`` null is full precision; ``backend`` is what ran it
``  recipe backend``
``  digest lineage``        identity; whether its manifest names the rung above (null for the reference)
``  size_bytes``            all files; ``denoiser_bytes`` the denoiser's
``  status reason``         "run" or "not run", and why
``  seconds``               of the free run, decoding included
``  non_finite``            the first tensor with NaN or Inf, or null
``  against_reference``     null for the reference: ``noise_snr_db noise_cosine image_psnr_db image_ssim``
``edges[]``                 from one rung to the next; all figures null where one end was not run:
``  upper lower kind``      names; "quantization" or "deployment"
``  noise_snr_db``          on the upper rung's trajectory
``  text_encoder_snr_db``   per prompt, the worst of the embeddings; ``vae_decoder_snr_db`` with the upper rung's final
                        latents decoded; ``vae_encoder_snr_db`` with its images encoded
``  codes``                 null or ``places differing fraction max_difference layers[]``; ``codes_reason``
``  image_psnr_change_db``  null or ``median low high mean``: against the chain's first rung, paired by prompt; the ends
                          are those of the median's 95 % interval
``gates[]``                 ``rung kind quantity measured limit at_least unit passed detail``; passed null: not measured
``budgets``                 the floors for each quantized rung
``notes[]``                 what a reader must know about how the rungs hang together
``environment``             versions of libraries, machine
==========================  ==============================================================================

``noise_snr_db`` holds ``mean`` (over prompts and steps), ``per_prompt`` and, for each step over prompts, ``median``,
``q25`` and ``q75``. Codes are compared layer by layer, every product fed with the upper rung's codes;
there ``codes.noise_snr_db`` is the noise prediction, one list a probed step, and ``codes.companions_snr_db`` the output
of a text encoder or decoder that is quantized, per prompt.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from quest_deploy.manifest import tool_versions
from quest_deploy.metrics import IDENTICAL_DB, mean_db
from quest_deploy.parity.budgets import Budget
from quest_deploy.parity.codes import FlipReport
from quest_deploy.parity.figures import Outcome, psnr_change
from quest_deploy.parity.gates import Gate
from quest_deploy.parity.ladder import Edge, notes

SCHEMA_VERSION = 1
IDENTICAL = "identical"

Number = float | str | None


def make_document(
    *,
    outcomes: Sequence[Outcome],
    edges: Sequence[Edge],
    gates: Sequence[Gate],
    budgets: Mapping[str, Budget],
    verdict: str,
    config: Mapping[str, Any],
    prompts: Sequence[str],
) -> dict[str, Any]:
    """Everything measured, in JSON's own types."""
    rungs = [outcome.rung for outcome in outcomes]
    reference = outcomes[0].trace
    lineage: list[bool | None] = [None, *(edge.lineage for edge in edges)]
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": verdict,
        "config": dict(config),
        "prompts": list(prompts),
        "seeds": [config["seed"] + index for index in range(len(prompts))],
        "timesteps": [] if reference is None else [step.item() for step in reference.timesteps],
        "rungs": [_rung(outcome, named) for outcome, named in zip(outcomes, lineage, strict=True)],
        "edges": [_edge(edge, outcomes) for edge in edges],
        "gates": [
            {**asdict(gate), "measured": number(gate.measured), "passed": gate.passed} for gate in gates
        ],
        "budgets": {rung.name: asdict(budgets[rung.name]) for rung in rungs if rung.grid is not None},
        "notes": notes(rungs, edges),
        "environment": {
            "tools": tool_versions(),
            "machine": platform.machine(),
            "system": platform.system(),
            "cpu_count": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
    }


def number(value: float | None) -> Number:
    """A figure as JSON can hold it."""
    if value is None or math.isnan(value) or value == -math.inf:
        return None
    return IDENTICAL if value == math.inf else value


def numbers(values: Tensor) -> list[Number]:
    """The figures of a vector."""
    return [number(value) for value in values.tolist()]


def _rung(outcome: Outcome, lineage: bool | None) -> dict[str, Any]:
    rung = outcome.rung
    return {
        "name": rung.name,
        "stage": rung.stage,
        "path": str(rung.path),
        "recipe": rung.recipe,
        "digest": rung.digest,
        "lineage": lineage,
        "size_bytes": rung.size_bytes,
        "denoiser_bytes": rung.denoiser_bytes,
        "backend": outcome.backend or None,
        "status": "not run" if outcome.reason else "run",
        "reason": outcome.reason or None,
        "seconds": None if outcome.reason else outcome.seconds,
        "non_finite": outcome.problem,
        "against_reference": _against_reference(outcome),
    }


def _against_reference(outcome: Outcome) -> dict[str, Any] | None:
    if outcome.forced is None or outcome.image_psnr_db is None or outcome.image_ssim is None:
        return None
    return {
        "noise_snr_db": _snr(outcome.forced.snr_db),
        "noise_cosine": number(float(outcome.forced.cosine.mean())),
        "image_psnr_db": {
            "mean": number(mean_db(outcome.image_psnr_db)),
            "per_prompt": numbers(outcome.image_psnr_db),
        },
        "image_ssim": {
            "mean": number(float(outcome.image_ssim.mean())),
            "per_prompt": numbers(outcome.image_ssim),
        },
    }


def _numbers(values: Tensor | None) -> list[Number] | None:
    return None if values is None else numbers(values)


def _edge(edge: Edge, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    upper, lower = outcomes[edge.upper], outcomes[edge.lower]
    against = lower.against
    document: dict[str, Any] = {"upper": upper.rung.name, "lower": lower.rung.name, "kind": edge.kind}
    if against is None:
        empty = (
            "noise_snr_db",
            "text_encoder_snr_db",
            "vae_decoder_snr_db",
            "vae_encoder_snr_db",
            "codes",
            "codes_reason",
        )
        return {**document, **dict.fromkeys((*empty, "image_psnr_change_db"))}
    change = psnr_change(lower, outcomes[edge.anchor]) if edge.kind == "deployment" else None
    return {
        **document,
        "noise_snr_db": _snr(against.forced.snr_db),
        "text_encoder_snr_db": _numbers(against.text_encoder_snr_db),
        "vae_decoder_snr_db": _numbers(against.vae_decoder_snr_db),
        "vae_encoder_snr_db": _numbers(against.vae_encoder_snr_db),
        "codes": None if against.codes is None else _codes(against.codes),
        "codes_reason": against.codes_reason or None,
        "image_psnr_change_db": None
        if change is None
        else {name: _finite(value) for name, value in vars(change).items()},
    }


def _snr(values: Tensor) -> dict[str, Any]:
    """Summaries of [steps, n]."""
    capped = values.clamp(max=IDENTICAL_DB)
    low, middle, high = (
        torch.where(torch.isposinf(values).all(1), torch.inf, capped.quantile(q, dim=1))
        for q in (0.25, 0.5, 0.75)
    )
    return {
        "mean": number(mean_db(values)),
        "per_prompt": [number(mean_db(column)) for column in values.T],
        "median": numbers(middle),
        "q25": numbers(low),
        "q75": numbers(high),
    }


def _codes(report: FlipReport) -> dict[str, Any]:
    total = report.total
    return {
        "places": total.places,
        "differing": total.differing,
        "fraction": total.fraction,
        "max_difference": total.max_difference,
        "layers": [{"layer": layer.layer, **asdict(layer.flips)} for layer in report.layers],
        "unmatched": list(report.unmatched),
        "noise_snr_db": [numbers(row) for row in report.noise_snr_db],
        "companions_snr_db": {name: numbers(values) for name, values in report.companions_snr_db.items()},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

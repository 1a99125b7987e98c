"""Run every rung of a ladder once, compare each with the reference and with the rung above it, write the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quest_deploy.artifacts import check_output, write_artifact, write_json
from quest_deploy.config import ParityConfig, to_dict
from quest_deploy.engines import resolve_backend
from quest_deploy.model.families import Classes, Family, choose_prompts
from quest_deploy.model.load import SINGLE_FILE_FAMILY
from quest_deploy.model.spec import classes_of, family_of
from quest_deploy.parity.budgets import Budget, check_names, load_budget
from quest_deploy.parity.document import make_document
from quest_deploy.parity.figures import Outcome, deployment_figures, quantization_figures
from quest_deploy.parity.gates import (
    Gate,
    deployment_gates,
    finite_gate,
    judges_denoiser,
    quantization_gates,
)
from quest_deploy.parity.ladder import Edge, Rung, make_ladder
from quest_deploy.parity.run import Progress, run_ladder
from quest_deploy.prompts import load_prompts
from quest_deploy.report import RungImages, write_report


@dataclass(frozen=True, kw_only=True)
class ParityResult:
    """The outcome of a comparison; true when every rung was run and judged, and no gate failed.

    Attributes:
        verdict: "passed", "failed", or "incomplete" (no gate failed, but a rung was not run, or its denoiser could
            not be held to any limit). A rung without limits, as of a recipe that no budget names, passes where it is
            finite; the report's notes say so.
        gates: Every requirement and how it came out.
        report: The content of ``report.json``.
        path: The parity artifact.
    """

    verdict: str
    gates: tuple[Gate, ...]
    report: dict[str, Any]
    path: Path

    def __bool__(self) -> bool:
        return self.verdict == "passed"


def compare(
    reference: Path,
    candidate: Path,
    output: Path,
    config: ParityConfig,
    *,
    via: Sequence[Path] = (),
    backend: str | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> ParityResult:
    """Compare `candidate` with `reference`: same noise, same schedule, same prompts.

    Args:
        reference: A model, checkpoint, ONNX or engine directory, usually the full-precision model.
        candidate: The directory to judge.
        output: Where the parity artifact is written: ``report.json`` and ``report.html``.
        config: Prompts, steps, guidance, seed and the budget file.
        via: Rungs in between, from the reference down, for example the quantized checkpoint.
        backend: What runs the candidate; None chooses by what it is.
        progress: Called after each denoising step.
        overwrite: Replace an older parity artifact at `output`.

    Raises:
        ParityError: the artifacts cannot be compared.
        ArtifactError: one of them is missing or damaged, or `output` may not be written.
        ConfigError: the budget, the prompts or the scheduler cannot be used.
    """
    check_output(output, stage="parity", overwrite=overwrite)
    rungs, edges = make_ladder(reference, via, candidate)
    if backend is not None:
        # Refused before the work starts, too.
        backend = resolve_backend(candidate, backend)
        rungs = (*rungs[:-1], dataclasses.replace(rungs[-1], backend=backend))
    budget_path = None if config.budget is None else Path(config.budget)
    # All budgets are read before the work starts: a typing mistake should not cost an hour.
    budgets = {rung.name: load_budget(budget_path, rung.recipe) for rung in rungs}
    recipes = {rung.recipe for rung in rungs if rung.recipe is not None}
    if budget_path is not None:
        check_names(budget_path, recipes)
    family, classes = reference_kind(rungs)
    prompts = choose_prompts(
        family, classes, config.prompts, default=load_prompts(default="heldout"), count=config.num_prompts
    )[: config.num_prompts]
    inputs = {rung.name: rung.digest for rung in rungs}
    with write_artifact(
        output, stage="parity", config=to_dict(config), inputs=inputs, overwrite=overwrite
    ) as writer:
        outcomes = run_ladder(rungs, edges, prompts, config, progress)
        gates = make_gates(outcomes, edges, budgets)
        unjudged = without_denoiser(outcomes, edges, gates)
        verdict = judge(gates, outcomes, unjudged)
        document = make_document(
            outcomes=outcomes,
            edges=edges,
            gates=gates,
            budgets=budgets,
            verdict=verdict,
            config=to_dict(config),
            prompts=prompts,
        )
        document["notes"] += unjudged + without_limits(outcomes, edges, gates)
        if budget_path is not None and all(edge.kind == "deployment" for edge in edges):
            document["notes"].append(
                "--budget: no rung is quantized otherwise than the one above, so its floors were held against nothing"
            )
        if config.debug_engines and all(rung.stage != "engines" for rung in rungs):
            document["notes"].append("no rung is of TensorRT engines: --debug-engines had nothing to build")
        if len(prompts) < config.num_prompts:
            document["notes"].append(
                f"prompts: {len(prompts)} instead of {config.num_prompts}, the list has no more"
            )
        write_json(writer.path / "report.json", document)
        write_report(writer.path / "report.html", document, _report_images(outcomes))
        writer.details = {"verdict": verdict}
    return ParityResult(verdict=verdict, gates=tuple(gates), report=document, path=Path(output))


def reference_kind(rungs: Sequence[Rung]) -> tuple[Family, Classes | None]:
    """What kind of model the rungs are, from the first that is a directory: a single file says little of itself."""
    path = next((rung.path for rung in rungs if rung.path.is_dir()), None)
    return (SINGLE_FILE_FAMILY, None) if path is None else (family_of(path), classes_of(path))


def make_gates(
    outcomes: Sequence[Outcome], edges: Sequence[Edge], budgets: Mapping[str, Budget]
) -> list[Gate]:
    """All gates of all rungs that were run."""
    gates = [
        finite_gate(outcome.rung.name, outcome.problem) for outcome in outcomes if outcome.trace is not None
    ]
    reference = outcomes[0]
    for edge in edges:
        upper, lower, anchor = (outcomes[index] for index in (edge.upper, edge.lower, edge.anchor))
        if lower.trace is None or reference.trace is None:
            continue
        if edge.kind == "quantization" and reference.rung.grid is None:
            budget = budgets[lower.rung.name]
            figures = quantization_figures(lower, reference.trace, budget.noise_snr_db_min)
            gates += quantization_gates(lower.rung.name, figures, budget)
        elif edge.kind == "deployment" and lower.against is not None:
            gates += deployment_gates(
                lower.rung.name,
                deployment_figures(lower, upper, anchor),
                quantized=lower.rung.has_codes,
                dtype=lower.rung.dtype,
            )
    return gates


def without_limits(outcomes: Sequence[Outcome], edges: Sequence[Edge], gates: Sequence[Gate]) -> list[str]:
    """One note for each rung below the reference that no figure was held to a limit of: "passed" says little of it."""
    limited = {gate.rung for gate in gates if gate.kind != "finite"}
    found = []
    for edge in edges:
        rung = outcomes[edge.lower].rung
        if outcomes[edge.lower].trace is None or rung.name in limited:
            continue
        why = f"no limits for recipe '{rung.recipe}'"
        next_step = "; give --budget"
        if edge.kind == "deployment":
            why, next_step = f"{outcomes[edge.upper].rung.name}, the rung above, was not run", ""
        elif outcomes[0].rung.grid is not None:
            why, next_step = "limits are against full precision", "; compare with the full-precision model"
        found.append(f"{rung.name}: {why}: only NaN and infinity were checked{next_step}.")
    return found


def without_denoiser(outcomes: Sequence[Outcome], edges: Sequence[Edge], gates: Sequence[Gate]) -> list[str]:
    """One note for each rung of another runtime whose denoiser nothing was measured of that has a limit."""
    judged = {gate.rung for gate in gates if judges_denoiser(gate)}
    found = []
    for edge in edges:
        lower = outcomes[edge.lower]
        if edge.kind != "deployment" or lower.against is None or lower.rung.name in judged:
            continue
        if outcomes[0].rung.grid is not None:
            next_step = "images have limits against full precision alone: give the full-precision model first"
        else:
            next_step = "one prompt says too little: raise --num-prompts"
        found.append(
            f"{lower.rung.name}: the denoiser was not judged: its codes cannot be seen, and {next_step}."
        )
    return found


def judge(gates: Sequence[Gate], outcomes: Sequence[Outcome], unjudged: Sequence[str] = ()) -> str:
    """One word for the whole comparison."""
    if any(gate.passed is False for gate in gates):
        return "failed"
    return "incomplete" if unjudged or any(outcome.reason for outcome in outcomes) else "passed"


def _report_images(outcomes: Sequence[Outcome]) -> list[RungImages]:
    """The images of every rung that was run, for the grid of the report."""
    return [
        RungImages(name=outcome.rung.name, images=outcome.trace.images)
        for outcome in outcomes
        if outcome.trace is not None
    ]

"""Run every rung of a ladder once, one in memory at a time, and compare it with the reference and the rung above."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quest_deploy.artifacts import read_manifest
from quest_deploy.config import ParityConfig, ProgressEvent
from quest_deploy.errors import EngineBuildError, MissingDependencyError, ParityError
from quest_deploy.metrics import psnr_db, snr_db, ssim
from quest_deploy.model.denoisers import CONTROL
from quest_deploy.parity.codes import CodeRun, FlipReport, compare_codes, take_codes
from quest_deploy.parity.figures import Against, Outcome
from quest_deploy.parity.ladder import Edge, Rung
from quest_deploy.parity.measure import (
    Request,
    Tick,
    Trace,
    decode_again,
    draw,
    encode_images,
    teacher_forced,
)
from quest_deploy.pipeline import Pipeline, load_pipeline

logger = logging.getLogger(__name__)

Progress = Callable[[ProgressEvent], None]


def run_ladder(
    rungs: Sequence[Rung],
    edges: Sequence[Edge],
    prompts: tuple[str, ...],
    config: ParityConfig,
    progress: Progress | None,
) -> list[Outcome]:
    """Measure all rungs from the reference down.

    Args:
        rungs: The reference first.
        edges: One fewer than rungs; edge i leads from rung i to rung i + 1.
        prompts: What is drawn.
        config: Steps, guidance scale, scheduler, seed and batch size.
        progress: Called after each denoising step.

    Returns:
        One outcome a rung. An engine that this machine cannot run gives one with a reason and no figures.

    Raises:
        ParityError: the reference cannot be run, or the rungs have different schedules.
    """
    outcomes: list[Outcome] = []
    schedule: Mapping[str, Any] = {}
    request: Request | None = None
    upper_codes: Sequence[CodeRun] | str = ""
    counter = _Counter(progress, _total_steps(edges, len(prompts), config))
    for index, rung in enumerate(rungs):
        pipeline = _open(rung)
        if isinstance(pipeline, str):
            if index == 0:
                raise ParityError(f"the reference '{rung.path}' cannot be run here: {pipeline}")
            outcomes.append(Outcome(rung=rung, reason=pipeline))
            continue
        with pipeline:
            if request is None:
                seeds = range(config.seed, config.seed + len(prompts))
                request = Request(prompts=prompts, noise=pipeline.initial_noise(seeds).cpu(), config=config)
                schedule = _schedule(pipeline)
            _check_schedule(rung, schedule, _schedule(pipeline))
            outcome = _draw(pipeline, rung, request, counter.named(rung.name))
            if index > 0:
                edge = edges[index - 1]
                outcome = _compare(
                    pipeline, outcome, outcomes, edge, upper_codes, request, counter.named(rung.name)
                )
            # Taken while the rung is loaded, for the one below.
            below = edges[index] if index < len(edges) else None
            upper_codes = _own_codes(pipeline, outcome, below, request)
        outcomes.append(outcome)
    return outcomes


def _open(rung: Rung) -> Pipeline | str:
    """The rung ready to run, or why this machine cannot run it."""
    try:
        return load_pipeline(
            rung.path,
            backend=rung.backend,
            weights_only=rung.weights_only and rung.stage == "checkpoint",
            loras=rung.loras,
        )
    except MissingDependencyError as error:
        if rung.stage != "engines":
            raise
        logger.warning("%s is not run: %s", rung.name, error)
        return str(error)


def _draw(pipeline: Pipeline, rung: Rung, request: Request, tick: Tick) -> Outcome:
    start = time.perf_counter()
    trace = draw(pipeline, request, tick)
    seconds = time.perf_counter() - start
    return Outcome(rung=rung, backend=pipeline.backend, seconds=seconds, trace=trace)


def _compare(
    pipeline: Pipeline,
    outcome: Outcome,
    above: Sequence[Outcome],
    edge: Edge,
    upper_codes: Sequence[CodeRun] | str,
    request: Request,
    tick: Tick,
) -> Outcome:
    """Add to `outcome` what it is against the reference and against the rung above."""
    reference, upper = above[0].trace, above[edge.upper].trace
    own = outcome.trace
    assert own is not None and reference is not None
    forced = teacher_forced(pipeline, reference, request, tick)
    outcome = dataclasses.replace(
        outcome,
        forced=forced,
        image_psnr_db=psnr_db(reference.images, own.images),
        image_ssim=ssim(reference.images, own.images),
    )
    if upper is None:
        return outcome
    flips: FlipReport | str = ""
    if edge.kind == "deployment" and outcome.rung.has_codes:
        flips = _flips(
            upper_codes, pipeline, upper, request, debug_source(outcome.rung, above, request.config)
        )
    against = Against(
        forced=forced if edge.upper == 0 else teacher_forced(pipeline, upper, request, tick),
        text_encoder_snr_db=text_encoder_snr_db(upper, own) if pipeline.family.has_text else None,
        vae_encoder_snr_db=None
        if upper.encoded is None
        else snr_db(upper.encoded, encode_images(pipeline, upper.images, request)),
        vae_decoder_snr_db=None
        if pipeline.family.autoencoder is None
        else snr_db(upper.images, decode_again(pipeline, upper, request)),
        codes=None if isinstance(flips, str) else flips,
        codes_reason=flips if isinstance(flips, str) else "",
    )
    return dataclasses.replace(outcome, against=against)


def text_encoder_snr_db(upper: Trace, own: Trace) -> Tensor:
    """Of every prompt's embeddings, whichever of them is worst, and of the empty prompt's, [n]."""
    branches = [(upper.positive, own.positive)]
    if upper.negative is not None and own.negative is not None:
        branches.append((upper.negative, own.negative))
    ratios = [
        snr_db(value, told[name])
        for above, told in branches
        for name, value in above.items()
        if value.is_floating_point() and name != CONTROL
    ]
    return torch.stack(ratios).amin(dim=0)


def debug_source(rung: Rung, above: Sequence[Outcome], config: ParityConfig) -> Path | None:
    """The ONNX directory that debug engines are built from; None where they are not wanted, or it is no rung."""
    if not config.debug_engines or rung.stage != "engines":
        return None
    if left_in_float(rung.path):
        logger.warning(
            "'%s': --auto-fallback left products of these engines in float, which no debug engine has; their codes are "
            "not compared, and their pictures are not the checkpoint's",
            rung.path,
        )
        return None
    sources = [one.rung for one in above if one.rung.digest == rung.inputs.get("onnx")]
    return sources[-1].path if sources else None


def left_in_float(engines: Path) -> list[str]:
    """The components of an engine directory that `--auto-fallback` left products of in float."""
    components = read_manifest(engines).details.get("components", {})
    return [name for name, one in components.items() if one.get("auto_fallback", {}).get("left_in_float")]


def _flips(
    upper_codes: Sequence[CodeRun] | str,
    pipeline: Pipeline,
    upper: Trace,
    request: Request,
    debug: Path | None,
) -> FlipReport | str:
    if isinstance(upper_codes, str):
        return upper_codes
    try:
        codes = take_codes(pipeline, upper, request.prompts, [run.codes for run in upper_codes], debug)
    except EngineBuildError as error:
        # TensorRT need not take a graph in the form that shows its codes; the rest of the comparison stands.
        logger.warning("%s: no codes: %s", pipeline.backend, error)
        return f"no debug engine could be built: {error}"
    return codes if isinstance(codes, str) else compare_codes(upper_codes, codes)


def _own_codes(
    pipeline: Pipeline, outcome: Outcome, below: Edge | None, request: Request
) -> Sequence[CodeRun] | str:
    """The rung's integer codes on its own trajectory, where the rung below is to be compared with them."""
    if below is None or below.kind != "deployment" or not outcome.rung.has_codes:
        return ""
    assert outcome.trace is not None
    return take_codes(pipeline, outcome.trace, request.prompts)


def _schedule(pipeline: Pipeline) -> dict[str, Any]:
    # Private keys hold the version of diffusers that wrote the file.
    return {key: value for key, value in dict(pipeline.scheduler.config).items() if not key.startswith("_")}


def _check_schedule(rung: Rung, expected: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    different = sorted(key for key in expected.keys() | got.keys() if expected.get(key) != got.get(key))
    if different:
        raise ParityError(
            f"'{rung.path}' has another noise schedule than the reference ({', '.join(different[:3])} "
            f"{'differs' if len(different) == 1 else 'differ'}); compare artifacts made from one model"
        )


def _total_steps(edges: Sequence[Edge], prompts: int, config: ParityConfig) -> int:
    batches = -(-prompts // config.batch_size)
    runs = 1 + sum(2 if edge.upper == 0 else 3 for edge in edges)
    return runs * batches * config.steps


class _Counter:
    """Counts denoising steps over all rungs and tells `progress`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.completed = progress, total, 0

    def named(self, rung: str) -> Tick:
        def tick(message: str) -> None:
            self.completed += 1
            if self.progress is not None:
                # Some schedulers evaluate the denoiser more often than the number of steps says.
                total = max(self.total, self.completed)
                self.progress(
                    ProgressEvent(
                        stage="parity", completed=self.completed, total=total, message=f"{rung}: {message}"
                    )
                )

        return tick

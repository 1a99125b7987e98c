"""`quest-deploy bench`: what an artifact costs to run, beside others in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from quest_deploy.bench.figures import P95_VALUES
from quest_deploy.commands.progress import show_progress
from quest_deploy.commands.verb import (
    DONE,
    ERROR,
    OVER_BUDGET,
    Result,
    artifact_result,
    format_size,
    format_table,
    output_option,
    overwrite_option,
    verb,
)
from quest_deploy.config import BenchConfig
from quest_deploy.errors import ArtifactError, BenchError


@click.command(short_help="Latency, throughput and memory.")
@click.argument("subjects", metavar="DIR[:BACKEND]...", nargs=-1, required=True)
@output_option
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="May be given several times.  [default: one]"
)
@click.option("--steps", type=int, default=BenchConfig.steps, show_default=True, help="Denoising steps.")
@click.option("--guidance-scale", type=float, default=BenchConfig.guidance_scale, show_default=True)
@click.option("--scheduler", metavar="NAME", help="[default: the model's own]")
@click.option("--height", type=int, help="Pixels.  [default: the model's own]")
@click.option("--width", type=int, help="Pixels.  [default: the model's own]")
@click.option(
    "--num-images", type=int, default=BenchConfig.num_images, show_default=True, help="For each prompt."
)
@click.option("--batch-size", type=int, default=BenchConfig.batch_size, show_default=True)
@click.option(
    "--runs",
    type=int,
    default=BenchConfig.runs,
    show_default=True,
    help=f"Measured runs of a process; {P95_VALUES} in all rounds have a p95.",
)
@click.option("--warmup", type=int, default=BenchConfig.warmup, show_default=True, help="Runs before them.")
@click.option(
    "--rounds", type=int, default=BenchConfig.rounds, show_default=True, help="Processes for each DIR."
)
@click.option("--threads", type=int, help="CPU threads.  [default: the runtime's choice]")
@overwrite_option
@verb()
def bench(
    *, subjects: tuple[str, ...], output: Path, prompts: tuple[str, ...], overwrite: bool, **options: Any
) -> Result:
    """Measure how fast each DIR draws, and what memory it takes; the first is what the others are compared with.

    A DIR is a model, checkpoint, ONNX or engines directory. `:BACKEND` after it runs it with that, for example
    `onnx:openvino`; `:torch-compile` compiles a model, `:torch-fp16` and `:torch-compile-fp16` run it in half
    precision, `:onnxruntime-cuda` names ONNX Runtime's execution provider, and `:tensorrt-no-cuda-graphs` captures no
    graphs. They take turns, each time in a new process. Exit code 3 where one of the others could not be measured.

    Memory is the process's peak beyond its imports; of what draws on a GPU, what the GPU has in use beyond what it had
    before loading (without the CUDA context). Let nothing else use the GPU meanwhile: its use counts too.
    """
    from quest_deploy.artifacts import stage_of
    from quest_deploy.bench import bench as run
    from quest_deploy.bench.stage import RESULT
    from quest_deploy.bench.subject import parse_subject
    from quest_deploy.files import read_json
    from quest_deploy.model.spec import classes_of, family_of
    from quest_deploy.prompts import load_prompts

    paths = [parse_subject(subject).path for subject in subjects]
    if files := [path for path in paths if path.is_file()]:
        raise ArtifactError(
            f"'{files[0]}' is a file, expected a directory; write a single-file model as one with diffusers' "
            "from_single_file(FILE).save_pretrained(DIR)"
        )
    if not prompts:
        first = paths[0]
        stage_of(first)
        if classes_of(first) is not None:
            prompts = ("0",)
        elif family_of(first).has_text:
            prompts = load_prompts(default="heldout")[:1]
    config = BenchConfig(prompts=prompts, **options)
    with show_progress() as progress:
        artifact = run(subjects, output, config, progress=progress, overwrite=overwrite)
    result = read_json(artifact.path / RESULT)
    written = artifact_result(artifact, f"open {output / 'bench.svg'}", bench=result)
    text = "\n\n".join((*tables(result), written.text))
    failure = result["rows"][result["baseline"]].get("error")
    if failure is None:
        failed = any("error" in row for row in result["rows"].values())
        return Result(data=written.data, text=text, exit_code=OVER_BUDGET if failed else DONE)
    message = (
        f"{result['baseline']}, which the others are compared with, cannot be measured: {failure}. "
        f"What was measured is in '{artifact.path}'"
    )
    click.echo(f"Error: {message}", err=True)
    error = {"type": BenchError.__name__, "message": message}
    return Result(data={**written.data, "error": error}, text=text, exit_code=ERROR)


def tables(result: dict[str, Any]) -> list[str]:
    """Whole loops, single calls of components, and what failed, if anything: each in the order of the subjects."""
    rows = [(label, result["rows"][label]) for label in result["order"]]
    components = [("what", "component", "calls per loop", "seconds of a call", "p95")]
    failures = []
    for label, row in rows:
        for name, one in row.get("components", {}).items():
            p95 = "–" if one["p95_s"] is None else f"{one['p95_s']:.3g}"
            seconds = (f"{one['median_s']:.3g}", p95)
            components.append((label, name, str(one["calls"]), *seconds))
        if "error" in row:
            before = " (its figures are of the rounds before)" if "loop" in row else ""
            failures.append(f"{label} failed{before}: {row['error']}")
    found = [_table_of_loops(rows, result["baseline"]), format_table(components)]
    return [*found, "\n".join(failures)] if failures else found


def _table_of_loops(subjects: Sequence[tuple[str, dict[str, Any]]], baseline: str) -> str:
    base = dict(subjects)[baseline].get("loop")
    measured = [row["loop"] for _, row in subjects if "loop" in row]
    tail = "slowest" if any(loop["p95_s"] is None for loop in measured) else "p95"
    rows = [("what", "seconds", tail, "images/s", "times as fast", "outside engines", "memory")]
    for label, row in subjects:
        if "loop" not in row:
            rows.append((label, "failed", "", "", "", "", ""))
            continue
        loop, memory = row["loop"], row["memory_bytes"]
        rows.append(
            (
                label,
                f"{loop['median_s']:.3g}",
                f"{loop[f'{tail}_s']:.3g}",
                f"{loop['images_per_s']:.3g}",
                f"{base['median_s'] / loop['median_s']:.2f}" if base else "",
                f"{100 * loop['overhead']:.1f} %",
                format_size(memory["peak"] if memory["device_peak"] is None else memory["device_peak"]),
            )
        )
    return format_table(rows)

"""Run the whole path on the bundled model through the command line, and write what each stage took.

    .venv/bin/python scripts/demo.py [--recipe w8a8|w4a8|w4a4] [--output artifacts/demo]

Run it again after an interruption: finished stages are made anew, the finetuning goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path("reference-model") / "pipeline"
PROMPTS = (
    "grinning face",
    "red heart",
    "pizza",
    "rocket",
    "snowman",
    "sunflower",
    "tiger face",
    "strawberry",
)
SAMPLING = ("--steps", "25", "--guidance-scale", "3", "--seed", "0")
OVER_BUDGET, INTERRUPTED = 3, 130  # exit codes of quest-deploy


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One call of the command: its arguments, and the directory it makes."""

    name: str
    arguments: tuple[str, ...]
    output: Path


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one stage took."""

    stage: str
    command: str
    exit_code: int
    seconds: float
    peak_memory_bytes: int


def stages(output: Path, recipe: str) -> tuple[Stage, ...]:
    """The main job, in order."""
    model, checkpoint, onnx = str(MODEL), str(output / "checkpoint"), str(output / "onnx")
    rtx = str(output / "onnx-tensorrt-rtx")
    rows: tuple[tuple[str, tuple[str, ...], str], ...] = (
        ("finetune", ("finetune", model, "--recipe", recipe, "--seed", "0"), "checkpoint"),
        ("export in full precision", ("export", model, "--mode", "none"), "onnx-fp32"),
        ("export for ONNX Runtime", ("export", checkpoint, "--target", "onnxruntime"), "onnx"),
        (
            "export for TensorRT for RTX",
            ("export", checkpoint, "--target", "tensorrt-rtx"),
            "onnx-tensorrt-rtx",
        ),
        ("build engines", ("build-engine", rtx, "--backend", "tensorrt-rtx"), "engines"),
        ("generate", ("generate", onnx, *PROMPTS, *SAMPLING, "--backend", "onnxruntime"), "images"),
        ("parity", ("parity", model, onnx, "--via", checkpoint), "parity"),
    )
    return tuple(
        Stage(name=name, arguments=(*arguments, "-o", str(output / directory)), output=output / directory)
        for name, arguments, directory in rows
    )


def flags(stage: Stage) -> tuple[str, ...]:
    """What a repeated run adds: replace a finished output, go on with an unfinished finetuning."""
    finished = ("--overwrite",) if (stage.output / "manifest.json").exists() else ()
    return (*finished, "--resume") if stage.arguments[0] == "finetune" else finished


def run(stage: Stage) -> Outcome:
    """Run one stage as a process of its own, so that its time and memory are its own."""
    command = [str(Path(sys.executable).with_name("quest-deploy")), *stage.arguments, *flags(stage)]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    # wait4 gives the peak of this one process; resource.getrusage(RUSAGE_CHILDREN) only the highest of all so far.
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:  # the stage was interrupted too, and is putting its output in order
        _, status, usage = os.wait4(process.pid, 0)
    return Outcome(
        stage=stage.name,
        command=" ".join(["quest-deploy", *(f"'{word}'" if " " in word else word for word in command[1:])]),
        exit_code=os.waitstatus_to_exitcode(status),
        seconds=round(time.monotonic() - started, 2),
        peak_memory_bytes=usage.ru_maxrss * 1024,
    )


def sizes(directory: Path) -> dict[str, int]:
    """Bytes of an artifact: `total`, and each subdirectory (component) that holds files."""
    found = {"total": 0}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            parts = path.relative_to(directory).parts
            size = path.stat().st_size
            found["total"] += size
            if len(parts) > 1:
                found[parts[0]] = found.get(parts[0], 0) + size
    return found


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def psnr_per_rung(report: Any) -> dict[str, float | str | None]:
    """Mean image PSNR against the full-precision model, in dB, of each rung in the parity report that was run."""
    rungs = report["rungs"] if report else []
    measured = {rung["name"]: rung["against_reference"] for rung in rungs}
    return {name: figures["image_psnr_db"]["mean"] for name, figures in measured.items() if figures}


def summarize(
    output: Path, recipe: str, outcomes: list[Outcome], planned: tuple[Stage, ...]
) -> dict[str, Any]:
    """What `summary.json` holds: of this run, and not of an earlier one whose outputs lie in the same place."""
    finished = {outcome.stage for outcome in outcomes if outcome.exit_code in (0, OVER_BUDGET)}
    made = [stage.output for stage in planned if stage.name in finished]
    parity = output / "parity"
    return {
        "recipe": recipe,
        "passed": len(outcomes) == len(planned) and all(outcome.exit_code == 0 for outcome in outcomes),
        "machine": {"cpus": os.cpu_count(), "system": platform.system(), "python": platform.python_version()},
        "stages": [asdict(outcome) for outcome in outcomes],
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 2),
        "size_bytes": {"model": sizes(ROOT / MODEL)} | {path.name: sizes(path) for path in made},
        "image_psnr_db": psnr_per_rung(read_json(parity / "report.json") if parity in made else None),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="w4a8")
    parser.add_argument("--output", type=Path, default=Path("artifacts") / "demo")
    arguments = parser.parse_args()

    os.chdir(ROOT)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    planned = stages(output, arguments.recipe)
    outcomes: list[Outcome] = []
    for number, stage in enumerate(planned, start=1):
        print(f"\n[{number}/{len(planned)}] {stage.name}", flush=True)
        outcome = run(stage)
        outcomes.append(outcome)
        print(
            f"    {outcome.seconds:.1f} s, peak memory {outcome.peak_memory_bytes / 1e6:.0f} MB", flush=True
        )
        if outcome.exit_code != 0:
            break

    summary = summarize(output, arguments.recipe, outcomes, planned)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    failed = next((outcome for outcome in outcomes if outcome.exit_code != 0), None)
    if failed is not None:
        why = {OVER_BUDGET: "is over its budget", INTERRUPTED: "was interrupted"}.get(
            failed.exit_code, "failed"
        )
        print(f"\n{failed.stage} {why} (exit code {failed.exit_code}): {failed.command}", file=sys.stderr)
    if failed is None or failed.exit_code == OVER_BUDGET:
        print(f"\nDone in {summary['seconds']:.0f} s. Look at")
        for what, name in (
            ("the pictures", "images/contact-sheet.png"),
            ("the comparison", "parity/report.html"),
            ("sizes, times, PSNR", "summary.json"),
        ):
            print(f"  {what:<20}{output / name}")
    return 0 if failed is None else max(1, failed.exit_code)


if __name__ == "__main__":
    sys.exit(main())

"""`quest-deploy parity`: does the candidate draw what the reference draws? Exit code 3 if not."""

from __future__ import annotations

from pathlib import Path

import click

from quest_deploy.commands.progress import show_progress
from quest_deploy.commands.verb import DONE, OVER_BUDGET, Result, output_option, overwrite_option, verb
from quest_deploy.config import BACKENDS, ParityConfig


@click.command(short_help="Measure one artifact against another.")
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@output_option
@click.option(
    "--via",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A rung in between, for example the checkpoint; from the reference down, repeatable.",
)
@click.option(
    "--backend", type=click.Choice(BACKENDS), help="What runs CANDIDATE.  [default: what it was made for]"
)
@click.option("--budget", metavar="FILE", help="Limits as YAML.  [default: the packaged ones, by recipe]")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts, one a line.  [default: the packaged held-out list]",
)
@click.option("--num-prompts", type=int, default=ParityConfig.num_prompts, show_default=True)
@click.option("--steps", type=int, default=ParityConfig.steps, show_default=True)
@click.option("--guidance-scale", type=float, default=ParityConfig.guidance_scale, show_default=True)
@click.option("--scheduler", metavar="NAME", help="For example ddim.  [default: the model's own]")
@click.option(
    "--seed", type=int, default=ParityConfig.seed, show_default=True, help="Of the first prompt's noise."
)
@click.option("--batch-size", type=int, default=ParityConfig.batch_size, show_default=True)
@click.option(
    "--debug-engines",
    is_flag=True,
    help="Compare TensorRT engines layer by layer too: builds each once more with its codes marked.",
)
@overwrite_option
@verb()
def parity(
    *,
    reference: Path,
    candidate: Path,
    output: Path,
    via: tuple[Path, ...],
    backend: str | None,
    budget: str | None,
    prompts: Path | None,
    num_prompts: int,
    steps: int,
    guidance_scale: float,
    scheduler: str | None,
    seed: int,
    batch_size: int,
    debug_engines: bool,
    overwrite: bool,
) -> Result:
    """Compare CANDIDATE with REFERENCE: same noise, same schedule, same prompts.

    Each is a model or any artifact that draws. Writes report.json and report.html; exit code 3 when a limit is not
    kept, or when a rung could not be run here, so that nothing is known about it.
    """
    from quest_deploy.artifacts import check_output
    from quest_deploy.prompts import load_prompts

    check_output(output, stage="parity", overwrite=overwrite)
    config = ParityConfig(
        prompts=() if prompts is None else load_prompts(prompts),
        num_prompts=num_prompts,
        steps=steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        seed=seed,
        batch_size=batch_size,
        budget=budget,
        debug_engines=debug_engines,
    )

    from quest_deploy.parity import compare

    with show_progress() as progress:
        result = compare(
            reference,
            candidate,
            output,
            config,
            via=via,
            backend=backend,
            progress=progress,
            overwrite=overwrite,
        )
    report = result.path / "report.html"
    return Result(
        data={"path": str(result.path), "verdict": result.verdict, "report": result.report},
        text="\n".join(
            [
                *(gate.describe() for gate in result.gates),
                *(f"note: {note}" for note in result.report["notes"]),
                f"parity {result.verdict}; open {report}",
            ]
        ),
        exit_code=DONE if result else OVER_BUDGET,
    )

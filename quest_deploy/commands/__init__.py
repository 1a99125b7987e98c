"""The command line: one file per verb, each imported only when it is used."""

from __future__ import annotations

import importlib
import json
from typing import Any

import click

from quest_deploy import __version__

# In the order of the path from a model to an image. Module and function are named after the verb.
VERBS = (
    "finetune",
    "export",
    "lint",
    "build-engine",
    "refit",
    "generate",
    "parity",
    "bench",
    "analyze",
    "inspect",
    "doctor",
)

_AS_JSON = "quest_deploy.as_json"


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        name = cmd_name.replace("-", "_")
        command = getattr(importlib.import_module(f"quest_deploy.commands.{name}"), name)
        if not isinstance(command, click.Command):
            raise TypeError(f"quest_deploy.commands.{name}.{name} is not a command")
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = args[: args.index("--")] if "--" in args else args
        ctx.meta[_AS_JSON] = "--json" in words
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb; one that was asked for JSON answers wrong usage with JSON, too."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if ctx.meta[_AS_JSON]:
                click.echo(json.dumps({"error": {"type": "UsageError", "message": error.format_message()}}))
            raise


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="quest-deploy")
def main() -> None:
    """Finetune a text-to-image diffusion model to low-bit with QuEST, deploy it, and measure every step.

    MODEL -> finetune -> checkpoint -> export -> ONNX -> build-engine -> engines; generate and parity take any of them.

    Exit codes: 0 done; 1 an error that you can act on; 2 usage; 3 parity over its budget or with a rung that could not
    be run, bench with a row that could not be measured, or lint errors; 130 interrupted (Ctrl-C); 143 terminated
    (SIGTERM).
    """

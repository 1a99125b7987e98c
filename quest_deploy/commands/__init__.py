"""The command line: one file per verb, each imported only when it is used."""

from __future__ import annotations

import importlib

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


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="quest-deploy")
def main() -> None:
    """Finetune a text-to-image diffusion model to low-bit with QuEST, deploy it, and measure every step.

    MODEL -> finetune -> checkpoint -> export -> ONNX -> build-engine -> engines; generate and parity take any of them.

    Exit codes: 0 done; 1 an error that you can act on; 2 usage; 3 parity over its budget or with a rung that could not
    be run, or lint errors; 130 interrupted (Ctrl-C); 143 terminated (SIGTERM).
    """

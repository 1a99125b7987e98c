"""The Python API: the verbs, loaded when used, whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest

import quest_deploy

IMPORTS = [
    pytest.param("import quest_deploy", id="package"),
    pytest.param("import quest_deploy.export.to_onnx", id="module below"),
    pytest.param(
        "import quest_deploy; quest_deploy.export; import quest_deploy.export.to_onnx", id="verb first"
    ),
]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    assert (
        run("import sys, quest_deploy; print({'torch', 'onnx', 'numpy', 'click'} & set(sys.modules))")
        == "set()"
    )


@pytest.mark.parametrize("name", [name for name in quest_deploy.__all__ if name != "__version__"])
def test_every_verb_can_be_called(name: str) -> None:
    assert callable(getattr(quest_deploy, name))


@pytest.mark.parametrize("imports", IMPORTS)
def test_export_is_verb_and_package_whatever_is_imported_first(imports: str) -> None:
    """The call reaches the stage: it refuses a source that does not exist."""
    code = (
        f"{imports}\nfrom pathlib import Path\nfrom quest_deploy.config import ExportConfig\n"
        "from quest_deploy.errors import QuestDeployError\n"
        "try:\n    quest_deploy.export(Path('nowhere'), Path('/tmp/out'), ExportConfig())\n"
        "except QuestDeployError as error:\n    print('refused', 'nowhere' in str(error))\n"
        "import quest_deploy.export.passes\nprint(callable(quest_deploy.export))"
    )
    assert run(code).split("\n") == ["refused True", "True"]


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        quest_deploy.quantise  # noqa: B018


def test_dir_lists_the_verbs() -> None:
    assert set(quest_deploy.__all__) <= set(dir(quest_deploy))

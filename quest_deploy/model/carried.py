"""What travels with a model through every stage though nothing changes it: licence, model card, safety checker."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quest_deploy.errors import ArtifactError
from quest_deploy.files import copy_tree, refuse_pickle
from quest_deploy.model.weights import stray_weights

logger = logging.getLogger(__name__)

# As they are called on the hub, in any case.
NOTICE = re.compile(r"(readme\.md|licen[cs]e.*|notice.*|copying.*|use[_-]policy.*)", re.IGNORECASE)
SAFETY_CHECKER, FEATURE_EXTRACTOR = "safety_checker", "feature_extractor"
SAFETY = (SAFETY_CHECKER, FEATURE_EXTRACTOR)
# Not the same weights in another precision, such as model.fp16.safetensors.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_CONFIGURATION = ".json"
_OF_PARTS = (".json", ".txt", ".model", ".safetensors")


def copy_part(source: Path, output: Path, library: str) -> None:
    """Copy one part of a pipeline as it lies on disk: what `library` loads, and nothing else that was left there.

    Args:
        source: Its folder.
        output: The folder to make.
        library: As for :func:`quest_deploy.model.weights.weight_files`.
    """

    def others(folder: str, names: list[str]) -> set[str]:
        unknown = {name for name in names if name.startswith(".") or Path(name).suffix not in _OF_PARTS}
        return unknown | stray_weights(Path(folder), library)

    copy_tree(source, output, others)


def copy_notices(source: Path, output: Path) -> None:
    """Copy model card, licence and notices from one directory to another; a single file has none beside it."""
    for file in sorted(source.iterdir()) if source.is_dir() else ():
        if NOTICE.fullmatch(file.name) and file.is_file():
            shutil.copyfile(file, output / file.name)


def safety_parts(index: Mapping[str, Any]) -> dict[str, Any]:
    """The lines of ``model_index.json`` that name a safety checker and what prepares pictures for it."""
    if not _names_class(index.get(SAFETY_CHECKER)):
        return {}
    return {name: index[name] for name in SAFETY if _names_class(index.get(name))}


def _names_class(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) for name in entry)


def check_safety_folder(folder: Path) -> None:
    """Check that a safety checker's folder can be read without unpickling.

    Raises:
        ArtifactError: the folder is missing, or holds no weights in safetensors; says what to do.
    """
    if not folder.is_dir():
        raise ArtifactError(
            f"'{folder}' is missing, and model_index.json names a safety checker; download the whole model"
        )
    if not any(_WEIGHTS.fullmatch(file.name) for file in folder.iterdir()):
        for file in sorted(folder.iterdir()):
            refuse_pickle(file)
        raise ArtifactError(f"'{folder}' holds no model.safetensors; download the whole model")


def copy_safety(source: Path, output: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a model's safety checker, configuration and safetensors alone.

    One that only unpickling could open is left behind with a warning.

    Args:
        source: A diffusers directory or a checkpoint; of a single file there is nothing to copy.
        output: Where the folders go.
        index: Content of the model's ``model_index.json``.

    Returns:
        What ``model_index.json`` says of the folders that were copied.
    """
    carried = safety_parts(index)
    if not carried:
        return {}
    try:
        check_safety_folder(source / SAFETY_CHECKER)
    except ArtifactError as error:
        logger.warning("the safety checker is left behind, so images will not be checked: %s", error)
        return {}
    for name in carried:
        folder = output / name
        folder.mkdir()
        for file in _of_safety(source / name):
            shutil.copyfile(file, folder / file.name)
    return carried


def safety_files(source: Path, index: Mapping[str, Any]) -> list[Path]:
    """What :func:`copy_safety` would copy, if it copied anything."""
    return [file for name in safety_parts(index) for file in _of_safety(source / name)]


def _of_safety(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*"))
    return [file for file in files if file.suffix == _CONFIGURATION or _WEIGHTS.fullmatch(file.name)]


def index_of_carried(index: Mapping[str, Any], carried: Mapping[str, Any]) -> dict[str, Any]:
    """``model_index.json`` of a directory that `carried` was copied to: what was left behind is not named."""
    left = {name: [None, None] for name in safety_parts(index) if name not in carried}
    rest = {"requires_safety_checker": False} if left else {}
    return {**index, **left, **rest}

"""Which of the files in a component's folder hold its weights: those that its library would load, and no others.

Training leaves more there (averages, steps in between), and downloads have other precisions.
"""

from __future__ import annotations

from pathlib import Path

from quest_deploy.errors import ModelLoadError
from quest_deploy.files import read_json, refuse_pickle
from quest_deploy.model.families import DIFFUSERS, TRANSFORMERS

WEIGHTS_NAME = {DIFFUSERS: "diffusion_pytorch_model.safetensors", TRANSFORMERS: "model.safetensors"}
SUFFIX = ".safetensors"
INDEX_SUFFIX = ".index.json"


def index_file(folder: Path, library: str) -> Path | None:
    """The list of the parts that a component's weights are stored in; None where one file holds them, or nothing does.

    Where a folder has both, diffusers reads the parts and transformers the one file.
    """
    single = folder / WEIGHTS_NAME[library]
    index = folder / f"{WEIGHTS_NAME[library]}{INDEX_SUFFIX}"
    return index if index.is_file() and (library == DIFFUSERS or not single.is_file()) else None


def weight_files(folder: Path, library: str) -> list[Path]:
    """The safetensors files that hold a component's weights; empty where there are none.

    Args:
        folder: The component's.
        library: "diffusers" or "transformers", which its class is of.

    Raises:
        ModelLoadError: the list of parts is corrupt, or names something that is no file in the folder.
    """
    index = index_file(folder, library)
    if index is None:
        single = folder / WEIGHTS_NAME[library]
        return [single] if single.is_file() else []
    content = read_json(index)
    try:
        names = sorted(set(content["weight_map"].values()))
        # A path would lead out of what is hashed.
        parts = [folder / Path(name).name for name in names if Path(name).name == name]
    except (AttributeError, KeyError, TypeError) as error:
        raise ModelLoadError(f"'{index}' lists no parts; restore the model from its source") from error
    if not parts or len(parts) < len(names):
        raise ModelLoadError(f"'{index}' lists no parts in its folder; restore the model from its source")
    return parts


def check_weights(folder: Path, library: str) -> None:
    """Check that a component's weights are there, as safetensors.

    Raises:
        ModelLoadError: they are not; says what is there instead.
    """
    if weight_files(folder, library):
        return
    for file in sorted(folder.glob("*")):
        refuse_pickle(file)
    stem = WEIGHTS_NAME[library].removesuffix(SUFFIX)
    variants = sorted(file.name for file in folder.glob(f"{stem}.*{SUFFIX}"))
    if variants:
        raise ModelLoadError(
            f"{folder}: holds {variants[0]}, a variant, and no {WEIGHTS_NAME[library]}; "
            "download the model without a variant, or load it in diffusers with that variant and save it again"
        )
    others = sorted(file.name for file in folder.glob(f"*{SUFFIX}"))
    beside = f", only {others[0]}, which {library} does not load" if others else ""
    raise ModelLoadError(
        f"{folder}: holds no {WEIGHTS_NAME[library]}{beside}; restore the model from its source"
    )


def stray_weights(folder: Path, library: str) -> set[str]:
    """The names of files in a component's folder that hold other weights than its own, or list their parts."""
    own = {file.name for file in weight_files(folder, library)}
    listed = index_file(folder, library)
    if listed is not None:
        own.add(listed.name)
    return {file.name for file in folder.iterdir() if SUFFIX in file.name} - own

"""The safety checker of the source model: images that it flags are drawn black, as diffusers does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quest_deploy.errors import ArtifactError
from quest_deploy.model.carried import FEATURE_EXTRACTOR, SAFETY_CHECKER, check_safety_folder, safety_parts
from quest_deploy.model.components import first_device
from quest_deploy.model.libraries import LOADING
from quest_deploy.model.load import load_component, loading_errors
from quest_deploy.model.spec import read_config
from quest_deploy.pipeline.images import to_pil

CHECKER_CLASS = "StableDiffusionSafetyChecker"
PROCESSOR_CLASSES = ("CLIPImageProcessor", "CLIPFeatureExtractor")
WITHOUT = "or draw without it (`--no-safety-checker`)"


@dataclass(frozen=True, kw_only=True)
class SafetyChecker:
    """A safety checker with what prepares pictures for it.

    Attributes:
        module: `StableDiffusionSafetyChecker` of diffusers.
        processor: `CLIPImageProcessor` of transformers.
    """

    module: Any
    processor: Any

    @torch.no_grad()
    def check(self, images: Tensor) -> tuple[Tensor, list[bool]]:
        """Blacken what is flagged.

        Args:
            images: float32 [n, 3, H, W] in [0, 1]; not changed.

        Returns:
            The images, flagged ones all 0; and which are flagged.
        """
        # The checker was trained on 8-bit pictures, which is also how diffusers asks it.
        pictures = self.processor([to_pil(image) for image in images], return_tensors="pt")
        clip_input = pictures.pixel_values.to(first_device(self.module))
        checked, flags = self.module(images=images.clone(), clip_input=clip_input)
        return checked, list(flags)


def load_safety_checker(path: Path, device: torch.device) -> SafetyChecker | None:
    """The safety checker of a model, checkpoint, ONNX or engine directory, on `device`; None where it names none.

    Raises:
        ArtifactError: the directory is gone, or the checker incomplete, pickled or of a class that is not known.
        ModelLoadError: its weights are incomplete or corrupt.
    """
    if path.is_file():
        return None
    index = read_config(path / "model_index.json")
    named = safety_parts(index)
    if not named:
        return None
    _check_class(path, SAFETY_CHECKER, named, (CHECKER_CLASS,))
    _check_class(path, FEATURE_EXTRACTOR, named, PROCESSOR_CLASSES)
    try:
        check_safety_folder(path / SAFETY_CHECKER)
    except ArtifactError as error:
        raise ArtifactError(f"{error}, {WITHOUT}") from error
    with LOADING:
        import transformers
        from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

        # The same pixels on every machine: where torchvision is installed, the other class resizes with it.
        processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        with loading_errors(path / SAFETY_CHECKER):
            module: Any = load_component(path / SAFETY_CHECKER, StableDiffusionSafetyChecker).to(device)
        with loading_errors(path / FEATURE_EXTRACTOR):
            prepare = processor.from_pretrained(path / FEATURE_EXTRACTOR, local_files_only=True)
        return SafetyChecker(module=module, processor=prepare)


def _check_class(path: Path, name: str, named: dict[str, Any], expected: Sequence[str]) -> None:
    got = named[name][1] if name in named else None
    if got not in expected:
        raise ArtifactError(
            f"'{path / 'model_index.json'}': {name} is {got}, expected {' or '.join(expected)}; "
            f"restore the model from its source, {WITHOUT}"
        )

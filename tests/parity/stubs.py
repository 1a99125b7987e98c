"""Rungs without weights: directories as artifacts have them, and a pipeline of closed-form components."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from quest_deploy.artifacts import hash_file, write_artifact
from quest_deploy.config import LoraConfig, to_dict
from quest_deploy.errors import MissingDependencyError
from quest_deploy.parity.ladder import make_ladder
from quest_deploy.sampling import Step

REFERENCE_MODEL = Path(__file__).parents[2] / "reference-model" / "pipeline"
TEXT = "encoder_hidden_states"


@dataclass(frozen=True)
class Damage:
    """What a stub rung does wrong; nothing by default."""

    noise: float = 0.0
    text: float = 0.0
    decoder: float = 0.0
    nan_at_step: int = -1
    train_timesteps: int = 1000
    missing: str = ""


class StubPipeline:
    """A stand-in with the interface of `quest_deploy.pipeline.Pipeline`: smooth closed-form components, no model."""

    backend = "stub"
    family = SimpleNamespace(autoencoder="vae", has_text=True, controlnet=None)
    engines: Mapping[str, object] = MappingProxyType({})

    def __init__(self, path: Path, damage: Damage) -> None:
        self.path, self.damage = path, damage
        self.scheduler = SimpleNamespace(
            config={"num_train_timesteps": damage.train_timesteps, "_version": str(path)}
        )

    def __enter__(self) -> StubPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        waves = torch.sin(lengths[:, None, None] * torch.arange(1, 13).reshape(1, 3, 4))
        return {TEXT: waves + self.damage.text}

    def encode_negative(self, count: int) -> dict[str, Tensor]:
        return self.encode([""] * count)

    def initial_noise(self, seeds: Sequence[int]) -> Tensor:
        return torch.cat([torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def predict_noise(
        self,
        latents: Tensor,
        timestep: Tensor,
        positive: dict[str, Tensor],
        negative: dict[str, Tensor],
        *,
        guidance_scale: float,
    ) -> Tensor:
        text = (positive[TEXT] - negative[TEXT]).mean((1, 2)).reshape(-1, 1, 1, 1)
        prediction = torch.tanh(latents + guidance_scale * text + timestep / 1000)
        step = round((1000 - timestep.item()) / 100)
        if step == self.damage.nan_at_step:
            prediction[0, 0, 0, 0] = math.nan
        return prediction * (1 + self.damage.noise)

    def denoise(
        self,
        noise: Tensor,
        positive: dict[str, Tensor],
        negative: dict[str, Tensor],
        *,
        steps: int,
        guidance_scale: float,
        scheduler: str | None = None,
        generators: Sequence[torch.Generator],
        callback: Callable[[Step], None],
    ) -> Tensor:
        latents = noise
        for index in range(steps):
            timestep = torch.tensor(1000 - 100 * index)
            prediction = self.predict_noise(
                latents, timestep, positive, negative, guidance_scale=guidance_scale
            )
            callback(Step(index, timestep, latents, prediction))
            latents = latents - 0.3 * prediction
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        pixels = latents[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3)
        return torch.sigmoid(pixels) * (1 - self.damage.decoder)


class Rungs:
    """Rung directories without weights, and the stub that `load_pipeline` returns for each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.damage: dict[Path, Damage] = {}
        self.weights_only: set[str] = set()
        self.merged: dict[str, tuple[LoraConfig, ...]] = {}

    def add(
        self,
        name: str,
        damage: Damage = Damage(),
        *,
        stage: str = "model",
        recipe: str | None = None,
        made_from: Path | None = None,
        loras: Sequence[LoraConfig] = (),
        **details: Any,
    ) -> Path:
        path = self.root / name
        self.damage[path] = damage
        if stage == "model":
            self._fill(path)
            return path
        inputs = {} if made_from is None else {"source": self.digest(made_from)}
        config = {"name": name, "loras": [to_dict(lora) for lora in loras]}
        inputs |= {f"lora-{index}": hash_file(lora.path) for index, lora in enumerate(loras)}
        with write_artifact(path, stage=stage, config=config, inputs=inputs) as writer:
            self._fill(writer.path)
            writer.details.update(details)
            if recipe is not None:
                (writer.path / "quest.json").write_text(json.dumps({"recipe": {"name": recipe}}))
        return path

    def digest(self, path: Path) -> str:
        return make_ladder(path, [], path)[0][0].digest

    def load(
        self, path: Path, *, backend: str | None, weights_only: bool, loras: tuple[LoraConfig, ...]
    ) -> StubPipeline:
        self.merged[path.name] = loras
        self.weights_only |= {path.name} if weights_only else set()
        assert backend is None
        damage = self.damage[Path(path)]
        if damage.missing:
            raise MissingDependencyError(damage.missing)
        return StubPipeline(path, damage)

    @staticmethod
    def _fill(path: Path) -> None:
        for name in ("model_index.json", "unet/config.json", "text_encoder/config.json", "vae/config.json"):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REFERENCE_MODEL / name, path / name)

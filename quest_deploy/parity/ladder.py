"""The rungs of a comparison and what each step between two of them costs: quantization or deployment.

Neither torch nor onnx is imported here: everything follows from manifests and ``quest.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from quest_deploy.artifacts import hash_directory, read_artifact, read_json, stage_of
from quest_deploy.config import LoraConfig
from quest_deploy.errors import ParityError
from quest_deploy.files import hash_mapping, list_files
from quest_deploy.manifest import QUANTIZATION_NAME
from quest_deploy.model.families import TEXT_ENCODER, VAE_DECODER
from quest_deploy.model.merged import MergedLoras, find_files, in_words, merged_loras
from quest_deploy.model.spec import component_specs, family_of

RUNG_STAGES = ("model", "checkpoint", "onnx", "engines")
WEIGHT_ONLY = "int4-weight-only"

EdgeKind = Literal["quantization", "deployment"]


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One artifact of the comparison.

    Attributes:
        name: Unique in the ladder: the stage, numbered where it repeats.
        path: Directory.
        stage: One of :data:`RUNG_STAGES`.
        recipe: Name of the quantization recipe; None for full precision.
        grid: Identity of the quantizers (sha256 of ``quest.json``); None for full precision.
        dtype: Of the float operators: "fp32", "fp16" or "bf16".
        weights_only: Whether its activations are in float although it, or its checkpoint, could quantize them.
        companions: The components besides the denoiser whose activations are quantized.
        digest: Identity of the artifact.
        inputs: Digests of what it was made from, by role.
        size_bytes: All of its files.
        denoiser_bytes: The files of its denoiser; None of a single file, which has all components.
        backend: What runs it; None chooses by what it is.
        merged: The LoRAs that it was made with, as far as its manifest tells.
        loras: Those that a full-precision model is given, to be what the rungs below were made from.
    """

    name: str
    path: Path
    stage: str
    recipe: str | None
    grid: str | None
    digest: str
    inputs: Mapping[str, str]
    size_bytes: int
    denoiser_bytes: int | None
    dtype: str = "fp32"
    weights_only: bool = False
    companions: tuple[str, ...] = ()
    backend: str | None = None
    merged: MergedLoras | None = None
    loras: tuple[LoraConfig, ...] = ()

    @property
    def has_codes(self) -> bool:
        """Whether its products take quantized activations."""
        return self.grid is not None and not self.weights_only


@dataclass(frozen=True, kw_only=True)
class Edge:
    """The step from one rung to the next.

    Attributes:
        upper: Index of the upper rung.
        lower: Index of the lower rung.
        kind: "quantization" changes the numbers on purpose; "deployment" must not change them.
        anchor: Index of the rung where the chain of deployments that this edge ends began.
        lineage: Whether the lower rung's manifest names the upper rung as its input.
    """

    upper: int
    lower: int
    kind: EdgeKind
    anchor: int
    lineage: bool


def read_rung(path: Path) -> Rung:
    """Find out what lies at `path`.

    Raises:
        ArtifactError: nothing usable, or changed since it was written.
        ParityError: an artifact that draws no images.
    """
    stage = stage_of(path)
    if stage not in RUNG_STAGES:
        raise ParityError(
            f"'{path}' is an artifact of stage '{stage}', expected a {', '.join(RUNG_STAGES[:-1])} or "
            f"{RUNG_STAGES[-1]} directory; compare what drew the images, not the images"
        )
    inputs: Mapping[str, str] = {}
    details: Mapping[str, Any] = {}
    merged = None
    if stage == "model":
        digest = hash_directory(path)
        files = (
            {name: (path / name).stat().st_size for name in list_files(path, follow=True)}
            if path.is_dir()
            else {}
        )
    else:
        artifact = read_artifact(path)
        digest, inputs = artifact.digest, artifact.manifest.inputs
        details, merged = artifact.manifest.details, merged_loras(artifact.manifest)
        files = {name: entry.size_bytes for name, entry in artifact.manifest.files.items()}
    quest = path / QUANTIZATION_NAME
    content = read_json(quest) if quest.is_file() else None
    return Rung(
        name=stage,
        path=path,
        stage=stage,
        recipe=None if content is None else recipe_name(content),
        grid=None if content is None else hash_mapping(content),
        digest=digest,
        inputs=inputs,
        size_bytes=sum(files.values()) if path.is_dir() else path.stat().st_size,
        denoiser_bytes=_denoiser_bytes(path, files),
        dtype=details.get("dtype", "fp32"),
        weights_only=details.get("lowering") == WEIGHT_ONLY,
        companions=() if content is None else quantized_companions(content),
        merged=merged,
    )


def quantized_companions(content: Any) -> tuple[str, ...]:
    """The components in the content of a ``quest.json``, besides the denoiser, that take quantized activations."""
    found = content.get("companions", {}) if isinstance(content, dict) else {}
    return tuple(
        # Of an autoencoder, which has a folder of another name, the decoder alone is quantized.
        name if name.startswith(TEXT_ENCODER) else VAE_DECODER
        for name, part in found.items()
        if any(layer.get("activation_bits") is not None for layer in part.get("layers", {}).values())
    )


def _denoiser_bytes(path: Path, files: Mapping[str, int]) -> int | None:
    if not path.is_dir():
        return None
    folder = f"{family_of(path).denoiser}/"
    return sum(size for name, size in files.items() if name.startswith(folder))


def recipe_name(content: Mapping[str, Any]) -> str:
    """Name of the recipe in the content of a ``quest.json``."""
    recipe = content.get("recipe", "custom")
    if isinstance(recipe, Mapping):
        recipe = recipe.get("name", "custom")
    return str(recipe)


def make_ladder(
    reference: Path, via: Sequence[Path], candidate: Path
) -> tuple[tuple[Rung, ...], tuple[Edge, ...]]:
    """Read all rungs and name what each step between them costs.

    Raises:
        ParityError: a quantized rung lies above a full-precision one, or the rungs are of different architectures, or
            made with different LoRAs.
        StaleArtifactError: a LoRA that a rung was made with is not there to be merged into the full-precision model.
    """
    rungs = _name_apart(_twins([read_rung(Path(path)) for path in (reference, *via, candidate)]))
    _check_architecture(rungs)
    rungs = _with_loras(rungs)
    edges: list[Edge] = []
    anchor = 0
    for lower in range(1, len(rungs)):
        above, below = rungs[lower - 1], rungs[lower]
        if above.grid is not None and below.grid is None:
            raise ParityError(
                f"'{above.path}' is quantized ({above.recipe}) but '{below.path}', below it, is full precision; "
                "order the rungs from the full-precision model down: REFERENCE, --via ..., CANDIDATE"
            )
        kind: EdgeKind = "deployment" if above.grid == below.grid else "quantization"
        if kind == "quantization":
            anchor = lower
        edges.append(
            Edge(
                upper=lower - 1,
                lower=lower,
                kind=kind,
                anchor=anchor,
                lineage=above.digest in below.inputs.values(),
            )
        )
    return rungs, tuple(edges)


def notes(rungs: Sequence[Rung], edges: Sequence[Edge]) -> list[str]:
    """What a reader of the comparison must know about how its rungs hang together."""
    found = _lora_notes(rungs)
    for edge in edges:
        above, below = rungs[edge.upper], rungs[edge.lower]
        if not edge.lineage and above.digest != below.digest:
            found.append(
                f"The manifest of {below.name} does not name {above.name} as its input: "
                "nothing proves that one was made from the other."
            )
        if edge.kind == "quantization" and below.stage != "checkpoint":
            found.append(
                f"{below.name} was compared with {above.name} directly, so its cost holds quantization and deployment "
                "together; pass its checkpoint with --via to tell them apart."
            )
    return found


def _lora_notes(rungs: Sequence[Rung]) -> list[str]:
    made = next((rung for rung in rungs if rung.merged is not None), None)
    if made is None or made.merged is None:
        return []
    named = in_words(made.merged.loras)
    if rungs[0].grid is not None:
        differ = {rung.merged and rung.merged.identity for rung in rungs if rung.stage == "checkpoint"}
        return ["The checkpoints were not made with the same LoRAs."] if len(differ) > 1 else []
    return [
        f"{made.name} was made with LoRAs ({named}); they were merged into {rung.name} too."
        if rung.loras
        else f"{made.name} was made with LoRAs ({named}) from another model than {rung.name}, into which they were not "
        "merged: what they change is measured together with quantization."
        for rung in rungs
        if rung.grid is None
    ]


def _twins(rungs: Sequence[Rung]) -> list[Rung]:
    """The rungs, a checkpoint without its activation quantizers where the rung below was exported so."""
    found = list(rungs)
    for index in range(len(found) - 2, -1, -1):
        above, below = found[index], found[index + 1]
        if above.stage == "checkpoint" and below.weights_only and above.grid == below.grid:
            found[index] = replace(above, name="checkpoint-weights", weights_only=True)
    return found


def _with_loras(rungs: Sequence[Rung]) -> tuple[Rung, ...]:
    """The rungs, every full-precision model that others were made from with LoRAs given these."""
    named = [rung for rung in rungs if rung.merged is not None]
    if rungs[0].grid is not None or not named:
        return tuple(rungs)
    first, merged = named[0], named[0].merged
    assert merged is not None
    for rung in rungs:
        # Other stages of an older quest-deploy do not tell.
        tells = rung.merged is not None or rung.stage == "checkpoint"
        if tells and (rung.merged is None or rung.merged.identity != merged.identity):
            raise ParityError(
                f"'{first.path}' and '{rung.path}' were not made with the same LoRAs; compare each with the model "
                "on its own"
            )
        if rung.grid is None and merged.source in rung.inputs.values():
            raise ParityError(
                f"'{rung.path}' was made without the LoRAs of '{first.path}' ({in_words(merged.loras)}); give the "
                "model in its place, into which they are merged"
            )
    lacking = [rung for rung in rungs if rung.stage == "model" and rung.digest == merged.source]
    loras = find_files(merged, first.path) if lacking else ()
    return tuple(replace(rung, loras=loras) if rung in lacking else rung for rung in rungs)


def _check_architecture(rungs: Sequence[Rung]) -> None:
    # A single-file model has no configuration beside it; its shapes are checked when it runs.
    directories = [rung for rung in rungs if rung.path.is_dir()]
    for rung in directories[1:]:
        expected, got = component_specs(directories[0].path), component_specs(rung.path)
        for name in expected.keys() | got.keys():
            if got.get(name) != expected.get(name):
                raise ParityError(
                    f"'{rung.path}' and '{directories[0].path}' have different {name} inputs or outputs; "
                    "compare artifacts made from one model"
                )


def _name_apart(rungs: Sequence[Rung]) -> tuple[Rung, ...]:
    named: list[Rung] = []
    for rung in rungs:
        before = sum(other.stage == rung.stage for other in named)
        named.append(replace(rung, name=f"{rung.stage}-{before + 1}") if before else rung)
    return tuple(named)

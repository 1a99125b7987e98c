"""What an interrupted run of a stage leaves beside its output, so that it can go on from there.

Every file is written to a temporary name and renamed, so that a process killed at any moment leaves the previous state.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quest_deploy.errors import ArtifactError, ConfigError
from quest_deploy.files import check_place, give_usual_mode, read_json, storage_errors, write_json
from quest_deploy.lock import locked
from quest_deploy.manifest import tool_versions
from quest_deploy.quantize.insert import LayerQParams

LIBRARIES = ("quest-deploy", "diffusers", "transformers")
"""Whose versions the last bits of a result may depend on, beside torch's."""

RUN = "run.json"
GENERATOR = "/generator"  # no layer has such a name
SAFETENSORS_TYPES = {torch.float32: "F32", torch.int64: "I64"}
SAVE_EVERY_SECONDS = 15.0
QUICK_SAVE_SECONDS = SAVE_EVERY_SECONDS / 10


class WorkDirectory:
    """The hidden sibling of an output in which a run of the verb `verb` keeps its state.

    Raises:
        ArtifactError: nothing can lie at the output.
    """

    def __init__(self, output: Path, verb: str = "finetune") -> None:
        check_place(output)
        self.output, self.verb = output, verb
        self.save_seconds = 0.0
        """What the last save took."""
        self.path = output.resolve().parent / f".{output.name}.{verb}"

    def lock(self) -> AbstractContextManager[None]:
        """Keep other runs out while the body runs; a process that dies in it lets them in.

        Raises:
            ConfigError: another process is inside.
        """
        return locked(self.path.with_name(f"{self.path.name}.lock"), self.output, self.verb)

    @property
    def started(self) -> bool:
        """Whether an interrupted run is there."""
        return (self.path / RUN).is_file()

    def started_after(self, file: Path) -> bool:
        """Whether an interrupted run is there that began when `file` was written already, hence did not write it."""
        try:
            return (self.path / RUN).stat().st_mtime_ns > file.stat().st_mtime_ns
        except FileNotFoundError:
            return False

    def open(self, run: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Start afresh, or go on with the run that is there.

        Args:
            run: Everything that must be the same for the result to be the same.
            resume: Whether to go on.
            overwrite: Whether an interrupted run may be thrown away.

        Raises:
            ConfigError: a run is there that was not asked for, or that was started with other settings.
        """
        exists = self.started
        if exists and resume:
            different = _differences(read_json(self.path / RUN), json.loads(json.dumps(run)))
            if different:
                raise ConfigError(
                    f"'{self.output}' was started with other settings ({'; '.join(different)}); "
                    "repeat those, or start afresh with --overwrite and without --resume"
                )
            # What a killed process was writing; safetensors writes to a name of its own.
            for unfinished in (*self.path.glob(".tmp*"), *self.path.glob("*.partial")):
                unfinished.unlink()
            return
        if exists and not overwrite:
            raise ConfigError(
                f"an interrupted run for '{self.output}' is there; "
                "go on with --resume, or start afresh with --overwrite"
            )
        with storage_errors(self.output):
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            write_json(self.path / RUN, run)

    def save(self, name: str, tensors: dict[str, Tensor], **facts: Any) -> None:
        """Write tensors and JSON facts under `name`, all at once."""
        final = self.path / f"{name}.safetensors"
        temporary = self.path / f"{name}.partial"
        started = time.monotonic()
        with storage_errors(self.output):
            contiguous = {key: value.detach().contiguous() for key, value in tensors.items()}
            save_file(contiguous, temporary, metadata={"facts": json.dumps(facts)})
            give_usual_mode(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(final)
        self.save_seconds = time.monotonic() - started

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and facts under `name`, or None if none were saved.

        Raises:
            ArtifactError: the file is corrupt.
        """
        path = self.path / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return tensors, json.loads(file.metadata()["facts"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{path}: the saved state is corrupt ({error}); start afresh with --overwrite"
            ) from error

    def append(self, names: Sequence[str], name: str, keep: Sequence[str] = ()) -> None:
        """Write what was saved under `names` under `name`, one after the other along the first axis, and drop them.

        Those in `keep` stay.

        Tensors whose first axis is not that of the ``latents`` are the same in all, and written once. Nothing is read
        as a whole: the result may be larger than memory.
        """
        parts = [tensors for tensors, _ in filter(None, map(self.load, names))]
        lengths = [part["latents"].shape[0] for part in parts]
        header: dict[str, Any] = {"__metadata__": {"facts": "{}"}}
        sources: list[list[Tensor]] = []
        offset = 0
        for key, first in parts[0].items():
            grows = all(part[key].shape[:1] == (n,) for part, n in zip(parts, lengths, strict=True))
            grows = grows and not key.startswith(("timesteps", "negative/"))
            tensors = [part[key] for part in parts] if grows else [first]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            header[key] = {
                "dtype": SAFETENSORS_TYPES[first.dtype],
                "shape": [sum(lengths) if grows else first.shape[0], *first.shape[1:]],
                "data_offsets": [offset, offset + size],
            }
            sources.append(tensors)
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        temporary = self.path / f"{name}.partial"
        with storage_errors(self.output):
            with temporary.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for tensor in itertools.chain.from_iterable(sources):
                    file.write(tensor.contiguous().numpy().tobytes())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / f"{name}.safetensors")
        self.drop([part for part in names if part not in keep])

    def names(self, prefix: str) -> list[str]:
        """What was saved under names that start with `prefix`, in order."""
        return sorted(path.stem for path in self.path.glob(f"{prefix}*.safetensors"))

    def drop(self, names: Sequence[str]) -> None:
        """Delete what was saved under `names`."""
        for name in names:
            (self.path / f"{name}.safetensors").unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the state, when the output is in place."""
        shutil.rmtree(self.path, ignore_errors=True)


def _differences(got: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    different = []
    for key in sorted(got.keys() | wanted.keys()):
        a, b = got.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            different += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            different.append(f"{prefix}{key} was {_short(a)}, now {_short(b)}")
    return different


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def machine(processes: int = 1) -> dict[str, Any]:
    """What else the last bits of a result depend on."""
    versions = tool_versions()
    facts: dict[str, Any] = {name: versions.get(name) for name in LIBRARIES}
    facts |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts if processes == 1 else facts | {"processes": processes}


def flatten_qparams(qparams: dict[str, LayerQParams]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Scales of layers as tensors and JSON facts, for :meth:`WorkDirectory.save`."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name, layer in qparams.items():
        facts[name] = {}
        for key, value in vars(layer).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                facts[name][key] = value
    return tensors, {"layers": facts}


def unflatten_qparams(tensors: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, LayerQParams]:
    """The inverse of :func:`flatten_qparams`."""
    fields: dict[str, dict[str, Any]] = {name: dict(values) for name, values in facts["layers"].items()}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        fields[name][field] = value
    return {name: LayerQParams(**values) for name, values in fields.items()}


class Throttle:
    """Says when the next save is due, so that saving costs little and an interruption loses little.

    Gigabytes on a slow disk take longer than the time between two saves: they are written less often, so that the saves
    of `work` take a tenth of the time at most.
    """

    def __init__(self, work: WorkDirectory | None) -> None:
        self.work, self.last = work, time.monotonic()

    def due(self) -> bool:
        last_save = 0.0 if self.work is None else self.work.save_seconds
        every = SAVE_EVERY_SECONDS * max(1.0, last_save / QUICK_SAVE_SECONDS)
        if time.monotonic() - self.last < every:
            return False
        self.last = time.monotonic()
        return True

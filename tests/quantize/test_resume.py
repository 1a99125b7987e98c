"""The state that an interrupted run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from quest_deploy.errors import ArtifactError
from quest_deploy.quantize import resume
from quest_deploy.quantize.calibrate import CalibrationSet, from_tensors, join
from quest_deploy.quantize.resume import Throttle, WorkDirectory, machine


def part(seed: int, prompts: int) -> CalibrationSet:
    generator = torch.Generator().manual_seed(seed)
    return CalibrationSet(
        timesteps=torch.tensor([900.0, 300.0]),
        latents=torch.randn(prompts, 2, 4, 3, 3, generator=generator),
        targets=torch.randn(prompts, 2, 2, 4, 3, 3, generator=generator),
        positive={"labels": torch.randint(9, (prompts,), generator=generator)},
        negative={"labels": torch.tensor([9])},
    )


def test_trajectories_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "out")
    work.open({}, resume=False, overwrite=False)
    parts = [part(0, 3), part(1, 2)]
    for index, one in enumerate(parts):
        work.save(f"part-{index}", one.tensors())
    work.append(["part-0", "part-1"], "all")
    loaded = work.load("all")
    assert loaded is not None
    got, expected = from_tensors(loaded[0]).tensors(), join(parts).tensors()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert sorted(path.name for path in work.path.iterdir()) == ["all.safetensors", "run.json"]


def test_a_link_to_itself_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(ArtifactError, match="is a symbolic link to nothing"):
        WorkDirectory(tmp_path / "link" / "checkpoint")


def test_a_resumed_run_deletes_what_the_killed_one_was_writing(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "out")
    work.open({}, resume=False, overwrite=False)
    work.save("kept", {"x": torch.ones(1)})
    for name in (".tmpAb12", "phase.partial"):
        (work.path / name).write_bytes(b"half")
    work.open({}, resume=True, overwrite=False)
    assert sorted(path.name for path in work.path.iterdir()) == ["kept.safetensors", "run.json"]


def test_state_has_the_mode_of_other_files(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "out")
    work.open({}, resume=False, overwrite=False)
    work.save("kept", {"x": torch.ones(1)})
    modes = {path.stat().st_mode for path in work.path.iterdir()}
    assert len(modes) == 1


def test_a_run_belongs_to_the_versions_that_started_it() -> None:
    assert {"quest-deploy", "diffusers", "transformers", "torch", "threads"} <= machine().keys()


@pytest.mark.parametrize(("save_s", "least", "most"), [(0.1, 6.0, 7.0), (20.0, 60.0, 120.0)])
def test_saving_takes_a_tenth_of_the_time_at_most(
    save_s: float, least: float, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gigabytes on a slow disk took longer than the time between two saves, and were written after every update."""
    work = WorkDirectory(tmp_path / "out")
    work.open({}, resume=False, overwrite=False)
    now, saving, save_file = 0.0, 0.0, resume.save_file

    def slow_save_file(*args: Any, **options: Any) -> None:
        nonlocal now, saving
        save_file(*args, **options)
        now, saving = now + save_s, saving + save_s

    monkeypatch.setattr(resume, "save_file", slow_save_file)
    monkeypatch.setattr(resume.time, "monotonic", lambda: now)
    throttle = Throttle(work)
    while now < 1000:
        now += 2
        if throttle.due():
            work.save("phase", {"x": torch.ones(1)})
    assert least <= saving <= most

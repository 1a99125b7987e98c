"""`quest-deploy bench`: figures from single calls, and whole runs on the tiny model."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from quest_deploy.bench import bench, stage, worker
from quest_deploy.bench.figures import summarize
from quest_deploy.bench.plot import OUTSIDE, parts, plot
from quest_deploy.bench.subject import WAYS, parse_subject
from quest_deploy.bench.worker import TimedEngine, measure, memory_bytes
from quest_deploy.commands import main
from quest_deploy.config import BenchConfig, RunConfig
from quest_deploy.errors import ArtifactError, BenchError, ConfigError

# Measures nothing: a model whose name is a number takes that many seconds, others fail in a way of their own.
WORKER = """
import json, os, pathlib, sys
name = pathlib.Path(json.load(sys.stdin)["path"]).name
if name in ("signal-9", "signal-11"):
    os.kill(os.getpid(), int(name[7:]))
if name == "exits":
    sys.exit("MemoryError: no room")
if name == "chatters":
    print("closing down")
    sys.exit()
if name == "5":  # dies in its second round
    try:
        pathlib.Path("second-round").mkdir()
    except FileExistsError:
        os.kill(os.getpid(), 9)
try:
    seconds = float(name)
    memory = {"imports": 50, "peak": 100, "device_peak": None}
    calls = {"unet": [[seconds / 4, seconds / 4]]}
    found = {"loops": [seconds], "calls": calls, "images": 1, "memory_bytes": memory, "device": "cpu"}
except ValueError:
    found = {"error": name + " does not fit" * 20}
print(json.dumps(found))
"""
SHORT: dict[str, Any] = {"prompts": ("pizza",), "steps": 2, "runs": 2, "warmup": 0, "rounds": 1, "threads": 1}


def turn(loops: list[float], calls: dict[str, list[list[float]]], peak: int = 100) -> dict[str, Any]:
    memory = {"imports": 50, "peak": peak, "device_peak": None}
    return {"loops": loops, "calls": calls, "images": 2, "memory_bytes": memory, "device": "cpu"}


def test_the_loop_the_calls_and_what_is_outside_of_them() -> None:
    turns = [
        turn([10.0, 12.0], {"unet": [[4.0, 4.0], [5.0, 4.0]], "vae_encoder": [[], []]}, peak=100),
        turn([11.0], {"unet": [[4.0, 5.0]], "vae_encoder": [[]]}, peak=300),
    ]
    found = summarize(turns)
    loop = found["loop"]
    assert (loop["runs"], loop["median_s"], loop["slowest_s"]) == (3, 11.0, 12.0)
    assert loop["images_per_s"] == pytest.approx(2 / 11)
    # 2 of 10, 3 of 12 and 2 of 11.
    assert loop["overhead"] == pytest.approx(0.2)
    unet = {"calls": 2, "median_s": 4.0, "p95_s": None, "run_median_s": 9.0}
    assert found["components"] == {"unet": unet}
    assert found["memory_bytes"] == {"imports": 50, "peak": 300, "device_peak": None}


def test_the_parts_of_a_run_are_its_calls_and_the_rest() -> None:
    # The last batch is smaller.
    row = summarize([turn([10.0], {"unet": [[4.0, 3.5, 0.5]], "vae_decoder": [[1.0]]})])
    assert parts(row) == pytest.approx({"unet": 8.0, "vae_decoder": 1.0, OUTSIDE: 1.0})
    picture = plot({"failed-row": {"error": "no GPU"}, "measured-row": row}, ["failed-row", "measured-row"])
    assert "measured-row" in picture
    assert "failed-row" not in picture


def test_bars_are_in_the_order_that_was_given() -> None:
    row = summarize([turn([10.0], {"unet": [[4.0]]})])
    picture = plot({"a$_^$": row, "b": row, "z": row}, ["z", "a$_^$", "b"])
    labels = ["z", "a$_^$", "b"]
    assert sorted(labels, key=lambda label: picture.index(f">{label}</text>")) == labels


def test_an_engine_that_is_timed_answers_as_it_does_without() -> None:
    class Double:
        spec, device = "its spec", "cpu"

        def __call__(self, **inputs: int) -> dict[str, int]:
            return {name: 2 * value for name, value in inputs.items()}

    waited: list[str] = []
    timed = TimedEngine(Double(), lambda: waited.append("waited"))  # type: ignore[arg-type]
    assert timed(x=2) == {"x": 4}  # type: ignore[arg-type,comparison-overlap]
    assert (timed.spec, timed.device, len(timed.seconds), len(waited)) == ("its spec", "cpu", 1, 2)


def test_memory_is_what_linux_says(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n")
    assert (memory_bytes("VmRSS", status), memory_bytes("VmHWM", status)) == (1024**2, 2 * 1024**2)
    with pytest.raises(ValueError, match="VmPeak"):
        memory_bytes("VmPeak", status)


@pytest.fixture
def digits_job(reference_model: Path) -> dict[str, Any]:
    """What the worker is told for one short run of the bundled unconditional model: three images, two at a time."""
    config = BenchConfig(steps=1, num_images=3, batch_size=2, runs=1, warmup=1)
    return {
        "path": str(reference_model.parent / "digits"),
        "backend": "torch",
        "compiled": False,
        "half": None,
        "run": {},
        "threads": None,
        "warmup": config.warmup,
        "runs": config.runs,
        "request": config.request(),
    }


def test_images_of_a_model_without_prompts_are_counted(digits_job: dict[str, Any]) -> None:
    assert measure(digits_job)["images"] == 3


def test_prompts_for_a_model_without_any_are_refused(digits_job: dict[str, Any]) -> None:
    request = {**digits_job["request"], "prompts": ["pizza"]}
    with pytest.raises(ConfigError, match="this model draws without any"):
        measure({**digits_job, "request": request})


@pytest.mark.parametrize(("device", "expected"), [("cuda", 130), ("cpu", None)])
def test_gpu_memory_is_what_the_device_has_in_use_beyond_what_it_had_before_loading(
    digits_job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, device: str, expected: int | None
) -> None:
    """On a made-up GPU: torch's allocator knows of nothing, as with engines."""
    used = 700  # other processes, and the context

    def load_pipeline(*args: object, **options: object) -> Any:
        nonlocal used
        used += 100
        family = SimpleNamespace(has_text=False)
        pipeline = SimpleNamespace(device=torch.device(device), engines={}, family=family, classes=None)

        @contextlib.contextmanager
        def opened() -> Iterator[Any]:
            nonlocal used
            yield pipeline
            used = 700

        return opened()

    def draw(*args: object) -> int:
        nonlocal used
        used += 30 if used == 800 else -10
        return 3

    monkeypatch.setattr("quest_deploy.pipeline.load_pipeline", load_pipeline)
    monkeypatch.setattr(worker, "_draw", draw)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000 - used, 1000))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "made up")
    assert measure(digits_job)["memory_bytes"]["device_peak"] == expected


@pytest.mark.parametrize(
    ("suffix", "backend", "compiled"),
    [("", "onnxruntime", False), (":openvino", "openvino", False), (":onnxruntime", "onnxruntime", False)],
)
def test_a_subject_is_a_directory_and_a_backend(
    tiny_onnx: Path, suffix: str, backend: str, compiled: bool
) -> None:
    subject = parse_subject(f"{tiny_onnx}{suffix}")
    assert (subject.path, subject.backend, subject.compiled) == (tiny_onnx, backend, compiled)


def test_a_backend_may_say_more(tiny_onnx: Path) -> None:
    subject = parse_subject(f"{tiny_onnx}:onnxruntime-cpu")
    assert (subject.backend, subject.run) == ("onnxruntime", RunConfig(provider="cpu"))
    assert WAYS["tensorrt-rtx-no-cuda-graphs"] == ("tensorrt-rtx", RunConfig(cuda_graphs=False))
    with pytest.raises(ConfigError, match="expected one of .*onnxruntime-cuda.*tensorrt-no-cuda-graphs"):
        parse_subject(f"{tiny_onnx}:onnxruntime-abacus")


def test_a_model_may_be_compiled(tiny_model: Path) -> None:
    subject = parse_subject(f"{tiny_model}:torch-compile")
    assert (subject.backend, subject.compiled) == ("torch", True)


@pytest.mark.parametrize(
    ("way", "compiled", "half"),
    [("torch", False, None), ("torch-bf16", False, "bf16"), ("torch-compile-fp16", True, "fp16")],
)
def test_torch_may_run_a_model_in_half_precision(
    tiny_model: Path, way: str, compiled: bool, half: str | None
) -> None:
    subject = parse_subject(f"{tiny_model}:{way}")
    assert (subject.backend, subject.compiled, subject.half) == ("torch", compiled, half)


def test_what_cannot_run_is_refused_before_anything_is_measured(
    tiny_onnx: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for subject, error in (
        (f"{tiny_onnx}:torch-compile", ConfigError),
        (f"{tiny_model}:abacus", ConfigError),
        (f"{tmp_path / 'missing'}", ArtifactError),
    ):
        with pytest.raises(error):
            bench([str(tiny_onnx), subject], tmp_path / "bench", BenchConfig(**SHORT))
    with pytest.raises(ConfigError, match="twice"):
        bench([str(tiny_onnx)] * 2, tmp_path / "bench", BenchConfig(**SHORT))
    assert not (tmp_path / "bench").exists()


def test_every_mistake_of_a_configuration_is_told() -> None:
    with pytest.raises(ConfigError) as error:
        BenchConfig(runs=0, rounds=0, warmup=-1)
    for name in ("runs", "rounds", "warmup"):
        assert name in str(error.value)


@pytest.mark.thorough
def test_the_command_measures_in_turns(tiny_onnx: Path, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["--prompt", "pizza", "--steps", "2", "--runs", "2", "--rounds", "1", "--threads", "1"]
    output = tmp_path / "bench"
    done = CliRunner().invoke(
        main, ["bench", str(tiny_model), str(tiny_onnx), "-o", str(output), "--json", *arguments]
    )
    assert done.exit_code == 0, done.output
    result = json.loads((output / "bench.json").read_text())
    assert json.loads(done.stdout)["bench"] == result
    assert [result["rows"][label]["backend"] for label in result["order"]] == ["torch", "onnxruntime"]
    for row in result["rows"].values():
        loop, unet = row["loop"], row["components"]["unet"]
        assert loop["runs"] == 2
        assert unet["calls"] == 2
        assert 0 < unet["calls"] * unet["median_s"] < loop["slowest_s"]
        assert 0 < loop["overhead"] < 1
        assert row["memory_bytes"]["peak"] > 0
    assert (output / "bench.svg").read_text().startswith("<?xml")


def test_a_subject_that_fails_is_named(tiny_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="scheduler"):
        bench([str(tiny_onnx)], tmp_path / "bench", BenchConfig(**{**SHORT, "scheduler": "abacus"}))
    assert not (tmp_path / "bench").exists()


@pytest.fixture
def made_up(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`bench` of copies of the tiny model with these names, into tmp_path / "bench", with made-up figures."""
    (tmp_path / "made_up_worker.py").write_text(WORKER)
    monkeypatch.setattr(stage, "WORKER", "made_up_worker")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def run(*names: str, options: Sequence[str] = ()) -> Result:
        for name in names:
            shutil.copytree(tiny_model, tmp_path / name)
        return CliRunner().invoke(main, ["bench", *names, "-o", "bench", "--rounds", "2", *options])

    return run


def lines_of(done: Result) -> dict[str, list[str]]:
    """Words of the first printed line that begins with each word."""
    return {words[0]: words for words in map(str.split, reversed(done.stdout.splitlines())) if words}


def test_the_first_is_what_the_others_are_compared_with(made_up: Callable[..., Result]) -> None:
    done = made_up("8", "4", "16")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["what", "8", "4", "16"]
    column = lines[0].index("times as fast")
    assert [line[column:].split()[0] for line in lines[1:4]] == ["1.00", "2.00", "0.50"]


def test_components_have_a_table_of_their_own(made_up: Callable[..., Result]) -> None:
    done = made_up("8", "broken", "4")
    _, components, *_ = done.stdout.split("\n\n")
    assert [line.split() for line in components.splitlines()[1:]] == [
        ["8", "unet", "2", "2", "–"],
        ["4", "unet", "2", "1", "–"],
    ]


def test_a_long_message_widens_no_column(made_up: Callable[..., Result]) -> None:
    loops, _, failures, _ = made_up("8", "broken").stdout.split("\n\n")
    assert failures == "broken failed: broken" + " does not fit" * 20
    assert max(map(len, loops.splitlines())) < 80


def test_order_and_baseline_are_written(made_up: Callable[..., Result], tmp_path: Path) -> None:
    done = made_up("8", "4", "16", options=["--json"])
    written = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert (written["baseline"], written["order"]) == ("8", ["8", "4", "16"])
    assert json.loads(done.stdout)["bench"] == written


def test_a_row_that_fails_and_sorts_first_loses_no_other(made_up: Callable[..., Result]) -> None:
    done = made_up("8", "4", "+broken")
    assert done.exit_code == 3, done.output
    assert lines_of(done)["4"][4] == "2.00"
    assert "\n+broken failed: +broken does not fit" in done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("signal-9", "its process was killed (SIGKILL), probably for want of memory; free some, or"),
        ("signal-11", "its process crashed with signal 11 (Segmentation fault): it said nothing; see"),
        ("exits", "its process ended with code 1: MemoryError: no room; see"),
        ("chatters", "its process ended with code 0: it said nothing; see"),
    ],
)
def test_a_row_whose_process_dies_says_why_and_loses_no_other(
    made_up: Callable[..., Result], name: str, message: str
) -> None:
    done = made_up("8", name, "4")
    assert done.exit_code == 3, done.output
    assert lines_of(done)["4"][4] == "2.00"
    assert f"\n{name} failed: {message}" in done.stdout


def test_a_baseline_that_fails_is_an_error_and_the_rest_is_written(
    made_up: Callable[..., Result], tmp_path: Path
) -> None:
    done = made_up("signal-9", "4", options=["--json"])
    assert done.exit_code == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert (
        len(errors) == 1 and "signal-9, which the others are compared with, cannot be measured" in errors[0]
    )
    found = json.loads(done.stdout)
    assert found["error"] == {"type": "BenchError", "message": errors[0].removeprefix("Error: ")}
    assert found["bench"] == json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert found["bench"]["rows"]["4"]["loop"]["median_s"] == 4


def test_without_a_baseline_no_ratio_is_printed(made_up: Callable[..., Result]) -> None:
    done = made_up("broken", "4")
    assert done.exit_code == 1
    assert lines_of(done)["4"][1:5] == ["4", "4", "0.25", "50.0"]


def test_a_row_that_fails_later_keeps_the_figures_of_the_rounds_before(
    made_up: Callable[..., Result], tmp_path: Path
) -> None:
    done = made_up("8", "5")
    assert done.exit_code == 3, done.output
    assert lines_of(done)["5"][4] == "1.60"
    assert "\n5 failed (its figures are of the rounds before): its process was killed" in done.stdout
    row = json.loads((tmp_path / "bench" / "bench.json").read_text())["rows"]["5"]
    assert row["loop"]["runs"] == 1 and "killed" in row["error"]


def test_where_every_row_fails_each_says_why_and_nothing_is_written(
    made_up: Callable[..., Result], tmp_path: Path
) -> None:
    done = made_up("signal-9", "broken")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "signal-9: cannot be measured: its process was killed" in done.stderr
    assert "broken: cannot be measured: broken" in done.stderr
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize("before", [[], ["--prompt", "pizza"]], ids=["no prompt", "a prompt"])
def test_a_single_file_is_an_ordinary_error(before: list[str], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    done = CliRunner().invoke(main, ["bench", str(file), "-o", str(tmp_path / "out"), *before])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: '{file}' is a file, expected a directory; ")
    assert "save_pretrained(DIR)" in done.stderr

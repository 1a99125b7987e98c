"""optimum-onnx runs an exported directory as it is, and draws what quest-deploy draws."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from quest_deploy.pipeline import load_pipeline
from tests.interop import environment
from tests.interop.environment import IndexUnreachableError, install, optimum_environment

SETTINGS = {"prompt": ["rocket", "red heart"], "num_inference_steps": 8, "guidance_scale": 3.0}
# Both run the same files in the same runtime from the same noise, and DDIM draws none: what may differ are the last
# bits of float32 (-140 dB), which products over up to 1,152 terms, eight steps and a decoder raise by a few powers of
# ten. A flipped int8 code would cost more, and the same products of the same numbers flip none.
LEAST_PSNR_DB = 80.0


def psnr_db(expected: np.ndarray, got: np.ndarray) -> float:
    """Of images in [0, 1]."""
    error = float(np.square(expected.astype(np.float64) - got).mean())
    return float("inf") if error == 0 else -10 * np.log10(error)


@pytest.mark.interop
@pytest.mark.timeout(900)
def test_optimum_onnx_draws_what_quest_deploy_draws(reference_onnx: Path, tmp_path: Path) -> None:
    variables = optimum_environment()
    with load_pipeline(reference_onnx, threads=1) as pipeline:
        noise = pipeline.initial_noise([3, 4])
        latents = pipeline.denoise(
            noise,
            pipeline.encode(SETTINGS["prompt"]),
            pipeline.encode_negative(2),
            steps=SETTINGS["num_inference_steps"],
            guidance_scale=SETTINGS["guidance_scale"],
        )
        ours = pipeline.decode(latents).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "request.npz", latents=noise.numpy(), settings=json.dumps(SETTINGS))
    script = Path(environment.HERE) / "draw_with_optimum.py"
    done = subprocess.run(
        [sys.executable, script, reference_onnx, tmp_path / "request.npz", tmp_path / "images.npz"],
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = np.load(tmp_path / "images.npz")["images"]
    assert ours.std() > 0.05
    assert psnr_db(ours, theirs) >= LEAST_PSNR_DB


def test_no_answer_from_an_index_is_told_from_other_failures(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("optimum-onnx==0.1.0\n")
    # Nothing listens on port 9 of this machine.
    options = ("--isolated", "--no-cache-dir", "--retries", "1", "--index-url", "http://127.0.0.1:9/simple")
    with pytest.raises(IndexUnreachableError, match="optimum-onnx"):
        install(tmp_path / "unreachable", requirements, *options)
    with pytest.raises(RuntimeError, match="No matching distribution") as failed:
        install(tmp_path / "absent", requirements, "--isolated", "--no-index")
    assert failed.type is RuntimeError
    assert not list(tmp_path.glob("*able*")) and not list(tmp_path.glob("*absent*"))

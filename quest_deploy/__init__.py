"""Finetune text-to-image diffusion models to low-bit with QuEST, and deploy them as ONNX and TensorRT engines.

The Python API has the verbs of the command line; each is imported when it is first used::

    import quest_deploy
    quest_deploy.analyze("model", Path("analysis"), AnalyzeConfig(...))
    quest_deploy.finetune("model", Path("checkpoint"), FinetuneConfig(...))
    quest_deploy.export(Path("checkpoint"), Path("onnx"), ExportConfig(target="tensorrt-rtx"))
    quest_deploy.lint(Path("onnx"), target="tensorrt-rtx")
    quest_deploy.build_engine(Path("onnx"), Path("engines"), BuildConfig())
    quest_deploy.generate(Path("onnx"), Path("images"), GenerateConfig(prompts=("rocket",)))
    quest_deploy.compare(Path("model"), Path("onnx"), Path("parity"), ParityConfig())
    quest_deploy.bench(["model", "onnx:openvino"], Path("bench"), BenchConfig(prompts=("rocket",)))
    pipeline = quest_deploy.load_pipeline(Path("onnx"), backend="onnxruntime")
"""

from __future__ import annotations

import importlib
import os.path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quest_deploy.auto_fallback import build_engine
    from quest_deploy.export.lint import lint
    from quest_deploy.parity import compare
    from quest_deploy.pipeline import generate, load_pipeline
    from quest_deploy.quantize.finetune import finetune

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "analyze",
    "bench",
    "build_engine",
    "compare",
    "export",
    "finetune",
    "generate",
    "lint",
    "load_pipeline",
]

_VERBS = {
    "finetune": "quest_deploy.quantize.finetune",
    "lint": "quest_deploy.export.lint",
    "build_engine": "quest_deploy.auto_fallback",
    "generate": "quest_deploy.pipeline",
    "load_pipeline": "quest_deploy.pipeline",
    "compare": "quest_deploy.parity",
}
_CALLABLE_PACKAGES = ("analyze", "bench", "export")

# A checkout has `export` and `engines` beside this package. Python that runs in its root imports this package from
# there, and not the one that `pip install .` put elsewhere.
_FOLDER = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_FOLDER, "engines")):
    __path__.append(os.path.dirname(_FOLDER))


def __getattr__(name: str) -> Any:
    if name in _CALLABLE_PACKAGES:
        # The subpackage itself, which can be called: see its __init__.
        return importlib.import_module(f"quest_deploy.{name}")
    if name in _VERBS:
        return getattr(importlib.import_module(_VERBS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

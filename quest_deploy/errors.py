"""Everything a user of quest-deploy can be told.

::

    QuestDeployError                 exit code 1, one message, no traceback
    ├── ConfigError                  an option, recipe or budget that cannot be used
    ├── MissingDependencyError       an optional package (or a GPU) that this step needs
    ├── ArtifactError                a file or directory that is not what it claims to be
    │   └── StaleArtifactError       a valid artifact that no longer matches its inputs or its machine
    ├── ModelLoadError               a diffusers model that cannot be loaded
    ├── CalibrationError             calibration data that yields no usable scale
    ├── ExportError                  a component that cannot be written as ONNX
    ├── EngineBuildError             a TensorRT network or plan that could not be built
    ├── EngineInputError             a tensor that an engine does not accept
    ├── EngineRunError               an engine that the library or the GPU refused to run
    └── ParityError                  a comparison that cannot be made at all

A message says what happened, what was got and expected, and what to do next:
``unet input 'sample': got [4, 4, 64, 64], engine allows batch 1..2; rebuild with --max-batch 4``.
"""

from __future__ import annotations


class QuestDeployError(Exception):
    """Base class of every error that a user can act on."""


class ConfigError(QuestDeployError):
    """An option, recipe or budget that cannot be used."""


class MissingDependencyError(QuestDeployError):
    """An optional package, driver or GPU that this step needs is absent."""


class ArtifactError(QuestDeployError):
    """A file or directory is missing, corrupt, or not the artifact it was taken for."""


class StaleArtifactError(ArtifactError):
    """A valid artifact that no longer matches its inputs, its libraries or this machine."""


class ModelLoadError(QuestDeployError):
    """A diffusers model that cannot be loaded."""


class CalibrationError(QuestDeployError):
    """Calibration data from which no usable scale follows."""


class ExportError(QuestDeployError):
    """A component that cannot be written as ONNX."""


class EngineBuildError(QuestDeployError):
    """A TensorRT network or plan that could not be built."""


class EngineInputError(QuestDeployError):
    """A tensor that an engine does not accept (name, shape or dtype)."""


class EngineRunError(QuestDeployError):
    """An engine that was loaded, and that the library or the GPU refused to run."""


class BenchError(QuestDeployError):
    """A measurement that cannot be made."""


class ParityError(QuestDeployError):
    """A comparison that cannot be made (not one that failed: that is exit code 3)."""

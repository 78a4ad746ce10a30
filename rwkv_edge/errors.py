"""The one exception tree of rwkv-edge.

::

    RwkvEdgeError                      exit code 1
    ├── InputError                     exit code 2: an argument that cannot be meant
    ├── FileError                      a text, a figure or a cache that cannot be read or written
    ├── MissingDependencyError         a package that an extra installs
    ├── CheckpointError                a file of weights that cannot be read
    │   └── UnsupportedVersionError    an RWKV version that cannot be exported
    ├── ArtifactError                  an exported folder that cannot be opened or written
    ├── ExportError                    a graph that cannot be built
    ├── CalibrationError               a calibration that cannot be made, read, or used with this model
    ├── VerificationError              parity past the tolerance
    ├── SessionError                   a backend that cannot open or run a graph
    │   └── StateError                 a state of another model, shape or content; a snapshot that cannot be written
    └── TokenizerError                 a vocabulary that does not fit, text that cannot be encoded

Every message is one sentence that says what was expected, what was found and what to do next.
The command line turns these into that sentence and the exit code; library users catch them.
"""

from __future__ import annotations


class RwkvEdgeError(Exception):
    """Base of every error that rwkv-edge raises on purpose."""

    exit_code = 1


class InputError(RwkvEdgeError):
    """An argument has a value that cannot be meant."""

    exit_code = 2


class FileError(RwkvEdgeError):
    """A text, a report, a plot or a cache cannot be read or written."""


class MissingDependencyError(RwkvEdgeError):
    """A package is needed that is not installed; no ``extra``: it is installed under its own name."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        installed = f"'rwkv-edge[{extra}]'" if extra else package
        super().__init__(f"{purpose} needs the package '{package}': pip install {installed}")
        self.package = package
        self.extra = extra


class CheckpointError(RwkvEdgeError):
    """A checkpoint cannot be read, or its tensors do not describe a model."""


class UnsupportedVersionError(CheckpointError):
    """The checkpoint is of an RWKV version that cannot be exported."""


class ArtifactError(RwkvEdgeError):
    """An exported folder is incomplete, damaged, of another format, or cannot be written."""


class ExportError(RwkvEdgeError):
    """A graph cannot be built or fails the ONNX checker."""


class CalibrationError(RwkvEdgeError):
    """A calibration cannot be made or read, belongs to another model, or a scheme cannot be applied."""


class VerificationError(RwkvEdgeError):
    """An artifact differs from its checkpoint by more than the tolerance."""


class SessionError(RwkvEdgeError):
    """A backend cannot open or run a graph."""


class StateError(SessionError):
    """A state belongs to another model, has another shape, or holds NaN; or its file cannot be read or written."""


class TokenizerError(RwkvEdgeError):
    """A vocabulary does not fit the model, or a text cannot be encoded."""

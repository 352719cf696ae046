"""Every error that runtime and export raise on purpose (training has `CheckpointError` in its loaders).

DeixisError
├── BundleError (ValueError)                    something is wrong with a bundle
│   ├── BundleNotFoundError (FileNotFoundError)     no such bundle
│   ├── BundleFormatError                           the manifest is not what the format says (lists every problem)
│   ├── BundleVersionError                          of a format version that this deixis does not read
│   └── BundleIntegrityError                        a file is missing, altered, truncated or a link
├── DeviceError (RuntimeError)                  unknown device, or its engine is not installed
├── EngineError (RuntimeError)                  the engine failed while loading or running a graph
├── ImageError (ValueError)                     a picture that cannot be read or used
├── PromptError (ValueError)                    a box, points, text or option that makes no sense
│   └── TextTooLongError                            longer than the model takes
├── TaskError (ValueError)                      this bundle cannot do this task
├── DeadlineError (TimeoutError)                the call's deadline passed
├── CancelledError (RuntimeError)               the call's cancel handle was set
├── ClosedError (RuntimeError)                  the model was closed
└── ExportError (RuntimeError)                  an export failed; nothing was left behind

Messages are one line: what is wrong, where, what to do. Each class also inherits the matching builtin, so either
kind of `except` works.
"""

from __future__ import annotations


class DeixisError(Exception):
    """Base of all errors raised on purpose by deixis."""


class BundleError(DeixisError, ValueError):
    """Something is wrong with a bundle."""


class BundleNotFoundError(BundleError, FileNotFoundError):
    """There is no bundle at the given path or under the given name."""


class BundleFormatError(BundleError):
    """The manifest breaks the format. `problems` lists everything found, not only the first."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class BundleVersionError(BundleError):
    """The bundle's format has another major version, or a newer minor one with fields unknown to this runtime."""


class BundleIntegrityError(BundleError):
    """A file is missing, altered, truncated or a link. `problems` lists all of them."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class DeviceError(DeixisError, RuntimeError):
    """The device is unknown, or the engine that serves it is not installed."""


class EngineError(DeixisError, RuntimeError):
    """The engine failed while loading or running a graph."""


class ImageError(DeixisError, ValueError):
    """A picture cannot be read, is empty, or has a layout that was not declared."""


class PromptError(DeixisError, ValueError):
    """A box, points, text or option is not usable."""


class TextTooLongError(PromptError):
    """A text has more tokens than the model takes."""


class TaskError(DeixisError, ValueError):
    """The bundle has no graphs for this task."""


class DeadlineError(DeixisError, TimeoutError):
    """The call's deadline passed before the result was complete."""


class CancelledError(DeixisError, RuntimeError):
    """The call's cancel handle was set."""


class ClosedError(DeixisError, RuntimeError):
    """The model (or the model behind a scene) has been closed."""


class ExportError(DeixisError, RuntimeError):
    """An export failed. Nothing is left at the destination."""

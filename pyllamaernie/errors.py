"""Every exception that pyllamaernie raises on purpose; nothing else is imported here.

A message says what happened, the value, what was allowed and one next step. Many classes also derive from the
built-in exception that a user of a similar library already catches. `exit_code` is what the command line returns.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_CHECK = 3
EXIT_INPUT = 4
EXIT_RESOURCES = 5
EXIT_OFFLINE = 6
EXIT_INTERRUPTED = 130


class PyllamaernieError(Exception):
    """Root of all of them."""

    exit_code: ClassVar[int] = EXIT_FAILED


class ModelLoadError(PyllamaernieError, RuntimeError, ValueError):
    """A model or projector could not be loaded."""


class ModelNotFoundError(ModelLoadError, FileNotFoundError):
    """There is no file at the given path."""

    exit_code = EXIT_INPUT


class UnsupportedArchitectureError(ModelLoadError):
    """The file is sound, but its architecture is not known to this build."""


class CorruptModelError(ModelLoadError):
    """The file is not a GGUF, is cut short, or misses a tensor or key."""

    exit_code = EXIT_INPUT


class ProjectorMismatchError(ModelLoadError):
    """The mmproj file does not belong to the text model."""


class OutOfMemoryError(ModelLoadError, MemoryError):
    """The model or its context does not fit into memory."""

    exit_code = EXIT_RESOURCES


class InferenceError(PyllamaernieError, RuntimeError):
    """Evaluation failed after the model was loaded."""


class ContextOverflowError(InferenceError, ValueError):
    """The prompt, or prompt and answer together, is longer than the context."""


class DecodeError(InferenceError):
    """The native decode call returned an error code."""


class ClosedError(InferenceError):
    """The object was used after close()."""


class InputError(PyllamaernieError, ValueError):
    """A request is not valid."""


class ChatTemplateError(InputError):
    """The chat template is missing or rejects the messages."""


class SchemaError(InputError):
    """A JSON schema is not valid, or holds a keyword that the answer cannot be held to."""


class MediaError(InputError):
    """A picture or video is missing, broken or out of the allowed size."""

    exit_code = EXIT_INPUT


class UnsupportedInputError(InputError):
    """The request is valid but this model cannot take it, such as a picture without an mmproj."""


class CancelledError(PyllamaernieError):
    """The caller stopped the work."""

    exit_code = EXIT_INTERRUPTED


class OfflineError(PyllamaernieError):
    """Something that is not on this machine, upstream's source or a model, could not be downloaded."""

    exit_code = EXIT_OFFLINE


class HubError(PyllamaernieError):
    """A name on a hub means no model there, or what came is not what the hub promised."""

    exit_code = EXIT_INPUT


class ConvertError(PyllamaernieError):
    """A checkpoint could not be converted."""


class MissingFileError(ConvertError, FileNotFoundError):
    """A file that the conversion needs is not in the checkpoint's folder, or cannot be read."""

    exit_code = EXIT_INPUT


class TensorMappingError(ConvertError):
    """A tensor is missing, unknown, or has another shape or type than the configuration implies."""


class WeightMismatchError(ConvertError):
    """Weights of a quantized release, read as asked for, are not those of the release that it was made from."""

    exit_code = EXIT_CHECK


class TokenizerError(ConvertError):
    """The tokenizer files are missing, contradict each other or cannot be expressed."""


class DiskSpaceError(ConvertError, OSError):
    """The output does not fit on its disk."""

    exit_code = EXIT_RESOURCES


class OutputError(ConvertError, InputError):
    """No file can be written under the output's name: its folder is not there, or the name is taken."""


class OutputNameError(OutputError):
    """The output's name does not end as the kind of file does."""

    exit_code = EXIT_USAGE


class QuantizeError(PyllamaernieError):
    """A model could not be quantized."""


class BudgetError(QuantizeError, ValueError):
    """No choice of types fits the budget; `smallest_bytes` is the least that would."""

    exit_code = EXIT_CHECK

    def __init__(self, message: str, *, budget_bytes: int = 0, smallest_bytes: int = 0) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes


class PatchError(PyllamaernieError, RuntimeError):
    """The patch series could not be used; each argument says what and where."""

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))


class PatchConflictError(PatchError):
    """A patch does not apply."""

    exit_code = EXIT_CHECK


class PinMismatchError(PatchError):
    """A source tree or archive is not the pinned one."""


class SeriesError(PatchError):
    """The series names a missing patch, or a patch is not listed."""

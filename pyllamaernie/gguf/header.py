"""What a GGUF file says about itself, by ggml's own reader: a wrong file is one clear exception before it is loaded.

Not the data of its tensors and arrays: that is `file.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllamaernie import _core, log
from pyllamaernie.errors import CorruptModelError, ModelNotFoundError, UnsupportedArchitectureError


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself; arrays of the metadata appear as their length."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Sequence[tuple[str, tuple[int, int, int, int], str, int, int]]  # name, ne, type, offset, bytes

    @property
    def arch(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def is_projector(self) -> bool:
        return self.arch == "clip"

    def get(self, key: str, default: Any = None) -> Any:
        """A key of the architecture's own section, such as `embedding_length`."""
        return self.metadata.get(f"{self.arch}.{key}", default)


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a GGUF file, checked against the file's real size.

    Raises: ModelNotFoundError, CorruptModelError.
    """
    path = Path(path)
    if path.is_dir():
        raise ModelNotFoundError(
            f"{path} is a folder; a GGUF file is needed (`pyllamaernie convert {path} -o OUT.gguf` makes one)"
        )
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        raise CorruptModelError(f"{str(path)!a}: llama.cpp opens files by names in UTF-8; rename it") from None
    if path.exists() and not path.is_file():
        raise CorruptModelError(f"{path} is a pipe or device; a regular file is needed")
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        size = path.stat().st_size
    except FileNotFoundError:
        raise ModelNotFoundError(f"no model file at {path}") from None
    except OSError as error:
        raise CorruptModelError(f"{path} cannot be read: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise CorruptModelError(
            f"{path} is not a GGUF file: it starts with {magic!r} instead of b'GGUF' ({size} bytes)"
        )
    try:
        raw = _core.gguf_read(os.fspath(path))
    except RuntimeError:
        reason = log.last_error() or "its header is broken or cut short"
        raise CorruptModelError(f"{path} is not a sound GGUF file ({size} bytes): {reason}") from None
    end = max((offset + n_bytes for _, _, _, offset, n_bytes in raw["tensors"]), default=0)
    if end > size:
        raise CorruptModelError(f"{path} is cut short: its tensors end at byte {end}, the file has {size}")
    return Header(path, raw["metadata"], raw["tensors"])


def check_text_model(model: Header) -> None:
    """Raise UnsupportedArchitectureError or CorruptModelError for a file that is sound but no language model."""
    if model.is_projector:
        raise UnsupportedArchitectureError(
            f"{model.path} is a projector (mmproj); give the text model as the model and this file as mmproj"
        )
    if not model.arch:
        raise CorruptModelError(f"{model.path} names no architecture (key general.architecture)")

"""The files that a conversion makes: their paths, keys and tensors, and writing all of them or none.

The text model and, beside it, the mmproj of a vision-language model or the draft model (mtp) of a checkpoint with
multi-token-prediction layers.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from pyllamaernie.convert import ernie4_5, ernie4_5_mtp
from pyllamaernie.convert.checkpoint import Checkpoint
from pyllamaernie.convert.progress import Progress, cancellable
from pyllamaernie.convert.tokenizer import Vocabulary
from pyllamaernie.errors import ConvertError, DiskSpaceError
from pyllamaernie.gguf.file import Key, OutTensor, TensorType, file_bytes, general_keys, write_gguf

log = logging.getLogger("pyllamaernie.convert")

TYPES = {"f32": TensorType.F32, "f16": TensorType.F16, "bf16": TensorType.BF16, "q8_0": TensorType.Q8_0}
_SPARE_BYTES = 64 * 2**20  # header (the vocabulary is a few MB) and a reserve


@dataclass(frozen=True)
class OutFile:
    """One file to be written; `kind` is text, mmproj or mtp."""

    kind: str
    path: Path
    arch: str
    keys: list[Key]
    tensors: list[OutTensor]


def mmproj_path(model: Path) -> Path:
    """Where the vision side of a model is written: `mmproj-NAME.gguf` in the same folder."""
    return model.with_name(f"mmproj-{model.name}")


def mtp_path(model: Path) -> Path:
    """Where the draft model is written: `mtp-NAME.gguf`, a prefix that llama.cpp's downloader knows too."""
    return model.with_name(f"mtp-{model.name}")


def known_type(name: str) -> str:
    """The name of a type, checked. Raises: ConvertError for one that is not in TYPES."""
    if name not in TYPES:
        raise ConvertError(f"type {name!r}; expected auto, {', '.join(TYPES)}")
    return name


def plan_files(
    checkpoint: Checkpoint,
    family: ModuleType,
    vocabulary: Vocabulary,
    model: Path,
    type: str,
    mmproj_type: str | None,
    mtp: bool,
) -> list[OutFile]:
    """All files with their keys and tensors, the text model first; every tensor of the checkpoint is accounted for.

    `mmproj_type` None leaves the vision side out. Raises: ConvertError and its subclasses.
    """
    vision = getattr(family, "vision_model", None)
    pool = family.pool(checkpoint)
    # nobody has seen such layers in a vision-language checkpoint, whose positions they would have to know
    left_out = ernie4_5.dropped(checkpoint) + (pool.drop(ernie4_5_mtp.NAMES) if vision or not mtp else [])
    for name in left_out:
        log.info("%s: not part of the network that is run; left out", name)
    keys, tensors = family.text_model(checkpoint, pool, vocabulary, TYPES[type])
    files = [_file(checkpoint, "text", model, family.ARCH, [*keys, *vocabulary.keys], tensors)]
    if vision:
        keys, tensors = vision(checkpoint, pool, vocabulary, TYPES[mmproj_type or "f16"])
        if mmproj_type:
            files.append(_file(checkpoint, "mmproj", mmproj_path(model), "clip", keys, tensors))
    elif ernie4_5_mtp.n_layers(pool):
        keys, tensors = ernie4_5_mtp.draft_model(pool, family.read_config(checkpoint.config), TYPES[type])
        files.append(_file(checkpoint, "mtp", mtp_path(model), ernie4_5_mtp.ARCH, [*keys, *vocabulary.keys], tensors))
    pool.finish()
    return files


def _file(
    checkpoint: Checkpoint, kind: str, path: Path, arch: str, keys: list[Key], tensors: list[OutTensor]
) -> OutFile:
    file_kind = "mmproj" if kind == "mmproj" else "model"
    general = general_keys(checkpoint.folder, _counts(tensors), file_kind=file_kind)
    return OutFile(kind, path, arch, [*general, *keys], tensors)


def _counts(tensors: Sequence[OutTensor]) -> tuple[int, int, int, int]:
    """Parameters in all, outside experts, and in one expert of each bank together; the number of experts."""
    total = shared = expert = n_expert = 0
    for tensor in tensors:
        size = math.prod(tensor.shape)
        total += size
        if "_exps" in tensor.name:
            n_expert = tensor.shape[0]
            expert += size // n_expert
        else:
            shared += size
    return total, shared, expert, n_expert


def check_target(files: Sequence[OutFile], overwrite: bool) -> None:
    """Whether the files can be written: the folder is there, their names are free, the disk has room.

    Raises: ConvertError, DiskSpaceError.
    """
    folder = files[0].path.absolute().parent
    if not folder.is_dir():
        raise ConvertError(f"{folder}: no such folder to write to")
    there = [str(file.path) for file in files if file.path.exists()]
    if there and not overwrite:
        raise ConvertError(f"{' and '.join(there)}: already there; pass --overwrite to replace")
    wanted, free = sum(file_bytes(file.tensors) for file in files) + _SPARE_BYTES, shutil.disk_usage(folder).free
    if wanted > free:
        raise DiskSpaceError(f"{folder}: {wanted / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


def write_files(files: Sequence[OutFile], progress: Progress) -> None:
    """Writes under temporary names and renames at the end; whatever happens before that, nothing stays.

    Raises: ConvertError; CancelledError when `progress` says so.
    """
    temporary = [file.path.with_name(f".{file.path.name}.{os.getpid()}.partial") for file in files]
    with ExitStack() as stack:
        for path in temporary:
            stack.callback(path.unlink, missing_ok=True)
        progress.start(sum(t.n_bytes for file in files for t in file.tensors), "B", "convert")
        stack.callback(progress.close)
        try:
            for file, path in zip(files, temporary, strict=True):
                write_gguf(path, file.arch, file.keys, file.tensors, cancellable(progress))
        except OSError as error:
            if isinstance(error, ConvertError):
                raise
            raise ConvertError(f"{files[0].path.parent}: cannot be written ({error})") from error
        # the text model last: where it is, the others are too
        for file, path in reversed(list(zip(files, temporary, strict=True))):
            os.replace(path, file.path)

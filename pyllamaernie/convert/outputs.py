"""The files that a conversion makes: their paths, keys and tensors, and writing all of them or none.

The text model and, beside it, the mmproj of a vision-language model or the draft model (mtp) of a checkpoint with
multi-token-prediction layers.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np

from pyllamaernie.convert import ernie4_5, ernie4_5_mtp
from pyllamaernie.convert.checkpoint import Checkpoint
from pyllamaernie.convert.json_file import number, text, whole
from pyllamaernie.convert.plan import FLOATS, check_finite
from pyllamaernie.convert.progress import Progress, cancellable
from pyllamaernie.convert.tokenizer import Vocabulary
from pyllamaernie.errors import ConvertError, DiskSpaceError
from pyllamaernie.files import check_output, hidden_file
from pyllamaernie.gguf.file import SAMPLING, Key, OutTensor, TensorType, file_bytes, general_keys, write_gguf

log = logging.getLogger("pyllamaernie.convert")

TYPES = {"f32": TensorType.F32, "f16": TensorType.F16, "bf16": TensorType.BF16, "q8_0": TensorType.Q8_0}
_GENERATION = "generation_config.json"
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
    """The name of a type in lower case; it may be given in either. Raises: ConvertError for one not in TYPES."""
    if name.lower() not in TYPES:
        raise ConvertError(f"type {name!r}; expected auto, {', '.join(TYPES)}")
    return name.lower()


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
    general = general_keys(
        checkpoint.folder,
        _counts(tensors),
        file_kind=file_kind,
        model_id=text(checkpoint.config, "_name_or_path"),
        sampling=_sampling(checkpoint),
    )
    return OutFile(kind, path, arch, [*general, *keys], tensors)


def _sampling(checkpoint: Checkpoint) -> dict[str, int | float | str]:
    """What generation_config.json says of sampling, checked. Raises: ConvertError."""
    said = checkpoint.json(_GENERATION)
    out: dict[str, int | float | str] = {}
    for key, (_, kind) in SAMPLING.items():
        if said.get(key) is None:
            continue
        if kind == "str":
            out[key] = text(said, key, _GENERATION) or ""
        elif kind == "i32":
            out[key] = whole(said, key, low=-1, high=2**31 - 1, where=_GENERATION)
        else:
            out[key] = number(said, key, low=-1e6, high=1e6, where=_GENERATION)
    return out


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
    for file in files:
        check_output(file.path, overwrite, ending=".gguf")
    wanted, free = sum(file_bytes(file.tensors) for file in files) + _SPARE_BYTES, shutil.disk_usage(folder).free
    if wanted > free:
        raise DiskSpaceError(f"{folder}: {wanted / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


def write_files(files: Sequence[OutFile], progress: Progress) -> None:
    """Writes under hidden names and renames at the end; whatever happens before that, nothing stays.

    Raises: ConvertError, also for a value that is not finite; CancelledError when `progress` says so.
    """
    with ExitStack() as stack:
        progress.start(sum(t.n_bytes for file in files for t in file.tensors), "B", "convert")
        stack.callback(progress.close)
        try:
            hidden = [stack.enter_context(hidden_file(file.path)) for file in files]
            for file, path in zip(files, hidden, strict=True):
                write_gguf(path, file.arch, file.keys, list(map(_finite, file.tensors)), cancellable(progress))
            # the text model last: where it is, the others are too
            for file, path in reversed(list(zip(files, hidden, strict=True))):
                os.replace(path, file.path)
        except OSError as error:
            if isinstance(error, ConvertError):
                raise
            raise ConvertError(f"{files[0].path.parent}: cannot be written ({error})") from error


def _finite(tensor: OutTensor) -> OutTensor:
    """The tensor, whose values are looked at as they pass. Those in blocks were, before they were encoded."""
    if tensor.type not in FLOATS:
        return tensor

    def blocks() -> Iterator[np.ndarray]:
        at = 0
        for block in tensor.blocks():
            check_finite(tensor.name, tensor.shape, tensor.type, block, at)
            at += block.size
            yield block

    return replace(tensor, blocks=blocks)

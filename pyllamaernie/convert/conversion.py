"""`convert`: a Hugging Face folder of an ERNIE 4.5 model to GGUF, in one pass and without torch.

Tensors are mapped, converted a few rows at a time and written behind a header whose sizes are known beforehand, so
memory stays small whatever the model. A 2-bit release of Baidu's gives its routed experts, once they were held against
the original, which gives the rest.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pyllamaernie.convert import wint2
from pyllamaernie.convert.checkpoint import open_checkpoint
from pyllamaernie.convert.families import family_of, own_type, vocabulary_of
from pyllamaernie.convert.outputs import OutFile, check_target, known_type, plan_files, write_files
from pyllamaernie.convert.progress import Bar, Progress
from pyllamaernie.convert.two_bit import compare_experts, find_two_bit, two_bit_experts, with_experts
from pyllamaernie.convert.wint2_check import CheckReport
from pyllamaernie.errors import OutputNameError
from pyllamaernie.gguf.file import file_bytes


@dataclass(frozen=True)
class TensorRow:
    """One written tensor; `shape` in numpy order, `file` is text, mmproj or mtp."""

    file: str
    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int


@dataclass(frozen=True)
class ConvertResult:
    """What was written, or with `dry_run` would be. `size_bytes` counts tensor data of all files.

    `n_params` counts the checkpoint's parameters that went in, each once. `assumed` says what a dry run had to take
    on trust, None where all headers were read.
    """

    model: Path
    mmproj: Path | None
    architecture: str
    type: str
    mmproj_type: str | None
    n_tensors: int
    size_bytes: int
    tensors: tuple[TensorRow, ...]
    mtp: Path | None = None
    n_params: int = 0
    assumed: str | None = None
    check: CheckReport | None = None  # of a 2-bit release

    def to_dict(self) -> dict[str, Any]:
        paths = {name: path and str(path) for name, path in (("mmproj", self.mmproj), ("mtp", self.mtp))}
        return {**asdict(self), "model": str(self.model), **paths}


def convert(
    source: str | Path,
    output: str | Path | None = None,
    *,
    type: str = "auto",
    mmproj: bool = True,
    mmproj_type: str | None = None,
    mtp: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    original: str | Path | None = None,
    reading: str = wint2.DOCUMENTED,
) -> ConvertResult:
    """Converts a checkpoint folder to GGUF and says what was written.

    `output`: NAME.gguf, by default FOLDER-TYPE.gguf in the current directory. `type`: auto (the checkpoint's own 16-bit
    type), f32, f16, bf16 or q8_0. `mmproj_type`: by default f32 for f32 and f16 otherwise. `mmproj=False` leaves the
    vision side out, `mtp=False` the multi-token-prediction layers. Files appear under their names only when all are
    complete. A dry run does without weights: it then takes names from the index and shapes from config.json.

    A 2-bit release needs its `original`, the folder of the same model in BF16. Its experts in 2 bits become CCQ2_B,
    as they are; the rest is the original's in `type`, where auto is q8_0, and q4_0 for the experts of the first layers,
    which the release has in 4 bits. `reading`: how its bytes are meant, see `wint2.READINGS`.

    Raises: ConvertError and its subclasses; CancelledError when `progress` says so.
    """
    two_bit = find_two_bit(Path(source), original, dry_run=dry_run)
    checkpoint = open_checkpoint(Path(source if original is None else original), need_weights=not dry_run)
    family = family_of(checkpoint)
    experts = two_bit_experts(two_bit, checkpoint, reading) if two_bit else None
    w4_type = "q4_0" if type.lower() == "auto" else known_type(type)
    if type.lower() == "auto":
        type = "q8_0" if experts else own_type(checkpoint)
    type = known_type(type)
    mmproj_type = ("f32" if type == "f32" else "f16") if mmproj_type is None else known_type(mmproj_type)
    said = wint2.TYPE.name.lower() if experts else type
    model = Path(output) if output is not None else Path(f"{Path(os.path.abspath(source)).name}-{said.upper()}.gguf")
    if model.suffix != ".gguf":  # before any file is read; the rest in check_target
        raise OutputNameError(f"{model}: the output's name must end in .gguf")
    vocabulary, assumed = vocabulary_of(checkpoint, dry_run=dry_run)
    files = plan_files(checkpoint, family, vocabulary, model, type, mmproj_type if mmproj else None, mtp)
    if experts:
        files[0] = with_experts(files[0], checkpoint, vocabulary, experts, w4_type)
        if experts.two_bit.parts is None:
            assumed = "; ".join(filter(None, [assumed, f"experts of layers {experts.layers[0]} and up in 2 bits"]))
    result = _result(files, said, mmproj_type, assumed)
    if not dry_run:
        check_target(files, overwrite)
        progress = progress if progress is not None else Bar()
        if experts:
            result = replace(result, check=compare_experts(experts, checkpoint, progress))
        write_files(files, progress)
    return result


def _result(files: Sequence[OutFile], type: str, mmproj_type: str, assumed: str | None) -> ConvertResult:
    rows = tuple(TensorRow(f.kind, t.name, t.shape, t.type.name, t.n_bytes) for f in files for t in f.tensors)
    paths = {file.kind: file.path for file in files}
    return ConvertResult(
        files[0].path,
        paths.get("mmproj"),
        files[0].arch,
        type,
        mmproj_type if "mmproj" in paths else None,
        len(rows),
        sum(file_bytes(file.tensors) for file in files),
        rows,
        paths.get("mtp"),
        sum(math.prod(row.shape) for row in rows if not _is_copy(row)),
        assumed,
    )


def _is_copy(row: TensorRow) -> bool:
    """Whether it is computed, or repeats what another row holds."""
    repeated = row.file == "mtp" and not row.name.startswith("blk.")
    return repeated or row.name in ("rope_freqs.weight", "v.boi", "v.eoi", "v.bov", "v.eov")

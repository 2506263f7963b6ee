"""`pyllamaernie convert`: a Hugging Face folder of an ERNIE 4.5 model to GGUF, in one pass and without torch.

The text model and, beside it, the mmproj of a vision-language model and the draft model (mtp) of a checkpoint with
multi-token-prediction layers. Tensors are mapped, converted a few rows at a
time and written behind a header whose sizes are known beforehand, so memory stays small whatever the model.
A 2-bit release of Baidu's gives its routed experts, once they were held against the original, which gives the rest.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from tqdm import tqdm

from pyllamaernie._upstream import OutTensor, TensorType, file_bytes, general_keys, write_gguf
from pyllamaernie.convert import ernie4_5, ernie4_5_moe, ernie4_5_mtp, ernie4_5_vl_moe, wint2
from pyllamaernie.convert.checkpoint import Checkpoint, open_checkpoint
from pyllamaernie.convert.tokenizer import MODEL_FILES, Vocabulary, read_vocabulary
from pyllamaernie.convert.wint2_check import CheckReport, Originals, check
from pyllamaernie.errors import CancelledError, ConvertError, DiskSpaceError

__all__ = [
    "CheckReport", "ConvertResult", "Progress", "TensorRow", "add_arguments", "check_two_bit", "convert",
    "mmproj_path", "mtp_path", "run",
]  # fmt: skip

log = logging.getLogger("pyllamaernie.convert")

# config.json's model_type -> family. Baidu's own repositories of the VL model say ernie4_5_moe_vl.
FAMILIES: dict[str, ModuleType] = {
    "ernie4_5": ernie4_5,
    "ernie4_5_moe": ernie4_5_moe,
    "ernie4_5_vl_moe": ernie4_5_vl_moe,
    "ernie4_5_moe_vl": ernie4_5_vl_moe,
}
TYPES = {"f32": TensorType.F32, "f16": TensorType.F16, "bf16": TensorType.BF16, "q8_0": TensorType.Q8_0}
_STORED_TYPES = {"BF16": "bf16", "F16": "f16"}
_SPARE_BYTES = 64 * 2**20  # header (the vocabulary is a few MB) and a reserve


class Progress(Protocol):
    """What a caller may pass to follow the work; `advance` cancels it by returning False."""

    def start(self, total: int, unit: str, text: str) -> None: ...
    def advance(self, n: int) -> bool | None: ...
    def close(self) -> None: ...


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


@dataclass(frozen=True)
class _File:
    kind: str
    path: Path
    arch: str
    keys: list
    tensors: list[OutTensor]


def mmproj_path(model: Path) -> Path:
    """Where the vision side of a model is written: `mmproj-NAME.gguf` in the same folder."""
    return model.with_name(f"mmproj-{model.name}")


def mtp_path(model: Path) -> Path:
    """Where the draft model is written: `mtp-NAME.gguf`, a prefix that llama.cpp's downloader knows too."""
    return model.with_name(f"mtp-{model.name}")


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
    two_bit = _two_bit(Path(source), original, dry_run)
    checkpoint = open_checkpoint(Path(original if two_bit else source), need_weights=not dry_run)
    family = _family(checkpoint)
    experts = two_bit and _experts(two_bit, checkpoint, reading)
    w4_type = "q4_0" if type == "auto" else type
    if type == "auto":
        type = "q8_0" if two_bit else _own_type(checkpoint)
    _known_type(type)
    mmproj_type = ("f32" if type == "f32" else "f16") if mmproj_type is None else _known_type(mmproj_type)
    said = wint2.TYPE.name.lower() if two_bit else type
    model = Path(output) if output is not None else Path(f"{Path(source).resolve().name}-{said.upper()}.gguf")
    if model.suffix != ".gguf":
        raise ConvertError(f"{model}: the output's name must end in .gguf")
    vocabulary, assumed = _vocabulary(checkpoint, dry_run)
    files = _plan(checkpoint, family, vocabulary, model, type, mmproj_type if mmproj else None, mtp)
    if two_bit:
        files[0] = _with_experts(files[0], checkpoint, vocabulary, experts, w4_type)
        if two_bit.parts is None:
            assumed = "; ".join(filter(None, [assumed, f"experts of layers {experts.layers[0]} and up in 2 bits"]))
    result = _result(files, said, mmproj_type, assumed)
    if not dry_run:
        _check_target(files, overwrite)
        progress = progress if progress is not None else _Tqdm()
        if two_bit:
            result = replace(result, check=_compare(experts, checkpoint, progress))
        _write(files, progress)
    return result


def check_two_bit(
    source: str | Path, original: str | Path, *, reading: str = wint2.DOCUMENTED, progress: Progress | None = None
) -> CheckReport:
    """Holds every expert of a 2-bit release against its original and says what was found; writes nothing.

    Raises: WeightMismatchError when they do not fit, other ConvertErrors as `convert` does.
    """
    two_bit = _two_bit(Path(source), original, False)
    checkpoint = open_checkpoint(Path(original))
    return _compare(_experts(two_bit, checkpoint, reading), checkpoint, progress if progress is not None else _Tqdm())


def _two_bit(source: Path, original: str | Path | None, dry_run: bool) -> wint2.TwoBitFolder | None:
    two_bit = wint2.find(source, need_weights=original is not None and not dry_run)
    if two_bit and original is None:
        raise ConvertError(
            f"{source}: a 2-bit release, of which only the experts can be used; pass --original with the folder of "
            f"{wint2.original_name(source)}, which the rest is taken from"
        )
    if original is not None and not two_bit:
        raise ConvertError(
            f"{source}: its config.json does not say that it is a 2-bit release (quantization 'wint2'), so it needs no "
            "--original"
        )
    return two_bit


def _experts(two_bit: wint2.TwoBitFolder, checkpoint: Checkpoint, reading: str) -> wint2.Experts:
    wint2.check_same_model(two_bit, checkpoint.config, checkpoint.folder)
    if _family(checkpoint) is not ernie4_5_moe:
        raise ConvertError(
            f"{checkpoint.folder}: not a text mixture of experts; 2-bit releases are known of those only"
        )
    c = ernie4_5_moe.read_config(checkpoint.config)
    return wint2.Experts(two_bit, c, ernie4_5_moe.text_bank(c), reading)


def _with_experts(
    file: _File, checkpoint: Checkpoint, vocabulary: Vocabulary, experts: wint2.Experts, w4_type: str
) -> _File:
    kind = TensorType.Q4_0 if w4_type == "q4_0" else TYPES[w4_type]
    _, w4 = ernie4_5_moe.text_model(checkpoint, ernie4_5_moe.pool(checkpoint), vocabulary, kind)
    keys, tensors = wint2.with_experts(file.keys, file.tensors, w4, experts)
    return replace(file, keys=keys, tensors=tensors)


def _compare(experts: wint2.Experts, checkpoint: Checkpoint, progress: Progress) -> CheckReport:
    c = ernie4_5_moe.read_config(checkpoint.config)
    pool = ernie4_5_moe.pool(checkpoint)

    def advance(n: int) -> None:
        if progress.advance(n) is False:
            raise CancelledError("conversion cancelled")

    progress.start(len(experts.layers) * experts.n_expert, "experts", "check")
    try:
        return check(experts, Originals(pool, c, ernie4_5_moe.text_bank(c)), checkpoint.tensors, advance)
    finally:
        progress.close()


def _family(checkpoint: Checkpoint) -> ModuleType:
    kind = checkpoint.config.get("model_type")
    if kind not in FAMILIES:
        raise ConvertError(
            f"{checkpoint.folder / 'config.json'}: model_type {kind!r}; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def _known_type(name: str) -> str:
    if name not in TYPES:
        raise ConvertError(f"type {name!r}; expected auto, {', '.join(TYPES)}")
    return name


def _own_type(checkpoint: Checkpoint) -> str:
    """The 16-bit type of the first matrix that has one; f16 when all are float32 (as upstream's heuristics)."""
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) >= 2 and tensor.dtype in _STORED_TYPES:
            return _STORED_TYPES[tensor.dtype]
    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return "bf16" if not checkpoint.has_weights and said == "bfloat16" else "f16"


def _vocabulary(checkpoint: Checkpoint, dry_run: bool) -> tuple[Vocabulary, str | None]:
    """The vocabulary, and what is assumed for want of files; only a dry run does without any."""
    missing = []
    if not checkpoint.has_weights:
        missing.append(f"shapes from config.json, names from {'the index' if checkpoint.names else 'it too'}")
    if dry_run and not any((checkpoint.folder / name).is_file() for name in MODEL_FILES):
        missing.append("no tokenizer to check")
        vocabulary = Vocabulary([], [], [], [])
    else:
        config = {**checkpoint.config, **(checkpoint.config.get("text_config") or {})}
        vocabulary = read_vocabulary(checkpoint, ernie4_5.need(config, "vocab_size"))
        if all(key.name != "tokenizer.chat_template" for key in vocabulary.keys):
            log.warning(
                "%s: no chat template in tokenizer_config.json, chat_template.jinja or chat_template.json, as in base "
                "models; the GGUF completes text, and a chat with it needs a template from elsewhere",
                checkpoint.folder,
            )
    return vocabulary, "; ".join(missing) or None


def _plan(
    checkpoint: Checkpoint,
    family: ModuleType,
    vocabulary: Vocabulary,
    model: Path,
    type: str,
    mmproj_type: str | None,
    mtp: bool,
) -> list[_File]:
    """All files with their keys and tensors; every tensor of the checkpoint is accounted for."""
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


def _file(checkpoint: Checkpoint, kind: str, path: Path, arch: str, keys: list, tensors: list[OutTensor]) -> _File:
    file_kind = "mmproj" if kind == "mmproj" else "model"
    return _File(
        kind, path, arch, [*general_keys(checkpoint.folder, _counts(tensors), file_kind=file_kind), *keys], tensors
    )


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


def _is_copy(row: TensorRow) -> bool:
    """Whether it is computed, or repeats what another row holds."""
    repeated = row.file == "mtp" and not row.name.startswith("blk.")
    return repeated or row.name in ("rope_freqs.weight", "v.boi", "v.eoi", "v.bov", "v.eov")


def _result(files: Sequence[_File], type: str, mmproj_type: str, assumed: str | None) -> ConvertResult:
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


def _check_target(files: Sequence[_File], overwrite: bool) -> None:
    folder = files[0].path.absolute().parent
    if not folder.is_dir():
        raise ConvertError(f"{folder}: no such folder to write to")
    there = [str(file.path) for file in files if file.path.exists()]
    if there and not overwrite:
        raise ConvertError(f"{' and '.join(there)}: already there; pass --overwrite to replace")
    wanted, free = sum(file_bytes(file.tensors) for file in files) + _SPARE_BYTES, shutil.disk_usage(folder).free
    if wanted > free:
        raise DiskSpaceError(f"{folder}: {wanted / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


def _write(files: Sequence[_File], progress: Progress) -> None:
    """Writes under temporary names and renames at the end; whatever happens before that, nothing stays."""
    temporary = [file.path.with_name(f".{file.path.name}.{os.getpid()}.partial") for file in files]

    def on_bytes(n: int) -> None:
        if progress.advance(n) is False:
            raise CancelledError("conversion cancelled")

    with ExitStack() as stack:
        for path in temporary:
            stack.callback(path.unlink, missing_ok=True)
        progress.start(sum(t.n_bytes for file in files for t in file.tensors), "B", "convert")
        stack.callback(progress.close)
        try:
            for file, path in zip(files, temporary, strict=True):
                write_gguf(path, file.arch, file.keys, file.tensors, on_bytes)
        except OSError as error:
            if isinstance(error, ConvertError):
                raise
            raise ConvertError(f"{files[0].path.parent}: cannot be written ({error})") from error
        # the text model last: where it is, the others are too
        for file, path in reversed(list(zip(files, temporary, strict=True))):
            os.replace(path, file.path)


class _Tqdm:
    """A bar on standard error when that is a terminal and PYLLAMAERNIE_PROGRESS is not 0."""

    def start(self, total: int, unit: str, text: str) -> None:
        off = not sys.stderr.isatty() or os.environ.get("PYLLAMAERNIE_PROGRESS") == "0"
        self._bar = tqdm(
            total=total, unit=unit, desc=text, unit_scale=True, unit_divisor=1024, disable=off, leave=False
        )

    def advance(self, n: int) -> None:
        self._bar.update(n)

    def close(self) -> None:
        self._bar.close()


# ---- command line ----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.description = (
        "Convert a Hugging Face folder of an ERNIE 4.5 model to GGUF, or a 2-bit release of Baidu's with its original."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = """examples:
  pyllamaernie convert ERNIE-4.5-0.3B-PT -o ernie.gguf
  pyllamaernie convert ERNIE-4.5-VL-28B-A3B-PT -o vl.gguf --type q8_0

  # Baidu's 2-bit experts, bit for bit; all else from the release they were made from
  pyllamaernie convert ERNIE-4.5-300B-A47B-2Bits-Paddle --original ERNIE-4.5-300B-A47B-PT --check
  pyllamaernie convert ERNIE-4.5-300B-A47B-2Bits-Paddle --original ERNIE-4.5-300B-A47B-PT -o 300b.gguf"""
    parser.add_argument("source", metavar="DIR", help="folder with config.json, *.safetensors and tokenizer.model")
    parser.add_argument(
        "--original",
        metavar="PT-DIR",
        help="for a 2-bit release: the same model in BF16 (-PT), which all but the 2-bit experts come from",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="hold a 2-bit release against its original, print how well it fits, write nothing",
    )
    parser.add_argument(
        "--reading",
        default=wint2.DOCUMENTED,
        help="how the bytes of a 2-bit release are meant, when --check finds another one than the documented: "
        + ", ".join(wint2.READINGS)
        + ", or several joined by +; it must fit best, too",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT.gguf",
        help="text model; the mmproj is written beside it (default: DIR-TYPE.gguf here)",
    )
    parser.add_argument(
        "--type",
        default="auto",
        choices=["auto", *TYPES],
        help="type of the matrices (default: auto, the checkpoint's 16-bit type; with --original q8_0, and q4_0 for "
        "experts that the release has in 4 bits)",
    )
    parser.add_argument(
        "--mmproj-type", choices=list(TYPES), help="the same for the mmproj (default: f32 with --type f32, else f16)"
    )
    parser.add_argument("--no-mmproj", action="store_true", help="leave the vision side out")
    parser.add_argument("--no-mtp", action="store_true", help="leave the multi-token-prediction layers out")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print every tensor and the totals, write nothing; config.json alone is enough",
    )


def run(args: argparse.Namespace) -> int:
    """Converts as the command line says; prints the paths of the written files."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a polite kill cleans up too
    if args.check:
        if args.original is None:
            _two_bit(Path(args.source), None, True)
            raise ConvertError("--check is for 2-bit releases; --dry-run shows what any other folder becomes")
        print("\n".join(check_two_bit(args.source, args.original, reading=args.reading).lines()))
        return 0
    result = convert(
        args.source,
        args.output,
        type=args.type,
        mmproj=not args.no_mmproj,
        mmproj_type=args.mmproj_type,
        mtp=not args.no_mtp,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        original=args.original,
        reading=args.reading,
    )
    if result.check:
        print("\n".join(result.check.lines()))
    if args.dry_run:
        for row in result.tensors:
            dims = "x".join(map(str, reversed(row.shape)))
            print(f"{row.file:6}  {row.name:40}  {dims:>20}  {row.type:5}  {row.n_bytes:>14}")
    for kind, path, chosen in (
        ("text", result.model, result.type),
        ("mmproj", result.mmproj, result.mmproj_type),
        ("mtp", result.mtp, next((row.type.lower() for row in result.tensors if row.file == "mtp"), "")),
    ):
        rows = [row for row in result.tensors if row.file == kind]
        if path is not None:
            print(f"{path}: {len(rows)} tensors, {sum(row.n_bytes for row in rows)} bytes, {chosen}")
    if args.dry_run:
        note = f" ({result.assumed})" if result.assumed else ""
        print(f"total: {result.n_params / 1e9:.4g} billion parameters, {result.size_bytes} bytes{note}")
    return 0

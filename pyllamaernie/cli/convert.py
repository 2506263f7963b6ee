"""`pyllamaernie convert`: a Hugging Face folder of an ERNIE 4.5 model to GGUF."""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path

from pyllamaernie.cli.options import local_source
from pyllamaernie.convert import TYPES, check_two_bit, convert, wint2
from pyllamaernie.convert.two_bit import find_two_bit
from pyllamaernie.errors import ConvertError

EPILOG = """examples:
  pyllamaernie convert ERNIE-4.5-0.3B-PT -o ernie.gguf
  pyllamaernie convert org/name -o ernie.gguf     fetched from a hub unless it is here
  pyllamaernie convert ERNIE-4.5-VL-28B-A3B-PT -o vl.gguf --type q8_0

  # Baidu's 2-bit experts, bit for bit; all else from the release they were made from
  pyllamaernie convert ERNIE-4.5-300B-A47B-2Bits-Paddle --original ERNIE-4.5-300B-A47B-PT --check
  pyllamaernie convert ERNIE-4.5-300B-A47B-2Bits-Paddle --original ERNIE-4.5-300B-A47B-PT -o 300b.gguf"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.description = (
        "Convert a Hugging Face folder of an ERNIE 4.5 model to GGUF, or a 2-bit release of Baidu's with its original."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "source", metavar="DIR", help="folder with config.json, *.safetensors and tokenizer.model, or org/name on a hub"
    )
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
        type=str.lower,
        choices=["auto", *TYPES],
        help="type of the matrices (default: auto, the checkpoint's 16-bit type; with --original q8_0, and q4_0 for "
        "experts that the release has in 4 bits)",
    )
    parser.add_argument(
        "--mmproj-type",
        type=str.lower,
        choices=list(TYPES),
        help="the same for the mmproj (default: f32 with --type f32, else f16)",
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
    args.source = local_source("convert", args.source)
    if args.original is not None:
        args.original = local_source("convert", args.original)
    if args.check:
        if args.original is None:
            find_two_bit(Path(args.source), None, dry_run=True)
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

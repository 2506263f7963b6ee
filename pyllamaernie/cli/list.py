"""`pyllamaernie list`: the models of hubs that are on this disk."""

from __future__ import annotations

import argparse
import time

from pyllamaernie.files import size_text
from pyllamaernie.hub.cache import kept
from pyllamaernie.hub.library import cache_folder

EPILOG = """examples:
  pyllamaernie list

A line for each model: its name as every verb takes it, what it is, how many files, their size, the day of last use.
  GGUF         files of that type, all parts together
  folder       a Hugging Face folder
  beside       what goes with a GGUF file: mmproj, mtp
  converted    a GGUF file that was made of the folder, so that it can be run
  unfinished   the part of a file that came before a pull was broken off
exit codes: 0 done, 4 huggingface_hub is not installed"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> int:
    lines = [
        (
            str(line.name),
            line.kind,
            "1 file" if line.n_files == 1 else f"{line.n_files} files",
            size_text(line.size_bytes),
            time.strftime("%Y-%m-%d", time.localtime(line.used)),
        )
        for line in kept()
    ]
    if not lines:
        print(f"no models in {cache_folder()}; `pyllamaernie pull org/name` fetches one")
        return 0
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    for row in lines:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0

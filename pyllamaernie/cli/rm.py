"""`pyllamaernie rm`: models of hubs off this disk."""

from __future__ import annotations

import argparse
import sys

from pyllamaernie.cli.messages import bad_usage
from pyllamaernie.errors import EXIT_FAILED
from pyllamaernie.files import size_text
from pyllamaernie.hub.cache import remove, removed_by
from pyllamaernie.hub.names import hub_name

EPILOG = """examples:
  pyllamaernie rm org/name:Q4_K_M     the files of that type, and what was converted to it
  pyllamaernie rm org/name            all of that repository, with its mmproj and what was converted
  pyllamaernie rm --yes org/name      without asking

Other programs that use huggingface_hub share these files. `pyllamaernie list` shows what is there.
exit codes: 0 done, 1 not wanted after all, 2 bad usage, 4 nothing of that name is here"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("names", nargs="+", metavar="NAME", help="org/name or org/name:TYPE")
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")


def run(args: argparse.Namespace) -> int:
    names = [hub_name(text) for text in args.names]
    lines = {name: removed_by(name) for name in names}
    if not args.yes:
        if not sys.stdin.isatty():
            return bad_usage("rm", "stdin is no terminal to ask on; say --yes to remove without asking")
        for name in names:
            size = size_text(sum(line.size_bytes for line in lines[name]))
            print(f"{name}: {sum(line.n_files for line in lines[name])} files, {size}", file=sys.stderr)
        print("remove? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            return EXIT_FAILED
    for name in names:
        print(f"{name}: removed, {size_text(remove(name))} freed")
    return 0

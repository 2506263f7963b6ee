"""The `pyllamaernie` command: one table of verbs, each imported only when chosen.

Exit codes: 0 done, 1 failed, 2 bad usage, 3 a check was not met, 4 an input file is missing or unreadable,
5 not enough memory or disk, 6 network needed, 130 interrupted, 141 the reader of stdout went away.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence

from pyllamaernie.errors import EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED, PyllamaernieError
from pyllamaernie.machine import installed

EXIT_PIPE = 141

# verb -> (module with add_arguments(parser) and run(args) -> exit code, or run_words(words); one line of help)
VERBS: dict[str, tuple[str, str]] = {
    "run": ("pyllamaernie.cli.run", "answer a prompt, or chat when there is none"),
    "serve": ("pyllamaernie.cli.serve", "serve a model over HTTP, for OpenAI clients and with a web page"),
    "pull": ("pyllamaernie.cli.pull", "fetch a model from a hub by its name, and keep it"),
    "list": ("pyllamaernie.cli.list", "show the models of hubs that are on this disk"),
    "rm": ("pyllamaernie.cli.rm", "remove models of hubs from this disk"),
    "convert": ("pyllamaernie.cli.convert", "convert a Hugging Face folder to GGUF"),
    "quantize": ("pyllamaernie.cli.quantize", "make a model smaller: a preset, a recipe, or a plan"),
    "imatrix": ("pyllamaernie.cli.imatrix", "measure what a model's weights matter for, on text and pictures"),
    "plan": ("pyllamaernie.cli.plan", "choose a type for every tensor, so that a file of a given size loses least"),
    "compare": (
        "pyllamaernie.cli.compare",
        "show what smaller files of a model lose: divergence, perplexity, size, speed",
    ),
    "prune": ("pyllamaernie.cli.prune", "drop the experts that add least to the output on calibration data"),
    "slice": ("pyllamaernie.cli.slice", "keep some layers, experts, neurons or experts per token, byte for byte"),
    "rpc": ("pyllamaernie.cli.rpc", "hold layers of a model for another process, or check who does"),
    "patch": ("pyllamaernie.cli.patch", "fetch llama.cpp, list, apply, check and write our patches"),
    "tool": ("pyllamaernie.cli.tool", "run a bundled llama.cpp program, arguments untouched"),
}

DESCRIPTION = "ERNIE 4.5 language and vision-language models on llama.cpp."
EPILOG = """examples:
  pyllamaernie run --image shapes.png "What is in the picture?"
  pyllamaernie convert ERNIE-4.5-VL-28B-A3B -o ernie-vl.gguf --type q8_0

`pyllamaernie VERB --help` explains a verb."""


def version_text() -> str:
    """Package version, upstream commit and digest of the patch series, one per line."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        package = version("pyllamaernie")
    except PackageNotFoundError:
        package = "not installed"
    lines = [f"pyllamaernie {package}"]
    path = installed("data") / "build.json"
    if path.is_file():
        build = json.loads(path.read_text(encoding="utf-8"))
        lines += [f"llama.cpp {build['commit']} (b{build['build_number']})", f"patches {build['digest']}"]
    else:
        lines.append("llama.cpp not built")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; never raises for an error of ours."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv and (not argv or argv[0] != "tool")
    if debug:
        argv.remove("--debug")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8; they are printed as is
    try:
        return _dispatch(argv)
    except PyllamaernieError as error:
        if debug:
            raise
        print(f"pyllamaernie: {_one_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the interpreter flushes stdout once more at exit: give it somewhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except OSError as error:
        if debug:
            raise
        print(f"pyllamaernie: {_one_line(error)}", file=sys.stderr)
        return EXIT_INPUT
    except Exception as error:  # a fault of ours; the trace is one flag away
        if debug:
            raise
        print(f"pyllamaernie: {type(error).__name__}: {_one_line(error)} (--debug shows where)", file=sys.stderr)
        return EXIT_FAILED


def _dispatch(argv: list[str]) -> int:
    verb = next((word for word in argv if not word.startswith("-")), None)
    if argv and argv[0] == "--version":
        print(version_text())
        return 0
    if verb in VERBS and argv[0] == verb:
        module = importlib.import_module(VERBS[verb][0])
        if hasattr(module, "run_words"):  # `tool`: the words belong to another program
            return int(module.run_words(argv[1:]))
        parser = argparse.ArgumentParser(
            prog=f"pyllamaernie {verb}",
            description=VERBS[verb][1].capitalize() + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        parser.add_argument("--debug", action="store_true", help="show the full trace of an error")
        return int(module.run(_parse(parser, argv[1:])) or 0)

    parser = argparse.ArgumentParser(
        prog="pyllamaernie",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version", action="store_true", help="print the version, the upstream commit and the patch digest"
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for name, (_, text) in VERBS.items():
        verbs.add_parser(name, help=text, add_help=False)
    parser.parse_args(argv)
    parser.print_help(sys.stderr)
    return 2


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    if any(isinstance(action, argparse._SubParsersAction) for action in parser._actions):
        return parser.parse_args(argv)
    return parser.parse_intermixed_args(argv)  # an optional word may stand between options


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

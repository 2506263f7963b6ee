"""`pyllamaernie pull`: a model from a hub onto this disk, for every verb that takes a model by its name."""

from __future__ import annotations

import argparse
from functools import partial

from pyllamaernie.cli.messages import say
from pyllamaernie.hub.choice import Wish
from pyllamaernie.hub.library import quiet_unless_terminal
from pyllamaernie.hub.names import hub_name
from pyllamaernie.hub.resolve import resolve

EPILOG = """examples:
  pyllamaernie pull org/name:Q4_K_M          the GGUF file of that type, all its parts, its mmproj and mtp
  pyllamaernie pull org/name                 the best GGUF file to run, else the Hugging Face folder
  pyllamaernie run -m org/name:Q4_K_M "Hi"   needs no network then

Without a type Q4_K_M is taken, else Q8_0, else F16, else the only one. A pull that was broken off goes on where it was,
and every file is checked against the hub's hash. A newer revision replaces the older one under the same name.
Files are kept in huggingface_hub's cache, which HF_HUB_CACHE moves; HF_ENDPOINT names another hub (a mirror), HF_TOKEN
a token for repositories that need one; with HF_HUB_OFFLINE nothing is fetched.
exit codes: 0 done, 1 failed, 2 bad usage, 4 no such model there, 5 not enough disk, 6 network needed, 130
interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("names", nargs="+", metavar="NAME", help="org/name or org/name:TYPE")
    parser.add_argument(
        "--folder", action="store_true", help="the Hugging Face folder, also where there is a GGUF file"
    )


def run(args: argparse.Namespace) -> int:
    for name in [hub_name(text) for text in args.names]:
        quiet_unless_terminal(str(name))
        found = resolve(name, refresh=True, wish=Wish(folder_first=args.folder), say=partial(say, "pull"))
        for path in [found.folder] if found.folder is not None else found.files:
            print(path)
    return 0

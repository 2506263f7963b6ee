"""`pyllamaernie patch`: fetch llama.cpp, list, apply, check and write our patches.

Standard library only, as all that it imports: the build runs `python -m pyllamaernie patch`.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
from datetime import datetime, timezone
from email.utils import format_datetime
from pathlib import Path

from pyllamaernie.errors import EXIT_CHECK, EXIT_FAILED, EXIT_INTERRUPTED, OfflineError, PatchError
from pyllamaernie.patching.editing import BASE, apply_git, export
from pyllamaernie.patching.files import FIELDS
from pyllamaernie.patching.series import check, find_root, log, new, open_tree, status
from pyllamaernie.patching.source import fetch, load_pin
from pyllamaernie.patching.tree import apply


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verbs and their options."""
    parser.add_argument(
        "--root", type=Path, help="source checkout (default: the one around this file, else around the working folder)"
    )
    verbs = parser.add_subparsers(dest="patch_verb", metavar="VERB", required=True)

    verb = verbs.add_parser("fetch", help="get the pinned llama.cpp into vendor/llama.cpp and prove it")
    verb.add_argument(
        "--verify-commit", action="store_true", help="check the archive's git data again even when the tree is there"
    )

    verb = verbs.add_parser("status", help="pin, commit, digests, and each patch with its size and Upstream-Status")
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    verb = verbs.add_parser(
        "apply", help="make DIR the patched copy with the overlay in it; files that are right keep their times"
    )
    verb.add_argument(
        "source",
        nargs="?",
        type=Path,
        metavar="TREE",
        help="a pristine tree to take unchecked (default: the pin, fetched if need be)",
    )
    verb.add_argument("--into", required=True, type=Path, metavar="DIR", help="the folder to make")
    verb.add_argument(
        "--git", action="store_true", help="make DIR a git tree with one commit per patch, to edit and export"
    )

    verb = verbs.add_parser(
        "check",
        help="judge the series: list, headers, sizes, rules, and that every patch applies exactly; exit 3 if not",
    )
    verb.add_argument(
        "--against", type=Path, metavar="DIR", help="say patch by patch which apply to this other tree or archive"
    )
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    verb = verbs.add_parser("new", help="start a patch file with its header and list it")
    verb.add_argument("name", help="<kind>-<area>-<what>, kind is hook, fix or feat")
    verb.add_argument("--subject", required=True, help="'kind: area: what'")
    verb.add_argument("--author", metavar="'NAME <MAIL>'", help="default: the author of the last patch")

    verb = verbs.add_parser("export", help="rewrite patches/ from a git tree made by apply --git")
    verb.add_argument("tree", type=Path, metavar="TREE")


def run(args: argparse.Namespace) -> int:
    """Does the verb; one line on stderr and an exit code when it cannot be done (3: the check failed, 6: offline)."""
    handler = None
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("patch: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        return VERBS[args.patch_verb](args)
    except (PatchError, OfflineError) as e:
        print(f"error: patch {args.patch_verb}: {e}", file=sys.stderr)
        return e.exit_code
    except BrokenPipeError:
        raise  # the reader of stdout went away: the caller ends without a word
    except OSError as e:
        print(f"error: patch {args.patch_verb}: {e}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        if handler:
            log.removeHandler(handler)


def run_fetch(args: argparse.Namespace) -> int:
    root = find_root(args.root)
    tree = fetch(root, verify_commit=args.verify_commit)
    print(f"{tree.path}: llama.cpp {load_pin(root).commit}, {len(tree.files)} files ({tree.origin})")
    return 0


def run_status(args: argparse.Namespace) -> int:
    said = status(args.root)
    if args.json:
        print(json.dumps(said, indent=1))
        return 0
    print(
        f"pin      {said['source']}, llama.cpp {said['upstream_version']} b{said['build_number']}\ncommit   "
        f"{said['commit']}"
    )
    print(f"series   {said['digest']}\noverlay  {said['overlay_sha256']}, {len(said['overlay_files'])} files")
    width = max((len(row["name"]) for row in said["patches"]), default=0)
    for row in said["patches"]:
        print(f"{row['name']:{width}}  {row['group']:9}  {row['size_bytes']:6d} bytes  {row['upstream_status']}")
    print(f"{len(said['patches'])} patches, {sum(row['size_bytes'] for row in said['patches'])} bytes")
    return 0


def run_apply(args: argparse.Namespace) -> int:
    make = apply_git if args.git else apply
    plan = make(find_root(args.root), args.into, source=args.source)
    if args.git:
        print(
            f"edit in {args.into}, then: git commit --fixup COMMIT; GIT_SEQUENCE_EDITOR=true git rebase -i "
            f"--autosquash {BASE}; patch export {args.into}"
        )
    else:
        print(f"{args.into}: {len(plan.series)} patches, {len(plan.overlay)} overlay files")
    return 0


def run_check(args: argparse.Namespace) -> int:
    root = find_root(args.root)
    scratch = Path(tempfile.mkdtemp(prefix="patch-check-"))
    try:
        tree = open_tree(args.against, scratch) if args.against else None
        verdicts, wrong = check(root, tree)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    failed = bool(wrong) or any(v.problems for v in verdicts)
    if args.json:
        rows = [{"name": v.name, "problems": v.problems, "notes": v.notes} for v in verdicts]
        print(
            json.dumps(
                {
                    "against": tree.origin if tree else load_pin(root).commit,
                    "ok": not failed,
                    "patches": rows,
                    "problems": wrong,
                },
                indent=1,
            )
        )
        return EXIT_CHECK if failed else 0
    print(f"against {tree.origin if tree else 'the pin, llama.cpp ' + load_pin(root).commit}")
    for v in verdicts:
        print(f"{'FAIL' if v.problems else 'moved' if v.notes else 'ok':5}  {v.name}")
        for text in (*v.problems, *v.notes):
            print(f"       {text}")
    for text in wrong:
        print(f"FAIL   {text}")
    n_failed = sum(bool(v.problems) for v in verdicts)
    print(
        f"{len(verdicts)} patches: {len(verdicts) - n_failed} apply{'' if tree else ' and are in order'}, "
        f"{n_failed} fail" + (f"; {len(wrong)} problems of the whole" if wrong else "")
    )
    return EXIT_CHECK if failed else 0


def run_new(args: argparse.Namespace) -> int:
    path = new(find_root(args.root), args.name, args.subject, format_datetime(datetime.now(timezone.utc)), args.author)
    print(
        f"{path}: fill in {', '.join(FIELDS)}; then\n  patch apply --git --into DIR\n  edit in DIR, git add, git "
        f"commit --amend or --fixup\n  patch export DIR"
    )
    return 0


def run_export(args: argparse.Namespace) -> int:
    said = export(find_root(args.root), args.tree)
    print("\n".join(said) if said else "nothing changed")
    return 0


VERBS = {
    "fetch": run_fetch,
    "status": run_status,
    "apply": run_apply,
    "check": run_check,
    "new": run_new,
    "export": run_export,
}

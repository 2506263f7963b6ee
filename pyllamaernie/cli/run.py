"""`pyllamaernie run`: one answer to a prompt, or a chat on a terminal. stdout holds the answer and nothing else."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from pyllamaernie.cli.messages import bad_usage
from pyllamaernie.cli.options import add_model, take_model
from pyllamaernie.errors import EXIT_INTERRUPTED, MediaError, PyllamaernieError

if TYPE_CHECKING:
    from pyllamaernie.llama.llama import Llama

EPILOG = """examples:
  pyllamaernie run --image examples/shapes.png "What is in the picture?"
  pyllamaernie run -m ernie-vl.gguf --image a.jpg --image b.jpg "Which picture is brighter?"
  pyllamaernie run -m org/name:Q4_K_M --image a.jpg "What is this?"     fetched from a hub unless it is here
  pyllamaernie run -m ernie-vl.gguf --video clip.mp4 "What happens?"
  echo "What is in the picture?" | pyllamaernie run --image shapes.png
  pyllamaernie run -m ernie-vl.gguf          a chat; /image FILE adds a picture

Without -m the embedded ernie-4.5-vl-tiny answers, which knows only simple shapes.
exit codes: 0 done, 1 failed, 2 bad usage, 4 a file is missing or unreadable, 5 not enough memory or
disk, 6 network needed, 130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="the question; without it stdin is read, or on a terminal a chat starts",
    )
    model = parser.add_argument_group("model")
    add_model(model)
    model.add_argument(
        "--ctx", type=_positive, metavar="N", help="context in tokens (default: the model's, as memory allows)"
    )
    model.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: all)")
    media = parser.add_argument_group("media")
    for kind, what in (("image", "a picture"), ("video", "a video (needs `pip install 'pyllamaernie[video]'`)")):
        media.add_argument(
            f"--{kind}",
            action="append",
            dest="media",
            default=[],
            type=partial(_medium, kind),
            metavar="FILE",
            help=f"{what} for the first question; may be repeated, in the order of the prompt",
        )
    sampling = parser.add_argument_group("answer")
    sampling.add_argument("--system", metavar="TEXT", help="system message")
    sampling.add_argument(
        "--think", action=argparse.BooleanOptionalAction, default=None, help="think before answering (default: no)"
    )
    sampling.add_argument("--max-tokens", type=_positive, metavar="N", help="longest answer (default: to its end)")
    sampling.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="0 is greedy (default: 0 for the embedded model, else 0.2)",
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="seed of the sampler")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="print the whole result object instead of streaming the text"
    )
    output.add_argument("-v", "--verbose", action="store_true", help="show the log on stderr")


def run(args: argparse.Namespace) -> int:
    chat = args.prompt is None and sys.stdin.isatty()
    if args.prompt is None and not chat:
        args.prompt = sys.stdin.read().rstrip("\n")
    if args.prompt is not None and not args.prompt.strip():
        return bad_usage("run", "the prompt is empty")
    if chat and args.json:
        return bad_usage("run", "--json needs a prompt")
    if args.temperature is not None and args.temperature < 0:
        return bad_usage("run", "--temperature is a number from 0 up")

    from pyllamaernie.llama.llama import Llama

    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        media = [_part(*medium) for medium in args.media]  # before the model: a wrong path should not cost a load
        take_model("run", args)
        llama = Llama(
            args.model, mmproj=args.mmproj, n_ctx=args.ctx, n_threads=args.threads, seed=args.seed, verbose=args.verbose
        )
    with llama:
        if chat:
            return _chat(llama, args, media)
        messages = [*_system(args), _user(args.prompt, media)]
        if args.json:
            answer = llama.create_chat_completion(messages, **_options(args))
            print(json.dumps(answer, ensure_ascii=False, indent=2))
        else:
            _stream(llama, messages, args)
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"enable_thinking": args.think, "max_tokens": args.max_tokens, "seed": args.seed}
    if args.temperature is not None:
        options["temperature"] = args.temperature
    elif args.model is None:
        options["temperature"] = 0.0  # the embedded model has one right answer to each of its questions
    return options


def _system(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _part(kind: str, path: str) -> dict[str, Any]:
    """A part of a message. A picture is read at once, a video when the model's limits are known."""
    from pyllamaernie.media.image import Image

    if kind == "image":
        return {"type": "image", "image": Image.of(path)}
    if not os.path.isfile(path):
        raise MediaError(f"{path}: no such video")
    return {"type": "video", "video": path}


def _user(text: str, media: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": "user", "content": [*media, {"type": "text", "text": text}] if media else text}


def _stream(llama: Llama, messages: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Print an answer as it comes: thoughts to stderr, the answer to stdout; returns the answer."""
    chunks: Any = llama.create_chat_completion(messages, stream=True, **_options(args))
    answer: list[str] = []
    thinking = False
    try:
        for chunk in chunks:
            for choice in chunk["choices"]:
                delta = choice["delta"]
                thought, text = delta.get("reasoning_content"), delta.get("content")
                if thought:
                    thinking = True
                    print(thought, end="", file=sys.stderr, flush=True)
                if text:
                    if thinking:
                        thinking = False
                        print("\n", file=sys.stderr, flush=True)
                    answer.append(text)
                    print(text, end="", flush=True)
    finally:
        chunks.close()
    print(flush=True)
    return "".join(answer)


def _chat(llama: Llama, args: argparse.Namespace, media: list[dict[str, Any]]) -> int:
    """Questions and answers until /quit or the end of input; Ctrl-C ends an answer, and at the prompt the chat."""
    try:
        import readline  # noqa: F401  line editing and history for input()
    except ImportError:
        pass
    print("/image FILE adds a picture, /video FILE a video, /quit ends the chat", file=sys.stderr)
    messages = _system(args)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return 0
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return EXIT_INTERRUPTED
        if line in ("/quit", "/exit"):
            return 0
        try:
            command, _, path = line.partition(" ")
            if command in ("/image", "/video"):
                part = _part(command[1:], path.strip())
                media.append(part)
                name = f"picture {part['image'].width}x{part['image'].height}" if "image" in part else path.strip()
                print(f"{name} goes with the next question", file=sys.stderr)
            elif line.startswith("/"):
                print(f"unknown command {command}; there are /image FILE, /video FILE and /quit", file=sys.stderr)
            elif line:
                question = _user(line, media)
                answer = _stream(llama, [*messages, question], args)
                messages += [question, {"role": "assistant", "content": answer}]
                media = []
        except KeyboardInterrupt:
            print("\n(interrupted)", file=sys.stderr)
        except PyllamaernieError as error:
            print(f"pyllamaernie: {' '.join(str(error).split())}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"pyllamaernie: warning: {message}", file=sys.stderr)


def _medium(kind: str, path: str) -> tuple[str, str]:
    return kind, path


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"a positive whole number is needed, got {text}")
    return value

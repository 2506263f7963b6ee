"""`pyllamaernie serve`: a model over HTTP, for OpenAI clients and with a web page."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pyllamaernie import programs
from pyllamaernie.cli.messages import bad_usage, warn
from pyllamaernie.cli.options import add_model, add_threads, add_workers, not_positive, take_model
from pyllamaernie.llama.rpc import endpoints
from pyllamaernie.server.address import is_local, require_free_port
from pyllamaernie.server.http import arguments

EPILOG = """examples:
  pyllamaernie serve                                       the embedded model, page at http://127.0.0.1:8080
  pyllamaernie serve -m ernie-vl.gguf --port 9000 --ctx 32768
  pyllamaernie serve -m ernie-vl.gguf --rpc 10.0.0.2:50052,10.0.0.3:50052
  pyllamaernie serve -m ernie-vl.gguf -- --temp 0.6 --slots   what follows -- goes to llama-server
  OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=none your-program

ERNIE does not think unless a request asks: "chat_template_kwargs": {"enable_thinking": true}; the thoughts then are in
reasoning_content. `pyllamaernie tool llama-server --help` lists every flag for after --.
exit codes: 1 failed, 2 bad usage, 4 a file is missing or unreadable, 5 not enough memory or
disk, 6 network needed; then llama-server's own"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    model = parser.add_argument_group("model")
    add_model(model)
    model.add_argument(
        "--ctx", type=int, metavar="N", help="context in tokens, shared by all requests (default: as memory allows)"
    )
    model.add_argument("--parallel", type=int, metavar="N", help="requests answered at once (default: 4)")
    add_threads(model)
    add_workers(model)
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)"
    )
    network.add_argument("--port", type=int, default=8080, metavar="N", help="port; 0 takes a free one (default: 8080)")
    network.add_argument("--api-key", metavar="KEY", help="refuse requests without it (or set LLAMA_API_KEY)")
    network.add_argument("--public", action="store_true", help="allow an address that other machines can reach")


def run_words(words: Sequence[str]) -> int:
    """The whole command line after the verb; everything behind a lone `--` is llama-server's."""
    words = list(words)
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="pyllamaernie serve",
        description="Serve a model over HTTP, for OpenAI clients and with a web page.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [-- llama-server flags]",
    )
    add_arguments(parser)
    args = parser.parse_args(words[:at])
    args.upstream = words[at + 1 :]
    return run(args)


def run(args: argparse.Namespace) -> int:
    if wrong := not_positive(args, "ctx", "parallel", "threads"):
        return bad_usage("serve", wrong)
    if not 0 <= args.port < 65536:
        return bad_usage("serve", f"--port is 0 to 65535, got {args.port}")
    for host in _hosts(args.host, args.upstream):
        if not is_local(host) and not args.public:
            return bad_usage(
                "serve", f"{host} can be reached by other machines; say --public to allow it, and give an --api-key"
            )
    environment = {"LLAMA_API_KEY": args.api_key} if args.api_key else {}  # not in the process list
    if args.public and not (args.api_key or os.environ.get("LLAMA_API_KEY")):
        warn("serve", "no --api-key: whoever reaches the port may use the model")
    port = require_free_port("127.0.0.1" if args.host == "localhost" else args.host, args.port)
    take_model("serve", args)
    command = arguments(
        args.model,
        args.mmproj,
        host=args.host,
        port=port,
        n_ctx=args.ctx,
        n_parallel=args.parallel,
        n_threads=args.threads,
        rpc_servers=endpoints(args.rpc) if args.rpc is not None else (),
    )
    shown = f"[{args.host}]" if ":" in args.host else args.host
    print(
        f"pyllamaernie: {Path(command[1]).name} at http://{shown}:{port} once it is loaded "
        f"(web page; OpenAI clients: http://{shown}:{port}/v1); Ctrl-C ends it",
        file=sys.stderr,
    )
    if {"-a", "--alias"} & set(args.upstream):  # llama-server collects names instead of taking the last one
        at = command.index("--alias")
        del command[at : at + 2]
    os.environ.update(environment)
    return programs.execute("llama-server", [*command, *args.upstream])


def _hosts(host: str, upstream: Sequence[str]) -> list[str]:
    hosts = [host]
    for word, value in zip(upstream, [*upstream[1:], ""], strict=False):
        if word == "--host":
            hosts += value.split(",")
        elif word.startswith("--host="):
            hosts += word.removeprefix("--host=").split(",")
    return hosts

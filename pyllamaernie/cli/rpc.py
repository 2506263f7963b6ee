"""`pyllamaernie rpc`: a worker that holds layers of a model for another process, or a check that one is there."""

from __future__ import annotations

import argparse
import ipaddress
import sys

from pyllamaernie import programs
from pyllamaernie.cli.messages import bad_usage
from pyllamaernie.cli.options import not_positive
from pyllamaernie.llama.rpc import check, dotted, endpoints, protocol
from pyllamaernie.server import rpc
from pyllamaernie.server.address import is_local, require_free_port

PORT = 50052

EPILOG = """examples:
  pyllamaernie rpc                                  a worker on 127.0.0.1:50052, this machine only
  pyllamaernie rpc --port 50053 --threads 8         a second one
  pyllamaernie serve -m ernie-vl.gguf --rpc 127.0.0.1:50052,127.0.0.1:50053
  pyllamaernie rpc --check 127.0.0.1:50052          is it there, and of this build?

A worker holds layers of one model for one client at a time and needs no model file of its own. It neither asks for a
password nor encrypts. Between two machines use a tunnel (ssh -L 50052:127.0.0.1:50052 OTHER); --public opens the port
to everybody who can reach it, who can then run any computation in it.
exit codes: 0 done, 1 a worker is missing or of another build, 2 bad usage, 130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="IPv4 address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help=f"port to listen on (default: {PORT})")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: half of the CPUs)")
    parser.add_argument("--device", metavar="NAMES", help="devices to offer, with commas (default: GPUs, else the CPU)")
    parser.add_argument(
        "--cache", action="store_true", help="keep large tensors on disk, so that the next load is quicker"
    )
    parser.add_argument("--public", action="store_true", help="allow an address that other machines can reach")
    parser.add_argument("--check", metavar="HOST:PORT", help="start nothing; shake hands with these workers (commas)")


def run(args: argparse.Namespace) -> int:
    if args.check is not None:
        servers = endpoints(args.check)
        check(servers)
        for endpoint in servers:
            print(f"{endpoint} is an RPC worker of this build (protocol {dotted(protocol())})")
        return 0
    host = "127.0.0.1" if args.host == "localhost" else args.host
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return bad_usage("rpc", f"--host is an IPv4 address, got {args.host!r}")
    if not 0 < args.port < 65536:
        return bad_usage("rpc", f"--port is 1 to 65535, got {args.port}")
    if wrong := not_positive(args, "threads"):
        return bad_usage("rpc", wrong)
    if not is_local(host) and not args.public:
        return bad_usage(
            "rpc",
            f"{host} can be reached by other machines, and a worker obeys whoever connects; "
            "tunnel to 127.0.0.1, or say --public",
        )
    require_free_port(host, args.port)
    words = rpc.arguments(host, args.port, n_threads=args.threads, devices=args.device, cache=args.cache)
    print(f"pyllamaernie rpc: worker on {host}:{args.port}, Ctrl-C ends it", file=sys.stderr)
    return programs.execute(rpc.PROGRAM, words)

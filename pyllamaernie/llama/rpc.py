"""RPC: workers that hold layers of a model for this process. `check` shakes hands; no worker is started here.

The handshake is made here before the engine makes it, so that a worker that is missing, busy or of another build is a
sentence. One that goes away later fails the requests that need it; load the model again then. Neither
end proves who it is and nothing is encrypted: loopback or a private link only.
Source: llama.cpp ggml/src/ggml-rpc/ggml-rpc.cpp at the pin (commands, endpoint syntax, one client at a time).
"""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterable, Sequence

from pyllamaernie.errors import ModelLoadError

SERVERS_MAX = 16  # GGML_RPC_MAX_SERVERS
TIMEOUT_S = 5.0

_HELLO = 14  # RPC_CMD_HELLO, the one command number that upstream promises never to change
_CAPS_BYTES = 24  # RPC_CONN_CAPS_SIZE: zeros ask for plain TCP
_ANSWER_BYTES = 4 + _CAPS_BYTES

_in_use: Counter[str] = Counter()  # workers that models of this process hold: each serves one client at a time
_in_use_lock = threading.Lock()


class RpcError(ModelLoadError):
    """An RPC worker cannot be reached, is busy, is of another build, or is no worker at all."""


def endpoints(servers: str | Iterable[str]) -> list[str]:
    """`host:port` strings, from a list or from one string with commas. Raises: RpcError naming the bad one."""
    words = servers.split(",") if isinstance(servers, str) else list(servers)
    words = [str(word).strip() for word in words]
    if not words or not all(words):
        raise RpcError(f"RPC workers are given as HOST:PORT, got {servers!r}")
    for word in words:
        match = re.fullmatch(r"([A-Za-z0-9._-]+):([0-9]{1,5})", word)
        if not match or not 0 < int(match[2]) < 65536:
            raise RpcError(
                f"{word!r} is no RPC worker; give HOST:PORT with a name or IPv4 address and a port up to 65535"
            )
    twice = [word for word, n in Counter(words).items() if n > 1]
    if twice:
        raise RpcError(f"{twice[0]} is given twice")
    if len(words) > SERVERS_MAX:
        raise RpcError(f"{len(words)} RPC workers were given; at most {SERVERS_MAX} can be used")
    return words


def protocol() -> tuple[int, int, int]:
    """The protocol version of this build."""
    from pyllamaernie import _core

    return _core.RPC_VERSION


def hello(endpoint: str, timeout_s: float = TIMEOUT_S) -> tuple[int, int, int]:
    """The protocol version that the worker at `host:port` answers with.

    Raises: RpcError when nobody listens there, nobody answers, or the answer is not a worker's.
    """
    host, port = endpoint.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=timeout_s) as link:
            link.settimeout(timeout_s)
            link.sendall(struct.pack("<BQ", _HELLO, _CAPS_BYTES) + bytes(_CAPS_BYTES))
            answer = b""
            while len(answer) < 8 + _ANSWER_BYTES:
                piece = link.recv(8 + _ANSWER_BYTES - len(answer))
                if not piece:
                    break
                answer += piece
                if len(answer) >= 8 and struct.unpack_from("<Q", answer)[0] != _ANSWER_BYTES:
                    break
    except socket.gaierror as error:
        raise RpcError(f"RPC worker {endpoint}: the host is not known ({error.strerror})") from None
    except ConnectionRefusedError:
        raise RpcError(f"RPC worker {endpoint}: nothing listens there; start one with `pyllamaernie rpc`") from None
    except TimeoutError:
        raise RpcError(
            f"RPC worker {endpoint} does not answer within {timeout_s:g} s: the address is wrong, or the worker is "
            "busy (it serves one client at a time)"
        ) from None
    except OSError as error:
        if not isinstance(error, ConnectionResetError):
            raise RpcError(f"RPC worker {endpoint} cannot be reached: {error.strerror or error}") from None
        answer = b""
    if len(answer) < 8 + _ANSWER_BYTES:
        raise RpcError(
            f"{endpoint} does not answer like an RPC worker of this build: it is another program, or a worker of "
            "a much older llama.cpp"
        )
    return struct.unpack_from("<3B", answer, 8)


def check(servers: Sequence[str], timeout_s: float = TIMEOUT_S) -> None:
    """Shake hands with every worker. Raises: RpcError naming the first that cannot be used, and why."""
    ours = protocol()
    for endpoint in servers:
        with _in_use_lock:
            if _in_use[endpoint]:  # this process shares its connection; the worker would not answer a second one
                continue
        theirs = hello(endpoint, timeout_s)
        if theirs != ours:
            raise RpcError(
                f"RPC worker {endpoint} is of another build: it speaks protocol {dotted(theirs)}, this one "
                f"{dotted(ours)}; run the same version of pyllamaernie on both ends"
            )


def acquire(servers: Sequence[str], timeout_s: float = TIMEOUT_S) -> list[str]:
    """Engine options for a model whose layers lie on these workers, or, for none, on this machine alone.

    Every call needs a `release` once the model is gone. Raises: RpcError.
    """
    from pyllamaernie import _core

    check(servers, timeout_s)
    names: list[str] = []
    for endpoint in servers:
        try:
            names += _core.rpc_add_server(endpoint)
        except RuntimeError as error:
            raise RpcError(f"RPC worker {endpoint}: {error}") from None
    if not names and not _core.gpu_devices(True):
        return []
    with _in_use_lock:
        _in_use.update(servers)
    # a worker stays registered in this process: without a choice, every later model would be put on it
    local = _core.gpu_devices(False)
    vision = ["--mmproj-device", local[0]] if local else ["--no-mmproj-offload"]
    return ["--device", ",".join([*names, *local]) or "none", *vision]


def release(servers: Sequence[str]) -> None:
    """The counterpart of `acquire`."""
    with _in_use_lock:
        _in_use.subtract(servers)


def dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))

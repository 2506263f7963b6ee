"""An RPC worker: the bundled ggml-rpc-server, which holds layers of a model for another process.

Not the other end: a model whose layers lie on workers is `llama/rpc.py`.
"""

from __future__ import annotations

PROGRAM = "ggml-rpc-server"


def arguments(
    host: str, port: int, *, n_threads: int | None = None, devices: str | None = None, cache: bool = False
) -> list[str]:
    """The words after the program's name; what is left out is the program's to choose."""
    words = ["--host", host, "--port", str(port)]
    if n_threads is not None:
        words += ["--threads", str(n_threads)]
    if devices is not None:
        words += ["--device", devices]
    if cache:
        words.append("--cache")
    return words

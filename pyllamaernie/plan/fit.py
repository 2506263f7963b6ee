"""How large a model file may be, so that the machine can run it: memory that is there, less what the rest takes.

Context and compute buffers come from the bundled llama-fit-params, which sets a model up without allocating anything;
they do not depend on the types of the weights. Upstream's own fit chooses how to load a given file and takes the
system's memory as unlimited; here the file is what is chosen, and memory is what counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyllamaernie import programs
from pyllamaernie.errors import BudgetError, InputError, PyllamaernieError
from pyllamaernie.gguf.header import read_header
from pyllamaernie.machine import free_memory_bytes

MIB = 2**20
RESERVE_SHARE = 0.05
RESERVE_BYTES_MIN = 2**30
# Of a Python process with the engine loaded: libraries, tokenizer, tables, thread stacks. Measured by bench/fit.py.
PROCESS_BYTES = 60 * MIB
VOCABULARY_BYTES = 400  # for each token: its text in several tables
N_BATCH = 512  # tokens that are computed at once, upstream's default for n_ubatch


@dataclass(frozen=True)
class Needs:
    """What running a model takes beside its weights, and the weights of this file, in bytes of system memory."""

    weights: int
    context: int
    compute: int
    process: int

    @property
    def total(self) -> int:
        return self.weights + self.context + self.compute + self.process


def needs(model: Path, *, n_ctx: int, kv_type: str = "f16", n_parallel: int = 1) -> Needs:
    """What loading a GGUF with this context will take on the CPU, without loading it.

    Raises: InputError for a KV cache type that there is not; PyllamaernieError when the model cannot be set up.
    """
    from pyllamaernie.llama.options import cache_type

    if n_ctx < 1:
        raise InputError(f"a context has at least 1 token, got {n_ctx}")
    header = read_header(model)
    kind = cache_type("kv_type", kv_type)
    words = ["-m", model, "-fitp", "on", "-c", n_ctx, "-np", n_parallel, "-ctk", kind, "-ctv", kind, "-ngl", 0]
    done = programs.run("llama-fit-params", [*words, "-ub", N_BATCH], check=False, capture=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    host = next((row for row in rows if row[:1] == ["Host"] and len(row) == 4), None)
    if done.returncode or host is None:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise PyllamaernieError(f"{model} cannot be measured: {said[-1] if said else 'llama-fit-params says nothing'}")
    n_vocab = int(header.metadata.get("tokenizer.ggml.tokens", 0))
    weights = sum(n_bytes for *_, n_bytes in header.tensors)
    # the program rounds each number down to whole MiB
    return Needs(
        weights, (int(host[2]) + 1) * MIB, (int(host[3]) + 1) * MIB, PROCESS_BYTES + n_vocab * VOCABULARY_BYTES
    )


def memory_limit_bytes() -> int:
    """Memory that this process could still get: what the system has, or what its cgroup leaves it, if that is less."""
    return min([free_memory_bytes(), *_cgroup_rooms()])


def _cgroup_rooms(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Sequence[int]:
    """What is left of the limit of each cgroup that this process is in; both versions of cgroups."""
    try:
        lines = own.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":  # version 2
            files, base = ("memory.max", "memory.current"), root
        elif "memory" in controllers.split(","):
            files, base = ("memory.limit_in_bytes", "memory.usage_in_bytes"), root / "memory"
        else:
            continue
        folder = base / name.lstrip("/")
        while True:  # a parent's limit counts as well
            limit, used = (_number(folder / file) for file in files)
            if limit is not None and limit < 2**60:  # version 1 says nearly 2**63 for none
                cache = _cache_bytes(folder)
                rooms.append(max(0, limit - max(0, (used or 0) - cache)))
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent
    return rooms


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max"
        return None


def _cache_bytes(folder: Path) -> int:
    """File pages that count as used but are given back when memory is short."""
    try:
        rows = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return 0
    names = ("inactive_file", "total_inactive_file")
    return next((int(rows[name]) for name in names if name in rows), 0)


def reserve_bytes(limit: int) -> int:
    """What stays free for everything else, if nothing is said: 5 %, and 1 GiB at least."""
    return max(RESERVE_BYTES_MIN, math.ceil(limit * RESERVE_SHARE))


def file_budget(
    model: Path, *, n_ctx: int, kv_type: str = "f16", reserve: int | None = None, limit: int | None = None
) -> tuple[int, str]:
    """Bytes that a smaller file of this model may have to run here, and a sentence that adds them up.

    `limit` and `reserve` in bytes: by default `memory_limit_bytes()` and `reserve_bytes()`. A projector beside the
    model takes its share. Raises: BudgetError when nothing is left, and as `needs`.
    """
    limit = memory_limit_bytes() if limit is None else limit
    reserve = reserve_bytes(limit) if reserve is None else reserve
    wanted = needs(model, n_ctx=n_ctx, kv_type=kv_type)
    projector = _projector_bytes(model)
    budget = limit - reserve - projector - (wanted.total - wanted.weights)
    parts = [f"{_mib(reserve)} stay free", f"context of {n_ctx} {_mib(wanted.context)}"]
    parts += [f"compute {_mib(wanted.compute)}", f"process {_mib(wanted.process)}"]
    parts += [f"projector {_mib(projector)}"] * bool(projector)
    text = f"memory {_mib(limit)}: {', '.join(parts)}"
    if budget <= 0:
        raise BudgetError(
            f"{text}: nothing is left for weights; take a smaller context (--ctx) or reserve (--reserve)",
            budget_bytes=max(0, budget),
        )
    return budget, f"{text}; {_mib(budget)} are left for the file"


def _projector_bytes(model: Path) -> int:
    """The projector beside a model, with as much again for its buffers."""
    from pyllamaernie.gguf.projector import find_projector

    found = find_projector(read_header(model), "auto")
    return 0 if found is None else 2 * found.path.stat().st_size


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / MIB:,.0f} MiB"

"""Measuring how strongly each column of each weight matrix is used, on text and on pictures, and writing it to a file.

The file has the format of upstream's llama-imatrix and feeds `llama-quantize --imatrix`; for a text its numbers are
that program's. Pictures go through the chat template and the projector, so that the experts for vision get statistics
too: a text never reaches them. What each expert adds to the output is stored beside, for `prune`; upstream's programs
skip it. Quantizers read such a file with `importance`.
Source: llama.cpp tools/imatrix/imatrix.cpp at the pin (chunks, keys, tensor names).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllamaernie import files
from pyllamaernie.compare.samples import read_text
from pyllamaernie.errors import InputError, PyllamaernieError, UnsupportedInputError

if TYPE_CHECKING:
    import numpy as np

    from pyllamaernie.llama.llama import Llama

logger = logging.getLogger("pyllamaernie.quant")

CHUNK = 512
N_CTX_PICTURES = 8192  # the longest prompt with pictures

# Sums over the tokens of each expert, stored as NAME.experts.KEY with NAME the down projection's. g is the weight that
# the token gave to the expert, after all normalisation; y is the expert's output before it. Shapes: (n_expert,)
EXPERT_SUMS = {
    "gate": "sum of g",
    "gate2": "sum of g^2",
    "gate_out": "sum of g |y|",
    "gate2_out2": "sum of g^2 |y|^2",
    "out_max": "largest |y|",
    "prob": "sum of the router's probability over all tokens of the layer, chosen or not",
}


@dataclass(frozen=True)
class Statistics:
    """Sums over the inputs of one weight matrix. Shapes: sums (n_mat, n_cols) float32, counts (n_mat or 1,) int64.

    `experts`: for the down projection of experts EXPERT_SUMS, each (n_expert,) float64.
    """

    name: str
    sums: np.ndarray
    counts: np.ndarray
    experts: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def unused(self) -> list[int]:
        """Experts that no input reached."""
        return [i for i, count in enumerate(self.counts) if count == 0]


@dataclass(frozen=True)
class ImatrixResult:
    """What `compute_imatrix` wrote. `missing` names matrices of the model without any statistics."""

    path: Path
    n_chunks: int
    n_pictures: int
    entries: tuple[Statistics, ...]
    missing: tuple[str, ...]


def compute_imatrix(
    model: str | os.PathLike[str] | None,
    text: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    *,
    pictures: Sequence[tuple[Any, str]] = (),
    mmproj: str | os.PathLike[str] | None = "auto",
    chunk: int = CHUNK,
    n_chunks: int | None = None,
    n_threads: int | None = None,
    rpc_servers: str | Sequence[str] | None = None,
    process_output: bool = False,
    experts: bool = True,
    overwrite: bool = False,
    progress: bool = False,
) -> ImatrixResult:
    """Run a text file in chunks of `chunk` tokens and pictures with their questions, and write an importance matrix.

    `model` None is the embedded one. `pictures` holds (picture, question) pairs; a picture is what `Image.of` takes.
    `experts` False leaves out what only `prune` needs. The output appears only when it is whole.
    Raises: InputError, MediaError, the load errors of `Llama`, PyllamaernieError for inputs that are not finite.
    """
    from pyllamaernie.llama.llama import Llama
    from pyllamaernie.media.image import Image

    output = Path(output)
    files.check_output(output, overwrite)
    if text is None and not pictures:
        raise InputError("nothing to run: give a text, pictures, or both")
    words = None if text is None else read_text(Path(text))
    prompts = [(Image.of(source), question) for source, question in pictures]
    mmproj = mmproj if prompts else None
    with Llama(model, mmproj=mmproj, n_ctx=CHUNK, n_threads=n_threads, rpc_servers=rpc_servers) as llm:
        if prompts and llm.mmproj_path is None:
            raise UnsupportedInputError(
                f"{llm.model_path} has no projector, so it takes no pictures; give its mmproj file"
            )
        chunks = [] if words is None else _chunks(llm, words, chunk, n_chunks)
        entries = _collect(llm, chunks, prompts, chunk, process_output, experts, progress)
        write_imatrix(output, entries, [str(text)] * (text is not None) + ["pictures"] * bool(prompts), chunk)
        missing = _missing(llm, entries)
    return ImatrixResult(output, len(chunks), len(prompts), tuple(entries), tuple(missing))


def _chunks(llm: Llama, text: str, size: int, n_max: int | None) -> list[list[int]]:
    ids = llm.tokenize(text, add_bos=True)
    n = len(ids) // size if n_max is None else min(n_max, len(ids) // size)
    if n == 0:
        raise InputError(f"the text has {len(ids)} tokens, a chunk takes {size}; give more text or smaller chunks")
    chunks = [ids[i * size : (i + 1) * size] for i in range(n)]
    if llm.adds_bos():
        chunks = [[llm.token_bos(), *chunk[1:]] for chunk in chunks]
    return chunks


def _collect(
    llm: Llama,
    chunks: Sequence[Sequence[int]],
    prompts: Sequence[tuple[Any, str]],
    size: int,
    process_output: bool,
    experts: bool,
    progress: bool,
) -> list[Statistics]:
    import numpy as np
    from tqdm import tqdm

    from pyllamaernie import _core, log

    n_threads = llm.context_options["n_threads"]
    n_ctx = max(size, min(N_CTX_PICTURES, llm.n_ctx_train())) if prompts else size
    session = _core.ImatrixSession(llm.engine, n_ctx, min(size, CHUNK), n_threads, process_output, experts)
    try:
        if prompts:
            session.load_projector(str(llm.mmproj_path), llm.media_marker(), n_threads, bool(_core.gpu_devices(False)))
        with tqdm(total=len(chunks) + len(prompts), unit="prompt", disable=not progress, file=sys.stderr) as bar:
            for chunk in chunks:
                session.add_tokens(np.asarray(chunk, np.int32))
                bar.update()
            for picture, question in prompts:
                content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
                session.add_prompt(llm.apply_template([{"role": "user", "content": content}]), [picture.rgb])
                bar.update()
        added = session.expert_statistics()
        return [Statistics(*entry, added.get(entry[0], {})) for entry in session.statistics()]
    except ValueError as error:
        raise InputError(str(error)) from None
    except RuntimeError as error:
        reason = next(iter(log.drain()[-1:]), "")
        raise PyllamaernieError(f"{error}{': ' + reason if reason else ''}") from None
    finally:
        session.close()
        log.drain()


def _missing(llm: Llama, entries: Iterable[Statistics]) -> list[str]:
    """Matrices of the layers that no batch reached at all."""
    have = {entry.name for entry in entries}
    names = [name for name, shape, _, _, _ in llm.header.tensors if name.endswith(".weight") and shape[1] > 1]
    # routers stay in F32, so nobody asks for theirs
    matrices = [name for name in names if name.startswith("blk.") and "_norm" not in name and "_gate_inp" not in name]
    return sorted(name for name in matrices if name not in have)


def write_imatrix(path: Path, entries: Sequence[Statistics], datasets: list[str], size: int) -> None:
    """A file in upstream's layout: for each matrix `NAME.in_sum2` and `NAME.counts`; then our `NAME.experts.KEY`,
    which it skips. Written beside and renamed."""
    import numpy as np

    from pyllamaernie.gguf.file import Key, OutTensor, TensorType, write_gguf

    n_max = max((int(entry.counts.max()) for entry in entries), default=0)
    keys = [
        Key("general.type", "str", "imatrix"),
        Key("imatrix.datasets", "list", datasets),
        Key("imatrix.chunk_count", "u32", max(1, n_max // size)),
        Key("imatrix.chunk_size", "u32", size),
    ]

    def tensor(name: str, data: np.ndarray) -> OutTensor:
        data = data[0] if data.ndim > 1 and len(data) == 1 else data  # ggml drops a last dimension of one
        return OutTensor(name, data.shape, TensorType.F32, lambda: iter((data,)))

    tensors = []
    for entry in entries:
        counts = entry.counts.astype(np.float32).reshape(-1, 1)
        parts = {f"experts.{key}": sums.astype(np.float32) for key, sums in sorted(entry.experts.items())}
        all_parts = {"in_sum2": entry.sums, "counts": counts, **parts}
        tensors += [tensor(f"{entry.name}.{suffix}", data) for suffix, data in all_parts.items()]
    with files.hidden_file(path) as hidden:
        write_gguf(hidden, "imatrix", keys, tensors)
        os.replace(hidden, path)


def report(result: ImatrixResult) -> list[str]:
    """One line for every matrix with unused experts, and for matrices that nothing reached."""
    lines = []
    for entry in result.entries:
        if entry.unused:
            ids = ", ".join(map(str, entry.unused[:16])) + (", ..." if len(entry.unused) > 16 else "")
            lines.append(f"{entry.name}: nothing reached {len(entry.unused)} of {len(entry.counts)} experts ({ids})")
    vision = [name for name in result.missing if name.endswith("_vl.weight")]
    others = [name for name in result.missing if name not in vision]
    if vision:
        lines.append(f"{len(vision)} matrices for vision have no statistics; they need pictures (--image, --images)")
    if others:
        lines.append(f"no statistics: {', '.join(others[:8])}{', ...' if len(others) > 8 else ''}")
    return lines

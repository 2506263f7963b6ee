"""What smaller files of a model lose and gain, on the same text and pictures: `compare`.

A text is scored as llama-perplexity scores it, the second half of each chunk. A picture goes through the chat template
with its question; the rows behind it count, and those of the answer that the first file gives. `run` runs the files,
`divergence` holds the figures, `table` shows them; here is only what is checked before.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllamaernie.compare.samples import read_text
from pyllamaernie.errors import InputError

if TYPE_CHECKING:
    from pyllamaernie.compare.table import ComparisonTable

N_CTX = 512
N_SPEED_RUNS = 3


def compare(
    models: Sequence[str | os.PathLike[str]],
    text: str | os.PathLike[str] | None,
    *,
    images: Sequence[tuple[Any, str]] = (),
    n_ctx: int = N_CTX,
    n_chunks: int | None = None,
    mmproj: str | os.PathLike[str] | None = "auto",
    n_threads: int | None = None,
    speed_runs: int = N_SPEED_RUNS,
    progress: bool = False,
) -> ComparisonTable:
    """Run GGUF files of one vocabulary on a text file and on (picture, question) pairs; the first is the reference.

    `mmproj` "auto" takes the projector beside each file, or the reference's; a path serves all. Files run side by side
    as far as memory allows; the reference runs again for each further group. `speed_runs` 0 leaves the timing out.
    Raises: InputError (nothing to run, other vocabulary, text too short), UnsupportedInputError, MediaError, the load
        errors of `Llama`, PyllamaernieError for logits that are not finite.
    """
    from pyllamaernie.compare.run import Run
    from pyllamaernie.compare.vocabulary import check_headers
    from pyllamaernie.gguf.header import check_text_model, read_header
    from pyllamaernie.media.image import Image

    if len(models) < 2:
        raise InputError(f"a comparison takes at least two files, got {len(models)}")
    if text is None and not images:
        raise InputError("nothing to run: give a text, pictures, or both")
    if n_ctx < 4 or speed_runs < 0 or (n_chunks is not None and n_chunks < 1):
        raise InputError(
            f"n_ctx is at least 4, n_chunks at least 1, speed_runs at least 0; got {n_ctx}, {n_chunks}, {speed_runs}"
        )
    words = None if text is None else read_text(Path(text))
    for source, _ in images:  # a wrong one should not cost the work before it; they are not kept, a folder may be large
        Image.of(source)
    headers = [read_header(path) for path in models]
    for header in headers:
        check_text_model(header)
    for header in headers[1:]:
        check_headers(headers[0], header)
    run = Run(headers, words, images, n_ctx=n_ctx, n_chunks=n_chunks, mmproj=mmproj, n_threads=n_threads)
    return run.table(speed_runs, progress)

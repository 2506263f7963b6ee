"""Experts chosen by trying: masking in memory is the written file, and what is chosen costs less."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_models import gguf

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from cut_cases import N_EXPERT, imatrix, text

from pyllamaernie import Llama
from pyllamaernie.compare.divergence import kl_rows
from pyllamaernie.cut.prune import rank_experts, write_pruned
from pyllamaernie.cut.refine import refine
from pyllamaernie.cut.scores import Ranking, read_statistics
from pyllamaernie.cut.source import open_source
from pyllamaernie.errors import InputError, UnsupportedInputError


def test_probing_masks_as_the_written_file_does_and_chooses_what_costs_less(tmp_path: Path) -> None:
    source, importance = open_source(gguf("moe")), read_statistics(imatrix("moe"))
    words = tmp_path / "selection.txt"
    words.write_text(" ".join(np.random.default_rng(11).choice(text().read_text().split(), 1500)))
    worst = [flipped(r) for r in rank_experts(source, imatrix("moe"), keep=6, score="output")]
    options = {"band": 0.25, "n_chunks": 2, "n_threads": 1}
    refined, before, after = refine(source, worst, importance, words, **options)
    assert all(len(r.kept) == 6 and r.kept == tuple(sorted(r.kept)) for r in refined)
    assert after < 0.9 * before, "the strongest experts were removed, so nearly any change is better"
    with Llama(gguf("moe"), n_ctx=512, n_threads=1) as llm:
        ids = llm.tokenize(words.read_text(), add_bos=True)[512:1024]  # the chunk that judges
        reference = llm.logits(ids)[:-1]
    with pytest.raises(InputError, match="cannot be halved"):
        refine(source, worst, importance, words, n_chunks=1, n_threads=1)
    for rankings, kl in ((worst, before), (refined, after)):
        write_pruned(source, tmp_path / "out.gguf", rankings, "x", exact=True, overwrite=True)
        with Llama(tmp_path / "out.gguf", n_ctx=512, n_threads=1) as llm:
            found = kl_rows(reference, llm.logits(ids)[:-1])[0].mean()
        assert found == pytest.approx(kl, rel=0.02), "the model in memory is that of the file"


def flipped(r: Ranking) -> Ranking:
    """The strongest experts go instead of the weakest."""
    gone = set(np.argsort(-r.scores)[:2].tolist())
    return replace(r, kept=tuple(e for e in range(N_EXPERT) if e not in gone))


def test_masking_needs_a_bias(tmp_path: Path) -> None:
    source = open_source(gguf("moe"))
    without = replace(source, tensors=[t for t in source.tensors if "exp_probs_b" not in t.name])
    rankings = rank_experts(source, imatrix("moe"), keep=6)
    with pytest.raises(UnsupportedInputError, match="without one an ordinary cut is exact"):
        write_pruned(without, tmp_path / "never.gguf", rankings, "count", exact=True)
    with pytest.raises(UnsupportedInputError, match="layer 1 has no correction bias in F32 for text"):
        refine(without, rankings, read_statistics(imatrix("moe")), text(), n_chunks=1, n_threads=1)
    with pytest.raises(InputError, match="above 0 and at most 1, got 2"):
        refine(source, rankings, read_statistics(imatrix("moe")), text(), band=2)

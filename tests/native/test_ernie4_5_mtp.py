"""The draft model that a checkpoint's multi-token-prediction layers become, on upstream's speculative decoding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from checkpoint_shapes import shape_with
from logits_cases import TEXT, encode

from pyllamaernie.convert import ConvertResult, convert

_core = pytest.importorskip("pyllamaernie._core", reason="the native module is not built")

N_GREEDY = 48
OPTIONS = {"kind": "moe", "shape": shape_with("moe", n_mtp=1), "tied": False, "seed": 2}


def greedy(result: ConvertResult, prompt: Sequence[int], n_draft: int) -> dict[str, Any]:
    """The server's answer to a prompt of ids: `tokens`, and in `timings` how many were drafted and accepted."""
    # a worker that another test has registered stays a device of this process
    exact = [
        "-dev",
        "none",
        "-ctk",
        "f32",
        "-ctv",
        "f32",
        "-fa",
        "off",
        "-c",
        "256",
        "-np",
        "1",
        "-t",
        "1",
        "--no-warmup",
    ]
    draft = ["-md", str(result.mtp), "--spec-type", "draft-mtp", "--spec-draft-n-max", str(n_draft)]
    draft += ["--spec-draft-n-min", "0", "--spec-draft-p-min", "0", "-ctkd", "f32", "-ctvd", "f32"]
    engine = _core.Engine(["-m", str(result.model), *exact, *(draft if n_draft else [])])
    try:
        asked = {"prompt": list(prompt), "n_predict": N_GREEDY, "temperature": 0, "ignore_eos": True}
        body = json.dumps({**asked, "return_tokens": True, "cache_prompt": False})
        return json.loads(engine.open("completions", body).data)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def random_heads(tmp_path_factory: pytest.TempPathFactory) -> ConvertResult:
    root = tmp_path_factory.mktemp("mtp")
    return convert(checkpoints.write_checkpoint(root / "m", **OPTIONS), root / "x.gguf", type="f32")


@pytest.mark.parametrize("n_draft", [1, 3])
def test_drafts_never_change_greedy_tokens(n_draft: int, random_heads: ConvertResult) -> None:
    alone, with_drafts = (greedy(random_heads, encode(TEXT), n) for n in (0, n_draft))
    assert alone["tokens"] == with_drafts["tokens"] and len(alone["tokens"]) == N_GREEDY
    assert with_drafts["timings"]["draft_n"] >= n_draft * (N_GREEDY // 2) and "draft_n" not in alone["timings"]


@pytest.mark.reference
@pytest.mark.parametrize("every", [1, 2])
def test_as_many_drafts_are_accepted_as_the_reference_gets_right(every: int, tmp_path: Path) -> None:
    """With random weights no draft is ever right, so the projection is fitted, to some of the tokens."""
    import reference  # torch is optional
    import torch

    plain, prompt = checkpoints.write_checkpoint(tmp_path / "plain", **OPTIONS), encode(TEXT)
    ids = prompt + reference.greedy(plain, prompt, n=N_GREEDY)[0]
    extra = fitted(checkpoints.weights_of(**OPTIONS), ids, reference.load(plain), torch, every)
    folder = checkpoints.write_checkpoint(tmp_path / "fitted", extra=extra, **OPTIONS)
    drafts = reference.drafts(folder, ids)
    at, n_drafted, n_accepted = len(prompt), 0, 0
    while at + 2 < len(ids):  # the last token is not drafted
        hit = drafts[at] == ids[at + 1]
        n_drafted, n_accepted, at = n_drafted + 1, n_accepted + hit, at + 1 + hit
    assert n_drafted > n_accepted > 10  # else this test would say little

    answer = greedy(convert(folder, tmp_path / "x.gguf", type="f32"), prompt, n_draft=1)
    assert answer["tokens"] == ids[len(prompt) :]
    assert (answer["timings"]["draft_n"], answer["timings"]["draft_n_accepted"]) == (n_drafted, n_accepted)


def fitted(weights: dict, ids: list[int], model: Any, torch: Any, every: int) -> dict[str, np.ndarray]:
    """Weights of a layer that is mostly its projection, giving every n-th hidden state of `ids` from its inputs."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0].numpy()

    def rms(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weights[f"model.mtp_{name}.0.weight"]

    before = np.concatenate([np.zeros_like(hidden[:1]), hidden[:-1]])
    embedded = weights["model.embed_tokens.weight"][ids]
    inputs = np.concatenate([rms(embedded, "emb_norm"), rms(before, "hidden_norm")], axis=1)
    wanted = hidden / weights["model.norm.weight"]
    found = np.linalg.lstsq(inputs[::every], wanted[::every], rcond=None)[0].T
    out = {"model.mtp_linear_proj.0.weight": np.ascontiguousarray(found, np.float32)}
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        name = f"model.mtp_block.0.{part}.weight"
        out[name] = weights[name] * np.float32(0.3)
    return out

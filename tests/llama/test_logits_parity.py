"""Our runtime's logits against transformers': random checkpoints, float32 weights and KV cache, CPU.

The golden logits come from `data/make_logits.py`; the same comparison runs live under the marker `reference`.
"""

from __future__ import annotations

from pathlib import Path

import checkpoints
import numpy as np
import pytest
from checkpoint_shapes import KINDS, WIDE_SHAPES
from logits_cases import CASES, CHECKPOINTS, Case

from pyllamaernie.convert import convert

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import Llama

DATA = Path(__file__).parents[1] / "data"
N_GREEDY = 32

# Largest logit error over the logits' standard deviation, mean KL divergence in nats; without and with pictures. Seen:
# 7e-6 and 3e-11. With ggml's half-precision table for quick GELU (`fix-ggml-cpu-gelu-quick`) pictures had 1e-3 to 2e-3.
BARS = {False: (1e-3, 1e-6), True: (1e-3, 2e-5)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    """Name of a checkpoint -> (its folder, the open model in float32)."""
    root, opened = tmp_path_factory.mktemp("parity"), {}

    def get(name: str) -> tuple[Path, Llama]:
        if name not in opened:
            folder = checkpoints.write_checkpoint(root / name, **CHECKPOINTS[name])
            path = convert(folder, root / f"{name}.gguf", type="f32").model
            # one thread: so small a model gains nothing from a second one, and waits for it when cores are busy
            opened[name] = folder, Llama(path, type_k="f32", type_v="f32", n_ctx=256, n_threads=1)
        return opened[name]

    yield get
    for _, llm in opened.values():
        llm.close()


def golden(case: Case) -> dict[str, np.ndarray]:
    with np.load(DATA / f"logits-{case.name}.npz") as file:
        found = dict(file)
    digest = checkpoints.digest(checkpoints.weights_of(**CHECKPOINTS[case.checkpoint]))
    assert digest == str(found["digest"]), (
        "numpy draws other weights than when the golden file was made: run data/make_logits.py"
    )
    return found


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def compare(ours: np.ndarray, theirs: np.ndarray, *, with_pictures: bool) -> tuple[float, float]:
    """Asserts the bars and returns (largest error over std, mean KL)."""
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    bar_error, bar_kl = BARS[with_pictures]
    error = np.abs(ours - theirs)
    relative = float(error.max() / theirs.std())
    p, q = log_softmax(theirs), log_softmax(ours)
    kl = float((np.exp(p) * (p - q)).sum(axis=-1).mean())
    second, first = np.sort(theirs, axis=-1)[:, -2:].T
    decided = first - second > 2 * error.max(axis=-1)  # an error in each of the two can turn a smaller margin
    assert relative <= bar_error, (
        f"largest error {relative:.2e} of the logits' std, at position {error.max(axis=-1).argmax()}"
    )
    assert kl <= bar_kl, f"mean KL {kl:.2e}"
    assert decided.mean() > 0.9, "the margins are too small for the test to say anything"
    assert (ours.argmax(-1) == theirs.argmax(-1))[decided].all()
    return relative, kl


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_logits_equal_the_golden_ones(case: Case, models, record_property) -> None:
    _, llm = models(case.checkpoint)
    ours = llm.logits(case.input_ids(), images=case.images())
    error, kl = compare(ours, golden(case)["logits"], with_pictures=bool(case.sizes))
    record_property("max_error_over_std", error)
    record_property("mean_kl", kl)
    print(f"{case.name}: max error / std {error:.2e}, mean KL {kl:.2e}")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_greedy_continuation_equals_the_golden_one(case: Case, models) -> None:
    """One by one with the cache; the golden tokens each come from a full pass."""
    _, llm = models(case.checkpoint)
    rows, at, tokens = llm.logits(case.input_ids(), images=case.images()), case.n_positions(), []
    for i in range(N_GREEDY):
        tokens.append(int(rows[-1].argmax()))
        rows = llm.scorer().session.decode_tokens(np.array(tokens[-1:], np.int32), at + i)
    assert tokens == golden(case)["greedy"].tolist()


@pytest.mark.parametrize("case", [c for c in CASES if c.sizes], ids=lambda c: c.name)
def test_a_changed_picture_changes_the_logits_behind_it(case: Case, models) -> None:
    _, llm = models(case.checkpoint)
    ids, images = case.input_ids(), case.images()
    before = llm.logits(ids, images=images)
    after = llm.logits(ids, images=[image[:, ::-1].copy() for image in images])
    assert np.array_equal(before[0], after[0])  # the first token stands before every picture
    assert np.abs(before[-1] - after[-1]).max() > 0.05 * before.std()


@pytest.mark.reference
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_logits_equal_live_transformers(case: Case, models) -> None:
    import reference  # torch is optional

    folder, llm = models(case.checkpoint)
    compare(
        llm.logits(case.input_ids(), images=case.images()),
        reference.logits(folder, case.input_ids(), case.images()),
        with_pictures=bool(case.sizes),
    )


@pytest.mark.reference
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_live_transformers_with_wide_rows(kind: str, tmp_path: Path) -> None:
    import reference  # torch is optional

    case = next(c for c in CASES if c.name == {"dense": "dense_text", "moe": "moe_text", "vl": "vl_two_images"}[kind])
    folder = checkpoints.write_checkpoint(tmp_path / kind, kind, shape=WIDE_SHAPES[kind], seed=3)
    with Llama(
        convert(folder, tmp_path / f"{kind}.gguf", type="f32").model, type_k="f32", type_v="f32", n_ctx=256
    ) as llm:
        compare(
            llm.logits(case.input_ids(), images=case.images()),
            reference.logits(folder, case.input_ids(), case.images()),
            with_pictures=bool(case.sizes),
        )

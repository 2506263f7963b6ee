"""`pyllamaernie imatrix`: a text gives upstream's numbers, pictures reach the experts for vision."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
import gguf as gguf_py
import numpy as np
import PIL.Image
import pytest
import verb
from checkpoint_shapes import SHAPES, shape_with
from gguf_models import gguf, picture, random_words

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import Llama, programs
from pyllamaernie.convert import convert
from pyllamaernie.errors import InputError, MediaError, UnsupportedInputError
from pyllamaernie.quant.imatrix import EXPERT_SUMS, compute_imatrix, report

CHUNK = 128
PICTURES = [(picture(84, 112, seed=seed), "What is in the picture?") for seed in range(3)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_words(tmp_path_factory.mktemp("imatrix") / "text.txt", 700)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    reader = gguf_py.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return {tensor.name: np.array(tensor.data) for tensor in reader.tensors}, fields


def upstream(model: Path, text: Path, output: Path, *words: object) -> subprocess.CompletedProcess[str]:
    options = ["-c", CHUNK, "-b", CHUNK, "-t", 1, "--no-ppl", *words]
    return programs.run("llama-imatrix", ["-m", model, "-f", text, "-o", output, *options], capture=True, timeout=60)


@pytest.mark.parametrize("kind", ["dense", "moe", "vl"])
def test_text_gives_the_numbers_of_llama_imatrix(kind: str, text: Path, tmp_path: Path) -> None:
    compute_imatrix(gguf(kind), text, tmp_path / "ours.gguf", chunk=CHUNK, n_threads=1, process_output=True)
    upstream(gguf(kind), text, tmp_path / "theirs.gguf", "--process-output")
    ours, our_keys = read(tmp_path / "ours.gguf")
    theirs, their_keys = read(tmp_path / "theirs.gguf")
    assert our_keys.pop("general.architecture") == "imatrix"  # the writer cannot leave it out; nobody reads it
    assert our_keys == their_keys and our_keys["imatrix.chunk_count"] >= 4
    added = {name for name in ours if ".experts." in name}
    assert ours.keys() - added == theirs.keys() and "output.weight.in_sum2" in ours
    assert not any("_vl" in name for name in ours), "a text never reaches the experts for vision"
    for name, values in theirs.items():
        assert ours[name].shape == values.shape
        if name.endswith(".counts"):
            assert np.array_equal(ours[name], values), name
        else:  # upstream adds in single precision
            np.testing.assert_allclose(ours[name], values, rtol=1e-4, atol=1e-5 * values.max(), err_msg=name)


def test_number_of_chunks_can_be_limited(text: Path, tmp_path: Path) -> None:
    result = compute_imatrix(gguf("dense"), text, tmp_path / "a.gguf", chunk=CHUNK, n_chunks=2, n_threads=1)
    counts = {int(entry.counts[0]) for entry in result.entries}
    assert (result.n_chunks, counts, result.missing) == (2, {2 * CHUNK}, ())


def test_pictures_reach_the_experts_for_vision_and_no_others(text: Path, tmp_path: Path) -> None:
    options = {"chunk": CHUNK, "n_threads": 1}
    only_text = compute_imatrix(gguf("vl"), text, tmp_path / "text.gguf", **options)
    both = compute_imatrix(gguf("vl"), text, tmp_path / "both.gguf", pictures=PICTURES, **options)
    before = {entry.name: entry for entry in only_text.entries}
    after = {entry.name: entry for entry in both.entries}
    vision = {f"blk.{il}.ffn_{part}_exps_vl.weight" for il in (1, 2, 3) for part in ("up", "gate", "down")}
    assert vision <= after.keys() and not vision & before.keys()
    assert set(only_text.missing) == vision and both.missing == ()
    n_rows = 3 * (1 + 12 + 1)  # three pictures of 3 x 4 tokens between START and END
    n_used = SHAPES["vl"].n_expert_used
    for name in vision:
        assert after[name].counts.sum() == n_rows * n_used, name
        assert np.array_equal(after[name].sums.any(1), after[name].counts > 0), name
    with Llama(gguf("vl"), n_ctx=512, n_threads=1) as llm:
        messages = [[{"role": "user", "content": [picture, words]}] for picture, words in PICTURES]
        usage = [llm.create_chat_completion(m, max_tokens=1)["usage"]["prompt_tokens"] for m in messages]
    name = "blk.2.ffn_up_exps.weight"
    assert after[name].counts.sum() - before[name].counts.sum() == (sum(usage) - n_rows) * n_used


def test_sums_are_those_of_the_rows_that_an_expert_saw(tmp_path: Path) -> None:
    """gate and up see the same rows, so their sums agree; twice the picture is twice the sums."""
    once = compute_imatrix(gguf("vl"), None, tmp_path / "1.gguf", pictures=PICTURES[:1], n_threads=1)
    twice = compute_imatrix(gguf("vl"), None, tmp_path / "2.gguf", pictures=PICTURES[:1] * 2, n_threads=1)
    first = {entry.name: entry for entry in once.entries}
    for entry in twice.entries:
        np.testing.assert_allclose(entry.sums, 2 * first[entry.name].sums, rtol=1e-6)
        assert np.array_equal(entry.counts, 2 * first[entry.name].counts)
    for il in (1, 2, 3):
        up, gate = first[f"blk.{il}.ffn_up_exps_vl.weight"], first[f"blk.{il}.ffn_gate_exps_vl.weight"]
        assert np.array_equal(up.sums, gate.sums) and up.sums.max() > 0


def test_unused_experts_are_named(tmp_path: Path) -> None:
    result = compute_imatrix(gguf("vl"), None, tmp_path / "1.gguf", pictures=PICTURES[:1], n_threads=1)
    lines = report(result)
    for entry in result.entries:
        unused = [i for i in range(len(entry.counts)) if entry.counts[i] == 0]
        line = next((line for line in lines if line.startswith(f"{entry.name}: ")), None)
        assert (line is not None) == bool(unused)
        if unused:
            assert f"nothing reached {len(unused)} of 8 experts ({', '.join(map(str, unused))})" in line
    assert any(entry.unused for entry in result.entries), "the test needs an expert that nothing reached"


def test_weights_of_a_token_add_up_to_one_in_each_pool(text: Path, tmp_path: Path) -> None:
    """ERNIE divides by their sum; and the probabilities of all experts add up to one for each token of the pool."""
    result = compute_imatrix(gguf("vl"), text, tmp_path / "i.gguf", pictures=PICTURES, chunk=CHUNK, n_threads=1)
    stored, _ = read(tmp_path / "i.gguf")
    n_used = SHAPES["vl"].n_expert_used
    seen = 0
    for entry in result.entries:
        if "ffn_down_exps" not in entry.name:
            assert not entry.experts
            continue
        seen += 1
        n_tokens = entry.counts.sum() / n_used
        assert entry.experts.keys() == EXPERT_SUMS.keys()
        assert entry.experts["gate"].sum() == pytest.approx(n_tokens, rel=1e-5)
        assert entry.experts["prob"].sum() == pytest.approx(n_tokens, rel=1e-5)
        unused = entry.counts == 0
        for key, values in entry.experts.items():
            np.testing.assert_allclose(stored[f"{entry.name}.experts.{key}"], values, rtol=1e-6)
            assert key == "prob" or np.array_equal(values == 0, unused), (entry.name, key)
        used = ~unused  # for each expert: mean <= root mean square <= largest
        mean = entry.experts["gate_out"][used] / entry.experts["gate"][used]
        square = np.sqrt(entry.experts["gate2_out2"][used] / entry.experts["gate2"][used])
        assert (mean <= 1.0001 * entry.experts["out_max"][used]).all()
        assert (square <= 1.0001 * entry.experts["out_max"][used]).all()
    assert seen == 6


@pytest.mark.reference
def test_sums_of_experts_are_those_of_an_independent_forward(text: Path, tmp_path: Path) -> None:
    """Inputs of the sparse layers from transformers; routing and experts in numpy, in double precision."""
    torch, reference = pytest.importorskip("torch"), pytest.importorskip("reference")
    result = compute_imatrix(gguf("moe"), text, tmp_path / "i.gguf", chunk=CHUNK, n_chunks=4, n_threads=1)
    found = {entry.name: entry for entry in result.entries}
    with Llama(gguf("moe"), n_ctx=512, n_threads=1) as llm:
        ids = llm.tokenize(text.read_text().removesuffix("\n"), add_bos=True)
    model, inputs = reference.load(gguf("moe").parent / "hf"), {il: [] for il in (1, 2, 3)}
    hooks = [
        model.model.layers[il].mlp.register_forward_hook(lambda _, args, __, il=il: inputs[il].append(args[0][0]))
        for il in inputs
    ]
    try:
        with torch.no_grad():
            for i in range(4):
                chunk = ids[i * CHUNK : (i + 1) * CHUNK]
                model(torch.tensor([chunk]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    weights = checkpoints.weights_of("moe", tied=False)
    for il, rows in inputs.items():
        x = torch.cat(rows).double().numpy()
        stem = f"model.layers.{il}.mlp"
        raw = x @ weights[f"{stem}.gate.weight"].T.astype(float)
        prob = np.exp(raw - raw.max(1, keepdims=True))
        prob /= prob.sum(1, keepdims=True)
        biased = prob + weights[f"{stem}.moe_statics.e_score_correction_bias"]
        chosen = np.argsort(-biased, axis=1)[:, :3]
        gate = np.take_along_axis(prob, chosen, 1)
        gate /= gate.sum(1, keepdims=True)
        entry = found[f"blk.{il}.ffn_down_exps.weight"]
        close = {"rtol": 2e-3, "atol": 0}  # a token near a tie may go elsewhere in single precision
        np.testing.assert_allclose(entry.experts["prob"], prob.sum(0), **close)
        for e in range(8):
            up, gated, down = (
                weights[f"{stem}.experts.{e}.{w}_proj.weight"].astype(float) for w in ("up", "gate", "down")
            )
            row, column = np.nonzero(chosen == e)
            g, hidden = gate[row, column], x[row] @ gated.T
            out = np.linalg.norm((hidden / (1 + np.exp(-hidden)) * (x[row] @ up.T)) @ down.T, axis=1)
            assert entry.counts[e] == len(row)
            expected = {
                "gate": g.sum(),
                "gate2": (g**2).sum(),
                "gate_out": (g * out).sum(),
                "gate2_out2": (g**2 * out**2).sum(),
                "out_max": out.max(),
            }
            for key, value in expected.items():
                np.testing.assert_allclose(entry.experts[key][e], value, err_msg=f"{il} {e} {key}", **close)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VL model whose rows fit the types that demand an importance matrix."""
    home = tmp_path_factory.mktemp("wide")
    sizes = {"n_layer": 2, "n_ff": 512, "n_ff_exp": 256, "n_ff_exp_vl": 256, "n_expert": 4, "n_expert_used": 2}
    shape = shape_with("vl", **sizes, v_depth=1)
    source = checkpoints.write_checkpoint(home / "hf", "vl", shape=shape, tied=False)
    return convert(source, home / "wide.gguf", type="f32").model


def test_quantizing_to_two_bits_needs_the_pictures(wide: Path, text: Path, tmp_path: Path) -> None:
    compute_imatrix(wide, text, tmp_path / "text.gguf", chunk=CHUNK, n_chunks=2, n_threads=1)
    compute_imatrix(wide, text, tmp_path / "both.gguf", chunk=CHUNK, n_chunks=2, n_threads=1, pictures=PICTURES)

    def quantize(matrix: str, type_: str) -> subprocess.CompletedProcess[str]:
        words = ["--imatrix", tmp_path / matrix, wide, tmp_path / "out.gguf", type_, 1]
        return programs.run("llama-quantize", words, check=False, capture=True, timeout=120)

    done = quantize("text.gguf", "q2_k_s")
    assert done.returncode != 0 and "_vl.weight" in done.stdout + done.stderr
    done = quantize("both.gguf", "q2_k_s")
    assert done.returncode == 0, done.stderr[-400:]
    with_sums = (tmp_path / "out.gguf").read_bytes()
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf_py.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.1.ffn_up_exps_vl.weight"] == kinds["blk.1.ffn_up_exps.weight"] == "Q2_K"
    assert any(".experts." in name for name in read(tmp_path / "both.gguf")[0])
    options = {"chunk": CHUNK, "n_chunks": 2, "n_threads": 1, "pictures": PICTURES, "experts": False, "overwrite": True}
    compute_imatrix(wide, text, tmp_path / "both.gguf", **options)
    assert not any(".experts." in name for name in read(tmp_path / "both.gguf")[0])
    quantize("both.gguf", "q2_k_s")
    assert (tmp_path / "out.gguf").read_bytes() == with_sums, "upstream's program skips the sums of experts"


def test_wrong_input_is_an_error_and_leaves_no_file(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    for error, match, arguments in [
        (InputError, "nothing to run", (gguf("dense"), None, out, {})),
        (InputError, "a chunk takes 100000", (gguf("dense"), text, out, {"chunk": 100000})),
        (UnsupportedInputError, "takes no pictures", (gguf("dense"), None, out, {"pictures": PICTURES})),
        (MediaError, "nowhere.png", (gguf("vl"), None, out, {"pictures": [("nowhere.png", "?")]})),
        (FileNotFoundError, "nowhere.txt", (gguf("dense"), tmp_path / "nowhere.txt", out, {})),
        (InputError, "is not a folder", (gguf("dense"), text, tmp_path / "none" / "out.gguf", {})),
        (
            InputError,
            "the context holds 4096",
            (gguf("vl"), None, out, {"pictures": [(PICTURES[0][0], "red " * 9000)]}),
        ),
    ]:
        *words, options = arguments
        with pytest.raises(error, match=match):
            compute_imatrix(*words, n_threads=1, **options)
    out.write_bytes(b"precious")
    with pytest.raises(InputError, match="exists"):
        compute_imatrix(gguf("dense"), text, out, chunk=CHUNK, n_threads=1)
    assert out.read_bytes() == b"precious" and [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_verb_takes_a_folder_of_pictures_and_warns(text: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, (pixels, _) in enumerate(PICTURES):
        PIL.Image.fromarray(pixels).save(photos / f"{i}.png")
    (photos / "notes.txt").write_text("not a picture")
    base = ["-m", gguf("vl"), "-f", text, "--chunk", CHUNK, "--chunks", 1]
    done = verb.run("imatrix", "--threads", 1, *base, "--images", photos, "-o", "a.gguf", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("1 chunks of 128 tokens, 3 pictures"), done.stderr
    assert "_exps_vl.weight: nothing reached" in done.stderr and "have no statistics" not in done.stderr
    done = verb.run("imatrix", "--threads", 1, *base, "-o", "b.gguf", cwd=tmp_path)
    assert done.returncode == 0 and "9 matrices for vision have no statistics; they need pictures" in done.stderr
    pairs = ["--image", photos / "0.png", "--prompt", "red?", "--image", photos / "1.png", "--prompt", "star?"]
    done = verb.run("imatrix", "--threads", 1, "-m", gguf("vl"), *pairs, "-o", "c.gguf", cwd=tmp_path)
    assert done.returncode == 0 and "2 pictures" in done.stdout
    assert {path.name for path in tmp_path.glob("*.gguf")} == {"a.gguf", "b.gguf", "c.gguf"}


def test_wrong_words_are_one_line_with_the_documented_code(text: Path, tmp_path: Path) -> None:
    base = ["-m", gguf("vl"), "-o", tmp_path / "x.gguf"]
    for words, code, match in [
        (base, 2, "nothing to run"),
        ([*base, "-f", text, "--chunk", 8], 2, "--chunk"),
        (
            [*base, "--image", "a", "--image", "b", "--image", "c", "--prompt", "p", "--prompt", "q"],
            2,
            "2 --prompt for 3",
        ),
        ([*base, "--images", text.parent], 1, "holds no pictures"),
        ([*base, "-f", tmp_path / "nowhere.txt"], 4, "nowhere.txt"),
        ([*base, "--image", "nowhere.png"], 4, "nowhere.png"),
    ]:
        done = verb.run("imatrix", "--threads", 1, *words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (code, "") and match in done.stderr, (words, done.stderr)
        assert done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_ctrl_c_leaves_no_file(tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("What is in the picture? " * 200_000)
    command = verb.command("imatrix", "--threads", 1, "-m", gguf("moe"), "-f", text, "-o", "out.gguf")
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 30
        while "moe.gguf" not in Path(f"/proc/{process.pid}/maps").read_text():  # until the model is loaded
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.3)
        assert process.poll() is None, "the text is too short for this test"
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and out == b"" and b"Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]

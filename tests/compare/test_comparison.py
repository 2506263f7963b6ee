"""`pyllamaernie compare`: figures by hand and as llama-perplexity has them, pictures as `Llama.logits`."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import checkpoints
import numpy as np
import PIL.Image
import pytest
import verb
from checkpoint_shapes import shape_with
from gguf_models import QUESTION, gguf, image_ids, picture, question, random_words

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import Llama, programs
from pyllamaernie.compare import model as compare_model
from pyllamaernie.compare import run as compare_run
from pyllamaernie.compare.comparison import compare
from pyllamaernie.compare.divergence import Rows, kl_rows, mean_interval, nll_rows, ratio_interval
from pyllamaernie.compare.table import N_ANSWER
from pyllamaernie.convert import convert
from pyllamaernie.errors import InputError, PyllamaernieError, UnsupportedInputError
from pyllamaernie.gguf.header import read_header

CTX = 128
FAST = {"n_ctx": CTX, "n_threads": 1, "speed_runs": 0}
PICTURES = [(picture(84, 112, seed=seed), QUESTION) for seed in range(2)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_words(tmp_path_factory.mktemp("compare") / "text.txt", 700)


def quantized(kind: str, type_: str) -> Path:
    path = gguf(kind).with_name(f"{kind}-{type_}.gguf")
    if not path.is_file():
        programs.run("llama-quantize", ["--pure", gguf(kind), path, type_, 1], capture=True, timeout=60)
    return path


def test_kl_and_nll_are_those_of_the_definition() -> None:
    p, q = np.log([[1 / 2, 1 / 2], [1 / 4, 3 / 4]]), np.log([[1 / 4, 3 / 4], [3 / 4, 1 / 4]])
    kl, same = kl_rows(p.astype(np.float32) + np.float32(3), q.astype(np.float32) - np.float32(7))
    by_hand = [np.log(2) / 2 + np.log(2 / 3) / 2, np.log(1 / 3) / 4 + 3 * np.log(3) / 4]
    np.testing.assert_allclose(kl, by_hand, rtol=1e-6)
    assert same.tolist() == [False, False]
    np.testing.assert_allclose(nll_rows(q.astype(np.float32), [1, 0]), -np.log([3 / 4, 3 / 4]), rtol=1e-6)


def test_tiny_differences_are_measured_and_equal_rows_are_exactly_zero() -> None:
    """For small steps KL is half the variance of the step under p; llama-perplexity's floor is near 1e-4."""
    rng = np.random.default_rng(0)
    a = rng.normal(0, 3, (70, 100_000)).astype(np.float32)  # more than one block of rows
    b = a + rng.normal(0, 1e-4, a.shape).astype(np.float32)
    p = np.exp(a.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    step = b.astype(np.float64) - a
    expected = ((p * step**2).sum(1) - (p * step).sum(1) ** 2) / 2
    kl, same = kl_rows(a, b)
    np.testing.assert_allclose(kl, expected, rtol=1e-2)
    assert kl.max() < 2e-8 and same.all()
    assert not kl_rows(a, a)[0].any()


def test_interval_has_the_width_of_independent_chunks_and_is_missing_for_few() -> None:
    rng = np.random.default_rng(1)
    sums, n_rows = rng.normal(10, 2, 400), np.full(400, 50)
    low, high = mean_interval(sums, n_rows)
    half = 1.96 * (sums / 50).std() / 20
    assert low == pytest.approx(sums.mean() / 50 - half, abs=half / 10)
    assert high == pytest.approx(sums.mean() / 50 + half, abs=half / 10)
    assert mean_interval(sums[:7], n_rows[:7]) is None and mean_interval(sums[:8], n_rows[:8]) is not None


def test_ratio_is_paired_by_chunk() -> None:
    """Twice the KL in every chunk is a ratio of two without any doubt, however much the chunks differ."""
    a, b = Rows(), Rows()
    for number, scale in enumerate(np.random.default_rng(2).lognormal(0, 1, 30)):
        kl = np.random.default_rng(number).random(20) * scale
        a.add(number, 2 * kl, kl > 0)
        b.add(number, kl[:5], kl[:5] > 0)  # in two pieces
        b.add(number, kl[5:], kl[5:] > 0)
    ratio, interval = ratio_interval(a.divergence(), b.divergence())
    assert ratio == pytest.approx(2) and interval == pytest.approx((2, 2))
    assert b.divergence().chunk_rows == (20,) * 30


@pytest.mark.parametrize("kind", ["dense", "vl"])
def test_text_agrees_with_llama_perplexity(kind: str, text: Path, tmp_path: Path) -> None:
    other = quantized(kind, "q4_0")
    base = ["-f", text, "-c", CTX, "-b", CTX, "-t", 1, "--kl-divergence-base", tmp_path / "base"]
    programs.run("llama-perplexity", ["-m", gguf(kind), *base], capture=True, timeout=60)
    done = programs.run("llama-perplexity", ["-m", other, *base, "--kl-divergence"], capture=True, timeout=60)

    def theirs(label: str) -> float:
        return float(re.search(rf"^{label} *: *(\S+)", done.stdout + done.stderr, re.MULTILINE)[1])

    def their_error(label: str) -> float:
        return float(re.search(rf"^{label} *: .* ± *(\S+)", done.stdout + done.stderr, re.MULTILINE)[1])

    table = compare([gguf(kind), other], text, **FAST)
    reference, ours = table.models
    assert table.n_chunks >= 8 and ours.text.n_rows == table.n_chunks * (CTX // 2 - 1)
    pairs = {"Mean    KLD": ours.text.mean, "Median  KLD": ours.text.median, "99.0%   KLD": ours.text.p99}
    pairs |= {"99.9%   KLD": ours.text.p999, "Maximum KLD": ours.text.max}
    for label, value in pairs.items():  # they keep the reference in 16 bits, and print six decimals
        assert value == pytest.approx(theirs(label), rel=1e-3, abs=1e-4), label
    assert 100 * ours.text.same_top == pytest.approx(theirs("Same top p"), abs=0.2)
    # theirs of the reference is cut off at exp(-16), which matters to a random model; this one is not
    label = r"Mean PPL\(Q\)"
    assert ours.perplexity == pytest.approx(theirs(label), rel=1e-4)
    assert ours.perplexity_error == pytest.approx(their_error(label), rel=1e-4)
    low, high = ours.text.interval
    assert low < ours.text.mean < high
    assert reference.text.mean == 0 and reference.text.same_top == 1


def test_a_model_against_itself_is_exactly_zero_and_better_types_are_nearer(text: Path) -> None:
    files = [gguf("vl"), gguf("vl"), quantized("vl", "q8_0"), quantized("vl", "q4_0")]
    table = compare(files, text, images=PICTURES, **FAST)
    for kind in ("text", "pictures"):
        itself, q8, q4 = (getattr(model, kind) for model in table.models[1:])
        assert (itself.mean, itself.max, itself.same_top) == (0.0, 0.0, 1.0)
        assert 0 < q8.mean < q4.mean and q4.same_top < q8.same_top <= 1
    assert [model.same_answers for model in table.models[:2]] == [1.0, 1.0]
    assert table.models[0].perplexity == table.models[1].perplexity
    ratio, (low, high) = table.kl_ratio(2, 3)
    assert ratio == pytest.approx(table.models[2].text.mean / table.models[3].text.mean) and low < ratio < high < 1
    with pytest.raises(InputError, match=r"no ratio to .*vl\.gguf: its KL is 0"):
        table.kl_ratio(3, 1)


def test_chunks_longer_than_a_piece_give_the_rows_of_one_pass(text: Path) -> None:
    """700 tokens in pieces of 512: the same mean as from all logits at once."""
    other = quantized("dense", "q4_0")
    table = compare([gguf("dense"), other], text, **{**FAST, "n_ctx": 700}, n_chunks=1)
    rows = []
    for path in (gguf("dense"), other):
        with Llama(path, n_ctx=64, n_threads=1) as llm:
            ids = llm.tokenize(text.read_text().removesuffix("\n"), add_bos=True)[:700]
            rows.append(llm.logits(ids)[350:699].astype(np.float64))
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in rows)
    kl = (np.exp(p) * (p - q)).sum(1)
    assert table.models[1].text.n_rows == 349 and table.models[1].text.interval is None
    assert table.models[1].text.mean == pytest.approx(kl.mean(), rel=1e-3)  # f16 cache, other batches
    nll = -q[np.arange(349), ids[351:700]].mean()
    assert table.models[1].perplexity == pytest.approx(np.exp(nll), rel=1e-3)


def test_files_that_do_not_fit_together_give_the_same_table(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [gguf("vl"), quantized("vl", "q8_0"), quantized("vl", "q4_0")]
    options = {**FAST, "n_chunks": 2, "images": PICTURES[:1]}
    together = compare(files, text, **options)
    assert compare_run._groups([5, 4, 3]) == [[0, 1, 2]]
    monkeypatch.setattr(compare_run, "free_memory_bytes", lambda: 0)
    assert compare_run._groups([5, 4, 3]) == [[0, 1], [0, 2]]
    assert compare(files, text, **options) == together


def test_picture_rows_are_those_of_llama_logits_and_the_answer_is_the_engines() -> None:
    files = [gguf("vl"), quantized("vl", "q8_0")]
    image, words = PICTURES[0]
    table = compare(files, None, images=PICTURES[:1], **FAST)
    found = table.models[1].pictures
    assert table.models[1].text is None and table.models[1].perplexity is None
    rows: list[np.ndarray] = []
    for path in files:
        with Llama(path, mmproj=gguf("vl").with_name("mmproj-vl.gguf"), n_ctx=512, n_threads=1) as llm:
            head = [*llm.tokenize("<|begin_of_sentence|>User: Picture 1:", special=True), *image_ids(3, 4)]
            tail = llm.tokenize(words + "\nAssistant: ")
            if not rows:
                said = llm.create_chat_completion(question(image, words), temperature=0, max_tokens=N_ANSWER)
                answer = greedy(llm, [*head, *tail], image)
                text = llm.detokenize(answer).decode("utf-8", "replace")
                theirs = said["choices"][0]["message"]["content"]  # without half a character at its end
                assert text.rstrip("\ufffd").strip() == theirs.rstrip("\ufffd") and len(theirs) > 4
            rows.append(llm.logits([*head, *tail, *answer], images=[image])[len(head) :])
    kl, same = kl_rows(*rows)
    assert found.n_rows == len(tail) + len(answer) == len(kl)
    assert found.mean == pytest.approx(kl.mean(), rel=1e-2)  # other batches, and an f16 cache
    assert found.same_top == same.mean()
    assert table.models[1].same_answers == float(same[len(tail) - 1 :].all())


def greedy(llm: Llama, ids: list[int], image: np.ndarray) -> list[int]:
    answer: list[int] = []
    while len(answer) < N_ANSWER:
        token = int(llm.logits([*ids, *answer], images=[image])[-1].argmax())
        if token in (llm.token_eos(), llm.token_eot()):
            break
        answer.append(token)
    return answer


def test_same_answers_looks_at_the_answer_and_not_at_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_model, "N_ANSWER", 1)
    files, asked = [gguf("vl"), quantized("vl", "q8_0")], "What is in the picture? " * 8
    pictures = [(image, asked) for image, _ in PICTURES]
    model = compare(files, None, images=pictures, **FAST).models[1]
    says = []
    for path in files:
        with Llama(path, mmproj=gguf("vl").with_name("mmproj-vl.gguf"), n_ctx=512, n_threads=1) as llm:
            options = {"temperature": 0, "max_tokens": 2, "logprobs": True}
            answers = [llm.create_chat_completion(question(image, asked), **options) for image, _ in pictures]
            says.append([[t["id"] for t in a["choices"][0]["logprobs"]["content"]] for a in answers])
    assert model.same_answers == np.mean([a == b for a, b in zip(*says, strict=True)])
    assert model.same_answers == 1 > model.pictures.same_top, "the test needs a question on whose rows the files differ"


def test_a_file_without_a_projector_beside_it_takes_the_references(tmp_path: Path) -> None:
    lonely = tmp_path / "other.gguf"
    shutil.copy(quantized("vl", "q4_0"), lonely)
    table = compare([gguf("vl"), lonely], None, images=PICTURES[:1], **FAST)
    assert table.models[1].pictures.mean > 0
    with pytest.raises(UnsupportedInputError, match=r"other\.gguf has no projector"):
        compare([lonely, gguf("vl")], None, images=PICTURES[:1], **FAST)


def test_table_holds_sizes_speed_and_every_chunk(text: Path) -> None:
    other = quantized("dense", "q4_0")
    table = compare([gguf("dense"), other], text, **{**FAST, "speed_runs": 1})
    for model, path in zip(table.models, (gguf("dense"), other), strict=True):
        assert model.size_bytes == path.stat().st_size
        assert model.prefill_tps > 0 and model.decode_tps > 0
    assert table.models[0].bpw == 32 and 4.5 <= table.models[1].bpw < 4.7
    data = json.loads(table.to_json())
    assert data["format"] == 1 and data["n_chunks"] == len(data["models"][1]["text"]["chunk_sums"])
    assert data["models"][1]["text"]["mean"] == table.models[1].text.mean
    lines = table.to_markdown().splitlines()
    assert lines[0].startswith("| file ") and "reference" in lines[2] and "dense-q4_0.gguf" in lines[3]
    assert len({line.count("|") for line in lines[:4]}) == 1


def test_sizes_of_a_split_model_are_those_of_all_parts(text: Path, tmp_path: Path) -> None:
    words = ["--split", "--split-max-tensors", 20, gguf("dense"), tmp_path / "part"]
    programs.run("llama-gguf-split", words, capture=True, timeout=60)
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 1
    table = compare([gguf("dense"), parts[0]], text, **FAST, n_chunks=1)
    assert table.models[1].size_bytes == sum(path.stat().st_size for path in parts)
    assert table.models[1].bpw == 32 and table.models[1].text.max == 0


def test_plot_is_written_in_each_format(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    files = [gguf("vl"), quantized("vl", "q8_0"), quantized("vl", "q4_0"), gguf("vl")]
    table = compare(files, text, images=PICTURES, **FAST)
    table.plot(tmp_path / "a.png")
    table.plot(tmp_path / "a.svg")
    with PIL.Image.open(tmp_path / "a.png") as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 20)) > 10
    drawing = (tmp_path / "a.svg").read_text()
    for words in ("vl-q8_0.gguf", "vl-q4_0.gguf", "mean KL to the reference", "KL 0: ", "pictures"):
        assert words in drawing, words


def test_only_files_of_one_vocabulary_are_compared(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    data = gguf("dense").read_bytes()
    name = "\u2581circle".encode()
    assert data.count(name) >= 1
    other.write_bytes(data.replace(name, "\u2581cirkle".encode(), 1))
    with pytest.raises(InputError, match=r"token \d+ is b'.*circle' in .*dense\.gguf and b'.*cirkle' in .*other\.gguf"):
        compare([gguf("dense"), other], text, **FAST)
    key = data.index(b"tokenizer.ggml.scores") + len(b"tokenizer.ggml.scores")
    assert struct.unpack_from("<IIQ", data, key) == (9, 6, 512)  # array of float32
    scores = np.frombuffer(data, np.float32, 512, key + 16)
    other.write_bytes(data[: key + 16] + (-scores).tobytes() + data[key + 16 + 4 * 512 :])  # merges in another order
    with pytest.raises(InputError, match=r"dense\.gguf and .*other\.gguf cut the text into different tokens"):
        compare([gguf("dense"), other], text, **FAST)
    shape = shape_with("dense", n_vocab=520, n_layer=1)
    source = checkpoints.write_checkpoint(tmp_path / "hf", "dense", shape=shape, tied=False)
    larger = convert(source, tmp_path / "larger.gguf", type="f32").model
    with pytest.raises(InputError, match=r"dense\.gguf has 512 tokens, .*larger\.gguf has 520: only"):
        compare([gguf("dense"), larger], text, **FAST)


def test_logits_that_are_not_finite_name_their_file(text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    shutil.copy(gguf("dense"), broken)
    header = read_header(broken)
    size = broken.stat().st_size
    n_data = max(offset + n_bytes for _, _, _, offset, n_bytes in header.tensors)
    first = next(offset for name, _, _, offset, _ in header.tensors if name == "output_norm.weight")
    with open(broken, "r+b") as file:
        file.seek(first if n_data == size else size - n_data + first)
        file.write(struct.pack("<f", float("nan")))
    with pytest.raises(PyllamaernieError, match=r"broken\.gguf: logits that are not finite"):
        compare([gguf("dense"), broken], text, **FAST)


def test_wrong_input_is_an_error(text: Path, tmp_path: Path) -> None:
    pair = [gguf("dense"), gguf("dense")]
    for error, match, files, words, options in [
        (InputError, "at least two files, got 1", pair[:1], text, {}),
        (InputError, "nothing to run", pair, None, {}),
        (InputError, "a chunk takes 4000", pair, text, {"n_ctx": 4000}),
        (InputError, "was trained for 4096", pair, text, {"n_ctx": 100_000}),
        (InputError, "n_chunks at least 1", pair, text, {"n_chunks": 0}),
        (UnsupportedInputError, "takes no pictures", pair, text, {"images": PICTURES}),
        (FileNotFoundError, "nowhere.gguf", [pair[0], tmp_path / "nowhere.gguf"], text, {}),
        (FileNotFoundError, "nowhere.txt", pair, tmp_path / "nowhere.txt", {}),
    ]:
        with pytest.raises(error, match=match):
            compare(files, words, **{**FAST, **options})


def test_verb_prints_the_table_and_writes_json(text: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, (pixels, _) in enumerate(PICTURES):
        PIL.Image.fromarray(pixels).save(photos / f"{i}.png")
    base = [gguf("vl"), quantized("vl", "q8_0"), "-f", text, "--ctx", CTX, "--chunks", 2, "--speed-runs", 1]
    pictures = ["--images", photos, "--image", photos / "0.png", "--prompt", "red?"]
    done = verb.run("compare", "--threads", 1, *base, *pictures, "--json", "o", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "Text: 2 chunks of 128 tokens, 126 rows" in done.stdout and "Pictures: 3, " in done.stdout
    data = json.loads((tmp_path / "o").read_text())
    assert (data["n_chunks"], data["n_pictures"]) == (2, 3) and data["models"][1]["decode_tps"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "o"}


def test_wrong_words_are_one_line_with_the_documented_code(text: Path, tmp_path: Path) -> None:
    pair = [gguf("dense"), gguf("dense")]
    for words, code, match in [
        (pair, 2, "nothing to run"),
        ([*pair, "-f", text, "--ctx", 2], 2, "--ctx is a whole number from 4 up, got 2"),
        ([*pair, *"--image a --image b --image c --prompt p --prompt q".split()], 2, "2 --prompt for 3"),
        ([*pair, "-f", text, "--json", "none/o.json"], 1, "none is not a folder"),
        ([*pair, "-f", text, "--plot", "o.gif"], 1, "a plot ends in .png, .svg, .pdf"),
        ([pair[0], "nowhere.gguf", "-f", text], 4, "nowhere.gguf"),
    ]:
        done = verb.run("compare", "--threads", 1, *words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (code, "") and match in done.stderr, (words, done.stderr)
        assert done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())

"""The streaming writer: llama-quantize's bytes for any recipe and number of threads, and the same after a kill."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import gguf as gguf_py
import gguf_models
import numpy as np
import pytest

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import _upstream, programs
from pyllamaernie.convert import convert
from pyllamaernie.errors import (
    CancelledError,
    CorruptModelError,
    DiskSpaceError,
    InputError,
    ModelNotFoundError,
    QuantizeError,
)
from pyllamaernie.quant import native, writer
from pyllamaernie.quant.importance import read_importance
from pyllamaernie.quant.job import plan_job
from pyllamaernie.quant.journal import journal_path, part_path
from pyllamaernie.quant.source import gguf_source
from pyllamaernie.quant.writer import Progress, write_quantized

SHAPE = checkpoints.Shape(
    n_vocab=512, n_embd=256, n_head=4, n_head_kv=1, head_dim=64, n_layer=2, n_ff=256, n_expert=3, n_expert_used=2,
    n_shared=1, n_ff_exp=256,
)  # fmt: skip
FAST = ["Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q3_K", "IQ3_S", "IQ4_XS", "MXFP4", "BF16"]
KNOWN = set(_upstream.TensorType.__members__)  # the gguf package may lack the newest: Q2_0
ALL = [t for t in native.TYPES if t in KNOWN - {"F32", "F16"} and not t.startswith(("CCQ", "TQ"))]


@pytest.fixture(scope="module")
def home() -> Path:
    return gguf_models.subfolder("writer")


@pytest.fixture(scope="module")
def folder(home: Path) -> Path:
    return checkpoints.write_checkpoint(home / "hf", "moe", shape=SHAPE, tied=False)


@pytest.fixture(scope="module")
def model(home: Path, folder: Path) -> Path:
    return convert(folder, home / "bf16.gguf", type="bf16").model


@pytest.fixture(scope="module")
def imatrix(home: Path, model: Path) -> Path:
    """Random importance of every matrix; in each expert tensor nothing reached one expert."""
    rng = np.random.default_rng(3)
    tensors = []
    for w in gguf_source(model).weights:
        if len(w.shape) > 1:
            counts = rng.integers(1, 900, (w.n_matrices, 1)).astype(np.float32)
            counts[-1] = 0 if w.n_matrices > 1 else counts[-1]
            sums = rng.lognormal(size=(w.n_matrices, w.n_cols)).astype(np.float32) * counts
            for suffix, data in (("in_sum2", sums), ("counts", counts)):
                data = data[0] if len(data) == 1 else data
                tensors.append(
                    _upstream.OutTensor(
                        f"{w.name}.{suffix}", data.shape, _upstream.TensorType.F32, lambda data=data: iter((data,))
                    )
                )
    keys = [
        _upstream.Key("general.type", "str", "imatrix"),
        _upstream.Key("imatrix.datasets", "list", ["a text"]),
        _upstream.Key("imatrix.chunk_count", "u32", 7),
        _upstream.Key("imatrix.chunk_size", "u32", 128),
    ]
    _upstream.write_gguf(home / "imatrix.gguf", "imatrix", keys, tensors)
    return home / "imatrix.gguf"


def random_types(model: Path, seed: int, choices: list[str]) -> dict[str, str]:
    rng = random.Random(seed)
    some = rng.sample(choices, min(5, len(choices)))
    return {
        w.name: rng.choice(some)
        for w in gguf_source(model).weights
        if len(w.shape) > 1 and w.name.endswith(".weight") and "_norm" not in w.name and "gate_inp" not in w.name
    }


def stock(model: Path, types: dict[str, str], out: Path, imatrix: Path | None, n_threads: int = 2) -> Path:
    recipe = out.with_suffix(".txt")
    recipe.write_text("".join(f"^{re.escape(name)}$={kind.lower()}\n" for name, kind in types.items()))
    words = ["--tensor-type-file", recipe, *(["--imatrix", imatrix] if imatrix else [])]
    programs.run("llama-quantize", [*words, model, out, "Q8_0", n_threads], capture=True)
    return out


def payload(path: Path) -> dict[str, tuple]:
    return {
        t.name: (tuple(n for n in t.shape.tolist() if n > 1), t.tensor_type, np.ascontiguousarray(t.data).tobytes())
        for t in gguf_py.GGUFReader(path).tensors
    }


def leftovers(output: Path) -> list[Path]:
    return [path for path in (output, part_path(output), journal_path(output)) if path.exists()]


# ---- the bytes


def same_as_stock(model: Path, imatrix: Path | None, tmp: Path, seed: int, choices: list[str], threads: tuple) -> None:
    types = random_types(model, seed, choices)
    expected = payload(stock(model, types, tmp / "stock.gguf", imatrix))
    importance = None if imatrix is None else read_importance(imatrix)
    for n in threads:
        out = tmp / "ours.gguf"
        write_quantized(gguf_source(model), types, out, importance=importance, n_threads=n, overwrite=True)
        got = payload(out)
        assert got.keys() == expected.keys()
        assert not [name for name in got if got[name] != expected[name]], (seed, n)


@pytest.mark.parametrize(("seed", "n_threads", "with_imatrix"), [(0, 1, False), (1, 2, True), (2, 7, True)])
def test_payloads_are_those_of_llama_quantize(
    seed: int, n_threads: int, with_imatrix: bool, model: Path, imatrix: Path, tmp_path: Path
) -> None:
    same_as_stock(model, imatrix if with_imatrix else None, tmp_path, seed, FAST, (n_threads,))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_payloads_are_those_of_llama_quantize_for_any_recipe(
    seed: int, model: Path, imatrix: Path, tmp_path: Path
) -> None:
    same_as_stock(model, imatrix, tmp_path, seed, ALL, (1, 2, 7))


@pytest.mark.parametrize("type_name", ["f16", pytest.param("f32", marks=pytest.mark.slow)])
def test_sources_of_other_float_types_too(type_name: str, folder: Path, tmp_path: Path) -> None:
    model = convert(folder, tmp_path / "source.gguf", type=type_name).model
    same_as_stock(model, None, tmp_path, 5, FAST, (2,))


def test_a_split_source_gives_the_same_file(model: Path, tmp_path: Path) -> None:
    programs.run("llama-gguf-split", ["--split", "--split-max-tensors", 9, model, tmp_path / "part"], capture=True)
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 2
    types = random_types(model, 1, FAST)
    write_quantized(gguf_source(model), types, tmp_path / "whole.gguf")
    write_quantized(gguf_source(parts[1]), types, tmp_path / "split.gguf")
    assert payload(tmp_path / "whole.gguf") == payload(tmp_path / "split.gguf")
    assert "split.count" not in gguf_py.GGUFReader(tmp_path / "split.gguf").fields
    parts[0].unlink()
    with pytest.raises(ModelNotFoundError, match="00001-of"):
        gguf_source(parts[1])


def test_our_types_are_those_of_llama_quantize(model: Path, tmp_path: Path) -> None:
    types = {"blk.0.attn_k.weight": "CCQ2", "blk.0.attn_v.weight": "CCQ2_75"}
    others = {name: "Q8_0" for name in random_types(model, 0, FAST)}
    expected = payload(stock(model, others | types, tmp_path / "stock.gguf", None))
    write_quantized(gguf_source(model), others | types, tmp_path / "ours.gguf")
    assert payload(tmp_path / "ours.gguf") == expected


def test_the_metadata_say_what_was_done(model: Path, imatrix: Path, tmp_path: Path) -> None:
    types = dict.fromkeys(random_types(model, 0, FAST), "Q4_K")
    result = write_quantized(
        gguf_source(model), types, tmp_path / "out.gguf", importance=read_importance(imatrix), n_threads=1
    )
    fields = {k: f.contents() for k, f in gguf_py.GGUFReader(result.path).fields.items()}
    assert fields["general.file_type"] == gguf_py.LlamaFileType.MOSTLY_Q4_K_M
    assert fields["general.quantization_version"] == gguf_py.GGML_QUANT_VERSION
    assert fields["quantize.recipe.bpw"] == pytest.approx(result.bpw, abs=1e-3)
    assert re.fullmatch("[0-9a-f]{64}", fields["quantize.recipe.hash"])
    assert fields["quantize.recipe.tool"].startswith("pyllamaernie ")
    assert fields["quantize.imatrix.file"] == "imatrix.gguf" and fields["quantize.imatrix.dataset"] == "a text"
    assert fields["quantize.imatrix.chunks_count"] == 7
    assert fields["quantize.imatrix.entries_count"] == len(read_importance(imatrix).columns)
    assert result.n_bytes == result.path.stat().st_size
    assert result.bpw == 8 * sum(t.n_bytes for t in gguf_py.GGUFReader(result.path).tensors) / result.n_params
    assert any("nothing reached" in line for line in result.warnings)


def test_what_is_asked_to_stay_is_copied(model: Path, tmp_path: Path) -> None:
    write_quantized(gguf_source(model), {}, tmp_path / "copy.gguf")
    assert payload(tmp_path / "copy.gguf") == payload(model)


def test_a_quantized_source_needs_permission(model: Path, tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    write_quantized(gguf_source(model), {name: "Q8_0"}, tmp_path / "q8.gguf")
    source = gguf_source(tmp_path / "q8.gguf")
    with pytest.raises(InputError, match=r"attn_q.weight is Q8_0 already; making Q4_K of it loses more"):
        write_quantized(source, {name: "Q4_K"}, tmp_path / "q4.gguf")
    assert write_quantized(source, {name: "Q4_K"}, tmp_path / "q4.gguf", allow_requantize=True).path.exists()


# ---- interruptions


@pytest.fixture
def slow_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces take 20 ms each, so that an interruption comes in the middle of a small model."""
    encoded = writer._encoded

    def slowly(*args):
        time.sleep(0.02)
        return encoded(*args)

    monkeypatch.setattr(writer, "_encoded", slowly)


def stop_after(n: int):
    """An on_progress that cancels once a few pieces are written."""

    def on_progress(progress: Progress) -> bool:
        return progress.stage != "write" or progress.n_bytes < n

    return on_progress


@pytest.mark.usefixtures("slow_pieces")
def test_a_cancelled_job_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    types = dict.fromkeys(random_types(model, 0, FAST), "Q5_K")
    whole = write_quantized(gguf_source(model), types, tmp_path / "whole.gguf", n_threads=1).path.read_bytes()
    out = tmp_path / "out.gguf"
    with pytest.raises(CancelledError):
        write_quantized(gguf_source(model), types, out, n_threads=1, on_progress=stop_after(100_000))
    assert not out.exists() and part_path(out).stat().st_size == len(whole)
    lines = journal_path(out).read_bytes()
    assert 2 < lines.count(b"\n") < len(gguf_source(model).weights)

    # a torn last line, and a piece whose bytes never reached the disk
    journal_path(out).write_bytes(lines + b"[3,0,")
    number, row, _, _ = json.loads(lines.splitlines()[-1])
    tensor = plan_job(gguf_source(model), types, out).tensors[number]
    with part_path(out).open("r+b") as file:
        file.seek(tensor.offset + row * tensor.row_bytes)
        file.write(bytes(16))
    result = write_quantized(gguf_source(model), types, out, n_threads=3)
    assert out.read_bytes() == whole and 0 < result.n_bytes_kept < len(whole)
    assert leftovers(out) == [out]


@pytest.mark.usefixtures("slow_pieces")
def test_another_job_does_not_go_on_from_it(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    types = dict.fromkeys(random_types(model, 0, FAST), "Q5_K")
    with pytest.raises(CancelledError):
        write_quantized(gguf_source(model), types, out, n_threads=1, on_progress=stop_after(100_000))
    other = types | {"blk.0.attn_q.weight": "IQ4_XS"}
    result = write_quantized(gguf_source(model), other, out)
    assert result.n_bytes_kept == 0
    write_quantized(gguf_source(model), other, tmp_path / "clean.gguf")
    assert out.read_bytes() == (tmp_path / "clean.gguf").read_bytes()


@pytest.mark.usefixtures("slow_pieces")
def test_without_resume_an_interruption_leaves_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    types = dict.fromkeys(random_types(model, 0, FAST), "Q5_K")
    with pytest.raises(CancelledError):
        write_quantized(gguf_source(model), types, out, n_threads=1, resume=False, on_progress=stop_after(100_000))
    assert leftovers(out) == []


@pytest.mark.skipif(os.name == "nt", reason="no file locks there")
def test_two_processes_do_not_write_one_file(model: Path, tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "out.gguf"
    with journal_path(out).open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(QuantizeError, match="is being written by another process"):
            write_quantized(gguf_source(model), {}, out)


def command(*words: object) -> list[str]:
    return [sys.executable, "-P", "-m", "pyllamaernie", "quantize", *map(str, words)]


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(home: Path, tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(home / "kill-hf", "moe", shape=checkpoints.WIDE_SHAPES["moe"], tied=False)
    model = convert(folder, home / "kill.gguf", type="bf16").model
    words = ("--type", "Q4_K", "--pure", "--threads", 2, model, "-o")
    started = time.monotonic()
    subprocess.run(command(*words, tmp_path / "whole.gguf"), check=True)
    whole, duration = (tmp_path / "whole.gguf").read_bytes(), time.monotonic() - started
    rng, n_resumed, n_killed = random.Random(1), 0, 0
    for i in range(200):
        out = tmp_path / f"{i}.gguf"
        process = subprocess.Popen(command(*words, out), stdout=subprocess.DEVNULL)
        while process.poll() is None and not journal_path(out).exists():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.8 * duration))
        was_running = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        if was_running and not out.exists():
            n_killed += 1
            text = subprocess.run(command(*words, out), check=True, capture_output=True, text=True).stdout
            n_resumed += "from before" in text
            assert out.read_bytes() == whole
            assert leftovers(out) == [out]
        out.unlink(missing_ok=True)
        if n_killed == 20:
            break
    assert n_killed == 20 and n_resumed >= 5


# ---- hostile input: one clear line, and no file


def test_a_truncated_source(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(model.read_bytes()[:-5000])
    with pytest.raises(CorruptModelError, match="cut short"):
        gguf_source(short)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    source = gguf_source(copy)
    with copy.open("r+b") as file:  # while it is worked on
        file.truncate(len(short.read_bytes()) // 2)
    with pytest.raises(CorruptModelError, match="became shorter"):
        write_quantized(source, {}, tmp_path / "out.gguf")
    assert leftovers(tmp_path / "out.gguf") == []


def test_a_tensor_named_twice(model: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.gguf"
    data = model.read_bytes()
    assert data.count(b"blk.0.attn_k.weight") == 1
    twice.write_bytes(data.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"))
    with pytest.raises(CorruptModelError, match="not a sound GGUF file"):
        gguf_source(twice)


@pytest.mark.parametrize("type_name", ["Q4_K", None])
def test_a_weight_that_is_no_number(type_name: str | None, model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "nan.gguf"
    bad.write_bytes(model.read_bytes())
    tensor = next(t for t in gguf_py.GGUFReader(model).tensors if t.name == "blk.1.ffn_up_exps.weight")
    with bad.open("r+b") as file:
        file.seek(int(tensor.data_offset) + 2 * (256 * 700 + 9))
        file.write(b"\xc0\x7f")
    types = {} if type_name is None else {"blk.1.ffn_up_exps.weight": type_name}
    with pytest.raises(QuantizeError, match=r"blk.1.ffn_up_exps.weight: \w+: row 700, column 9 is nan"):
        write_quantized(gguf_source(bad), types, tmp_path / "out.gguf")
    assert leftovers(tmp_path / "out.gguf") == []


def changed_imatrix(imatrix: Path, out: Path, change) -> Path:
    keys, tensors = _upstream.read_gguf(imatrix)
    data = {t.name: np.array(t.data) for t in tensors}
    change(data)
    written = [
        _upstream.OutTensor(n, d.shape, _upstream.TensorType.F32, lambda d=d: iter((d,))) for n, d in data.items()
    ]
    rest = [key for name, key in keys.items() if name != "general.architecture"]
    _upstream.write_gguf(out, "imatrix", rest, written)
    return out


def test_importance_that_is_no_number(imatrix: Path, tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"

    def spoil(data: dict[str, np.ndarray]) -> None:
        data[f"{name}.in_sum2"][5] = np.nan

    with pytest.raises(InputError, match=r"blk.0.attn_q.weight is nan in column 5 of matrix 0"):
        read_importance(changed_imatrix(imatrix, tmp_path / "nan.gguf", spoil))


def test_importance_of_another_model(model: Path, imatrix: Path, tmp_path: Path) -> None:
    def narrower(data: dict[str, np.ndarray]) -> None:
        data["blk.0.attn_q.weight.in_sum2"] = data["blk.0.attn_q.weight.in_sum2"][:128]

    def renamed(data: dict[str, np.ndarray]) -> None:
        for name in list(data):
            data[f"model.{name}"] = data.pop(name)

    types = {"blk.0.attn_q.weight": "Q4_K"}
    for change, text in ((narrower, "importance of 128 columns, the model has 1 x 256"), (renamed, "another model")):
        importance = read_importance(changed_imatrix(imatrix, tmp_path / "other.gguf", change))
        with pytest.raises(InputError, match=text):
            write_quantized(gguf_source(model), types, tmp_path / "out.gguf", importance=importance)
    with pytest.raises(InputError, match="holds 'model'; an importance matrix is needed"):
        read_importance(model)
    assert leftovers(tmp_path / "out.gguf") == []


def test_experts_that_nothing_reached_count_alike(model: Path, imatrix: Path) -> None:
    importance = read_importance(imatrix)
    columns = importance.columns["blk.1.ffn_up_exps.weight"]
    assert (columns[-1] == 1).all() and not (columns[0] == 1).any()


def test_a_type_that_the_gguf_package_lacks_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(_upstream.TensorType._member_map_, "Q4_K")
    with pytest.raises(InputError, match="Q4_K is not known to the installed gguf package"):
        write_quantized(gguf_source(model), {"blk.0.attn_q.weight": "Q4_K"}, tmp_path / "out.gguf")


def test_a_type_that_needs_importance_without_any(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"attn_q.weight: IQ2_M|attn_q.weight: IQ2_S needs importance data"):
        write_quantized(gguf_source(model), {"blk.0.attn_q.weight": "IQ2_S"}, tmp_path / "out.gguf")
    with pytest.raises(InputError, match=r"output.weight: IQ2_XXS needs importance data"):
        write_quantized(gguf_source(model), {"output.weight": "IQ2_XXS"}, tmp_path / "out.gguf")


def test_rows_that_are_no_whole_blocks(tmp_path: Path) -> None:
    model = gguf_models.gguf("moe")  # experts of width 96
    name = "blk.1.ffn_down_exps.weight"
    with pytest.raises(InputError, match=r"rows of 96 values are not whole blocks of 256, as Q4_K takes .* Q8_0"):
        write_quantized(gguf_source(model), {name: "Q4_K"}, tmp_path / "out.gguf")
    with pytest.raises(InputError, match=r"no tensor 'blk.99.attn_q.weight'"):
        write_quantized(gguf_source(model), {"blk.99.attn_q.weight": "Q4_K"}, tmp_path / "out.gguf")
    with pytest.raises(InputError, match="type Q4_X is not known; types are F32"):
        write_quantized(gguf_source(model), {name: "Q4_X"}, tmp_path / "out.gguf")


@pytest.mark.skipif(os.name == "nt", reason="no such limits there")
def test_a_disk_without_room_is_found_before_the_work(model: Path, tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    out = tmp_path / "out.gguf"
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(DiskSpaceError, match="no room for"):
            write_quantized(gguf_source(model), {}, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(out) == []


def test_a_disk_that_is_said_to_be_full(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DiskSpaceError, match=r"GB are needed, 0.00 GB are free"):
        write_quantized(gguf_source(model), {}, tmp_path / "out.gguf")
    assert leftovers(tmp_path / "out.gguf") == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that not even root can write to")
def test_a_folder_that_takes_no_files(model: Path) -> None:
    with pytest.raises(QuantizeError, match="/proc: cannot be written"):
        write_quantized(gguf_source(model), {}, "/proc/out.gguf")


def test_an_output_that_exists(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists; choose another name"):
        write_quantized(gguf_source(model), {}, out)
    assert out.read_bytes() == b"mine" and leftovers(out) == [out]
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    with pytest.raises(InputError, match="is what is read"):
        write_quantized(gguf_source(copy), {}, copy, overwrite=True)


def test_a_write_that_fails_in_the_middle_can_be_resumed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyllamaernie.quant.journal import Journal

    out, add, n = tmp_path / "out.gguf", Journal.add, []

    def fails(self: Journal, *words: int) -> None:
        n.append(1)
        if len(n) > 5:
            raise OSError(5, "Input/output error")
        add(self, *words)

    monkeypatch.setattr(Journal, "add", fails)
    with pytest.raises(QuantizeError, match=r"Input/output error; out.gguf.part keeps what is done"):
        write_quantized(gguf_source(model), {}, out, n_threads=1)
    monkeypatch.undo()
    assert write_quantized(gguf_source(model), {}, out).n_bytes_kept > 0
    assert payload(out) == payload(model)

"""The converter as a whole: types, equal bytes from equal content, output files, interruption, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import checkpoint_config
import checkpoints
import numpy as np
import pytest
from checkpoint_shapes import KINDS, Shape, shape_with
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader

from pyllamaernie import convert as module_or_function
from pyllamaernie.convert import TYPES, ConvertResult, convert, mmproj_path
from pyllamaernie.errors import CancelledError, ConvertError, DiskSpaceError

MATRIX = {"f32": T.F32, "f16": T.F16, "bf16": T.BF16, "q8_0": T.Q8_0}
ALWAYS_F32 = (
    "_norm.weight",
    ".bias",
    "ffn_gate_inp.weight",
    "ffn_gate_inp_vl.weight",
    "rope_freqs.weight",
    "v.boi",
    "v.eoi",
)


class Steps:
    """A progress that calls `action` at the n-th block."""

    def __init__(self, at: int, action: Callable[[], object]) -> None:
        self.left, self.action = at, action

    def start(self, total: int, unit: str, text: str) -> None:
        self.total = total

    def advance(self, n: int) -> object:
        self.left -= 1
        return self.action() if self.left == 0 else None

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {kind: checkpoints.write_checkpoint(root / kind, kind, dtype="BF16") for kind in KINDS}


def read(path: Path) -> dict[str, np.ndarray]:
    return {t.name: t for t in GGUFReader(path).tensors}


def value(path: Path, key: str) -> object:
    field = GGUFReader(path).fields.get(key)
    return field and field.contents()


def bytes_of(result: ConvertResult) -> list[bytes]:
    return [path.read_bytes() for path in (result.model, result.mmproj) if path]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TYPES)
def test_matrices_get_the_type_and_the_rest_stays_f32(kind: str, name: str, folders, tmp_path: Path) -> None:
    result = convert(folders[kind], tmp_path / "x.gguf", type=name)
    assert result.mmproj_type == ({"f32": "f32"}.get(name, "f16") if kind == "vl" else None)
    for path, wanted in ((result.model, MATRIX[name]), (result.mmproj, MATRIX[result.mmproj_type or "f32"])):
        for tensor in read(path).values() if path else ():
            kept = len(tensor.shape) < 2 or tensor.name.endswith(ALWAYS_F32)
            assert tensor.tensor_type == (T.F32 if kept else wanted), tensor.name
    assert value(result.model, "general.file_type") == {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[name]


@pytest.mark.parametrize(("stored", "chosen"), [("F32", "f16"), ("F16", "f16"), ("BF16", "bf16")])
def test_auto_is_the_checkpoints_own_16_bit_type(stored: str, chosen: str, tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "dense", "dense", dtype=stored)
    assert convert(folder, tmp_path / "x.gguf").type == chosen


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_to_bf16_and_f32_lose_nothing(kind: str, folders, tmp_path: Path) -> None:
    same, wide = (convert(folders[kind], tmp_path / f"{t}.gguf", type=t, mmproj_type="f32") for t in ("bf16", "f32"))
    a, b = read(same.model), read(wide.model)
    for name, tensor in a.items():
        if tensor.tensor_type == T.BF16:
            bits = tensor.data.view(np.uint16).astype(np.uint32) << 16
            assert np.array_equal(bits.view(np.float32).ravel(), b[name].data.ravel()), name


def test_rows_that_do_not_divide_into_blocks_become_f16(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shape = shape_with("moe", n_ff_exp=40, n_ff=160)
    folder = checkpoints.write_checkpoint(tmp_path / "moe", "moe", shape=shape)
    tensors = read(convert(folder, tmp_path / "x.gguf", type="q8_0").model)
    assert tensors["blk.1.ffn_down_exps.weight"].tensor_type == T.F16  # rows of 40
    assert tensors["blk.1.ffn_up_exps.weight"].tensor_type == T.Q8_0  # rows of 256
    assert "blk.1.ffn_down_exps.weight: rows of 40" in caplog.text


def test_a_value_beyond_f16_is_refused_by_name(tmp_path: Path) -> None:
    weights = checkpoints.weights_of("dense")
    large = weights["model.layers.1.mlp.up_proj.weight"] * 0 + 1e6
    folder = checkpoints.write_checkpoint(tmp_path / "d", "dense", extra={"model.layers.1.mlp.up_proj.weight": large})
    with pytest.raises(ConvertError, match=r"blk\.1\.ffn_up\.weight: largest value 1e\+06 .* bf16"):
        convert(folder, tmp_path / "x.gguf", type="f16")
    assert not list(tmp_path.glob("*gguf*"))


def test_unknown_type_names_the_known_ones(folders, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"q4_k.*f32, f16, bf16, q8_0"):
        convert(folders["dense"], tmp_path / "x.gguf", type="q4_k")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"shards": 3},
        {"names": "baidu"},
        {"names": "memory"},
        {"names": "fused"},
        {"flat": True},
        {"flat": True, "names": "baidu", "shards": 2},
    ],
    ids=str,
)
def test_every_flavour_of_a_checkpoint_gives_the_same_bytes(kind: str, options: dict, tmp_path: Path) -> None:
    plain = checkpoints.write_checkpoint(tmp_path / "a" / "model", kind, use_bias=kind != "vl", tied=False)
    other = checkpoints.write_checkpoint(tmp_path / "b" / "model", kind, use_bias=kind != "vl", tied=False, **options)
    first, second = (bytes_of(convert(f, f.parent / "x.gguf", type="f32")) for f in (plain, other))
    assert len(first) == (2 if kind == "vl" else 1)
    assert first == second


def test_the_same_input_gives_the_same_bytes(folders, tmp_path: Path) -> None:
    first, second = (
        bytes_of(convert(folders["vl"], tmp_path / f"{i}" / "x.gguf", type="q8_0"))
        for i in ((tmp_path / f"{i}").mkdir() or i for i in range(2))
    )
    assert first == second


def test_counters_are_left_out_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    extra = {"model.layers.1.mlp.moe_statics.expert_usage": np.zeros((1, 8), np.int64)}
    with_extra = checkpoints.write_checkpoint(tmp_path / "a" / "m", "moe", extra=extra)
    without = checkpoints.write_checkpoint(tmp_path / "b" / "m", "moe")
    caplog.set_level("INFO", "pyllamaernie.convert")
    assert bytes_of(convert(with_extra, tmp_path / "a.gguf")) == bytes_of(convert(without, tmp_path / "b.gguf"))
    assert all(f"{name}: not part of the network" in caplog.text for name in extra)


def test_the_mmproj_lies_beside_the_model_under_its_name(folders, tmp_path: Path) -> None:
    result = convert(folders["vl"], tmp_path / "ernie.gguf")
    assert result.mmproj == mmproj_path(result.model) == tmp_path / "mmproj-ernie.gguf"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ernie.gguf", "mmproj-ernie.gguf"]
    assert result.to_dict()["mmproj"] == str(result.mmproj)


def test_without_mmproj_only_the_text_model_is_written(folders, tmp_path: Path) -> None:
    assert convert(folders["vl"], tmp_path / "x.gguf", mmproj=False).mmproj is None
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_the_default_name_says_folder_and_type(folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert convert(folders["dense"]).model == Path("dense-BF16.gguf")
    assert (tmp_path / "dense-BF16.gguf").is_file()


@pytest.mark.parametrize("there", ["x.gguf", "mmproj-x.gguf"])
def test_an_existing_output_is_kept_without_overwrite(there: str, folders, tmp_path: Path) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(ConvertError, match=f"{there} exists; choose another name or allow overwriting .--overwrite"):
        convert(folders["vl"], tmp_path / "x.gguf")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(there, "mine")]
    convert(folders["vl"], tmp_path / "x.gguf", overwrite=True)
    assert GGUFReader(tmp_path / there).tensors


def test_a_full_disk_is_told_before_the_first_byte(folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**6})())
    with pytest.raises(DiskSpaceError, match=r"GB are needed, 0\.00 GB are free"):
        convert(folders["dense"], tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing_and_says_what_would_be(folders, tmp_path: Path) -> None:
    planned = convert(folders["vl"], tmp_path / "x.gguf", dry_run=True)
    assert not list(tmp_path.iterdir())
    assert planned == convert(folders["vl"], tmp_path / "x.gguf")
    written = {**read(tmp_path / "x.gguf"), **read(tmp_path / "mmproj-x.gguf")}
    assert {(r.name, r.n_bytes, r.type) for r in planned.tensors} == {
        (t.name, t.n_bytes, T(t.tensor_type).name) for t in written.values()
    }


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 40, 120], ids=["text begins", "in the text model", "in the mmproj"])
def test_an_interrupted_run_leaves_nothing_and_keeps_the_old_file(at: int, folders, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("old")
    blocks = Steps(-1, _interrupt)
    convert(folders["vl"], tmp_path / "count.gguf", progress=blocks)
    assert -blocks.left - 1 > 120  # so that the last of the three does interrupt
    for path in tmp_path.glob("*count*"):
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        convert(folders["vl"], tmp_path / "x.gguf", overwrite=True, progress=Steps(at, _interrupt))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.gguf", "old")]


def test_progress_cancels_by_returning_false(folders, tmp_path: Path) -> None:
    with pytest.raises(CancelledError):
        convert(folders["dense"], tmp_path / "x.gguf", progress=Steps(5, lambda: False))
    assert not list(tmp_path.iterdir())


def test_the_package_offers_convert() -> None:
    assert module_or_function is convert or module_or_function.convert is convert


def sparse_checkpoint(folder: Path, n_vocab: int, n_embd: int) -> int:
    """A dense model whose weights are a hole in a file, so that it takes no disk; returns its size in bytes."""
    shape = Shape(n_vocab=n_vocab, n_embd=n_embd, n_layer=1, n_ff=4 * n_embd, n_head=n_embd // 64, n_head_kv=4)
    small = checkpoints.tensors("dense", shape_with("dense", n_layer=1))
    checkpoints.write_checkpoint(folder, "dense", shape=shape_with("dense", n_layer=1))
    sizes = {384: 4 * n_embd, 256: n_embd, 512: n_vocab, 128: 4 * 64}  # of the small model -> of the large one
    header, offset = {}, 0
    for name, data in small.items():
        dims = [sizes[n] for n in data.shape]
        if "self_attn.q_proj" in name or "self_attn.o_proj" in name:
            dims = [n_embd, n_embd]
        header[name] = {"dtype": "F32", "shape": dims, "data_offsets": [offset, offset + 4 * int(np.prod(dims))]}
        offset = header[name]["data_offsets"][1]
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    config = checkpoint_config.config("dense", shape)
    (folder / "config.json").write_text(json.dumps({**config, "head_dim": 64}))
    return offset


def peak_bytes(folder: Path, out: Path, kind: str) -> int:
    """Largest resident set of a process that converts the folder. Mapped file pages count.

    Not getrusage: on Linux its maximum outlives exec and so includes this test process.
    """
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs /proc")
    code = (
        "import re, sys\nfrom pyllamaernie.convert import convert\n"
        f"convert(sys.argv[1], sys.argv[2], type={kind!r})\n"
        "print(1024 * int(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, folder, out], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    size = sparse_checkpoint(tmp_path / "large", 100_000, 1024)
    assert size > 400e6
    folder = checkpoints.write_checkpoint(tmp_path / "small", "dense")
    base = peak_bytes(folder, tmp_path / "small.gguf", "q8_0")
    peak = peak_bytes(tmp_path / "large", tmp_path / "large.gguf", "q8_0")
    print(f"{size / 1e6:.0f} MB of weights: peak {peak / 1e6:.0f} MB, a tiny model {base / 1e6:.0f} MB")
    assert peak - base < 200e6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["q8_0", "f16"])
def test_peak_memory_stays_under_one_gibibyte(kind: str, tmp_path: Path) -> None:
    size = sparse_checkpoint(tmp_path / "large", 103_424, 5120)
    assert size > 2.5e9
    peak = peak_bytes(tmp_path / "large", tmp_path / "large.gguf", kind)
    print(f"{size / 1e9:.2f} GB of weights to {kind}: peak {peak / 1e6:.0f} MB")
    assert peak < 2**30

"""The streaming writer: llama-quantize's bytes for any recipe and number of threads, and what it refuses to write."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import gguf as gguf_py
import gguf_models
import pytest

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
import quantize_jobs
from gguf_contents import payload
from quantize_jobs import FAST, leftovers, random_types

from pyllamaernie import programs
from pyllamaernie.convert import convert
from pyllamaernie.errors import DiskSpaceError, InputError, QuantizeError
from pyllamaernie.gguf import file as gguf_file
from pyllamaernie.quant import native
from pyllamaernie.quant.importance import read_importance
from pyllamaernie.quant.source import gguf_source
from pyllamaernie.quant.writer import write_quantized

KNOWN = set(gguf_file.TensorType.__members__)  # the gguf package may lack the newest: Q2_0
ALL = [t for t in native.TYPES if t in KNOWN - {"F32", "F16"} and not t.startswith(("CCQ", "TQ"))]


def stock(model: Path, types: dict[str, str], out: Path, imatrix: Path | None, n_threads: int = 2) -> Path:
    recipe = out.with_suffix(".txt")
    recipe.write_text("".join(f"^{re.escape(name)}$={kind.lower()}\n" for name, kind in types.items()))
    words = ["--tensor-type-file", recipe, *(["--imatrix", imatrix] if imatrix else [])]
    programs.run("llama-quantize", [*words, model, out, "Q8_0", n_threads], capture=True)
    return out


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
def test_sources_of_other_float_types_too(type_name: str, tmp_path: Path) -> None:
    model = convert(quantize_jobs.folder(), tmp_path / "source.gguf", type=type_name).model
    same_as_stock(model, None, tmp_path, 5, FAST, (2,))


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


def test_a_type_that_the_gguf_package_lacks_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(gguf_file.TensorType._member_map_, "Q4_K")
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

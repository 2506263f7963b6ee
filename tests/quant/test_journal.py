"""Interrupted jobs: what is done is kept and goes on to the same bytes, or nothing is left."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import checkpoints
import pytest
import verb
from checkpoint_shapes import WIDE_SHAPES

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
import quantize_jobs
from gguf_contents import payload
from quantize_jobs import FAST, leftovers, random_types

from pyllamaernie.convert import convert
from pyllamaernie.errors import CancelledError, QuantizeError
from pyllamaernie.quant import writer
from pyllamaernie.quant.job import plan_job
from pyllamaernie.quant.journal import journal_path, part_path
from pyllamaernie.quant.source import gguf_source
from pyllamaernie.quant.writer import Progress, write_quantized


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


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "hf", "moe", shape=WIDE_SHAPES["moe"], tied=False)
    model = convert(folder, tmp_path / "model.gguf", type="bf16").model
    words = ("--type", "Q4_K", "--pure", "--threads", 2, model)
    began = time.monotonic()
    verb.run("quantize", *words, "-o", tmp_path / "whole.gguf", check=True)
    whole, duration = (tmp_path / "whole.gguf").read_bytes(), time.monotonic() - began
    rng, n_resumed, n_killed = random.Random(1), 0, 0
    for i in range(200):
        out = tmp_path / f"{i}.gguf"
        process = quantize_jobs.started(out, *words, n_lines=0)
        time.sleep(rng.uniform(0, 0.8 * duration))
        was_running = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        if was_running and not out.exists():
            n_killed += 1
            text = verb.run("quantize", *words, "-o", out, check=True).stdout
            n_resumed += "from before" in text
            assert out.read_bytes() == whole
            assert leftovers(out) == [out]
        out.unlink(missing_ok=True)
        if n_killed == 20:
            break
    assert n_killed == 20 and n_resumed >= 5


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

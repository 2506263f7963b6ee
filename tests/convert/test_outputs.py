"""Files that a conversion writes: names that cannot be used, and what killed processes leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import verb
from checkpoint_shapes import shape_with

from pyllamaernie.convert import convert
from pyllamaernie.errors import ConvertError, InputError, OutputError, OutputNameError
from pyllamaernie.files import hidden_file, hidden_folder

SMALL = shape_with("dense", n_embd=64, n_head=2, n_head_kv=1, head_dim=32, n_layer=2, n_ff=64)
WAITS = """
import sys, time
from pathlib import Path
from pyllamaernie.convert import convert

class Waits:
    def start(self, *words): pass
    def advance(self, n):
        print("writing", flush=True)
        time.sleep(60)
    def close(self): pass

convert(sys.argv[1], sys.argv[2], progress=Waits())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.write_checkpoint(tmp_path / "toy", "dense", shape=SMALL)


def test_what_a_killed_conversion_leaves_goes_with_the_next_one(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    words = [sys.executable, "-c", WAITS, str(folder)]
    with subprocess.Popen([*words, str(out / "killed.gguf")], stdout=subprocess.PIPE) as dead:
        dead.stdout.readline()
        dead.send_signal(signal.SIGKILL)
    with subprocess.Popen([*words, str(out / "alive.gguf")], stdout=subprocess.PIPE) as alive:
        alive.stdout.readline()
        convert(folder, out / "done.gguf")
        names = sorted(path.name for path in out.iterdir())
        alive.kill()
    assert len(names) == 2 and names[0].startswith(".alive.gguf.") and names[1] == "done.gguf"
    convert(folder, out / "done.gguf", overwrite=True)
    assert [path.name for path in out.iterdir()] == ["done.gguf"]


def test_hidden_files_and_folders_are_removed_unless_somebody_holds_them(tmp_path: Path) -> None:
    stale = tmp_path / ".x.gguf.0123abcd.partial"
    (stale / "inside").mkdir(parents=True)
    (tmp_path / ".y.gguf.0123abcd.partial").touch()
    kept = [tmp_path / ".mine.partial", tmp_path / "x.gguf.0123abcd.partial"]
    for path in kept:
        path.touch()
    with hidden_folder(tmp_path / "held") as held, hidden_file(tmp_path / "other") as other:
        assert sorted(tmp_path.iterdir()) == sorted([*kept, held, other])
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_written_file_has_the_usual_rights(folder: Path, tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    assert convert(folder, tmp_path / "x.gguf").model.stat().st_mode == usual.stat().st_mode


def test_wrong_outputs_are_input_errors_and_conversion_errors_alike(folder: Path, tmp_path: Path) -> None:
    for output, error, match in (
        (tmp_path / "x.bin", OutputNameError, r"the output's name must end in \.gguf"),
        (tmp_path / "none" / "x.gguf", OutputError, "none is not a folder"),
        (tmp_path, OutputNameError, "must end"),
    ):
        with pytest.raises(error, match=match) as caught:
            convert(folder, output)
        assert isinstance(caught.value, InputError) and isinstance(caught.value, ConvertError)


@pytest.mark.parametrize(("output", "code"), [("x.bin", 2), ("none/x.gguf", 1), ("there.gguf", 1)])
def test_all_verbs_have_the_same_words_and_exit_codes_for_wrong_outputs(
    output: str, code: int, folder: Path, tmp_path: Path
) -> None:
    model = convert(folder, tmp_path / "model.gguf", type="f16").model
    (tmp_path / "there.gguf").touch()
    said = set()
    for words in (
        ["convert", folder],
        ["quantize", model, "--type", "Q8_0"],
        ["slice", model, "--layers", "0"],
    ):
        done = verb.run(*words, "-o", tmp_path / output, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        said.add(done.stderr.strip().splitlines()[-1].split(": ", 1)[1])
    assert len(said) == 1, said


@pytest.mark.parametrize("spelling", ["q8_0", "Q8_0"])
def test_types_are_taken_in_either_case(spelling: str, folder: Path, tmp_path: Path) -> None:
    done = verb.run("convert", folder, "-o", tmp_path / "x.gguf", "--type", spelling, "--mmproj-type", spelling)
    assert done.returncode == 0 and "x.gguf: " in done.stdout and done.stdout.rstrip().endswith(" q8_0"), done.stderr
    assert convert(folder, tmp_path / "y.gguf", type=spelling).model.read_bytes() == (tmp_path / "x.gguf").read_bytes()


def test_a_name_that_is_not_utf_8_is_printed_as_it_is(folder: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"x\xff.gguf")
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = verb.run("convert", folder, "-o", name, cwd=tmp_path, text=False, env=strict)
    assert done.returncode == 0 and done.stdout.startswith(b"x\xff.gguf: "), done.stderr
    assert (tmp_path / name).is_file()

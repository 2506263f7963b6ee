"""From a name on a small hub to an answer: GGUF files in parts, Hugging Face folders, and the verbs around them."""

from __future__ import annotations

import functools
from pathlib import Path

import checkpoints
import PIL.Image
import pytest

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from gguf_models import folder, gguf, picture, question, random_words, subfolder
from small_hub import Run, SmallHub

from pyllamaernie import Llama, programs

ASK = ["--threads", "1", "--ctx", "512", "--temperature", "0", "--max-tokens", "8"]


@functools.cache
def parts() -> dict[str, Path]:
    """The vision model in parts under a type's name, and its projector under a plain one."""
    home, model = subfolder("parts"), gguf("vl")
    words = ["--split", "--split-max-tensors", 40, model, home / "vl-F32"]
    programs.run("llama-gguf-split", words, capture=True, timeout=60)
    files = {f"F32/{path.name}": path for path in sorted(home.glob("*.gguf"))}
    assert len(files) > 1
    return {**files, "mmproj-vl-f16.gguf": model.with_name(f"mmproj-{model.name}")}


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "p.png"
    PIL.Image.fromarray(picture(84, 112)).save(path)
    return path


def answer(model: Path, png: Path) -> str:
    with Llama(model, n_ctx=512, n_threads=1) as llm:
        result = llm.create_chat_completion(question(png), max_tokens=8, temperature=0)
    return result["choices"][0]["message"]["content"] + "\n"


def test_gguf_files_in_parts_answer_about_a_picture(hub: SmallHub, run: Run, png: Path) -> None:
    hub.add("org/vl", parts() | {"vl-Q2_K.gguf": b"not asked for"})
    words = ["-m", "org/vl:f32", *ASK, "--image", png, "What is in the picture?"]
    done = run("run", *words)
    assert (done.returncode, done.stdout) == (0, answer(gguf("vl"), png)), done.stderr
    assert done.stderr.count("\n") == 1 and f"fetching {len(parts())} files" in done.stderr
    n_bytes = sum(path.stat().st_size for path in parts().values())
    assert hub.n_bytes_sent == n_bytes
    hub.is_down = True
    again = run("run", *words)
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, "")
    listed = run("list").stdout.splitlines()
    assert any(line.startswith("org/vl:F32") and f"{len(parts()) - 1} files" in line for line in listed), listed


def test_a_folder_is_converted_once_and_answers_about_a_picture(
    hub: SmallHub, run: Run, png: Path, cache: Path
) -> None:
    gguf("vl")
    hub.add_folder("org/ERNIE-VL", folder() / "vl" / "hf")
    hub.repos["org/ERNIE-VL"]["pytorch_model.bin"] = b"the same again"
    words = ["-m", "org/ERNIE-VL:F32", *ASK, "--image", png, "What is in the picture?"]
    done = run("run", *words)
    assert (done.returncode, done.stdout) == (0, answer(gguf("vl"), png)), done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 2 and "fetching" in said[0] and "converting org/ERNIE-VL" in said[1], said
    assert not list(cache.rglob("pytorch_model.bin"))
    made = sorted(path.name for path in cache.rglob("*.gguf"))
    commit = hub.commit("org/ERNIE-VL")[:7]
    assert made == [f"ERNIE-VL-{commit}.gguf", f"mmproj-ERNIE-VL-{commit}.gguf"]
    hub.is_down = True
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*.gguf")}
    again = run("run", *words, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, "")
    assert times == {path: path.stat().st_mtime_ns for path in cache.rglob("*.gguf")}
    wrong = run("run", "-m", "org/ERNIE-VL:Q4_K_M", "Hi")
    assert wrong.returncode == 4 and "pyllamaernie quantize org/ERNIE-VL --type Q4_K_M" in wrong.stderr, wrong.stderr


def test_convert_and_quantize_take_a_folder_by_its_name(hub: SmallHub, run: Run, tmp_path: Path) -> None:
    hub.add_folder("org/ERNIE-text", checkpoints.write_checkpoint(tmp_path / "hf", "dense"))
    done = run("convert", "org/ERNIE-text", "--type", "f16")
    assert done.returncode == 0 and (tmp_path / "ERNIE-text-F16.gguf").is_file(), done.stderr
    done = run("convert", "org/ERNIE-text:Q8_0")
    assert done.returncode == 1 and "without a type" in done.stderr, done.stderr
    done = run("quantize", "org/ERNIE-text", "-o", "q.gguf", "--type", "Q8_0")
    assert done.returncode == 0 and (tmp_path / "q.gguf").is_file(), done.stderr


def test_what_a_killed_conversion_left_is_removed(hub: SmallHub, run: Run, tmp_path: Path, cache: Path) -> None:
    hub.add_folder("org/ERNIE-text", checkpoints.write_checkpoint(tmp_path / "hf", "dense"))
    assert run("pull", "org/ERNIE-text").returncode == 0
    made = next((cache / "models--org--ERNIE-text" / "pyllamaernie").glob("*/"))
    (made / ".auto.0123abcd.partial" / "auto").mkdir(parents=True)
    assert run("run", "-m", "org/ERNIE-text", *ASK, "Hello").returncode == 0
    assert sorted(path.name for path in made.iterdir()) == ["ERNIE-text", "auto"]


def test_list_and_rm(hub: SmallHub, run: Run, cache: Path) -> None:
    hub.add("org/two", {"a-Q8_0.gguf": b"a" * 2048, "a-F16.gguf": b"b" * 4096})
    assert run("list").stdout.startswith("no models in")
    assert run("pull", "org/two:Q8_0", "org/two:F16").returncode == 0
    rows = [line.split("  ") for line in run("list").stdout.splitlines()]
    assert [row[0] for row in rows] == ["org/two:F16", "org/two:Q8_0"] and "4.00 KiB" in " ".join(rows[0])
    asked = run("rm", "org/two")
    assert asked.returncode == 2 and "--yes" in asked.stderr
    done = run("rm", "--yes", "org/two:q8_0")
    assert (done.returncode, done.stdout) == (0, "org/two:q8_0: removed, 2.00 KiB freed\n"), done.stderr
    assert [line.split()[0] for line in run("list").stdout.splitlines()] == ["org/two:F16"]
    assert run("rm", "--yes", "org/two").returncode == 0
    assert not list(cache.glob("models--*"))
    gone = run("rm", "--yes", "org/two")
    assert gone.returncode == 4 and "nothing of it" in gone.stderr


def test_from_pretrained(hub: SmallHub, python: Run, png: Path, tmp_path: Path) -> None:
    hub.add("org/vl", {name.replace("F32/", ""): path for name, path in parts().items()} | {"README.md": b"#"})
    hub.add_folder("org/ERNIE-VL", folder() / "vl" / "hf")
    done = python(f"""
from pathlib import Path
from pyllamaernie import Llama
words = [{{"role": "user", "content": [{{"type": "image", "image": {str(png)!r}}},
                                       {{"type": "text", "text": "What is in the picture?"}}]}}]
for repo, more in (("org/vl", dict(filename="*-F32-*", local_dir="here", additional_files=["*.md"])),
                   ("org/vl:F32", dict(cache_dir="other")), ("org/ERNIE-VL:F32", {{}})):
    with Llama.from_pretrained(repo, **more, n_ctx=512, n_threads=1) as llm:
        print(llm.create_chat_completion(words, max_tokens=8, temperature=0)["choices"][0]["message"]["content"])
""")
    assert (done.returncode, done.stdout) == (0, answer(gguf("vl"), png) * 3), done.stderr
    assert (tmp_path / "here" / "README.md").is_file() and (tmp_path / "other" / "models--org--vl").is_dir()


def test_serve_and_compare_take_names(hub: SmallHub, run: Run, python: Run, cache: Path, tmp_path: Path) -> None:
    hub.add("org/vl", parts())
    done = python(
        "from pyllamaernie import programs; from pyllamaernie.cli import main\n"
        "programs.execute = lambda name, words: print(*words, sep='\\n') or 0\n"
        "main(['serve', '-m', 'org/vl', '--port', '0'])"
    )
    words = done.stdout.splitlines()
    model, mmproj = (Path(words[words.index(word) + 1]) for word in ("--model", "--mmproj"))
    assert model.name.startswith("vl-F32-00001-of-") and cache in model.parents, done.stderr
    assert mmproj.name == "mmproj-vl-f16.gguf" and cache in mmproj.parents
    hub.add("org/dense", {"d-F32.gguf": gguf("dense"), "d-F16.gguf": gguf("dense")})
    random_words(tmp_path / "text.txt", 200)
    names = ["org/dense:F32", "org/dense:F16"]
    done = run("compare", *names, "-f", "text.txt", "--ctx", "64", "--speed-runs", "0", "--threads", "1")
    assert done.returncode == 0 and "d-F16" in done.stdout, done.stderr

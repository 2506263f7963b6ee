"""`pyllamaernie quantize`: presets, recipes, plans and sizes, from GGUF files and Hugging Face folders."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import checkpoints
import gguf as gguf_py
import gguf_models
import pytest

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
import quantize_jobs
from gguf_contents import payload

from pyllamaernie import Llama, cli, programs
from pyllamaernie.convert import convert
from pyllamaernie.errors import InputError
from pyllamaernie.plan import fit
from pyllamaernie.quant import stock
from pyllamaernie.quant.choice import choose_types
from pyllamaernie.quant.source import gguf_source

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model() -> Path:
    return quantize_jobs.model()


@pytest.fixture(scope="module")
def text() -> Path:
    return quantize_jobs.text()


def quantize(*words: object) -> int:
    return cli.main(["quantize", *map(str, words)])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that an error is."""
    text = capsys.readouterr().err.strip()
    assert text.count("\n") == 0, text
    return text


@pytest.mark.parametrize("preset", ["Q4_K_M", "iq4_xs", "Q5_K_S", "CCQ2", "F16"])
def test_a_preset_gives_the_types_of_llama_quantize(preset: str, model: Path, tmp_path: Path) -> None:
    expected = tmp_path / "stock.gguf"
    names = [w.name for w in gguf_source(model).weights]
    found = choose_types(gguf_source(model), type=preset)
    assert sorted(found.types) == sorted(names)
    if preset in ("CCQ2",):  # its encoder takes long; the types of a dry run are enough
        assert {"CCQ2", "F32"} <= set(found.types.values())
        return
    programs.run("llama-quantize", [model, expected, preset, 2], capture=True)
    assert found.types == {name: kind.name for name, (_, kind, _) in payload(expected).items()}


def test_a_preset_is_written_as_llama_quantize_writes_it(model: Path, tmp_path: Path, capsys) -> None:
    out, expected = tmp_path / "ours.gguf", tmp_path / "stock.gguf"
    assert quantize(model, "-o", out, "--type", "Q4_K_M", "--threads", 2) == 0
    assert f"{out}: {len(payload(model))} tensors, " in capsys.readouterr().out
    programs.run("llama-quantize", [model, expected, "Q4_K_M", 2], capture=True)
    assert payload(out) == payload(expected)
    file_type = gguf_py.GGUFReader(out).fields["general.file_type"].contents()
    assert file_type == gguf_py.GGUFReader(expected).fields["general.file_type"].contents()

    # and the recipe beside it makes the same of the source
    again = tmp_path / "again.gguf"
    words = ["--tensor-type-file", tmp_path / "ours.recipe.txt", model, again, "Q8_0", 2]
    log = programs.run("llama-quantize", words, capture=True)
    assert payload(again) == payload(out)
    n_lines = len((tmp_path / "ours.recipe.txt").read_text().splitlines())
    assert (log.stdout + log.stderr).count("converting to") == n_lines


def test_a_recipe_is_read_as_llama_quantize_reads_it(model: Path, tmp_path: Path) -> None:
    recipe = "attn_.*=Q5_K  ffn_down_exps=iq4_nl\nBLK.1=q4_0\noutput=q6_k\n"
    found = choose_types(gguf_source(model), recipe=recipe)
    (tmp_path / "r.txt").write_text(recipe)
    words = ["--tensor-type-file", tmp_path / "r.txt", model, tmp_path / "stock.gguf", "Q8_0", 2]
    programs.run("llama-quantize", words, capture=True)
    assert found.types == {name: kind.name for name, (_, kind, _) in payload(tmp_path / "stock.gguf").items()}
    assert found.types["blk.1.attn_output.weight"] == "Q5_K" and found.types["blk.1.ffn_up_exps.weight"] == "Q4_0"


def test_a_recipe_entry_that_nothing_matches_is_told(model: Path) -> None:
    found = choose_types(gguf_source(model), recipe="attn_q=q4_k nothing_has_this=q4_k")
    assert [line for line in found.warnings if "'nothing_has_this=q4_k' is found in no tensor's name" in line]


def test_pins_come_first(model: Path) -> None:
    found = choose_types(gguf_source(model), type="Q4_K_M", pins=["attn_q=q8_0", "attn=q5_0"])
    assert found.types["blk.0.attn_q.weight"] == "Q8_0" and found.types["blk.0.attn_k.weight"] == "Q5_0"


def test_one_type_for_all_matrices(model: Path) -> None:
    found = choose_types(gguf_source(model), type="nvfp4")
    assert set(found.types.values()) == {"NVFP4", "F32"}


def test_rows_that_do_not_fit_are_told() -> None:
    found = choose_types(gguf_source(gguf_models.gguf("moe")), type="Q4_K_S")
    text = next(line for line in found.warnings if "rows of 96" in line)
    assert "Q5_0 instead of Q4_K" in text and " more: " in text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"recipe": "attn_q"}, "entry 'attn_q': expected NAME=TYPE"),
        ({"recipe": "# attn_q=q4_k"}, "entry '#': expected NAME=TYPE"),
        ({"recipe": "attn_q=q4_x"}, "type 'q4_x' is not known; types are F32"),
        ({"recipe": " \n"}, "the recipe is empty"),
        ({"type": "Q4_X"}, "type 'Q4_X' is not known; presets are CCQ2"),
        ({}, "give a type or a recipe"),
    ],
)
def test_a_wrong_choice_is_named(words: dict[str, str], text: str, model: Path) -> None:
    with pytest.raises(InputError, match=text):
        choose_types(gguf_source(model), **words)


def test_every_preset_is_known_with_its_number() -> None:
    presets = stock.presets()
    assert presets["Q4_K_M"] == 15 and presets["IQ2_M"] == 29 and presets["CCQ2"] == 112 and len(presets) > 35


@pytest.mark.parametrize("via", ["bf16", "f16"])
def test_a_folder_gives_the_file_of_convert_and_quantize(via: str, tmp_path: Path) -> None:
    folder = quantize_jobs.folder()
    convert(folder, tmp_path / "between.gguf", type=via)
    assert quantize(tmp_path / "between.gguf", "-o", tmp_path / "two.gguf", "--type", "Q4_K_S") == 0
    assert quantize(folder, "-o", tmp_path / "one.gguf", "--type", "Q4_K_S", "--via", via) == 0
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_the_projector_of_a_folder_is_written_beside(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "hf", "vl", tied=False)
    convert(folder, tmp_path / "plain.gguf", type="f16")
    assert quantize(folder, "-o", tmp_path / "q.gguf", "--type", "Q8_0", "--via", "f16") == 0
    assert (tmp_path / "mmproj-q.gguf").read_bytes() == (tmp_path / "mmproj-plain.gguf").read_bytes()
    assert quantize(folder, "-o", tmp_path / "r.gguf", "--type", "Q8_0", "--no-mmproj") == 0
    assert not (tmp_path / "mmproj-r.gguf").exists()


def test_the_embedded_model_still_answers(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    import shapes_world as world

    folder = ROOT / "models" / "ernie-4.5-vl-tiny"
    assert quantize(folder, "-o", tmp_path / "tiny.gguf", "--type", "Q6_K") == 0
    rng, n_right, n = random.Random(4_000_000_007), 0, 0
    with Llama(tmp_path / "tiny.gguf", n_ctx=4096, n_threads=1) as llm:
        while n < 8:
            scene = world.random_scene(rng)
            asked = world.ask(scene, rng.choice(("what", "many", "colour", "where", "there")), rng)
            if asked is not None:
                content = [{"type": "image", "image": world.draw_scene(scene)}, {"type": "text", "text": asked[0]}]
                reply = llm.create_chat_completion([{"role": "user", "content": content}], temperature=0, max_tokens=96)
                n_right += reply["choices"][0]["message"]["content"] == asked[1]
                n += 1
    assert n_right >= 7


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_a_size_is_met_with_all_that_belongs_to_it(
    kind: str, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, size = tmp_path / "sized.gguf", int(model.stat().st_size * 0.42)
    given = model if kind == "gguf" else quantize_jobs.folder()
    more = [] if kind == "gguf" else ["--via", "bf16"]
    code = quantize(given, "-o", out, "--size", size, "-f", text, "--types", "Q4_K,Q6_K,Q8_0", *more)
    assert code == 0, capsys.readouterr().err
    assert size * 0.995 <= out.stat().st_size <= size
    assert {path.name.removeprefix("sized") for path in tmp_path.glob("sized*") if path.is_file()} >= {
        ".gguf", ".recipe.txt", ".plan.json", ".plan.md", ".imatrix.gguf",
    }  # fmt: skip
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.part*"))
    if kind == "gguf":
        again = tmp_path / "again.gguf"
        plan, imatrix = tmp_path / "sized.plan.json", tmp_path / "sized.imatrix.gguf"
        assert quantize(model, "-o", again, "--plan", plan, "--imatrix", imatrix) == 0
        assert again.read_bytes() == out.read_bytes()
        assert quantize(model, "-o", tmp_path / "x.gguf", "--plan", plan) != 0
        assert "made with another importance matrix" in capsys.readouterr().err


def test_a_dry_run_says_the_size_and_writes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    assert quantize(model, "-o", out, "--type", "Q4_K_M", "--dry-run") == 0
    text = capsys.readouterr().out
    assert not list(tmp_path.iterdir()) and "BF16 -> Q6_K" in text
    assert quantize(model, "-o", out, "--type", "Q4_K_M") == 0
    assert f", {out.stat().st_size} bytes" in text


def test_hostile_input_is_one_line_and_leaves_no_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.gguf").write_bytes(model.read_bytes()[:-4000])
    (tmp_path / "text.gguf").write_text("no model at all")
    (tmp_path / "broken.json").write_text("{}")
    out = ("-o", tmp_path / "out.gguf")
    cases: list[tuple[int, str, list[object]]] = [
        (4, "cut short", [tmp_path / "short.gguf", "--type", "Q4_K_M"]),
        (4, "is not a GGUF file", [tmp_path / "text.gguf", "--type", "Q4_K_M"]),
        (4, "no model file at", [tmp_path / "none.gguf", "--type", "Q4_K_M"]),
        (4, "no importance matrix at", [model, "--type", "IQ2_S", "--imatrix", tmp_path / "none.gguf"]),
        (1, "an importance matrix is needed", [model, "--type", "IQ2_S", "--imatrix", model]),
        (1, "is not known; presets are", [model, "--type", "Q9_K"]),
        (1, "not a plan", [model, "--plan", tmp_path / "broken.json"]),
        (4, "config.json", [tmp_path, "--type", "Q4_K_M"]),
        (1, "is not a folder", [model, "--type", "Q4_K_M", "-o", tmp_path / "none" / "out.gguf"]),
        (2, "must end in .gguf", [model, "--type", "Q4_K_M", "-o", tmp_path / "out.bin"]),
        (2, "--threads is a positive", [model, "--type", "Q4_K_M", "--threads", 0]),
        (2, "--min, --max and --types go with", [model, "--type", "Q4_K_M", "--max", "attn=Q4_K"]),
    ]
    for code, text, words in cases:
        assert quantize(*out, *words) == code, words
        assert text in said(capsys)
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_fits_as_it_is_stays_as_it_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(model, "-o", tmp_path / "out.gguf", "--fit", "--ctx", 512, "--reserve", "16MiB") == 1
    lines = capsys.readouterr().err.splitlines()
    assert "16 MiB stay free, context of 512" in lines[0] and "fits as it is" in lines[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_interrupted_size_is_not_planned_twice(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyllamaernie.plan import sized as quantize_size
    from pyllamaernie.quant import writer

    out, real = tmp_path / "out.gguf", writer.run_job
    words = (model, "-o", out, "--bpw", 5, "-f", text, "--types", "Q4_K,Q6_K,Q8_0", "--threads", 1)

    def stops(job, **options):
        def on_progress(progress: writer.Progress) -> None:
            if progress.n_bytes > 100_000:
                raise KeyboardInterrupt

        return real(job, **{**options, "on_progress": on_progress})

    monkeypatch.setattr(writer, "run_job", stops)
    assert quantize(*words) == 130
    assert "the same command goes on from there" in capsys.readouterr().err and not out.exists()
    monkeypatch.setattr(writer, "run_job", real)
    monkeypatch.setattr(quantize_size, "Planner", None)  # would fail when called
    assert quantize(*words) == 0
    said_ = capsys.readouterr()
    assert "the plan is that of the interrupted run" in said_.err and "from before" in said_.out
    assert out.exists() and not list(tmp_path.glob("*.part*"))


@pytest.mark.slow
def test_a_type_that_needs_importance_gets_it_measured(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    assert quantize(model, "-o", out, "--type", "IQ3_XXS") == 0
    assert "measured on this package's own sources" in capsys.readouterr().err
    assert "quantize.imatrix.file" in gguf_py.GGUFReader(out).fields and (tmp_path / "out.imatrix.gguf").exists()
    assert quantize(model, "-o", tmp_path / "two.gguf", "--type", "Q4_K_M", "-f", text) == 0
    assert "package's own" not in capsys.readouterr().err
    assert gguf_py.GGUFReader(tmp_path / "two.gguf").fields["quantize.imatrix.dataset"].contents() == "text.txt"
    expected = tmp_path / "stock.gguf"
    words = ["--imatrix", tmp_path / "two.imatrix.gguf", model, expected, "Q4_K_M", 2]
    programs.run("llama-quantize", words, capture=True)
    assert payload(tmp_path / "two.gguf") == payload(expected)


def test_files_beside_the_output_are_not_replaced_unasked(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.recipe.txt").write_text("mine")
    assert quantize(model, "-o", tmp_path / "out.gguf", "--type", "Q8_0") == 1
    assert "out.recipe.txt exists" in said(capsys) and (tmp_path / "out.recipe.txt").read_text() == "mine"
    assert quantize(model, "-o", tmp_path / "out.gguf", "--type", "Q8_0", "--overwrite") == 0


@pytest.mark.slow
def test_what_fits_decides_the_size(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs, size = fit.needs(model, n_ctx=512), int(model.stat().st_size * 0.4)
    limit = 2**30 + needs.total - needs.weights + size
    monkeypatch.setattr(fit, "memory_limit_bytes", lambda: limit)
    out = tmp_path / "out.gguf"
    words = ("--ctx", 512, "--reserve", "1GiB", "-f", text, "--types", "Q2_K,Q4_K,Q6_K")
    assert quantize(model, "-o", out, "--fit", *words) == 0
    assert size * 0.99 <= out.stat().st_size <= size


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    words = (model, "--type", "CCQ2", "--threads", 1)
    process = quantize_jobs.started(out, *words, n_lines=2, stderr=subprocess.PIPE, text=True)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert text.count("\n") == 1 and "the same command goes on from there" in text and "interrupted at " in text
    assert not out.exists() and (tmp_path / "out.gguf.part").exists()
    # a job with other types does not mind what lies there
    assert quantize(model, "-o", out, "--type", "Q8_0") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.recipe.txt"]

"""Plans for a size: types for every tensor, within the budget, and the verb."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import checkpoints
import gguf_models
import numpy as np
import pytest

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
import quantize_jobs

from pyllamaernie import programs
from pyllamaernie.cli import main
from pyllamaernie.convert import convert
from pyllamaernie.errors import BudgetError, InputError, OutOfMemoryError
from pyllamaernie.files import parse_size
from pyllamaernie.plan.budget import Plan as SolverPlan
from pyllamaernie.plan.budget import Rule
from pyllamaernie.plan.measure import is_quantizable, measure
from pyllamaernie.plan.model_plan import ModelPlan
from pyllamaernie.plan.planner import Planner, make_plan
from pyllamaernie.plan.probe import Probe
from pyllamaernie.plan.table import Curve, Item, fit_curve, groups_of, items_of
from pyllamaernie.quant import native
from pyllamaernie.quant.imatrix import compute_imatrix
from pyllamaernie.quant.importance import Importance, read_importance
from pyllamaernie.quant.native import TYPES
from pyllamaernie.quant.source import ModelSource, Piece, Weights, gguf_source
from pyllamaernie.quant.writer import write_quantized

FAST = ["Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0", "F16"]
SHAPE = replace(quantize_jobs.SHAPE, n_layer=4, n_expert=4)


@pytest.fixture(scope="module")
def home() -> Path:
    return gguf_models.subfolder("plan")


@pytest.fixture(scope="module")
def model(home: Path) -> Path:
    return convert(checkpoints.write_checkpoint(home / "hf", "moe", shape=SHAPE, tied=False), home / "m.gguf").model


@pytest.fixture(scope="module")
def text() -> Path:
    return quantize_jobs.text()


@pytest.fixture(scope="module")
def imatrix(home: Path, model: Path, text: Path) -> Path:
    path = home / "imatrix.gguf"
    compute_imatrix(model, text, path, n_threads=1)
    return path


@pytest.fixture(scope="module")
def guess(model: Path, imatrix: Path) -> Iterator[Planner]:
    """A planner that runs nothing."""
    with Planner(model, importance=imatrix, probe="none", types=FAST, baselines=False, n_threads=1) as planner:
        yield planner


@pytest.fixture(scope="module")
def runner(model: Path, imatrix: Path, text: Path) -> Iterator[Planner]:
    """A planner that runs the model, on one chunk."""
    options = {"types": FAST, "n_chunks": 1, "n_threads": 1, "n_trials": 2}
    with pytest.MonkeyPatch.context() as patch, Planner(model, importance=imatrix, text=text, **options) as planner:
        patch.setattr("pyllamaernie.plan.baselines.PRESETS", ("Q2_K", "Q3_K_M", "Q4_K_M"))  # asking takes a second each
        yield planner


def test_budget_is_never_exceeded_and_nearly_used(guess: Planner, home: Path) -> None:
    for bpw in np.linspace(3.0, 8.4, 10):
        size = guess.size_of(float(bpw))
        plan = guess.plan(size)
        assert plan.size_bytes <= size
        assert size - plan.size_bytes <= 0.005 * size
    path = home / "sized.gguf"
    result = write_quantized(guess.source, plan.types, path, importance=guess.importance, n_threads=1, overwrite=True)
    assert result.n_bytes == path.stat().st_size == plan.size_bytes


def test_too_small_a_budget_names_the_smallest(guess: Planner) -> None:
    with pytest.raises(BudgetError) as caught:
        guess.plan(100_000)
    smallest = caught.value.smallest_bytes
    assert guess.plan(smallest).size_bytes <= smallest


@pytest.mark.slow
def test_same_inputs_give_the_same_plan(model: Path, imatrix: Path) -> None:
    options = {"bpw": 4.2, "importance": imatrix, "probe": "none", "types": FAST, "baselines": False}
    first = make_plan(model, n_threads=1, **options)
    assert make_plan(model, n_threads=2, **options).to_json() == first.to_json()


@pytest.mark.parametrize(
    "given, n_bytes",
    [("12GiB", 12 << 30), ("800MB", 800_000_000), ("1.5g", 1_500_000_000), ("123456", 123456), ("2 kib", 2048)],
)
def test_sizes_can_be_written_in_units(given: str, n_bytes: int) -> None:
    assert parse_size(given) == n_bytes


@pytest.mark.parametrize("given", ["", "12 apples", "-3G", "0", "1e9", "GiB"])
def test_what_is_no_size_is_refused(given: str) -> None:
    with pytest.raises(InputError, match="12GiB"):
        parse_size(given)


def test_plan_as_json_is_the_plan(guess: Planner) -> None:
    plan = guess.plan(guess.size_of(4.0))
    again = ModelPlan.from_json(plan.to_json())
    assert again == plan
    assert SolverPlan.from_dict(json.loads(plan.to_json())) == plan.solved  # as `quantize --plan` reads it


def test_broken_plan_is_one_line(guess: Planner) -> None:
    for text in ("{", "[]", '{"format": 99}', json.dumps({"format": 1, "model": "m"})):
        with pytest.raises(InputError, match="plan"):
            ModelPlan.from_json(text)


def test_llama_quantize_takes_every_line_of_the_recipe(guess: Planner, model: Path, imatrix: Path, home: Path) -> None:
    plan = guess.plan(guess.size_of(4.3))
    path = home / "recipe.txt"
    path.write_text(plan.recipe())
    assert plan.recipe() == plan.recipe().lower() and all(line.startswith("^") for line in plan.recipe().splitlines())
    words = ["--dry-run", "--imatrix", imatrix, "--tensor-type-file", path, model, "Q8_0"]
    said = programs.run("llama-quantize", words, capture=True)
    for name, type_name in plan.types.items():
        if name.endswith("weight") and "_norm" not in name and "gate_inp" not in name:
            (line,) = [row for row in (said.stdout + said.stderr).splitlines() if f"] {name} " in row]
            assert f"({type_name.lower()})" in line.lower() or f"type = {type_name.lower()}" in line.lower()


def test_model_beyond_the_memory_is_not_run(model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyllamaernie.plan.planner.free_memory_bytes", lambda: 1_000_000)
    options = {"types": ["Q4_0", "Q8_0"], "baselines": False, "n_threads": 1}
    with pytest.raises(OutOfMemoryError, match="--probe none"):
        make_plan(model, bpw=6, text=text, probe="groups", **options)
    plan = make_plan(model, bpw=6, text=text, **options)
    assert plan.kl_measured is None and any("are free" in note for note in plan.notes)


def test_importance_of_another_model_is_refused(model: Path, imatrix: Path) -> None:
    good = read_importance(imatrix)
    name = "blk.1.attn_q.weight"
    for columns in ({"other.weight": np.ones((1, 256))}, {**good.columns, name: np.ones((1, 128), np.float32)}):
        counts = {name: np.array([9]) for name in columns}
        with pytest.raises(InputError, match="made with another model"):
            make_plan(model, bpw=5, importance=Importance(imatrix, columns, counts, (), 1), probe="none", types=FAST)


def test_gate_and_up_have_one_type(guess: Planner) -> None:
    types = guess.plan(guess.size_of(3.7)).types
    for name in types:
        if ".ffn_gate" in name and "_inp" not in name:
            assert types[name] == types[name.replace(".ffn_gate", ".ffn_up")]


def test_rules_are_kept(model: Path) -> None:
    rules = [Rule(r"^output\.weight$", "pin", "Q8_0"), Rule("_exps", "max", "Q4_0"), Rule("attn_v", "min", "Q6_K")]
    plan = make_plan(model, bpw=5.0, probe="none", types=["Q4_0", "Q6_K", "Q8_0"], rules=rules, n_threads=1)
    assert plan.types["output.weight"] == "Q8_0"
    for name, type_name in plan.types.items():
        assert "_exps" not in name or TYPES[type_name].bpw <= 4.5
        assert "attn_v" not in name or TYPES[type_name].bpw >= 6.5


def test_quantized_model_is_refused(guess: Planner, home: Path) -> None:
    path = home / "q8.gguf"
    types = {name: "Q8_0" for item in guess.items for name in item.names}
    write_quantized(guess.source, types, path, n_threads=1, overwrite=True)
    with pytest.raises(InputError, match=r"is Q8_0 already"):
        make_plan(path, bpw=4, probe="none")


def test_items_are_tensors_but_gate_with_up() -> None:
    names = ["blk.3.ffn_up_exps.weight", "blk.3.ffn_gate_exps.weight", "blk.3.ffn_down_exps.weight", "output.weight"]
    assert items_of(names) == [
        Item(("blk.3.ffn_down_exps.weight",), "ffn_down_exps", 3),
        Item(("blk.3.ffn_gate_exps.weight", "blk.3.ffn_up_exps.weight"), "ffn_gate_exps", 3),
        Item(("output.weight",), "output", None),
    ]
    layers = items_of(f"blk.{il}.attn_q.weight" for il in range(8))
    assert [len(group) for group in groups_of(layers).values()] == [2, 2, 2, 2]
    assert len(groups_of(layers, each=True)) == 8


def test_curve_goes_through_its_probes() -> None:
    truth = Curve(3.0, 1.25)
    points = [(sum(truth.loss(e) for e in errors), errors) for errors in ((0.1, 0.1), (0.004, 0.004))]
    found = fit_curve(points)
    assert found.scale == pytest.approx(3.0, rel=1e-6) and found.power == pytest.approx(1.25, rel=1e-6)
    assert fit_curve([(0.5, (0.1, 0.3))]).loss(0.1) == pytest.approx(0.125)
    assert fit_curve([(0.0, (0.1,))]).loss(0.1) == 0


def test_exact_weights_come_back(runner: Planner) -> None:
    probe = runner.probe
    assert probe is not None
    probe.restore()
    assert probe.kl() == 0.0
    losses = []
    for type_name in ("Q2_K", "Q4_K", "Q8_0"):
        probe.set_types({"blk.2.ffn_up_exps.weight": type_name})
        losses.append(probe.kl())
    assert losses[0] > 3 * losses[1] > 9 * losses[2] > 0
    probe.restore()
    assert probe.kl() == 0.0


def test_probed_loss_is_that_of_the_file(runner: Planner, model: Path, imatrix: Path, text: Path, home: Path) -> None:
    """The file rounds activations too, so it loses somewhat more; at three bits that is little."""
    from pyllamaernie.compare.comparison import compare

    types = {name: "Q3_K" for item in runner.items for name in item.names}
    probe = runner.probe
    assert probe is not None
    probe.set_types(types)
    expected = probe.kl()
    probe.restore()
    path = home / "q3.gguf"
    importance = read_importance(imatrix)
    write_quantized(runner.source, types, path, importance=importance, n_threads=1, overwrite=True)
    found = compare([model, path], text, n_chunks=1, n_threads=1, speed_runs=0).models[1].text
    assert found is not None
    assert found.mean == pytest.approx(expected, rel=0.25)  # it counts the second half of the chunk only


@pytest.mark.slow
def test_slow_types_are_imitated_with_their_error(model: Path, imatrix: Path, text: Path) -> None:
    source, importance = gguf_source(model), read_importance(imatrix)
    errors = measure(source, importance, types=["CCQ2", "Q2_K", "Q3_K"], n_rows=32)
    name = "blk.1.attn_q.weight"
    with Probe(source, importance, text, n_chunks=1, n_threads=1, errors=errors) as probe:
        encoder, share = probe._imitation(name, "CCQ2")
        row = errors.errors[name]
        assert encoder in ("Q2_K", "Q3_K")
        assert share**2 * row[encoder].error == pytest.approx(row["CCQ2"].error)
        probe.set_types({name: "CCQ2"})
        imitated = probe.kl()
        probe.restore()
        probe.errors = None
        probe._cache.clear()
        probe.set_types({name: "CCQ2"})
        assert imitated == pytest.approx(probe.kl(), rel=0.5)


@pytest.mark.slow
def test_measured_plan_is_no_worse_than_what_ran_beside_it(runner: Planner) -> None:
    size = runner.size_of(3.6)
    plan = runner.plan(size)
    assert plan.kl_measured is not None and plan.kl_predicted is not None and plan.size_bytes <= size
    assert {b.name.split()[0] for b in plan.baselines} == {"stock", "all", "experts"}
    for b in plan.baselines:
        assert b.kl is not None
        assert b.size_bytes > size or b.kl >= plan.kl_measured


@pytest.mark.slow
def test_better_preset_is_shipped_and_said(runner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the best plan that ran is bad, the preset is the plan."""
    monkeypatch.setattr(runner, "_measured", lambda curves, solved, *rest: (9.9, curves, solved))
    plan = runner.plan(runner.size_of(4.6))
    assert plan.source != "solved"
    assert plan.kl_measured == min(b.kl for b in plan.baselines if b.size_bytes <= plan.budget_bytes and b.kl)
    assert any(plan.source in note and "better" in note for note in plan.notes)
    assert plan.size_bytes <= plan.budget_bytes


def scaled_columns(source: ModelSource, layer: int, sigma: float, seed: int) -> tuple[ModelSource, Importance]:
    """The same function with one `down` that is hard to quantize: rows of `up` times s, columns of `down` over s.

    Its inputs are then s times as large; the importance matrix says so, and knows nothing else.
    """
    up, down = (f"blk.{layer}.ffn_{part}_exps.weight" for part in ("up", "down"))
    quantizable = [w for w in source.weights if is_quantizable(w)]
    columns = {w.name: np.ones((w.n_matrices, w.n_cols), np.float32) for w in quantizable}
    counts = {w.name: np.full(w.n_matrices, 100) for w in quantizable}
    s = np.random.default_rng(seed).lognormal(0, sigma, columns[down].shape).astype(np.float32)
    columns[down] = s * s
    out = []
    for w in source.weights:
        if w.name in (up, down):
            data = np.concatenate([p.load() for p in w.pieces()])
            values = native.dequantize(w.type, data, w.n_cols).reshape(w.shape)
            w = in_memory(w.name, values * s[:, :, None] if w.name == up else values / s[:, None, :])
        out.append(w)
    fingerprint = f"{source.fingerprint} {layer} {sigma} {seed}"
    importance = Importance(Path("imatrix.gguf"), columns, counts, (), 1)
    return ModelSource(source.path, source.arch, source.keys, out, fingerprint), importance


def in_memory(name: str, values: np.ndarray) -> Weights:
    flat = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
    rows = values.shape[-2]

    def pieces() -> Iterator[Piece]:
        for i in range(0, len(flat), rows):
            yield Piece(i, rows, lambda i=i: flat[i : i + rows].view(np.uint8))

    return Weights(name, values.shape, "F32", flat.nbytes, pieces)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_hard_tensor_gets_more_bits_than_its_peers(model: Path, seed: int, sigma: float) -> None:
    layer = 1 + seed % 3
    source, importance = scaled_columns(gguf_source(model), layer, sigma, seed)
    options = {"probe": "none", "types": FAST, "baselines": False, "n_threads": 1}
    plan = make_plan(source, bpw=5.0, importance=importance, **options)
    bits = {il: TYPES[plan.types[f"blk.{il}.ffn_down_exps.weight"]].bpw for il in (1, 2, 3)}
    assert all(bits[layer] > bits[il] for il in bits if il != layer), bits


def test_verb_writes_plan_recipe_and_report(model: Path, imatrix: Path, home: Path, capsys) -> None:
    output = home / "verb.plan.json"
    words = ["plan", model, "--bpw", 4, "--imatrix", imatrix, "--types", ",".join(FAST), "-o", output]
    assert main([*map(str, words), "--threads", "1"]) == 0
    plan = ModelPlan.from_json(output.read_text())
    assert str(plan.size_bytes) in capsys.readouterr().out
    assert (home / "verb.recipe.txt").read_text() == plan.recipe()
    report = (home / "verb.plan.md").read_text()
    assert "| ffn_down_exps |" in report and "nothing was run" in report
    for name in ("sizes", "bits"):
        assert (home / f"verb.{name}.svg").read_text().startswith("<?xml")
    assert main([*map(str, words), "--threads", "1"]) == 1  # exists
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["--size", "12 apples"], "12GiB"),
        (["--size", "10KiB"], "smallest file is"),
        (["--bpw", "-1"], "positive"),
        (["--bpw", "4", "--pin", "Q4_K"], "REGEX=TYPE"),
        (["--bpw", "4", "--types", "Q4_Z"], "Q4_Z"),
        (["--bpw", "4", "--probe", "each"], "give a text"),
        (["--bpw", "4", "-f", "missing.txt"], "missing.txt"),
    ],
)
def test_wrong_word_is_one_line_and_no_file(words: list[str], said: str, model: Path, tmp_path: Path, capsys) -> None:
    arguments = ["plan", str(model), *words, "-o", str(tmp_path / "out.plan.json"), "--threads", "1"]
    arguments += [] if "--types" in words else ["--types", "Q4_K,Q8_0"]
    assert main(arguments) != 0
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_losses_are_finite(guess: Planner) -> None:
    plan = guess.plan(guess.size_of(3.3))
    assert math.isfinite(plan.solved.loss) and plan.solved.gap < 0.001

"""The budget solver against brute force, dynamic programming and the real llama-quantize."""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
from tensor_lists import SHAPES, gate_up_ties, table

from pyllamaernie.errors import BudgetError, InputError, QuantizeError
from pyllamaernie.plan import knapsack
from pyllamaernie.plan.budget import Candidate, Plan, Rule, Tensor, disk_bytes, make_groups, solve, solve_all

ROUNDING = 1e-12  # of the loss: sums of a few hundred float64 in another order


def instance(seed: int, n_max: int, *, n_types: int = 5, unit: int = 32) -> tuple[list[Tensor], int]:
    """Random tensors and a feasible budget; every fourth has small integers, where ties abound."""
    rng = np.random.default_rng(seed)
    tensors = []
    span = (50, 1000, 10**7, 8)[seed % 4]
    for i in range(rng.integers(1, n_max + 1)):
        n = rng.integers(1, n_types + 1)
        sizes = rng.integers(1, span, n) * unit
        losses = rng.integers(0, 6, n) if seed % 4 == 3 else np.exp(rng.normal(0, 2, n))
        candidates = [Candidate(f"Q{j}", int(s), float(v)) for j, (s, v) in enumerate(zip(sizes, losses, strict=True))]
        tensors.append(Tensor(f"t{i}", 1000, tuple(candidates)))
    smallest = sum(min(c.size_bytes for c in t.candidates) for t in tensors)
    largest = sum(max(c.size_bytes for c in t.candidates) for t in tensors)
    return tensors, int(smallest + rng.uniform(0, 1.05) * (largest - smallest))


def least_loss(tensors: list[Tensor], budget_bytes: int) -> float:
    """By trying every combination."""
    sizes, losses = np.zeros(1, np.int64), np.zeros(1)
    for t in tensors:
        sizes = np.add.outer(sizes, [c.size_bytes for c in t.candidates]).ravel()
        losses = np.add.outer(losses, [c.loss for c in t.candidates]).ravel()
    return float(losses[sizes <= budget_bytes].min())


def least_loss_by_capacity(tensors: list[Tensor], budget_units: int, unit: int) -> float:
    """By dynamic programming over every byte count in units."""
    best = np.zeros(budget_units + 1)
    for t in tensors:
        after = np.full_like(best, np.inf)
        for c in t.candidates:
            n = c.size_bytes // unit
            after[n:] = np.minimum(after[n:], best[: len(best) - n] + c.loss)
        best = after
    return float(best[-1])


def check(plan: Plan, tensors: list[Tensor]) -> None:
    """The plan is one candidate for each tensor and its sums are right."""
    types = plan.types
    assert sorted(types) == sorted(t.name for t in tensors)
    chosen = [next(c for c in t.candidates if c.type == types[t.name]) for t in tensors]
    assert plan.size_bytes == plan.fixed_bytes + sum(c.size_bytes for c in chosen) <= plan.budget_bytes
    assert plan.loss == pytest.approx(math.fsum(c.loss for c in chosen), rel=ROUNDING, abs=0)
    assert plan.lp_bound <= plan.bound + ROUNDING * abs(plan.bound)
    assert plan.bound <= plan.loss


def test_plan_equals_brute_force() -> None:
    for seed in range(200):
        tensors, budget_bytes = instance(seed, 8)
        plan = solve(tensors, budget_bytes)
        check(plan, tensors)
        assert plan.loss == pytest.approx(least_loss(tensors, budget_bytes), rel=ROUNDING, abs=ROUNDING), seed
        assert plan.optimal and plan.gap == 0.0


def test_plan_equals_dynamic_programming_on_larger_instances() -> None:
    for seed in range(0, 80, 4):  # those with sizes up to 50 units
        tensors, budget_bytes = instance(seed, 60, n_types=12)
        plan = solve(tensors, budget_bytes)
        check(plan, tensors)
        expected = least_loss_by_capacity(tensors, budget_bytes // 32, 32)
        assert plan.optimal and plan.loss == pytest.approx(expected, rel=ROUNDING, abs=0), seed


def test_bound_is_true_where_the_search_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    n_open = 0
    for seed in range(200):
        tensors, budget_bytes = instance(seed, 8)
        optimum = least_loss(tensors, budget_bytes)
        monkeypatch.setattr(knapsack, "_N_STATES", (1,))
        monkeypatch.setattr(knapsack, "_N_EXPANDED_MAX", 2 * sum(len(t.candidates) for t in tensors))
        plan = solve(tensors, budget_bytes)
        check(plan, tensors)
        assert plan.bound <= optimum * (1 + ROUNDING) <= plan.loss * (1 + 2 * ROUNDING), seed
        n_open += not plan.optimal
    assert n_open > 0  # or nothing was cut short


def test_same_plan_for_the_same_table_in_any_order() -> None:
    rng = np.random.default_rng(3)
    tensors = table(SHAPES["21B"], seed=4)
    ties = gate_up_ties(tensors)
    budget_bytes = sum(t.n_weights for t in tensors) * 3 // 8
    first = solve(tensors, budget_bytes, ties=ties)
    mixed = [replace(t, candidates=tuple(rng.permutation(np.array(t.candidates, object)))) for t in tensors]
    rng.shuffle(mixed)
    again = solve(mixed, budget_bytes, ties=[tie[::-1] for tie in reversed(ties)])
    assert json.dumps(again.to_dict()) == json.dumps(first.to_dict())


def test_loss_never_rises_with_the_budget() -> None:
    tensors = table(SHAPES["21B"], seed=5)
    n_weights = sum(t.n_weights for t in tensors)
    plans = solve_all(tensors, (int(n_weights * bpw / 8) for bpw in np.linspace(1.8, 17.0, 40)))
    assert len(plans) == 40
    for a, b in itertools.pairwise(plans):
        assert a.budget_bytes < b.budget_bytes and b.loss <= a.loss and b.bound <= a.loss
    best = {t.name: min(c.loss for c in t.candidates) for t in tensors}
    assert plans[-1].loss == pytest.approx(math.fsum(best.values()), rel=ROUNDING)
    assert plans[-1].multiplier == 0.0 and plans[-1].optimal  # everything fits


def test_more_candidates_never_hurt_and_rules_never_help() -> None:
    rng = np.random.default_rng(9)
    for seed in range(100):
        tensors, budget_bytes = instance(seed, 8)
        plan = solve(tensors, budget_bytes)
        i = int(rng.integers(len(tensors)))
        more = replace(
            tensors[i],
            candidates=(*tensors[i].candidates, Candidate("new", int(rng.integers(1, 2000)), float(rng.uniform(0, 3)))),
        )
        assert solve([*tensors[:i], more, *tensors[i + 1 :]], budget_bytes).loss <= plan.loss * (1 + ROUNDING)
        pinned = tensors[i].candidates[int(rng.integers(len(tensors[i].candidates)))].type
        try:
            limited = solve(tensors, budget_bytes, rules=[Rule(f"^{tensors[i].name}$", "pin", pinned)])
        except BudgetError:
            continue
        assert limited.types[tensors[i].name] == pinned
        assert limited.loss >= plan.loss * (1 - ROUNDING)


def test_start_is_a_floor_for_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, budget_bytes = instance(2, 8)
    best = solve(tensors, budget_bytes)
    monkeypatch.setattr(knapsack, "_search", lambda relaxed, sizes, losses, known, n: (known, relaxed.bound, False))
    assert solve(tensors, budget_bytes, start=best.types).loss == best.loss
    foreign = {**best.types, "t0": "F64"}  # not a choice for this table: ignored
    assert solve(tensors, budget_bytes, start=foreign).loss == solve(tensors, budget_bytes).loss
    too_small = sum(min(c.size_bytes for c in t.candidates) for t in tensors)
    assert solve(tensors, too_small, start=best.types).size_bytes <= too_small


@pytest.mark.parametrize("name", SHAPES)
def test_gap_and_unused_bytes_of_real_shapes(name: str) -> None:
    tensors = table(SHAPES[name], seed=1)
    ties = gate_up_ties(tensors)
    n_quantizable = sum(t.quantizable for t in tensors)
    assert (n_quantizable, n_quantizable - len(ties)) == {"21B": (278, 223), "28B-VL": (359, 277), "300B": (380, 326)}[
        name
    ]
    n_weights = sum(t.n_weights for t in tensors)
    for bpw in (1.8, 2.2, 2.7, 3.3, 4.0, 4.85, 6.0):
        begin = time.perf_counter()
        plan = solve(tensors, int(n_weights * bpw / 8), fixed_bytes=6_000_000, ties=ties)
        seconds = time.perf_counter() - begin
        check(plan, tensors)
        print(f"{name} {bpw} bpw: gap {plan.gap:.2e}, to the relaxed bound {plan.lp_gap:.2e}, {seconds:.2f} s")
        assert plan.gap < 1e-3
        assert plan.unused_bytes <= 0.005 * plan.budget_bytes
        assert all(plan.types[gate] == plan.types[up] for gate, up in ties)


def test_layers_alike_leave_no_gap() -> None:
    """Equal losses within a role: the relaxed bound alone is 0.14 % off here."""
    first: dict[tuple[str, int], tuple[Candidate, ...]] = {}
    tensors = [
        replace(t, candidates=first.setdefault((t.name.split(".")[-2], t.n_weights), t.candidates))
        for t in table(SHAPES["21B"], seed=0)
    ]
    plan = solve(tensors, sum(t.n_weights for t in tensors) * 6 // 8, ties=gate_up_ties(tensors))
    check(plan, tensors)
    assert plan.gap < 1e-3 < plan.lp_gap


def test_too_small_a_budget_names_the_smallest_file() -> None:
    tensors, _ = instance(1, 8)
    smallest = 77 + sum(min(c.size_bytes for c in t.candidates) for t in tensors)
    with pytest.raises(BudgetError, match=rf"{smallest - 1} bytes .* {smallest} bytes") as caught:
        solve(tensors, smallest - 1, fixed_bytes=77)
    assert (caught.value.budget_bytes, caught.value.smallest_bytes) == (smallest - 1, smallest)
    assert (
        isinstance(caught.value, QuantizeError) and isinstance(caught.value, ValueError) and caught.value.exit_code == 3
    )
    plan = solve(tensors, smallest, fixed_bytes=77)
    assert plan.size_bytes == smallest and plan.unused_bytes == 0
    with pytest.raises(BudgetError):
        solve(tensors, -5)


def four() -> list[Tensor]:
    """Gate, up and down with 2, 4 and 8 bits, and a norm that stays F32."""
    bits = {"Q2": 2, "Q4": 4, "Q8": 8}
    weights = {"blk.0.ffn_gate.weight": 1.0, "blk.0.ffn_up.weight": 4.0, "blk.0.ffn_down.weight": 2.0}
    tensors = [
        Tensor(name, 1024, tuple(Candidate(t, 128 * b, weight * 4.0**-b) for t, b in bits.items()))
        for name, weight in weights.items()
    ]
    return [*tensors, Tensor("blk.0.ffn_norm.weight", 8, (Candidate("F32", 32, 0.0),), quantizable=False)]


GATE, UP, DOWN, NORM = (t.name for t in four())


def test_ties_give_one_type_and_add_bytes_and_losses() -> None:
    free = solve(four(), 128 * (2 + 4 + 4) + 32)
    assert free.types == {GATE: "Q2", UP: "Q4", DOWN: "Q4", NORM: "F32"}
    tied = solve(four(), 128 * (2 + 4 + 4) + 32, ties=[(GATE, UP)])
    assert tied.types == {GATE: "Q4", UP: "Q4", DOWN: "Q2", NORM: "F32"}
    group = next(g for g in make_groups(four(), [(UP, GATE)]) if GATE in g.tensors)
    assert group.tensors == (GATE, UP) and group.n_weights == 2048
    assert [(c.type, c.size_bytes, c.loss) for c in group.candidates] == [
        ("Q2", 512, 5 * 4.0**-2),
        ("Q4", 1024, 5 * 4.0**-4),
        ("Q8", 2048, 5 * 4.0**-8),
    ]
    chained = make_groups(four(), [(GATE, UP), (UP, DOWN)])  # ties with a tensor in common are one tie
    assert [g.tensors for g in chained] == [(DOWN, GATE, UP), (NORM,)]


def test_tied_tensors_take_only_types_that_all_allow() -> None:
    tensors = four()
    tensors[1] = replace(tensors[1], candidates=tensors[1].candidates[1:])
    group = next(g for g in make_groups(tensors, [(GATE, UP)]) if GATE in g.tensors)
    assert [c.type for c in group.candidates] == ["Q4", "Q8"]
    with pytest.raises(InputError, match=rf"no type in common \({GATE}: Q2, Q4, Q8; {NORM}: F32\)"):
        make_groups(tensors, [(GATE, NORM)])
    with pytest.raises(InputError, match=r"blk\.7\.x not in the table"):
        make_groups(tensors, [(GATE, "blk.7.x")])


def test_rules_limit_the_types() -> None:
    plan = solve(four(), 10**6, rules=[Rule("ffn_(gate|up)", "max", "Q4"), Rule("gate", "pin", "Q2")])
    assert plan.types == {GATE: "Q2", UP: "Q4", DOWN: "Q8", NORM: "F32"}
    plan = solve(four(), 128 * 8 + 32, rules=[Rule("down", "min", "Q4")])
    assert plan.types == {GATE: "Q2", UP: "Q2", DOWN: "Q4", NORM: "F32"}
    with pytest.raises(BudgetError, match=f"smallest file is {128 * 8 + 32} bytes"):
        solve(four(), 128 * 8 + 31, rules=[Rule("down", "min", "Q4")])
    plan = solve(four(), 128 * 8 + 32, ties=[(GATE, UP)], rules=[Rule("gate", "max", "Q2")])
    assert plan.types[UP] == "Q2"  # a rule holds for the tied tensor too


def test_a_limit_is_compared_in_bits_where_the_tensor_cannot_have_the_type() -> None:
    tensors = four()
    odd = Tensor("blk.0.odd.weight", 64, (Candidate("Q3_32", 32, 2.0), Candidate("Q8", 64, 1.0)))
    limited = make_groups([*tensors, odd], rules=[Rule("odd", "min", "Q4")])
    kept = next(g for g in limited if g.tensors == (odd.name,)).candidates
    assert [c.type for c in kept] == ["Q3_32", "Q8"]  # 32 bytes for 64 weights are 4 bits
    limited = make_groups([*tensors, odd], rules=[Rule("odd", "max", "Q4")])
    assert [c.type for c in next(g for g in limited if g.tensors == (odd.name,)).candidates] == ["Q3_32"]


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (Rule("gate", "pin", "Q5"), r"pin gate=Q5 leaves nothing for blk\.0\.ffn_gate\.weight: it can have Q2, Q4, Q8"),
        (Rule("gate", "min", "Q5"), r"'Q5' is a candidate of no tensor; known: F32, Q2, Q4, Q8"),
        (Rule("gate", "least", "Q4"), "'least': must be one of pin, min, max"),
        (Rule("attn", "min", "Q4"), "'attn' is found in no quantizable tensor"),
        (Rule("norm", "pin", "Q4"), "'norm' is found in no quantizable tensor"),
        (Rule("(gate", "min", "Q4"), "not a regular expression"),
    ],
)
def test_impossible_rules_are_named(rule: Rule, match: str) -> None:
    with pytest.raises(InputError, match=match):
        solve(four(), 10**6, rules=[rule])
    with pytest.raises(InputError, match="leaves nothing"):
        solve(four(), 10**6, rules=[Rule("gate", "min", "Q4"), Rule("gate", "max", "Q2")])


def test_broken_tables_are_refused() -> None:
    a = Tensor("a", 8, (Candidate("Q4", 32, 1.0),))
    with pytest.raises(InputError, match="a is in the table twice"):
        solve([a, a], 100)
    with pytest.raises(InputError, match="no tensors"):
        solve([], 100)
    with pytest.raises(InputError, match="different types"):
        solve([replace(a, candidates=())], 100)
    with pytest.raises(InputError, match="different types"):
        solve([replace(a, candidates=a.candidates * 2)], 100)
    with pytest.raises(InputError, match="needs one candidate"):
        solve([replace(four()[0], quantizable=False)], 10**6)
    for size_bytes, loss in ((0, 1.0), (32.5, 1.0), (32, math.nan), (32, math.inf)):
        with pytest.raises(InputError, match="tensor a, type Q4"):
            solve([replace(a, candidates=(Candidate("Q4", size_bytes, loss),))], 100)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="0 weights"):
        solve([replace(a, n_weights=0)], 100)


def test_useless_candidates_are_left_out() -> None:
    candidates = (("A", 64, 3.0), ("B", 64, 2.0), ("C", 96, 2.0), ("D", 128, 1.0), ("E", 64, 2.0))
    (group,) = make_groups([Tensor("a", 8, tuple(Candidate(*c) for c in candidates))])
    assert [c.type for c in group.candidates] == ["B", "D"]  # of equals the first by name


def test_disk_bytes_are_whole_blocks_and_padding() -> None:
    assert disk_bytes(1, 256, 256, 66) == 96
    assert disk_bytes(3, 512, 256, 66) == 416  # 396 and padding
    assert disk_bytes(3, 512, 256, 66, alignment=64) == 448
    assert disk_bytes(1, 32, 1, 4) == 128
    with pytest.raises(InputError, match="row of 48 weights is not a multiple of the block of 32"):
        disk_bytes(1, 48, 32, 18)


def test_plan_survives_json_to_the_last_bit() -> None:
    tensors = table(SHAPES["300B"], seed=2)
    plan = solve(tensors, 120 * 10**9, fixed_bytes=5, ties=gate_up_ties(tensors))
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["schema"] == 1
    assert Plan.from_dict(data) == plan


def test_foreign_or_altered_plans_are_refused() -> None:
    data = json.loads(json.dumps(solve(four(), 2000).to_dict()))
    with pytest.raises(InputError, match="schema is 2, this version reads 1"):
        Plan.from_dict({**data, "schema": 2})
    with pytest.raises(InputError, match="schema is 'list'"):
        Plan.from_dict([data])  # type: ignore[arg-type]
    for broken in (
        {k: v for k, v in data.items() if k != "bound"},
        {k: v for k, v in data.items() if k != "choices"},
        {**data, "more": 1},
        {**data, "choices": None},
        {**data, "choices": [{**data["choices"][0], "tensors": None}]},
        {**data, "fixed_bytes": "0"},
    ):
        with pytest.raises(InputError, match="not a plan of schema 1"):
            Plan.from_dict(broken)
    for key, match in (("size_bytes", "the plan's parts are"), ("loss", "do not add up")):
        part = {**data["choices"][0], key: data["choices"][0][key] + 32}
        with pytest.raises(InputError, match=match):
            Plan.from_dict({**data, "choices": [part, *data["choices"][1:]]})
    twice = [{**part, "tensors": [GATE]} for part in data["choices"]]
    with pytest.raises(InputError, match="twice"):
        Plan.from_dict({**data, "choices": twice})


def test_recipe_lines_are_anchored_escaped_and_lower_case() -> None:
    plan = solve(four(), 10**6, rules=[Rule("gate", "pin", "Q2")])
    assert plan.recipe().splitlines() == [
        r"^blk\.0\.ffn_down\.weight$=q8",
        r"^blk\.0\.ffn_gate\.weight$=q2",
        r"^blk\.0\.ffn_up\.weight$=q8",
    ]
    for name in ("blk.0.A.weight", "a b", "a=b", "a\n"):
        with pytest.raises(InputError, match="cannot stand in a recipe"):
            solve([replace(four()[0], name=name)], 10**6).recipe()


def test_llama_quantize_follows_the_recipe_to_the_byte(tmp_path: Path) -> None:
    pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
    from gguf_models import gguf

    from pyllamaernie import programs

    rng = np.random.default_rng(0)
    source, tensors = gguf("moe"), []
    for t in gguf_py.GGUFReader(source).tensors:
        n_per_row, n_rows = int(t.shape[0]), int(np.prod(t.shape[1:]))
        matrix = len(t.shape) > 1 and t.name.endswith(".weight") and not re.search("_norm|ffn_gate_inp", t.name)
        scale = float(np.exp(rng.normal(0, 2))) * n_per_row * n_rows
        candidates = []
        for name in ("Q4_0", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0", "BF16") if matrix else (t.tensor_type.name,):
            size = gguf_py.GGML_QUANT_SIZES[gguf_py.GGMLQuantizationType[name]]
            loss = scale * rng.uniform(0.8, 1.2) * 4.0 ** (-8 * size[1] / size[0])
            if n_per_row % size[0] == 0:
                candidates.append(Candidate(name, disk_bytes(n_rows, n_per_row, *size), loss))
        tensors.append(Tensor(t.name, n_per_row * n_rows, tuple(candidates), quantizable=matrix))
    plan = solve(tensors, sum(t.n_weights for t in tensors) * 7 // 8, ties=gate_up_ties(tensors))
    assert len({c.type for c in plan.choices if c.quantizable}) >= 4
    recipe, output = tmp_path / "recipe.txt", tmp_path / "out.gguf"
    recipe.write_text(plan.recipe())
    programs.run(
        "llama-quantize", ["--tensor-type-file", recipe, source, output, "Q8_0", "1"], capture=True, timeout=60
    )
    written = gguf_py.GGUFReader(output)
    assert {t.name: t.tensor_type.name for t in written.tensors} == plan.types
    assert output.stat().st_size == written.data_offset + plan.size_bytes

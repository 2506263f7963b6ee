"""The plan of a model as a record: a type for every tensor, how good that is, its JSON. `planner.py` makes plans."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pyllamaernie.errors import InputError
from pyllamaernie.plan import budget
from pyllamaernie.plan.table import Curve
from pyllamaernie.quant.importance import Importance
from pyllamaernie.quant.source import ModelSource

PLAN_FORMAT = 1


@dataclass(frozen=True)
class Baseline:
    """A file that anybody could make without a plan, its size, and its KL on the selection data.

    Its name begins with its kind: stock (a preset), all (one type), experts (a low type for them, a high for the rest).
    """

    name: str
    size_bytes: int
    kl: float


@dataclass(frozen=True)
class ModelPlan:
    """A type for every tensor of a model. `solved` holds sizes, losses and the proven bound of the solver.

    `kl_predicted` and `kl_measured` are on the selection data, None where nothing ran. `size_bytes` is the whole file.
    `source` says what the plan is: "solved", or the name of the baseline that was better. `notes` is for people.
    `runs`: (predicted, measured KL) of every solved plan that ran; the first is that of the first curves.
    """

    model: str
    fingerprint: str
    importance: str | None
    budget_bytes: int
    size_bytes: int
    n_params: int
    source: str
    types: Mapping[str, str]
    kl_predicted: float | None
    kl_measured: float | None
    baselines: tuple[Baseline, ...]
    curves: Mapping[str, Curve]
    notes: tuple[str, ...]
    solved: budget.Plan
    runs: tuple[tuple[float, float], ...] = ()

    @property
    def bpw(self) -> float:
        return self.solved.bpw

    def recipe(self) -> str:
        """Text for `llama-quantize --tensor-type-file`; CCQ types need this package's llama-quantize."""
        return self.solved.recipe()

    def to_dict(self) -> dict[str, Any]:
        out = {k: v for k, v in self.__dict__.items() if k not in ("solved", "curves", "baselines")}
        out |= {"types": dict(self.types), "notes": list(self.notes)}
        out |= {"curves": {label: asdict(c) for label, c in sorted(self.curves.items())}}
        out |= {"baselines": [asdict(b) for b in self.baselines], "solved": self.solved.to_dict()}
        return {"format": PLAN_FORMAT, **out}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ModelPlan:
        """The plan that `to_json` described. Raises: InputError when it is none, or of another version."""
        try:
            data = json.loads(text)
            if data["format"] != PLAN_FORMAT:
                raise InputError(f"plan format is {data['format']!r}, this version reads {PLAN_FORMAT}; make it again")
            fields = {k: v for k, v in data.items() if k != "format"}
            fields["solved"] = budget.Plan.from_dict(fields["solved"])
            fields["curves"] = {label: Curve(**c) for label, c in fields["curves"].items()}
            fields["baselines"] = tuple(Baseline(**b) for b in fields["baselines"])
            fields["notes"] = tuple(fields["notes"])
            fields["runs"] = tuple((a, b) for a, b in fields.get("runs", ()))
            return cls(**fields)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a plan: {error}; `pyllamaernie plan` makes one") from None


def planned_types(text: str, source: ModelSource, importance: Importance | None) -> dict[str, str]:
    """The types of a plan, as JSON. Raises: InputError for a plan of other files."""
    plan = ModelPlan.from_json(text)
    if plan.fingerprint != source.fingerprint:
        raise InputError(f"the plan was made for {plan.model}, or for it as it was then; make a plan for {source.path}")
    if plan.importance != (None if importance is None else importance.digest()):
        raise InputError(
            "the plan was made with another importance matrix; give the same one with --imatrix"
            if plan.importance
            else "the plan was made without an importance matrix; leave --imatrix out"
        )
    return dict(plan.types)

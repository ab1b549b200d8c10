"""The JSON Schema of plans accepts what the loader accepts, and refuses what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from psannlm.config.yaml_loader import dump_yaml, parse_yaml, read_yaml
from psannlm.errors import ConfigError
from psannlm.experiments.plan import load_plan
from psannlm.experiments.plan_schema import plan_schema

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if "\nvariants:" in path.read_text("utf-8"))
BASE = """\
model: {base: transformer, d_model: 16, n_layers: 1, n_heads: 2, mlp: swiglu}
data: {sources: [{builtin: python-reference}], tokenizer: simple, max_length: 16, val_split: 0.2}
train: {batch_tokens: 128, lr: 1e-2, max_steps: 999}
"""
PLAN = """\
base: base.yaml
budget: {tokens: 1000}
seeds: [1, 2]
learning_rates: [1e-2, 2e-2]
baseline: swiglu
overrides: {train: {warmup_steps: 2}}
variants:
  swiglu:
  sine: {model: {mlp: sine}, learning_rates: [5e-3]}
"""


def is_valid(value: object) -> bool:
    return bool(Draft202012Validator(plan_schema()).is_valid(value))


def changed(where: str, value: object) -> dict[str, Any]:
    """The plan above with the value at a dotted path replaced; ``...`` drops the key."""
    plan: Any = parse_yaml(PLAN).value
    *groups, key = where.split(".")
    group = plan
    for name in groups:
        group[name] = group.get(name) or {}
        group = group[name]
    if value is ...:
        del group[key]
    else:
        group[key] = value
    return plan  # type: ignore[no-any-return]


def test_schema_itself_is_valid_draft_2020_12() -> None:
    Draft202012Validator.check_schema(plan_schema())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_plans_validate(path: Path) -> None:
    assert [error.message for error in Draft202012Validator(plan_schema()).iter_errors(read_yaml(path).value)] == []


def test_all_shipped_plans_are_found() -> None:
    assert {"compare_example", "study_waves_1m", "study_task_parity"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("name", None),
        ("name", "a/b"),
        ("name", ""),
        ("seed", [1]),
        ("seeds", []),
        ("seeds", [1, 1]),
        ("seeds", 1),
        ("seeds", None),
        ("rate_seeds", None),
        ("rate_seeds", [1]),
        ("rate_seeds", []),
        ("learning_rates", None),
        ("learning_rates", [0]),
        ("learning_rates", ["fast"]),
        ("learning_rates", [1e-2, 1e-2]),
        ("rivals", []),
        ("rivals", ["sine"]),
        ("rivals", ["sine", "sine"]),
        ("budget", ...),
        ("budget", None),
        ("budget", {}),
        ("budget", {"flops": 1e12}),
        ("budget", {"flops": 1e12, "tokens": None}),
        ("budget", {"flops": 1e12, "tokens": 1}),
        ("budget", {"tokens": 0}),
        ("budget", {"token": 1}),
        ("base", ...),
        ("base", ""),
        ("baseline", ...),
        ("parameters", "shown"),
        ("parameters", "same"),
        ("solve_d_mlp", "no"),
        ("solve_d_mlp", 0),
        ("measure", "best"),
        ("measure", "worst"),
        ("answers", "copying"),
        ("answers", "poetry"),
        ("overrides", None),
        ("overrides", {"train": None}),
        ("overrides", {"trian": {}}),
        ("overrides.train", {"seed": 1}),
        ("overrides.train", {"epochs": 1}),
        ("overrides.train", {"checkpoint_dir": "runs/x"}),
        ("overrides.data", {"val_split": 0.1}),
        ("overrides.data", {"val_split": 1}),
        ("variants", {}),
        ("variants.sine", None),
        ("variants.sine", []),
        ("variants.sine", {"model": {"mlp": "sime"}}),
        ("variants.sine", {"model": None, "data": {"max_length": 8}}),
        ("variants.sine", {"train": {"lr": 1}}),
        ("variants.sine", {"learning_rates": []}),
        ("variants.sine", {"learning_rates": None, "budget_share": None}),
        ("variants.sine", {"budget_share": 0.5}),
        ("variants.sine", {"budget_share": 1.1}),
        ("variants.sine", {"budget_shar": 0.9}),
        ("variants.a+b_1", {}),
        ("variants.-a", {}),
    ],
)
def test_schema_agrees_with_loader(where: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    plan = changed(where, value)
    (tmp_path / "plan.yaml").write_text(dump_yaml(plan))
    try:
        load_plan(tmp_path / "plan.yaml")
        is_accepted = True
    except ConfigError:
        is_accepted = False
    assert is_valid(plan) == is_accepted


def test_every_key_has_a_description() -> None:
    schema = plan_schema()
    groups = [schema["properties"], *(section["anyOf"][0]["properties"] for section in schema["$defs"].values())]
    assert [name for group in groups for name, inner in group.items() if not inner.get("description")] == []
    assert set(schema["$defs"]["train"]["anyOf"][0]["properties"]).isdisjoint(("lr", "seed", "max_steps", "epochs"))

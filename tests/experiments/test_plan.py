"""Study configurations: reading, validation with line numbers, and former keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from psannlm.data.synthetic.algorithmic import TASKS, write_task
from psannlm.errors import ConfigError
from psannlm.experiments.plan import load_plan, merge
from psannlm.experiments.sizing import size_study
from psannlm.tokenizers.resolve import fit_tokenizer

ROOT = Path(__file__).resolve().parents[2]
BASE = """\
model: {base: transformer, d_model: 16, n_layers: 1, n_heads: 2, mlp: swiglu}
data: {tokenizer: simple, vocab_size: 512, max_length: 16, val_split: 0.2}
train: {batch_tokens: 128, lr: 1e-2, max_steps: 999, amp: fp32, device: cpu}
"""
PLAN = """\
base: base.yaml
budget: {tokens: 1000}
seeds: [1, 2]
learning_rates: [1e-2, 2e-2]
baseline: swiglu
overrides:
  train: {warmup_steps: 2}
variants:
  swiglu:
  sine:
    model: {mlp: sine}
    learning_rates: [5e-3]
"""


@pytest.fixture
def write(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path / "plan.yaml"


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs" / "studies").glob("study_*_*.yaml")))
def test_shipped_study_plans_have_equal_parameters(
    name: str, tmp_path: Path, prepare_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stand-ins for its corpora: every variant comes within 1 % of the baseline, in the same order of text."""
    text = "the quick brown fox jumps over the lazy dog. " * 400
    tokenizer = fit_tokenizer([text], "simple", vocab_size=512)
    for corpus in ("docs-2048", "books-2048"):
        prepare_folder(tmp_path / "psannlm-corpora" / corpus, tokenizer, [text, text[1:]], [text[2:]])
    (tmp_path / "psannlm-corpora" / "tasks").mkdir()
    for task in TASKS:
        (tmp_path / "psannlm-corpora" / "tasks" / f"{task}.txt").write_text("".join(write_task(task, 1, 20_000)))
    (tmp_path / "clone").mkdir()
    monkeypatch.chdir(tmp_path / "clone")
    study = size_study(load_plan(ROOT / "configs" / "studies" / name), Path("runs/study"))
    counts = {variant.variant.name: variant.n_parameters for variant in study.variants}
    baseline = counts[study.baseline.variant.name]
    assert len(counts) > 1
    assert any("sine" in (variant.model.mlp or "") for variant in study.variants)
    assert all(abs(count / baseline - 1) <= 0.01 for count in counts.values())
    assert not any(variant.order_differs for variant in study.variants)


def test_plan_former_key_merges_with_the_present_one(write: Path) -> None:
    """Base, overrides and variants may each name the convolution by its former or present key."""
    (write.parent / "base.yaml").write_text(BASE.replace("mlp: swiglu", "wave: {enabled: true, kernel_size: 3}"))
    overrides = "overrides:\n  model: {short_conv: {dilation_growth: 2}}\n"
    write.write_text(
        PLAN.replace("overrides:\n", overrides).replace("model: {mlp: sine}", "model: {wave: {activation: sine}}")
    )
    found = [variant.config.model.short_conv for variant in load_plan(write).variants]
    assert [(conv.enabled, conv.kernel_size, conv.dilation_growth) for conv in found] == [(True, 3, 2)] * 2
    assert [conv.activation for conv in found] == ["none", "sine"]


def test_plan_error_below_former_key_has_its_line(write: Path) -> None:
    write.write_text(PLAN.replace("model: {mlp: sine}", "model: {wave: {kernel_size: 0}}"))
    with pytest.raises(ConfigError) as caught:
        load_plan(write)
    (problem,) = caught.value.problems
    assert (problem.path, problem.line) == ("variants.sine.model.short_conv.kernel_size", 11)


def test_load_plan_reads_all_keys(write: Path) -> None:
    write.write_text(PLAN)
    plan = load_plan(write)
    swiglu, sine = plan.variants
    assert (plan.name, plan.baseline.name, plan.settings.seeds) == ("plan", "swiglu", (1, 2))
    assert (swiglu.learning_rates, sine.learning_rates) == ((0.01, 0.02), (0.005,))
    assert (sine.config.model.mlp, sine.config.model.d_model, sine.config.train.warmup_steps) == ("sine", 16, 2)
    assert sine.changes == {"model": {"mlp": "sine"}}


def test_shipped_example_plan_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = load_plan(Path("configs/compare_example.yaml"))
    assert plan.baseline.name == "swiglu"
    assert len(plan.variants) * len(plan.settings.seeds) * 2 == 24


FORMER_KEYS = "rivals: [sine]\nrate_seeds: [2]"
PRESENT_KEYS = "also_compare_to: [sine]\nlr_seeds: [2]"


def test_plan_former_keys_equal_present_keys(write: Path) -> None:
    write.write_text(PLAN.replace("baseline:", f"{FORMER_KEYS}\nbaseline:") + "    budget_share: 0.5\n")
    former = load_plan(write)
    write.write_text(PLAN.replace("baseline:", f"{PRESENT_KEYS}\nbaseline:") + "    budget_fraction: 0.5\n")
    assert former == load_plan(write)
    assert former.settings.also_compare_to == ("sine",)
    assert former.lr_seeds == (2,)
    assert [variant.budget_fraction for variant in former.variants] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds:", "seed:", ["seed (line 3): unknown key", "seeds"]),
        ("{tokens: 1000}", "{tokens: 1000, flops: 1}", ["line 2", "either tokens or flops"]),
        ("{tokens: 1000}", "{token: 1000}", ["budget.token (line 2)", "did you mean 'tokens'"]),
        ("budget: {tokens: 1000}\n", "", ["budget: missing"]),
        ("baseline: swiglu", "baseline: swigluu", ["baseline (line 5)", "did you mean 'swiglu'"]),
        (
            "baseline: swiglu",
            "baseline: swiglu\nalso_compare_to: [sin]",
            ["also_compare_to[0] (line 6)", "did you mean 'sine'"],
        ),
        (
            "baseline: swiglu",
            "baseline: swiglu\nalso_compare_to: [swiglu]",
            ["also_compare_to[0] (line 6)", "is the baseline"],
        ),
        ("baseline: swiglu", "baseline: swiglu\nalso_compare_to: [sine, sine]", ["also_compare_to (line 6)", "twice"]),
        ("[1, 2]", "[1, 1]", ["seeds (line 3)", "twice"]),
        ("[1, 2]", "[1, 2]\nrate_seeds: [1, 3]", ["lr_seeds[1] (line 4)", "not one of the seeds"]),
        ("[1, 2]", "[1, 2]\nrate_seeds: []", ["lr_seeds (line 4)", "empty"]),
        ("[1, 2]", "[1, 2]\nlr_seeds: [1]\nrate_seeds: [1]", ["rate_seeds (line 5): former name of lr_seeds"]),
        ("[1, 2]", "[1, 2]\nrate_seeds: [3]", ["lr_seeds[0] (line 4)", "not one of the seeds"]),
        ("[5e-3]", "[5e-3]\n    budget_share: 2", ["variants.sine.budget_fraction (line 13)", "at most 1"]),
        ("[1e-2, 2e-2]", "[0]", ["learning_rates", "line 4", "greater than 0"]),
        ("{mlp: sine}", "{mpl: sine}", ["variants.sine.model.mpl (line 11)", "did you mean 'mlp'"]),
        ("{mlp: sine}", "{mlp: sime}", ["variants.sine.model.mlp (line 11)", "did you mean 'sine'"]),
        ("    model: {mlp", "    modle: {mlp", ["variants.sine.modle (line 11)", "did you mean 'model'"]),
        ("[5e-3]", "[fast]", ["variants.sine.learning_rates", "line 12"]),
        ("[5e-3]", "[]", ["variants.sine.learning_rates", "line 12", "empty"]),
        ("[5e-3]", "[5e-3]\n    budget_fraction: 0", ["variants.sine.budget_fraction (line 13)", "greater than 0"]),
        (
            "[5e-3]",
            "[5e-3]\n    budget_fraction: 1.1",
            ["variants.sine.budget_fraction (line 13)", "at most 1"],
        ),
        ("[5e-3]", "[5e-3]\n    budget_fractio: 0.9", ["budget_fractio (line 13)", "did you mean 'budget_fraction'"]),
        ("{warmup_steps: 2}", "{warmup_stepz: 2}", ["overrides.train.warmup_stepz (line 7)", "warmup_steps"]),
        ("{warmup_steps: 2}", "{seed: 2}", ["overrides.train.seed (line 7)", "decided by seeds"]),
        ("{mlp: sine}", "{mlp: sine}\n    train: {lr: 1}", ["variants.sine.train.lr (line 12)", "learning_rates"]),
        ("  sine:", "  si/ne:", ["is not a folder name"]),
        ("base: base.yaml", "base: bse.yaml", ["did you mean 'base.yaml'"]),
    ],
)
def test_plan_errors_name_key_line_and_remedy(write: Path, old: str, new: str, words: list[str]) -> None:
    assert old in PLAN
    write.write_text(PLAN.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_plan(write)
    for word in words:
        assert word in str(caught.value)


def test_plan_error_in_base_is_reported_once(write: Path) -> None:
    (write.parent / "base.yaml").write_text(BASE.replace("n_heads: 2", "n_heads: 3"))
    write.write_text(PLAN)
    with pytest.raises(ConfigError) as caught:
        load_plan(write)
    assert str(caught.value).count("3 heads do not divide") == 1
    assert "in the base" in str(caught.value)


def test_plan_without_validation_split_raises(write: Path) -> None:
    (write.parent / "base.yaml").write_text(BASE.replace(", val_split: 0.2", ""))
    write.write_text(PLAN)
    with pytest.raises(ConfigError, match="no validation split"):
        load_plan(write)


def test_merge_merges_groups_and_replaces_lists() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert merge(base, {"a": {"c": [3]}, "e": {}}) == {"a": {"b": 1, "c": [3]}, "d": 1, "e": {}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 1}

"""Schemas of artifacts: every kept file fits, whatever version wrote it, and comes back with the same figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from psannlm.data.record_figures import PrepRecord
from psannlm.io.artifact_schema import read_figures
from psannlm.io.readers import Unreadable, read_json
from psannlm.reports.schemas.decoding import DecodingMetrics
from psannlm.reports.schemas.kinds import SCHEMAS, read_artifact_figures
from psannlm.reports.schemas.study import StudyMetrics

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = (REPOSITORY / "reports" / "published", REPOSITORY / "tests" / "compatibility" / "november_2026" / "reports")
KEPT = sorted(path for root in ROOTS for name in ("metrics", "summary") for path in root.glob(f"*/*/{name}.json"))
# Former names of keys and the present ones; None: no version writes it any more.
FORMER = {
    "rivals": "also_compare_to",
    "rate_seeds": "lr_seeds",
    "rival": "reference_model",
    "is_rehearsal": "is_dry_run",
    "has_gelu": None,
}


def first_of(kind: str) -> dict[str, Any]:
    return read_json(next(path for path in KEPT if path.parent.parent.name == kind))


def missing_from(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Yield the places at which ``new`` lacks what ``old`` has, or has something else."""
    if type(old) is not type(new):
        yield f"{where}: {old} became {new}"
    elif isinstance(old, dict):
        for key, value in old.items():
            if (present := FORMER.get(key, key)) is not None:
                yield from missing_from(value, new.get(present, "absent"), f"{where}.{key}")
    elif isinstance(old, list):
        if len(old) != len(new):
            yield where
        for at, pair in enumerate(zip(old, new, strict=False)):
            yield from missing_from(*pair, f"{where}.{at}")
    elif old != new:
        yield f"{where}: {old} became {new}"


@pytest.mark.parametrize("path", KEPT, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_kept_artifact_is_written_again_with_the_same_figures(path: Path) -> None:
    figures = read_json(path)
    metrics = read_artifact_figures(path.parent.parent.name, figures)
    assert metrics is not None
    assert list(missing_from(figures, json.loads(json.dumps(metrics.as_dict())))) == []


def test_kept_artifacts_are_of_all_benchmark_kinds() -> None:
    assert {path.parent.parent.name for path in KEPT} == SCHEMAS.keys() - {"prep", "tokenize"}


def test_kept_preparation_record_is_read() -> None:
    record = read_figures(PrepRecord, read_json(ROOTS[1].parent / "prepared" / "metrics.json"))
    assert (record.train.documents, record.lossy_tokenizer) == (4, False)


@pytest.mark.parametrize(
    ("kind", "key", "value", "reason"),
    [
        ("kv_cache", "threads", "2", "threads: input should be a valid integer"),
        ("kv_cache", "threads", True, "threads: input should be a valid integer"),
        ("kv_cache", "agreement", None, "agreement: field required"),
        ("tokenizers", "seed", 1 << 64, "seed: input should be less than or equal to"),
        ("tokenizers", "tokenizers", {}, "tokenizers: input should be a valid list"),
        ("throughput", "rows", [{}], "rows.0.timestamp: field required"),
        ("ablations", "curves", [{"variant": "a", "seed": 1, "tokens": [1], "seconds": [], "loss": []}], "differ"),
        ("ablations", "notes", [None], "notes.0: input should be a valid string"),
        ("eval", "loss", "4.5", "loss: input should be a number"),
        ("eval", "loss", 10**400, "loss: input should be a number"),
        ("gpu", "is_rehearsal", 1, "input should be a valid boolean"),
    ],
)
def test_wrong_value_is_refused_by_its_key(kind: str, key: str, value: Any, reason: str) -> None:
    with pytest.raises(Unreadable, match=SCHEMAS[kind][1]) as refused:
        read_artifact_figures(kind, {**first_of(kind), key: value})
    assert reason in str(refused.value)


def test_unknown_key_of_a_later_version_is_ignored() -> None:
    figures = first_of("eval")
    assert read_artifact_figures("eval", {**figures, "new": {}}) == read_artifact_figures("eval", figures)


def test_null_is_nan_where_a_figure_was_not_finite() -> None:
    figures = first_of("ablations")
    figures["variants"][0]["parameters_over_baseline"] = None
    (first, *_) = read_figures(StudyMetrics, figures).variants
    assert first.parameters_over_baseline != first.parameters_over_baseline


def test_interrupted_decoding_has_what_was_measured_only() -> None:
    plain = DecodingMetrics(is_complete=False, batch_size=2).as_dict()
    assert plain["batch_size"] == 2
    assert {"cases", "is_complete"} <= plain.keys()
    assert plain.keys().isdisjoint({"agreement", "problems", "cached_over_naive", "interrupted_in"})
    assert read_figures(DecodingMetrics, plain).problems is None


def test_many_wrong_values_are_counted_without_describing_each() -> None:
    figures = first_of("throughput")
    figures["rows"][0]["losses"] = ["x"] * 100_000
    with pytest.raises(Unreadable, match="100,000 problems in its figures"):
        read_artifact_figures("throughput", figures)

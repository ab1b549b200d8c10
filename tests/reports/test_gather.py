"""Gathering of artifacts and runs: unreadable folders are listed with the reason and never fatal."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pytest

from psannlm.errors import ConfigError
from psannlm.reports.gather import gather, parse_since


def test_gather_lists_damaged_and_unknown_folders_with_reason(
    tmp_path: Path, make_run: Callable[..., Path], make_artifact: Callable[..., Path]
) -> None:
    reports, runs = tmp_path / "reports", tmp_path / "runs"
    good = make_artifact(reports / "kv_cache" / "20261120_080000", {"x": 1})
    for name, content in {
        "20261120_080001": b'{"x": ',
        "20261120_080002": b"[1, 2]",
        "20261120_080003": b"\xff\xfe",
        "20261120_080004": b"[" * 100_000,
        "20261120_080005": b'{"a":' * 200 + b"1" + b"}" * 200,
        "20261120_080006": b'{"x": ' + b"9" * 10_000 + b"}",
    }.items():
        make_artifact(reports / "kv_cache" / name, {})
        (reports / "kv_cache" / name / "metrics.json").write_bytes(content)
    (reports / "holiday" / "photos").mkdir(parents=True)
    make_artifact(reports / "benchmarks" / "20261120_080000", {"own": "pages are not gathered again"})
    make_run(runs / "good")
    cut = make_run(runs / "cut")
    text = (cut / "metrics.jsonl").read_text()
    (cut / "metrics.jsonl").write_text(text[:-20])
    make_run(runs / "empty")
    (runs / "empty" / "metrics.jsonl").write_text("")
    bomb = make_run(runs / "bomb")
    (bomb / "config.yaml").write_text("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    (bomb / "step_00000004" / "model.safetensors").write_bytes(b"\xff" * 16)
    found = gather(reports, [runs])

    assert [artifact.folder for artifact in found.artifacts] == [good]
    reasons = {item.path.name: item.reason for item in found.unread if item.path.parent.name != "runs"}
    assert "line 1" in reasons["20261120_080001"]
    assert "no object" in reasons["20261120_080002"]
    assert "UTF-8" in reasons["20261120_080003"]
    assert "not JSON" in reasons["20261120_080004"]
    assert "levels deep" in reasons["20261120_080005"] or "not JSON" in reasons["20261120_080005"]
    assert "not JSON" in reasons["20261120_080006"]
    assert "not an artifact" in reasons["photos"]
    assert sorted(run.name for run in found.runs) == ["bomb", "cut", "good"]
    of_runs = {(item.path.name, item.reason) for item in found.unread if item.path.parent == runs}
    assert ("cut", "metrics.jsonl, line 6: cut short") in of_runs
    assert {name for name, _ in of_runs} == {"cut", "empty", "bomb"}
    assert any("alias" in reason for name, reason in of_runs if name == "bomb")
    assert any("model.safetensors" in reason for name, reason in of_runs if name == "bomb")


def test_run_record_equals_the_files_of_the_run(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    (run,) = gather(tmp_path / "none", [make_run(tmp_path / "runs" / "a")]).runs
    row = run.row.as_dict()
    assert (row["val_loss"], row["val_step"], row["bits_per_byte"]) == (3.75, 4, 2.125)
    assert (row["train_loss"], row["tokens"], row["parameters"]) == (3.25, 400, 10)
    # The first line times the warm-up and is left out of the rate.
    assert (row["tokens_per_s"], row["tokens_per_s_lowest"], row["tokens_per_s_highest"]) == (100.0, 50.0, 200.0)
    assert (row["lr"], row["corpus"], row["corpus_sha256"], row["peak_memory_bytes"]) == (2e-5, "texts", "c" * 64, 4000)
    # 100 tokens each at 10, 100, 50 and 200 tokens a second.
    assert run.points() == [(200, pytest.approx(11.0), 4.5), (400, pytest.approx(13.5), 3.75)]


def test_gather_filters_by_since_and_kind(
    tmp_path: Path, make_run: Callable[..., Path], make_artifact: Callable[..., Path]
) -> None:
    reports = tmp_path / "reports"
    make_artifact(reports / "kv_cache" / "20261101_000000", {"x": 1})
    make_artifact(reports / "kv_cache" / "20261122_000000", {"x": 1})
    make_artifact(reports / "tokenizers" / "20261123_000000", {"x": 1})
    make_run(tmp_path / "runs" / "a")
    since = parse_since("2026-11-21")
    assert len(gather(reports, [tmp_path / "runs"], since=since).artifacts) == 2
    assert gather(reports, [tmp_path / "runs"], since=since).runs == []
    chosen = gather(reports, [tmp_path / "runs"], kinds=["runs"])
    assert (chosen.artifacts, len(chosen.runs)) == ([], 1)
    with pytest.raises(ConfigError, match="did you mean 'kv_cache'"):
        gather(reports, [tmp_path / "runs"], kinds=["kv_cash"])


def test_parse_since_reads_dates_and_ages() -> None:
    now = datetime(2026, 11, 24, 12, tzinfo=timezone.utc)
    assert parse_since("36h", now) == datetime(2026, 11, 23, 0, tzinfo=timezone.utc)
    assert parse_since("7d", now) == datetime(2026, 11, 17, 12, tzinfo=timezone.utc)
    assert parse_since("20261124_101500") == datetime(2026, 11, 24, 10, 15, tzinfo=timezone.utc)
    assert parse_since("2026-11-24T10:15:00+02:00") == datetime(2026, 11, 24, 8, 15, tzinfo=timezone.utc)
    with pytest.raises(ConfigError, match="yesterday"):
        parse_since("yesterday")


def test_gather_counts_each_run_once_despite_links(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    run = make_run(tmp_path / "runs" / "deep" / "a")
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    found = gather(tmp_path / "none", [tmp_path / "runs", run, tmp_path / "runs" / "deep"])
    assert [record.name for record in found.runs] == ["deep/a"]


def test_gather_reads_nan_and_infinity_as_none(tmp_path: Path, make_artifact: Callable[..., Path]) -> None:
    folder = make_artifact(tmp_path / "gpu" / "20261120_080000", {})
    (folder / "metrics.json").write_text('{"loss": NaN, "rate": Infinity, "ok": 1.5}')
    (artifact,) = gather(tmp_path, []).artifacts
    assert artifact.figures == {"loss": None, "rate": None, "ok": 1.5}
    assert json.dumps(artifact.figures, allow_nan=False)


def test_gather_lists_linked_folders_without_following_them(tmp_path: Path, make_artifact: Callable[..., Path]) -> None:
    reports, elsewhere = tmp_path / "reports", tmp_path / "elsewhere"
    kept = make_artifact(reports / "kv_cache" / "20261120_080000", {"x": 1})
    make_artifact(elsewhere / "20261120_080001", {"secret": 1})
    (reports / "kv_cache" / "20261120_080001").symlink_to(elsewhere / "20261120_080001")
    (reports / "throughput").symlink_to(elsewhere)
    (reports / "published").symlink_to(elsewhere)
    found = gather(reports, [], published=True)
    assert [artifact.folder for artifact in found.artifacts] == [kept]
    links = [reports / "kv_cache" / "20261120_080001", reports / "throughput", reports / "published"]
    assert [item.path for item in found.unread] == links
    assert {item.reason for item in found.unread} == {"a symbolic link, which a report does not follow"}
    assert len(gather(reports, [], kinds=["throughput"]).unread) == 1

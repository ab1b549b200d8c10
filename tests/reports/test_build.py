"""Report files: figures equal those of the artifacts, and the page loads and runs nothing."""

from __future__ import annotations

import base64
import csv
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from psannlm.display import printable
from psannlm.errors import ArtifactError, ConfigError, PictureError
from psannlm.reports.build import Report, write_comparison, write_report
from psannlm.tokenizers.roundtrip import LOSSY, LOSSY_NOTE

HOSTILE = "<script>alert(1)</script>'\"><img src=//evil.example/x> $\\frac$ \u202e |`*[x](y)"
SPREAD = {"median": 73.50903428886672, "lowest": 69.1591280660641, "highest": 78.7839220767535}
SYSTEM = {"command": "psannlm report", "processor": "Abacus"}


class Page(HTMLParser):
    """Notes every element, and every attribute through which a browser would load something."""

    LOADS = frozenset(("src", "srcset", "href", "data", "poster", "action", "background", "xlink:href", "ping"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in self.LOADS]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def written(tmp_path: Path, make_run: Callable[..., Path], make_artifact: Callable[..., Path]) -> Report:
    reports, runs = tmp_path / "reports", tmp_path / "runs"
    make_run(runs / "a", corpus=HOSTILE)
    make_run(runs / "b<b>", base="transformer", shift=0.25)
    cases: list[dict[str, Any]] = [
        {"name": HOSTILE, "base": "sine", "tokens_per_s": SPREAD, "peak_bytes": 123456789, "note": None},
        {"name": "plain", "base": "gelu", "tokens_per_s": 0.1 + 0.2, "peak_bytes": 5, "note": HOSTILE},
    ]
    figures = {"batch_tokens": 4096, "cases": cases, "cache_bytes": {"a": {"measured": 7}, "b": {"measured": 8}}}
    make_artifact(reports / "throughput" / "20261120_080000", figures, command=HOSTILE)
    make_artifact(reports / HOSTILE.replace("/", "") / "20261120_080000", {HOSTILE: HOSTILE})
    (reports / "throughput" / "20261120_080000" / "x.png").write_bytes(b"no picture")
    return write_report(reports, [runs], SYSTEM, out=tmp_path / "out")


@pytest.mark.slow
def test_report_csv_and_json_equal_the_artifacts(written: Report) -> None:
    with open(written.folder / "throughput.csv", newline="") as file:
        rates = [row for row in csv.DictReader(file) if row["kind"] == "throughput"]
    assert [float(row["tokens_per_s"]) for row in rates] == [SPREAD["median"], 0.1 + 0.2]
    assert float(rates[0]["tokens_per_s_lowest"]) == SPREAD["lowest"]
    assert (rates[0]["name"], rates[0]["base"], rates[0]["batch_tokens"]) == (printable(HOSTILE), "sine", "4096")
    assert rates[0]["timestamp"] == "2026-11-20T08:00:00+00:00"
    memory = json.loads((written.folder / "memory.json").read_text())
    assert [row["bytes"] for row in memory if row["kind"] == "throughput"] == [123456789, 5, 7, 8]
    assert [row["bytes"] for row in memory if row["kind"] == "runs"] == [4000, 4000]
    runs = json.loads((written.folder / "metrics.json").read_text())["runs"]
    with open(written.folder / "runs.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [run["val_loss"] for run in runs] == [float(row["val_loss"]) for row in table] == [3.75, 4.0]
    assert (runs[0]["corpus"], table[0]["corpus"]) == (HOSTILE, printable(HOSTILE))
    assert runs[0]["settings"]["train.lr"] == 2e-5


@pytest.mark.slow
def test_html_page_loads_and_runs_nothing(written: Report) -> None:
    text = written.page.read_text(encoding="utf-8")
    page = Page(text)
    assert set(page.tags).isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form", "b"})
    assert page.handlers == []
    assert page.references
    for reference in page.references:
        assert reference.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,", "#s")), reference[:80]
        if reference.startswith("data:image/svg"):
            drawing = base64.b64decode(reference.partition(",")[2]).decode()
            assert not re.search(r"""(?:href|src)\s*=\s*["'](?!#)""", drawing)
            assert "<script" not in drawing
    assert "@import" not in text
    assert re.findall(r"url\(", text) == []
    assert "default-src 'none'" in text


@pytest.mark.slow
def test_html_and_markdown_escape_hostile_names(written: Report) -> None:
    page = Page(written.page.read_text(encoding="utf-8"))
    assert HOSTILE.replace("\u202e", "\\u202e") in page.text
    assert "img" in page.tags
    assert page.tags.count("img") == page.tags.count("figure"), "only our own pictures"
    markdown = (written.folder / "report.md").read_text(encoding="utf-8")
    assert "<script" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    heads = [at for at, line in enumerate(rows) if re.fullmatch(r"\|[-:|]+", line)]
    for head, until in zip(heads, [*(at - 1 for at in heads[1:]), len(rows)], strict=True):
        columns = rows[head].count("|")
        assert all(len(re.findall(r"(?<!\\)\|", row)) == columns for row in rows[head - 1 : until])


@pytest.mark.slow
def test_report_lists_left_out_files_with_reason(written: Report) -> None:
    assert [(item.path.name, item.reason) for item in written.unread] == [
        ("20261120_080000", "not the figures of a training benchmark: model: field required and 19 more problems"),
        ("x.png", "not a PNG picture"),
    ]
    text = Page(written.page.read_text(encoding="utf-8")).text
    assert "not a PNG picture" in text


@pytest.mark.slow
def test_report_benchmark_sections_show_command_and_machine(written: Report) -> None:
    text = Page(written.page.read_text(encoding="utf-8")).text
    assert "Abacus 9000, 2 threads, torch 2.13.0" in text
    assert "psannlm train x.yaml" in text
    assert "0123456789ab" in text


def test_report_without_input_raises_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing to report"):
        write_report(tmp_path / "reports", [tmp_path / "runs"], SYSTEM, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_comparison_of_two_runs_known_values(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    first = make_run(tmp_path / "first")
    second = make_run(tmp_path / "second", base="transformer", shift=0.25)
    written = write_comparison([first, second], SYSTEM, out=tmp_path / "out")
    content = json.loads((written.folder / "comparison.json").read_text())
    assert content["differences"] == {"model.base": {"first": "waveresnet", "second": "transformer"}}
    (delta,) = content["deltas"]
    assert (delta["val_loss"], delta["bits_per_byte"], delta["parameters"]) == (0.25, 0.25, 0)
    assert delta["tokens_per_s_ratio"] == 1.0
    # Both validated at steps 2 and 4; the later half is step 4.
    assert delta["val_loss_at_shared_steps"] == {"median": 0.25, "lowest": 0.25, "highest": 0.25, "n": 1}
    text = Page(written.page.read_text()).text
    assert "+0.2500" in text
    assert (written.folder / "loss_by_time.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_report_marks_bits_of_a_lossy_tokenizer(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    first, second = make_run(tmp_path / "runs" / "first"), make_run(tmp_path / "runs" / "second", shift=-1.0)
    log = second / "metrics.jsonl"
    log.write_text(log.read_text().replace('"bits_per_byte"', '"lossy_tokenizer": true, "bits_per_byte"'))
    compared = write_comparison([first, second], SYSTEM, out=tmp_path / "compared")
    (delta,) = json.loads((compared.folder / "comparison.json").read_text())["deltas"]
    assert delta["lossy_tokenizer"] is True
    text = Page(compared.page.read_text()).text
    assert f"1.125{LOSSY}" in text
    assert re.search(rf"−1\.0+{re.escape(LOSSY)}", text)
    assert LOSSY_NOTE.strip() in text
    made = write_report(tmp_path / "none", [tmp_path / "runs"], SYSTEM, out=tmp_path / "out")
    text = Page(made.page.read_text()).text
    assert f"1.125{LOSSY}" in text
    assert f"2.125{LOSSY}" not in text
    assert "Best validation" in text
    assert "2.125 bits per byte" in " ".join(text.split())
    assert [row["lossy_tokenizer"] for row in json.loads((made.folder / "metrics.json").read_text())["runs"]]


def test_comparison_requires_two_run_folders(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="two run folders"):
        write_comparison([make_run(tmp_path / "a")], SYSTEM)
    with pytest.raises(ConfigError, match="not a run folder"):
        write_comparison([tmp_path / "a", tmp_path / "nowhere"], SYSTEM)


def test_report_includes_published_results_only_on_request(
    tmp_path: Path, make_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reports = Path("reports")
    make_artifact(reports / "throughput" / "20261120_080000", {"tokens_per_s": 11.0})
    make_artifact(reports / "published" / "throughput" / "20251120_080000", {"tokens_per_s": 22.0})
    for published, rates in ((False, {"11.0"}), (True, {"11.0", "22.0"})):
        written = write_report(reports, [], SYSTEM, published=published, out=Path(f"page_{published}"))
        with open(written.folder / "throughput.csv", encoding="utf-8", newline="") as file:
            assert {row["tokens_per_s"] for row in csv.DictReader(file)} == rates
    with pytest.raises(ConfigError, match="there is no elsewhere/published"):
        write_report(Path("elsewhere"), [], SYSTEM, published=True)


def test_report_without_input_mentions_published_results(tmp_path: Path, make_artifact: Callable[..., Path]) -> None:
    make_artifact(tmp_path / "published" / "throughput" / "20251120_080000", {"tokens_per_s": 22.0})
    with pytest.raises(ArtifactError, match="--published includes"):
        write_report(tmp_path, [], SYSTEM)


@pytest.mark.slow
def test_metrics_csv_holds_the_steps_of_each_run(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    run = make_run(tmp_path / "runs" / "one")
    written = write_report(tmp_path / "reports", [run.parent], SYSTEM, out=tmp_path / "page")
    with open(written.folder / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["step"], row["loss"], row["val_loss"]) for row in rows] == [
        ("one", "1", "5.0", ""),
        ("one", "2", "4.0", "4.5"),
        ("one", "3", "3.5", ""),
        ("one", "4", "3.25", "3.75"),
    ]
    assert [row["perplexity"] for row in rows] == ["", "90.017", "", "90.017"]
    assert [row["tokens_per_s"] for row in rows] == ["10.0", "100.0", "50.0", "200.0"]
    assert all(math.isclose(math.log(float(row["train_perplexity"])), float(row["loss"])) for row in rows)
    assert {row["lr"] for row in rows} == {"2e-05"}


def test_metrics_csv_without_runs_has_its_header(tmp_path: Path, make_artifact: Callable[..., Path]) -> None:
    make_artifact(tmp_path / "throughput" / "20261120_080000", {"tokens_per_s": 11.0})
    written = write_report(tmp_path, [], SYSTEM, out=tmp_path / "page")
    [header] = (written.folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert header.startswith("run,step,loss,")


@pytest.mark.slow
def test_memory_has_wall_time_and_grad_checkpoint(
    tmp_path: Path, make_run: Callable[..., Path], make_artifact: Callable[..., Path]
) -> None:
    candidates = [
        {"name": "kept", "peak_bytes": 9, "step_s": 0.5, "grad_checkpoint": False},
        {
            "name": "recomputed",
            "peak_bytes": 4,
            "step_s": {"median": 0.75, "lowest": 0.7, "highest": 0.8},
            "grad_checkpoint": True,
        },
    ]
    make_artifact(tmp_path / "throughput" / "20261120_080000", {"rows": candidates, "grad_checkpoint": False})
    run = make_run(tmp_path / "runs" / "one")
    with open(run / "config.yaml", "a", encoding="utf-8") as file:
        file.write("  grad_checkpoint: true\n")
    written = write_report(tmp_path, [run.parent], SYSTEM, kinds=["throughput", "runs"], out=tmp_path / "page")
    rows = json.loads((written.folder / "memory.json").read_text(encoding="utf-8"))
    found = [(row["bytes"], row["grad_checkpoint"], row["wall_time_s"], row["wall_time_of"]) for row in rows]
    assert found[:2] == [(9, False, 0.5, "a training step"), (4, True, 0.75, "a training step")]
    # 100 tokens a step at 10, 100, 50 and 200 tokens/s.
    assert found[2] == (4000, True, 13.5, "all training steps")


def test_report_lists_pictures_that_cannot_be_drawn(
    tmp_path: Path, make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> bytes:
        raise PictureError("no Matplotlib here")

    monkeypatch.setattr("psannlm.reports.plots.render_formats", fail)
    runs = [make_run(tmp_path / "runs" / name) for name in ("a", "b")]
    report = write_report(tmp_path / "reports", [tmp_path / "runs"], {}, out=tmp_path / "one")
    compared = write_comparison(runs, {}, out=tmp_path / "two")
    for written in (report, compared):
        assert "loss_curve.png" in [item.path.name for item in written.unread]
        assert {item.reason for item in written.unread} == {"no Matplotlib here"}
        assert written.page.is_file()
        assert not list(written.folder.glob("*.png"))


@pytest.mark.slow
def test_report_shows_task_scores_of_runs_and_of_eval(
    tmp_path: Path, make_run: Callable[..., Path], make_artifact: Callable[..., Path]
) -> None:
    run = make_run(tmp_path / "runs" / "a")
    row = {"kind": "tasks", "step": 4, "psannlm_number": 0.617, "psannlm_number/stderr": 0.02}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**row, "psannlm_number/chance": 0.5}) + "\n")
    folder = make_artifact(tmp_path / "reports" / "tasks" / "20261129_000000", {})
    scores = [
        {"task": "psannlm_parity", "metric": "accuracy", "value": 0.5432, "stderr": 0.01, "chance": 0.5, "n": 400}
    ]
    (folder / "metrics.json").rename(folder / "tasks.json")
    (folder / "tasks.json").write_text(json.dumps({"checkpoint": "runs/a", "tasks": scores}))
    report = write_report(tmp_path / "reports", [tmp_path / "runs"], SYSTEM, out=tmp_path / "out")
    page = Page((report.folder / "report.html").read_text()).text.replace("\u200b", "")
    assert "Left out" not in page
    for text in ("Task scores", "psannlm_number", "0.617", "psannlm_parity", "0.543"):
        assert text in page

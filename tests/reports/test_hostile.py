"""Reports of untrusted folders: nothing in them is followed, interpreted or fatal, and what is left out is listed."""

from __future__ import annotations

import csv
import json
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from psannlm.display import printable
from psannlm.io.readers import Unreadable, number, read_bytes, read_json, read_yaml
from psannlm.io.run_metadata import write_json
from psannlm.reports.build import Report, write_comparison, write_report
from psannlm.reports.gather import gather
from psannlm.reports.page_model import Table, format_value
from psannlm.reports.runs import read_run
from psannlm.reports.tables.generic import memory_rows, rate_rows, tables_of

MANY_NINES = "9" * 400
ESCAPES = "run\x1b[2J\u202e=1"
NOT_UTF8 = os.fsdecode(b"caf\xe9")


def png(width: int = 1, height: int = 1) -> bytes:
    """A grey picture; only one of a single pixel is whole."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0\0")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


class Elements(HTMLParser):
    """Every element of a page, and the attributes that would run something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def refuse(word: str) -> None:
    raise AssertionError(f"{word} in JSON")


def reasons(written: Report) -> dict[str, str]:
    return {item.path.name: item.reason for item in written.unread}


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing, which takes most of a report's time."""
    monkeypatch.setattr("psannlm.reports.plots.render_formats", lambda draw, formats, **options: [png()] * len(formats))


@pytest.mark.usefixtures("no_pictures")
def test_report_lists_hostile_files_and_keeps_the_rest(
    tmp_path: Path, make_run: Callable[..., Path], make_artifact: Callable[..., Path]
) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("the password is swordfish")
    (tmp_path / "secret.png").write_bytes(png())
    reports, runs = tmp_path / "reports", tmp_path / "runs"
    make_run(runs / "good")
    folder = make_artifact(reports / "of_another_kind" / "20261120_080000", {"tokens_per_s": 11.0})
    (folder / "table.txt").unlink()
    (folder / "table.txt").symlink_to(secret)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "pipe.png")
    with open(folder / "huge.png", "wb") as file:
        file.truncate(40 << 30)
    (folder / "bomb.png").write_bytes(png(60_000, 60_000))
    markup = "a.png) <img src=x onerror=alert(1)> .png"
    (folder / markup).write_bytes(png())
    (folder / "a.png_ _img src=x onerror=alert(1)_ .png").write_bytes(png())
    (folder / f"{NOT_UTF8}.png").write_bytes(png())
    (folder / ("n" * 251 + ".png")).write_bytes(png())
    fifo = make_artifact(reports / "of_another_kind" / "20261120_080001", {})
    (fifo / "metrics.json").unlink()
    os.mkfifo(fifo / "metrics.json")
    for name in ("fifo", "linked"):
        (make_run(runs / name) / "metrics.jsonl").unlink()
    os.mkfifo(runs / "fifo" / "metrics.jsonl")
    (runs / "linked" / "metrics.jsonl").symlink_to(runs / "good" / "metrics.jsonl")
    weights = make_run(runs / "weights") / "step_00000004" / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights)

    written = write_report(reports, [runs], {}, out=tmp_path / "out")
    assert reasons(written) == {
        "table.txt": "table.txt is a symbolic link, which a report does not follow",
        "link.png": "link.png is a symbolic link, which a report does not follow",
        "pipe.png": "pipe.png is not a regular file",
        "huge.png": "huge.png is larger than 3 MiB",
        "bomb.png": "a picture of 60,000 × 60,000 pixels",
        "20261120_080001": "metrics.json is not a regular file",
        "fifo": "metrics.jsonl is not a regular file",
        "linked": "metrics.jsonl is a symbolic link, which a report does not follow",
        "weights": "step_00000004: model.safetensors is missing or damaged",
    }
    assert (written.n_runs, written.n_artifacts) == (2, 1)
    markdown = (written.folder / "report.md").read_text(encoding="utf-8")
    html = written.page.read_text(encoding="utf-8")
    page = Elements(html)
    for text in (markdown, html):
        assert "swordfish" not in text
        assert "<img src=x" not in text
        assert "huge.png is larger than 3 MiB" in text.replace("<wbr>", "")
    assert page.handlers == []
    pictures = [line for line in markdown.splitlines() if line.startswith("![")]
    linked = [line.rpartition("](")[2].removesuffix(")") for line in pictures]
    assert len(set(linked)) == len(linked) == 6, "two that the report draws, and four of the artifact"
    for name in linked:
        assert (written.folder / name).is_file(), name
        assert not set(name) & set("()<> \"'")


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "line",
    [
        f'{{"kind": "eval", "step": 2, "loss": {MANY_NINES}}}',
        f'{{"kind": "eval", "step": {MANY_NINES}, "loss": 1.0}}',
        '{"kind": "eval", "step": 2, "loss": NaN}',
        '{"kind": "eval", "step": 2, "loss": ' + "[" * 400 + "]" * 400 + "}",
        '{"kind": "train", "step": 5, "loss": 1e308, "tokens": 1e308, "tokens_per_s": 1e308, "lr": 1e308}',
        f'{{"kind": "train", "step": 5, "loss": -1e308, "tokens": {MANY_NINES}, "tokens_per_s": {MANY_NINES}}}',
        '{"kind": "train", "step": 5, "loss": 1.0, "tokens": {"a": [1]}, "lr": "=1+1", "tokens_per_s": 5e-324}',
        '{"kind": "eval", "step": 5, "loss": 1e308, "perplexity": Infinity, "bits_per_byte": "1"}',
        f'{{"kind": "train", "step": 5, "loss": 1, "tokens": {"9" * 308}, "tokens_per_s": 1e-300}}',
    ],
)
def test_report_survives_any_log_line(tmp_path: Path, make_run: Callable[..., Path], line: str) -> None:
    good, bad = make_run(tmp_path / "runs" / "good"), make_run(tmp_path / "runs" / "bad")
    for extra in (line, line):
        with open(bad / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(extra + "\n")
    written = write_report(tmp_path / "reports", [tmp_path / "runs"], {}, out=tmp_path / "out")
    compared = write_comparison([good, bad], {}, out=tmp_path / "compared")
    for folder in (written.folder, compared.folder):
        for path in folder.glob("*.json"):
            json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
        for path in folder.glob("*.csv"):
            with open(path, encoding="utf-8", newline="") as file:
                for row in csv.reader(file):
                    assert not any(cell.startswith("=") for cell in row)
    with open(written.folder / "runs.csv", encoding="utf-8", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert float(rows["good"]["val_loss"]) == 3.75
    assert rows.keys() == {"good", "bad"}


@pytest.mark.usefixtures("no_pictures")
def test_read_run_rejects_impossible_tensor_shapes(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    for at, shape in enumerate((f"[{MANY_NINES}]", "[4294967296, 4294967296]", '["7"]', "[-1]", "[true]", "[1.0]")):
        folder = make_run(tmp_path / "runs" / str(at))
        header = f'{{"a": {{"shape": {shape}}}}}'.encode()
        (folder / "step_00000004" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        run = read_run(folder)
        assert run.parameters is None, shape
        assert run.problems == ("step_00000004: model.safetensors is missing or damaged",)
    assert write_report(tmp_path / "reports", [tmp_path / "runs"], {}, out=tmp_path / "out").n_runs == 6


@pytest.mark.usefixtures("no_pictures")
def test_report_shows_figures_of_any_size_and_type(tmp_path: Path, make_artifact: Callable[..., Path]) -> None:
    huge = int(MANY_NINES)
    figures = {
        "big": huge,
        "rows": [{"name": "=cmd", "tokens_per_s": huge}, {"name": ["x"], "tokens_per_s": 1e308, "peak_bytes": -1e308}],
        "machine": huge,
        "checks": [{"check": huge, "measures": [{"name": "m", "value": 1e308, "unit": "GB"}]}],
        "variants": [{"name": {"a": 1}}],
        **{f"key {at}": at for at in range(1000)},
    }
    for kind in ("throughput", "gpu", "ablations", "kv_cache", "runs", "tokenizers"):
        make_artifact(tmp_path / kind / "20261120_080000", figures, threads=huge, gpus=huge)
    written = write_report(tmp_path, [], {}, out=tmp_path / "out")
    assert written.n_artifacts == 6
    text = Elements(written.page.read_text(encoding="utf-8")).text
    assert "about 1e400" in text
    assert "more rows are in the artifact" in text
    for path in written.folder.glob("*.json"):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    with open(written.folder / "throughput.csv", encoding="utf-8", newline="") as file:
        assert not any(cell.startswith("=") for row in csv.reader(file) for cell in row)


@pytest.mark.parametrize(
    "tag", ["!!int x", '!!int ""', "!!bool x", "!!timestamp x", "2026-13-45", "0x" + "f" * 5000, "[" * 5000]
)
def test_read_yaml_raises_unreadable_for_any_value(tmp_path: Path, tag: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"train: {tag}\n", encoding="utf-8")
    try:
        settings = read_yaml(path)
    except Unreadable:
        return
    write_json(tmp_path / "out.json", settings)


@pytest.mark.usefixtures("no_pictures")
def test_report_shows_control_characters_as_escapes(
    tmp_path: Path, make_run: Callable[..., Path], make_artifact: Callable[..., Path]
) -> None:
    runs, reports = tmp_path / "runs", tmp_path / "reports"
    names = (ESCAPES, NOT_UTF8, "=HYPERLINK(1)")
    for name in names:
        make_run(runs / name, corpus="text\x9b31m")
        make_artifact(reports / name / name, {"figure": "\x1b[31m"}, command="psannlm \x1b]0;x\x07")
    (runs / ESCAPES / "config.yaml").write_bytes(b"\xff")
    written = write_report(reports, [runs], {}, out=tmp_path / "out")
    assert (written.n_runs, written.n_artifacts) == (3, 3)
    for path in (*written.folder.glob("*.md"), *written.folder.glob("*.csv"), *written.folder.glob("*.json")):
        text = path.read_text(encoding="utf-8")
        assert printable(text, keep="\n") == text, path.name
    html = written.page.read_text(encoding="utf-8")
    assert printable(html, keep="\n\t") == html
    with open(written.folder / "runs.csv", encoding="utf-8", newline="") as file:
        found = [row["run"] for row in csv.DictReader(file)]
    assert sorted(found) == sorted([printable(ESCAPES), "caf\\xe9", "'=HYPERLINK(1)"])
    told = json.loads((written.folder / "metrics.json").read_text(encoding="utf-8"))
    assert sorted(run["run"] for run in told["runs"]) == sorted(names), "JSON gives names back as they are"


def test_loss_picture_escapes_names_and_survives_huge_losses(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    from psannlm.reports.pages import loss_picture

    runs = [read_run(make_run(tmp_path / "good")), read_run(make_run(tmp_path / NOT_UTF8, shift=1e300))]
    picture = loss_picture(runs)
    assert picture.png.startswith(b"\x89PNG")
    assert "caf\\xe9" in picture.alternative


def test_readers_respect_size_limits(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    path.write_bytes(b"12345678")
    assert read_bytes(path, 8) == b"12345678"
    with pytest.raises(Unreadable, match="larger than"):
        read_bytes(path, 7)
    path.write_text("[" + "[]," * (1 << 21) + "1]")
    with pytest.raises(Unreadable, match="values"):
        read_json(path)


@pytest.mark.slow
def test_report_tables_bound_memory_of_long_keys(tmp_path: Path, make_artifact: Callable[..., Path]) -> None:
    path = tmp_path / "f.json"
    path.write_text(json.dumps({"k" * 1001: 1}))
    with pytest.raises(Unreadable, match="a key of 1,001 characters"):
        read_json(path)
    figures: dict[str, object] = {f"tokens_per_s_{at}": at for at in range(2000)}
    for _ in range(20):
        figures = {"k" * 1000: figures, "tokens_per_s": 1.0}
    make_artifact(tmp_path / "reports" / "kv_cache" / "20261120_080000", figures)
    (artifact,) = gather(tmp_path / "reports", []).artifacts
    tracemalloc.start()
    rows = [*rate_rows(artifact.figures), *memory_rows(artifact.figures)]
    tables = list(tables_of(artifact.figures))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 20
    assert "1,820 more rows are in the artifact" in tables[-1].note
    assert most < 8e6


def test_read_run_gives_up_on_foreign_logs(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    run = make_run(tmp_path / "runs" / "a")
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("\n" * 100_000)
    assert read_run(run).problems == ()
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("x\n" * 20_000)
    (unread,) = gather(tmp_path / "none", [tmp_path / "runs"]).unread
    assert "is it a log?" in unread.reason


def test_report_cell_counts_records_instead_of_calling_them_empty() -> None:
    assert format_value([{"kurtosis": 3.0}, {"kurtosis": 4.0}]) == "2 items"
    assert format_value({"kurtosis": 3.0}) == "1 value"
    assert format_value({}) == "empty"
    assert format_value([1, "a"]) == "1, a"


def test_numbers_beyond_floats_are_none_but_formatted() -> None:
    assert number(10**400) is None
    assert number(10**300) == 10**300
    assert format_value(10**400) == "about 1e400"
    assert format_value(-(10**400)) == "about −1e400"


def test_table_rejects_cells_that_are_not_text() -> None:
    with pytest.raises(TypeError, match="int where text is expected"):
        Table("", ("a",), [[1]])  # type: ignore[list-item]

"""The metrics log survives a crash and a resume; the loss curve shows its rows."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from psannlm.errors import StorageError
from psannlm.training.metrics import METRICS_FILE, MetricsLog, draw_curve, read_metrics


def train_row(step: int) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 5.0 / step}


def eval_row(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "loss": loss, "bits_per_byte": loss / 3}


def test_metrics_rows_are_read_in_order(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run")
    log.write("train", 1, {"loss": 0.1 + 0.2, "lr": 1e-9})
    log.write("eval", 1, {"loss": 2.0})
    assert read_metrics(tmp_path / "run") == [
        {"kind": "train", "step": 1, "loss": 0.1 + 0.2, "lr": 1e-9},
        {"kind": "eval", "step": 1, "loss": 2.0},
    ]


def test_metrics_rows_are_written_immediately(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 1.0})
        assert len((tmp_path / METRICS_FILE).read_text(encoding="utf-8").splitlines()) == step


def test_metrics_rows_after_resume_step_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write("train", step, {"loss": step})
        log.write("eval", step, {"loss": step})
    MetricsLog(tmp_path, after_step=3).write("train", 4, {"loss": 40})
    assert [(row["kind"], row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [
        *((kind, step, step) for step in (1, 2, 3) for kind in ("train", "eval")),
        ("train", 4, 40),
    ]
    MetricsLog(tmp_path)
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize(
    "tail", [b'{"kind": "tra', b"\xff\xfe\x00", b"[1, 2]\n", b'{"step": "x"}\n', b"null\n", b"\n\n"]
)
def test_read_metrics_skips_truncated_last_line(tmp_path: Path, tail: bytes) -> None:
    log = MetricsLog(tmp_path)
    log.write("train", 1, {"loss": 1.0})
    with open(log.path, "ab") as file:
        file.write(tail)
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 1, "loss": 1.0}]
    MetricsLog(tmp_path, after_step=1).write("train", 2, {"loss": 2.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_metrics_log_is_strict_json_with_infinite_gradient(tmp_path: Path) -> None:
    MetricsLog(tmp_path).write("train", 1, {"grad_norm": float("inf"), "loss": 2.0})

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    line = (tmp_path / METRICS_FILE).read_text(encoding="utf-8")
    assert json.loads(line, parse_constant=refuse)["grad_norm"] is None


def test_metrics_log_full_disk_is_explained(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(StorageError, match=r"not enough disk space to write .*metrics\.jsonl.*MB free"):
            log.write("train", 1, {"loss": 1.0, "note": "x" * 400})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, to look into."""
    seen: list[Figure] = []
    original = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        seen.append(self)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return seen


@pytest.mark.parametrize(
    ("rows", "lines"),
    [
        ([train_row(s) for s in (1, 2, 5)], [[(1, 5.0), (2, 2.5), (5, 1.0)]]),
        ([eval_row(2, 4.0), eval_row(4, 3.0), eval_row(6, 3.5)], [[(2, 4.0), (4, 3.0), (6, 3.5)], [(4, 3.0)]]),
        (
            [train_row(1), eval_row(1, 4.0), train_row(2)],
            [[(1, 5.0), (2, 2.5)], [(1, 4.0)], [(1, 4.0)]],
        ),
        ([], []),
    ],
)
def test_loss_curve_shows_rows_and_best(
    tmp_path: Path, figures: list[Figure], rows: list[dict[str, Any]], lines: list[list[tuple[int, float]]]
) -> None:
    path = draw_curve(tmp_path, "a title", rows)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert width > height > 300
    (axes,) = figures[0].axes
    drawn = [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines]
    assert drawn == lines
    assert axes.get_title() == "a title"
    labels = [str(line.get_label()) for line in axes.lines if str(line.get_label()).startswith("best")]
    bits = [row["bits_per_byte"] for row in rows if row["kind"] == "eval"]
    assert labels == ([f"best: {min(bits):.3f} bits per byte at step {lines[-1][0][0]}"] if bits else [])
    assert (axes.get_legend() is not None) == bool(rows)


def test_loss_curve_keeps_plots_of_caller(tmp_path: Path) -> None:
    backend = mpl.rcParams._get_backend_or_none()  # type: ignore[attr-defined]
    draw_curve(tmp_path, "t", [train_row(1)])
    assert mpl.rcParams._get_backend_or_none() == backend  # type: ignore[attr-defined]


@pytest.mark.parametrize("title", ["a$b_{$", "$^$", "中文 🌊", "\\frac{"])
def test_loss_curve_works_for_any_folder_name(title: str, tmp_path: Path) -> None:
    assert draw_curve(tmp_path, title, [train_row(1), eval_row(1, 2.0)]).stat().st_size > 1000


def test_loss_curve_shows_single_step(tmp_path: Path) -> None:
    """Pixels of the curve's colour lie within the axes, and not in the legend alone."""
    from matplotlib.image import imread

    pixels = imread(draw_curve(tmp_path, "one", [train_row(1)]))
    inside = pixels[int(0.3 * len(pixels)) : int(0.8 * len(pixels)), :, :3]
    coloured = inside.max(axis=2) - inside.min(axis=2) > 0.3
    assert coloured.sum() > 20

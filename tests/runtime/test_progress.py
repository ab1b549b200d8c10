"""Progress lines: count, throughput and time left, each where it is known."""

from __future__ import annotations

import pytest

from psannlm.runtime.progress import Progress, ProgressCounter


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (Progress("reading reports"), "reading reports"),
        (Progress("writing shards", 1500, 3000, "tokens"), "writing shards: 1,500 of 3,000 tokens"),
        (
            Progress("encoding", 3_000_000, 12_000_000, "bytes", 2.0, 6.0, "700 tokens"),
            "encoding: 3.0 of 12.0 MB, 1.5 MB/s, 700 tokens, about 0:00:06 left",
        ),
        (Progress("encoding", 3_000_000, None, "bytes", 2.0), "encoding: 3.0 MB, 1.5 MB/s"),
        (
            Progress("generating", 10, None, "tokens", 4.0, 1.1, is_bound=True),
            "generating: 10 tokens, 2.5 tokens/s, at most 0:00:02 left",
        ),
    ],
)
def test_progress_line_shows_what_is_known(progress: Progress, line: str) -> None:
    assert str(progress) == line


def test_counter_extrapolates_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("psannlm.runtime.progress.time.monotonic", lambda: now[0])
    got: list[Progress] = []
    count = ProgressCounter(got.append, "evaluating", "windows", 40)
    count.at(0)
    now[0] += 5.0
    count.at(4, "more")
    count.add(6)
    ProgressCounter(got.append, "reading", "bytes").add(3)
    assert [(at.elapsed_s, at.left_s) for at in got] == [(0.0, None), (5.0, 45.0), (5.0, 15.0), (0.0, None)]
    assert str(got[2]) == "evaluating: 10 of 40 windows, 2.0 windows/s, about 0:00:15 left"

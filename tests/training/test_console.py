"""Console output of a run, on a fake clock."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from psannlm.evaluation.loss import Evaluation
from psannlm.training.console import ConsoleReporter
from psannlm.training.pending import Throughput
from psannlm.training.reporting import SilentReporter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_console_time_left_uses_mean_step_time(plain: Console) -> None:
    clock = Clock()
    reporter = ConsoleReporter(plain, clock)
    reporter.start(0, 100)
    clock.now += 20  # 2 s a step
    reporter.step(10, 5.0, 1e-3, 1234.5, True)
    assert lines(plain)[-1].endswith("0:03:00 left")
    clock.now += 100  # slower: 4 s a step on average
    reporter.step(30, 4.0, 1e-3, 1234.5, True)
    assert lines(plain)[-1].endswith("0:04:40 left")
    clock.now += 280
    reporter.step(100, 3.0, 1e-3, 1234.5, True)
    assert lines(plain)[-1].endswith("0:00:00 left")


def test_console_time_left_ignores_steps_before_resume(plain: Console) -> None:
    clock = Clock()
    reporter = ConsoleReporter(plain, clock)
    reporter.start(90, 100)
    clock.now += 3
    reporter.step(91, 5.0, 1e-3, 10.0, True)
    assert lines(plain)[-1].endswith("0:00:27 left")


def test_console_prints_plain_lines_without_terminal(plain: Console) -> None:
    clock = Clock()
    reporter = ConsoleReporter(plain, clock)
    reporter.notice("12 parameters [in one group] :smile:")
    reporter.start(0, 1000)
    for step in range(1, 5):
        clock.now += 1
        reporter.step(step, 5.12345, 2e-4, 12_345.6, step % 2 == 0)
    reporter.evaluation(4, Evaluation(nats=20.0, n_labels=10, n_bytes=40), is_best=True)
    reporter.evaluation(6, Evaluation(nats=21.0, n_labels=10, n_bytes=40), is_best=False)
    reporter.saved(Path("step_00000004"))
    reporter.stop()
    assert lines(plain) == [
        "12 parameters [in one group] :smile:",
        "step    2/1000  loss 5.1235  lr 2.00e-04  12,346 tokens/s  0:16:38 left",
        "step    4/1000  loss 5.1235  lr 2.00e-04  12,346 tokens/s  0:16:36 left",
        "validation at step 4: loss 2.0000  perplexity 7.39  0.7213 bits per byte  (best so far)",
        "validation at step 6: loss 2.1000  perplexity 8.17  0.7574 bits per byte",
    ]


def test_console_shows_dashboard_and_full_notices_on_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    reporter = ConsoleReporter(console, Clock())
    reporter.start(2, 10)
    reporter.step(3, 5.0, 1e-3, 321.0, False)
    reporter.notice("x" * 300)
    reporter.step(4, 4.5, 1e-3, 321.0, True)
    reporter.stop()
    reporter.stop()
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "x" * 300 in text
    assert "step 4 of 10" in text
    assert "loss 4.5000" in text
    assert "step 4/10" not in text


def test_silent_reporter_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    reporter = SilentReporter()
    reporter.start(0, 1)
    reporter.notice("x")
    reporter.step(1, 1.0, 1.0, 1.0, True)
    reporter.evaluation(1, Evaluation(1.0, 1, 1), True)
    reporter.saved(Path("x"))
    reporter.stop()
    assert capfd.readouterr() == ("", "")


def test_throughput_excludes_pauses() -> None:
    now = [0.0]
    rate = Throughput(clock=lambda: now[0])
    assert rate.tokens_per_s == 0.0
    now[0] = 2.0
    rate.add(100)
    now[0] = 50.0  # a validation
    rate.pause()
    now[0] = 53.0
    rate.add(200)
    assert rate.tokens_per_s == 300 / 5

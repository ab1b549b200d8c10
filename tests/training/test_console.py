"""Console output of a run, on a fake clock."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from psannlm.evaluation.loss import Evaluation
from psannlm.runtime.consoles import print_line
from psannlm.training.callbacks import SaveEvent, StepEvent, ValidationEvent
from psannlm.training.console import ConsoleDisplay
from psannlm.training.pending import Throughput


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


def step(number: int, loss: float = 5.0, total: int = 100, *, is_logged: bool = True) -> StepEvent:
    return StepEvent(number, total, 0, loss, 2e-4, 1.0, 64, 12_345.6, is_skipped=False, is_logged=is_logged)


def test_console_time_left_uses_mean_step_time(plain: Console) -> None:
    clock = Clock()
    with ConsoleDisplay(plain, 0, 100, clock) as display:
        clock.now += 20  # 2 s a step
        display.on_step(step(10))
        assert lines(plain)[-1].endswith("0:03:00 left")
        clock.now += 100  # slower: 4 s a step on average
        display.on_step(step(30))
        assert lines(plain)[-1].endswith("0:04:40 left")
        clock.now += 280
        display.on_step(step(100))
        assert lines(plain)[-1].endswith("0:00:00 left")


def test_console_time_left_ignores_steps_before_resume(plain: Console) -> None:
    clock = Clock()
    with ConsoleDisplay(plain, 90, 100, clock) as display:
        clock.now += 3
        display.on_step(step(91))
    assert lines(plain)[-1].endswith("0:00:27 left")


def test_console_prints_plain_lines_without_terminal(plain: Console) -> None:
    clock = Clock()
    print_line(plain, "12 parameters [in one group] :smile:")
    with ConsoleDisplay(plain, 0, 1000, clock) as display:
        for number in range(1, 5):
            clock.now += 1
            display.on_step(step(number, 5.12345, 1000, is_logged=number % 2 == 0))
        for number, nats, is_best in ((4, 20.0, True), (6, 21.0, False)):
            event = ValidationEvent(number, Evaluation(nats=nats, n_labels=10, n_bytes=40), is_best=is_best)
            print_line(plain, event)
            display.on_validation(event)
        display.on_save(SaveEvent(4, Path("step_00000004"), is_best=True))
    assert lines(plain) == [
        "12 parameters [in one group] :smile:",
        "step    2/1000  loss 5.1235  lr 2.00e-04  12,346 tokens/s  0:16:38 left",
        "step    4/1000  loss 5.1235  lr 2.00e-04  12,346 tokens/s  0:16:36 left",
        "validation at step 4: loss 2.0000  perplexity 7.39  0.7213 bits per byte  (best so far)",
        "validation at step 6: loss 2.1000  perplexity 8.17  0.7574 bits per byte",
    ]


def test_console_shows_dashboard_and_full_messages_on_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with ConsoleDisplay(console, 2, 10, Clock()) as display:
        display.on_step(step(3, total=10, is_logged=False))
        print_line(console, "x" * 300)
        display.on_step(step(4, 4.5, total=10))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "x" * 300 in text
    assert "step 4 of 10" in text
    assert "loss 4.5000" in text
    assert "step 4/10" not in text


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

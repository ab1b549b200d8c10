"""The dashboard: three lines that fit the terminal and stay short in a run of any length."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from psannlm.evaluation.loss import Evaluation
from psannlm.runtime.device import MemoryUse, memory_in_use
from psannlm.training.callbacks import StepEvent, ValidationEvent
from psannlm.training.console import ConsoleDisplay, Dashboard, sparkline


def shown(board: Dashboard, width: int) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    console.print(board.render())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def board_of_a_long_run() -> Dashboard:
    board = Dashboard(12_000, 3_000, lr=8e-3, tokens_per_s=24_512.2, elapsed_s=3_723, left_s=26 * 3600, skipped=2)
    board.memory = MemoryUse("GPU memory", 23_400_000_000, 71_000_000_000)
    board.validation, board.is_best = (2_900, 3.30214), True
    for step in range(3_000):
        board.add_loss(8.0 - step / 1000)
    return board


@pytest.mark.parametrize("width", [80, 120])
def test_dashboard_fits_all_values(width: int) -> None:
    lines = shown(board_of_a_long_run(), width)
    assert len(lines) == 3
    assert max(len(line) for line in lines) <= width
    assert "…" not in "".join(lines)
    for figure in (
        *("step 3,000 of 12,000", "1:02:03 elapsed", "1 day, 2:00:00 left", "loss 5.0010", "validation 3.3021"),
        *("at step 2,900, best so far", "24,512 tokens/s", "lr 8.00e-03", "GPU memory 23.4 GB, peak 71.0 GB"),
        "2 skipped",
    ):
        assert figure in "\n".join(lines), figure


@pytest.mark.parametrize("width", [20, 40, 79])
def test_dashboard_narrow_terminal_truncates_but_keeps_lines(width: int) -> None:
    lines = shown(board_of_a_long_run(), width)
    assert len(lines) == 3
    assert max(len(line) for line in lines) <= width


def test_dashboard_before_first_step_shows_no_values() -> None:
    lines = shown(Dashboard(10), 80)
    assert "step 0 of 10" in lines[0]
    assert "left" not in lines[0]
    assert lines[1].strip() == "waiting for the first step"
    assert lines[2:] in ([], [""])


@pytest.mark.parametrize("n_steps", [1, 2, 17, 18, 19, 36, 37, 97, 1000, 4096])
def test_dashboard_curve_stays_short_and_counts_each_step(n_steps: int) -> None:
    board = Dashboard(n_steps)
    for step in range(n_steps):
        board.add_loss(float(step))
    assert len(board.losses) < 18
    counted = len(board.losses) * board._per_point
    assert counted + len(board._pending) == n_steps
    # Of a line of losses each point is the middle of its steps: none is lost, doubled or out of place.
    size = board._per_point
    assert board.losses == [point * size + (size - 1) / 2 for point in range(len(board.losses))]
    assert board.loss == n_steps - 1


def test_sparkline_known_values() -> None:
    assert sparkline([0, 7, 1, 3.4]) == "▁█▂▄"
    assert sparkline([2, 2]) == "▁▁"
    assert sparkline([1]) == sparkline([]) == ""


def test_memory_in_use_is_of_this_process() -> None:
    use = memory_in_use()
    assert use is not None
    assert 10e6 < use.now_bytes <= use.most_bytes < 1e12
    before = use.now_bytes
    block = b"x" * (400 << 20)  # more than earlier tests may have freed, and written to: zeros take no memory
    later = memory_in_use()
    assert later is not None
    assert later.now_bytes - before > 200e6
    del block


def test_dashboard_redraw_is_throttled_and_final_state_drawn() -> None:
    now = [0.0]
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    assert isinstance(console.file, io.StringIO)
    with ConsoleDisplay(console, 0, 1000, lambda: now[0]) as display:
        for step in range(1, 501):
            now[0] += 0.01
            display.on_step(StepEvent(step, 1000, 0, 5.0, 1e-3, 1.0, 64, 100.0, is_skipped=False))
        drawn = console.file.getvalue().count("tokens/s")
        assert 15 <= drawn <= 21  # in five seconds
        display.on_validation(ValidationEvent(500, Evaluation(nats=20.0, n_labels=10, n_bytes=40), is_best=True))
        display.on_step(StepEvent(501, 1000, 0, float("nan"), 1e-3, 1.0, 64, 100.0, is_skipped=True, n_skipped=1))
    text = console.file.getvalue()
    assert "loss 5.0000" in text[text.rindex("step 501 of") :]
    assert "1 skipped" in text[text.rindex("step 501 of") :]
    assert "validation 2.0000 at step 500, best so far" in text[text.rindex("step 501 of") :]

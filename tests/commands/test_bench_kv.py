"""psannlm bench-kv: figures, files, and exit 3 when decoding with the cache is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TINY = ("--batch-size", "2", "--prompt-length", "4", "--max-new-tokens", "5", "--d-model", "16", "--n-layers", "1")
TINY += ("--n-heads", "2", "--vocab-size", "50", "--repeats", "1", "--device", "cpu")


def test_figures_are_printed_and_written(psannlm, project: Path) -> None:
    done = psannlm("bench-kv", *TINY)
    assert done.code == 0, done.err
    [folder] = Path("reports/kv_cache").iterdir()
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "system.json", "table.txt"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["batch_size"], metrics["prompt_length"], metrics["max_new_tokens"]) == (2, 4, 5)
    assert metrics["outputs_are_equal"] is True
    assert metrics["problems"] == []
    assert metrics["cache_bytes"]["cache on, batch"]["measured"] > 0
    table = (folder / "table.txt").read_text()
    for words in ("cache on, batch", "cache off, row by row", "the cache alone, one row", "batching alone, with cache"):
        assert words in done.out
        assert words in table
    assert "psannlm" in json.loads((folder / "system.json").read_text())


def test_json_is_the_only_thing_on_stdout(psannlm, project: Path) -> None:
    metrics = json.loads(psannlm("bench-kv", *TINY, "--base", "transformer", "--out", "here", "--json").out)
    assert metrics["model"]["base"] == "transformer"
    assert metrics["folder"] == "here"
    assert {case["cache"] for case in metrics["cases"]} == {True, False}
    assert Path("here/metrics.json").is_file()


def test_a_wrong_token_is_exit_3_and_leaves_the_evidence(
    psannlm, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that forgets how long it is: every token after the prompt is decoded at the place of the first."""
    from psannlm.models.cache import DecodeState

    select = DecodeState.require_room

    def forgetful(state: DecodeState, n_new: list[int]) -> None:
        select(state, n_new)
        state.lengths = [min(length, 4) for length in state.lengths]

    monkeypatch.setattr(DecodeState, "require_room", forgetful)
    lengths = ("--max-new-tokens", "12", "--d-model", "32", "--n-layers", "2")
    done = psannlm("bench-kv", *TINY, *lengths, "--out", "here")
    assert done.code == 3
    assert "outputs differ first at row" in done.err
    assert "cache on" in done.err
    assert "cache off" in done.err
    assert json.loads(Path("here/metrics.json").read_text())["outputs_are_equal"] is False


def test_impossible_sizes_are_usage_errors(psannlm, project: Path) -> None:
    done = psannlm("bench-kv", *TINY, "--n-heads", "3")
    assert done.code == 2
    assert "heads do not divide" in done.err
    assert "--n-heads: " in done.err
    done = psannlm("bench-kv", *TINY, "--base", "wavresnet")
    assert done.code == 2
    assert "waveresnet" in done.err
    assert psannlm("bench-kv", "--max-new-tokens", "1").code == 2
    assert not Path("reports").exists()

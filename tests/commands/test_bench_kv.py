"""psannlm bench-kv: figures, files, and exit 3 when decoding with the cache is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

TINY = ("--batch-size", "2", "--prompt-length", "4", "--max-new-tokens", "5", "--d-model", "16", "--n-layers", "1")
TINY += ("--n-heads", "2", "--vocab-size", "50", "--repeats", "1", "--device", "cpu")
QUICK = (*TINY, "--no-context-growth")


@pytest.fixture(autouse=True)
def collect_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip garbage collection between runs, which takes longer than runs of this size."""
    monkeypatch.setattr("gc.collect", lambda *generation: 0)


@pytest.mark.slow
def test_bench_kv_prints_and_writes_figures(psannlm, project: Path) -> None:
    done = psannlm("bench-kv", *TINY)
    assert done.code == 0, done.err
    [folder] = Path("reports/kv_cache").iterdir()
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "system.json", "table.txt", "decode.png"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["batch_size"], metrics["prompt_length"], metrics["max_new_tokens"]) == (2, 4, 5)
    assert metrics["outputs_are_equal"] is True
    assert metrics["problems"] == []
    assert metrics["cache_bytes"]["cache on, batch"]["measured"] > 0
    assert [point["context"] for point in metrics["context_growth"]] == [256, 512, 1024, 2048, 4096]
    table = (folder / "table.txt").read_text()
    for words in (
        "cache on, batch",
        "cache off, row by row",
        "cache alone, one row",
        "batching alone, with cache",
        "memory bandwidth",
        "4,096",
    ):
        assert words in done.out
        assert words in table
    assert "psannlm" in json.loads((folder / "system.json").read_text())
    assert (folder / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_bench_kv_json_is_all_of_stdout(psannlm, project: Path) -> None:
    metrics = json.loads(psannlm("bench-kv", *QUICK, "--base", "transformer", "--out", "here", "--json").out)
    assert metrics["model"]["base"] == "transformer"
    assert metrics["folder"] == "here"
    assert {case["cache"] for case in metrics["cases"]} == {True, False}
    assert {path.name for path in Path("here").iterdir()} == {"metrics.json", "system.json", "table.txt"}


def test_bench_kv_table_fits_80_columns(psannlm, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = psannlm("bench-kv", *QUICK, "--max-new-tokens", "20", "--uncached-steps", "3").out
    rows = [line for line in out.splitlines() if line.startswith(("  cache o", "│"))]
    assert len(rows) > 12
    assert all(len(line) <= 80 for line in rows)
    cached = next(line for line in rows if line.startswith("  cache on, batch"))
    assert len(cached.removeprefix("  cache on, batch").split()) == 4
    assert "4 of 20 forward passes of a row timed" in " ".join(out.split())


@pytest.mark.slow
def test_bench_kv_int8_reports_perplexity_cost(psannlm, project: Path) -> None:
    done = psannlm("bench-kv", *QUICK, "--dtype", "int8", "--cases", "cached", "--out", "here")
    assert done.code == 0, done.err
    assert "perplexity, int8" in done.out
    assert "x that of float32" in " ".join(done.out.replace("│", " ").split())
    metrics = json.loads(Path("here/metrics.json").read_text())
    assert metrics["dtype"] == "int8"
    assert 0.9 < metrics["packing_cost"]["ratio"] < 1.1
    assert [case["name"] for case in metrics["cases"]] == ["cache on, batch", "cache on, row by row"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_bench_kv_wrong_token_exits_3(dtype: str, psannlm, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that forgets how long it is: every token after the prompt is decoded at the place of the first."""
    from psannlm.models.kv_cache import KVCache

    commit = KVCache.commit

    def forgetful(state: KVCache, *arguments, **named) -> None:
        commit(state, *arguments, **named)
        state.offsets.clamp_(max=4)

    monkeypatch.setattr(KVCache, "commit", forgetful)
    lengths = ("--max-new-tokens", "12", "--d-model", "32", "--n-layers", "2")
    done = psannlm("bench-kv", *QUICK, *lengths, "--dtype", dtype, "--out", "here")
    assert done.code == 3
    assert "outputs differ first at row" in done.err
    assert "cache on" in done.err
    assert "a full forward pass" in done.err
    assert json.loads(Path("here/metrics.json").read_text())["outputs_are_equal"] is False


@pytest.mark.slow
def test_bench_kv_checkpoint_has_its_own_sizes(psannlm, project: Path, trained: Path) -> None:
    model = str(trained / "runs/tiny")
    lengths = ("--batch-size", "2", "--prompt-length", "4", "--max-new-tokens", "5", "--repeats", "1")
    done = psannlm("bench-kv", "--checkpoint", model, *lengths, "--device", "cpu", "--out", "here", "--json")
    assert done.code == 0, done.err
    metrics = json.loads(done.out)
    assert metrics["model"]["d_model"] == 16
    assert metrics["weights"].startswith(model)
    assert metrics["contexts_left_out"] == [256, 512, 1024, 2048, 4096]
    done = psannlm("bench-kv", "--checkpoint", model, "--d-model", "512")
    assert done.code == 2
    assert "leave out --d-model" in done.err
    done = psannlm("bench-kv", "--checkpoint", model, "--prompt-length", "400")
    assert done.code == 2
    assert "context of 16" in done.err


def test_bench_kv_invalid_sizes_exit_2(psannlm, project: Path) -> None:
    done = psannlm("bench-kv", *TINY, "--n-heads", "3")
    assert done.code == 2
    assert "heads do not divide" in done.err
    assert "--n-heads: " in done.err
    done = psannlm("bench-kv", *TINY, "--base", "wavresnet")
    assert done.code == 2
    assert "waveresnet" in done.err
    assert psannlm("bench-kv", "--max-new-tokens", "1").code == 2
    assert psannlm("bench-kv", *TINY, "--dtype", "int4").code == 2
    assert psannlm("bench-kv", *TINY, "--cases", "none").code == 2
    assert not Path("reports").exists()


def test_bench_kv_missing_reference_model_fails_early(psannlm, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psannlm.benchmarks.harness.reference_models.util.find_spec", lambda name: None)
    done = psannlm("bench-kv", *TINY, "--against", "transformers")
    assert done.code == 2
    assert "pip install -c constraints.txt '.[hf]'" in done.err
    assert not Path("reports").exists()


def test_bench_kv_loads_reference_model_only_on_request(
    psannlm, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # to import it is an error now
    done = psannlm("bench-kv", *QUICK)
    assert done.code == 0, done.err


@pytest.mark.slow
def test_bench_kv_time_limit_states_omissions(psannlm, project: Path) -> None:
    at = TINY.index("--repeats")
    sizes = [*TINY[:at], *TINY[at + 2 :]]
    done = psannlm("bench-kv", *sizes, "--max-new-tokens", "40", "--time-limit", "0.01s", "--out", "here", "--json")
    assert done.code == 0, done.err
    metrics = json.loads(done.out)
    assert {case["n_runs"] for case in metrics["cases"]} == {1}
    assert [case["passes_timed"] for case in metrics["cases"]] == [40, 40, 3, 3]
    assert metrics["context_growth"] == []
    notices = " ".join(metrics["notices"])
    assert "of 3 runs of each case, the time limit of" in notices
    assert "no context length was measured" in notices


@pytest.mark.slow
def test_bench_kv_explicit_repeats_have_no_limit(psannlm, project: Path) -> None:
    metrics = json.loads(psannlm("bench-kv", *QUICK, "--out", "here", "--json").out)
    assert metrics["time_limit_s"] is None
    at = QUICK.index("--repeats")
    sizes = [*QUICK[:at], *QUICK[at + 2 :]]
    assert json.loads(psannlm("bench-kv", *sizes, "--out", "there", "--json").out)["time_limit_s"] == 100

"""The export command from end to end: verification, publishing, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.commands.app import main
from psannlm.errors import ArtifactError, ConfigError, StorageError
from psannlm.export import hf
from psannlm.export.comparison import VerificationFailed
from psannlm.export.export import ExportSettings, export_hf

UNVERIFIED = ExportSettings(is_verified=False)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "psannlm", *arguments]
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "PYTHONPATH": root})


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that does what ``run`` does in this process."""

    def run_line(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        said = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), said.out, said.err)

    return run_line


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokenizer"), [("llama-scaled", "bpe"), ("waveresnet-dilated", "unigram")])
def test_command_verifies_in_a_fresh_process(save_tiny: Callable[..., Path], name: str, tokenizer: str) -> None:
    pytest.importorskip("transformers")
    path = save_tiny(name, tokenizer)
    done = run("export", path.name, "--out", "a folder.v1", cwd=path.parent)
    assert done.returncode == 0, done.stderr
    assert "verified: transformers" in done.stdout
    assert "10,000 random Unicode strings" in done.stdout
    assert [line.split(":")[0].strip() for line in done.stdout.splitlines()[-3:]] == [
        "transformers",
        "vLLM",
        "llama.cpp",
    ]
    assert names(path.parent) == {path.name, "a folder.v1"}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= names(path.parent / "a folder.v1")


@pytest.mark.slow
@pytest.mark.usefixtures("less_text")
def test_a_changed_weight_fails_the_verification(
    export_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    write = hf._write_weights

    def write_changed(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> None:
        # A copy: the tensors are those of the model that the folder is compared with.
        name = "model.layers.1.mlp.down_proj.weight"
        changed = tensors[name].clone()
        changed[0, 0] += 0.5
        write(folder, {**tensors, name: changed}, max_shard_bytes)

    monkeypatch.setattr(hf, "_write_weights", write_changed)
    with pytest.raises(VerificationFailed, match=r"window \d, position \d+: the logit of token \d+ is") as caught:
        export_tiny("llama")
    assert caught.value.exit_code == 3
    assert names(tmp_path) == {"tiny.safetensors"}


@pytest.mark.slow
@pytest.mark.usefixtures("less_text")
@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("tokenizer.json", '"ByteFallback"', '"Fuse"', "comes back as"),
        ("tokenizer_config.json", '"split_special_tokens": true', '"split_special_tokens": false', "has the ids"),
        ("modeling_psannlm.py", "import inspect", "import inspect\nimport psannlm", "imports psannlm"),
        ("modeling_psannlm.py", "class PsannLMModel", "raise OSError('cut short')\nclass PsannLMModel", "cut short"),
    ],
)
def test_a_changed_file_fails_the_verification(
    save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str, message: str
) -> None:
    pytest.importorskip("transformers")
    path = save_tiny("waveresnet", "char")
    write = hf.write_bytes

    def write_changed(target: Path, content: bytes) -> None:
        if target.name == file:
            assert old.encode() in content
            content = content.replace(old.encode(), new.encode(), 1)
        write(target, content)

    monkeypatch.setattr(hf, "write_bytes", write_changed)
    with pytest.raises(VerificationFailed, match=message):
        export_hf(path, path.parent / "out", ExportSettings())
    assert names(path.parent) == {path.name}


def test_a_folder_in_use_is_refused_and_kept(save_tiny: Callable[..., Path]) -> None:
    path = save_tiny("llama")
    out = path.parent / "out"
    out.mkdir()
    export_hf(path, out, UNVERIFIED)  # an empty folder is used
    (out / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty; choose another folder, or replace an earlier export"):
        export_hf(path, out, UNVERIFIED)
    assert (out / "README.md").read_text() == "mine"
    export_hf(path, out, ExportSettings(is_verified=False, is_forced=True))
    assert (out / "README.md").read_text() != "mine"
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match=r"holds 'thesis\.tex', which an export does not write"):
        export_hf(path, out, ExportSettings(is_verified=False, is_forced=True))
    assert (out / "thesis.tex").read_text() == "years of work"
    assert names(path.parent) == {path.name, "out"}


def test_force_removes_files_of_an_earlier_kind(save_tiny: Callable[..., Path]) -> None:
    path = save_tiny("waveresnet")
    out = path.parent / "out"
    export_hf(path, out, ExportSettings(is_verified=False, max_shard_bytes=20_000))
    other = save_tiny("llama", file="other.safetensors")
    export_hf(other, out, ExportSettings(is_verified=False, is_forced=True))
    plain = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert names(out) == {*plain, "model.safetensors"}


@pytest.mark.parametrize("kind", ["file", "link"])
def test_something_else_in_the_place_is_refused(save_tiny: Callable[..., Path], kind: str) -> None:
    path = save_tiny("llama")
    out = path.parent / "out"
    out.write_text("mine") if kind == "file" else out.symlink_to(path.parent)
    with pytest.raises(StorageError, match="is in the way: it is not a folder"):
        export_hf(path, out, ExportSettings(is_verified=False, is_forced=True))


def test_a_model_without_tokenizer_is_refused(save_tiny: Callable[..., Path]) -> None:
    path = save_tiny("llama", tokenizer=None)
    with pytest.raises(ArtifactError, match="has no tokenizer"):
        export_hf(path, path.parent / "out", UNVERIFIED)
    assert names(path.parent) == {path.name}


def test_a_run_without_checkpoint_is_one_line(run_here: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    done = run_here("export", "run", "--out", "out", "--no-verify", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "run" in done.stderr
    assert names(tmp_path) == {"run"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "--out", "out"], "no model file, checkpoint folder or run at missing"),
        (["tiny.safetensors", "--out", "out", "--max-shard-size", "5 apples"], "is not a size"),
        (["tiny.safetensors", "--out", "out", "--dtype", "int4"], "int4"),
    ],
)
def test_wrong_usage_exits_2(
    run_here: Callable[..., Any], save_tiny: Callable[..., Path], arguments: list[str], message: str
) -> None:
    path = save_tiny("llama")
    done = run_here("export", *arguments, cwd=path.parent)
    assert done.returncode == 2
    assert message in done.stderr
    assert names(path.parent) == {path.name}


def test_verification_without_transformers_names_the_extra(
    save_tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tiny("llama")
    monkeypatch.setattr("psannlm.export.verify.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"constraints\.txt '\.\[hf\]'.*--no-verify"):
        export_hf(path, path.parent / "out", ExportSettings())
    assert export_hf(path, path.parent / "out", UNVERIFIED).verification is None


def test_model_card_states_origin_and_loaders(save_tiny: Callable[..., Path]) -> None:
    path = save_tiny("waveresnet")
    export_hf(path, path.parent / "out", UNVERIFIED)
    card = (path.parent / "out" / "README.md").read_text()
    front, _, text = card.removeprefix("---\n").partition("\n---\n")
    assert "library_name: transformers" in front
    assert "custom_code" in front
    for fact in ("waveresnet", "| trained | 5 steps, 320 tokens |", "2.5000 nats per token", "trust_remote_code=True"):
        assert fact in text
    assert "- llama.cpp: no" in text
    assert "This folder was not verified." in text


def test_json_output_is_one_document(run_here: Callable[..., Any], save_tiny: Callable[..., Path]) -> None:
    path = save_tiny("qwen3")
    done = run_here("export", path.name, "--out", "out", "--no-verify", "--json", cwd=path.parent)
    found = json.loads(done.stdout)
    assert found["architecture"] == "Qwen3ForCausalLM"
    assert found["loaders"]["llama.cpp"]["able"] is True
    assert found["verification"] is None

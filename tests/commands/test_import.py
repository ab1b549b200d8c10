"""psannlm import: from a folder of transformers to generated text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from psannlm.export.plain_mapping import plain_config, plain_tensors
from psannlm.tokenizers.huggingface import HuggingFaceTokenizer


@pytest.fixture
def folder(tmp_path: Path, build_tiny, tiny_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "llama"
    folder.mkdir()
    model = build_tiny(base="transformer", vocab_size=300).to(torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(plain_config(model.config, torch.bfloat16)))
    save_file(dict(plain_tensors(model.state_dict())), folder / "model.safetensors", {"format": "pt"})
    HuggingFaceTokenizer.fit(tiny_texts, 300).save(folder / "tokenizer.json")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_imported_bfloat16_model_generates(psannlm, folder: Path, dtype: str) -> None:
    done = psannlm("import", str(folder), "--out", "model.safetensors", "--json")
    assert (done.code, done.err) == (0, "")
    card = json.loads(done.out)
    assert (card["class"], card["dtype"], card["vocab_size"]) == ("LlamaForCausalLM", "float32", 300)
    made = psannlm("generate", "--checkpoint", card["file"], "--prompt", "The sea", "--dtype", dtype,
                   "--max-new-tokens", "8")  # fmt: skip
    assert made.code == 0
    assert made.out.startswith("The sea")


def test_import_shows_the_next_command(psannlm, folder: Path) -> None:
    done = psannlm("import", str(folder))
    assert done.code == 0
    assert "next: psannlm generate --checkpoint model.safetensors --prompt TEXT" in done.out


def test_import_keeps_an_existing_file_without_force(psannlm, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    refused = psannlm("import", str(folder))
    assert refused.code == 2
    assert "--force" in refused.err
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
    assert psannlm("import", str(folder), "--force").code == 0


@pytest.mark.parametrize("name", ["missing", "llama/config.json", "."])
def test_import_of_no_folder_is_wrong_usage(psannlm, folder: Path, name: str) -> None:
    refused = psannlm("import", name)
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1
    assert not Path("model.safetensors").exists()

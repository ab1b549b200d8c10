"""Import of folders that were exported with custom code: every tensor bit for bit, and the same network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.errors import ArtifactError, ConfigError
from psannlm.export.import_hf import import_folder
from psannlm.models.artifact import load_model
from tests.export.conftest import CUSTOM


@pytest.mark.parametrize("name", CUSTOM)
def test_import_undoes_the_export_bit_for_bit(
    save_tiny: Callable[..., Path], export_tiny: Callable[..., Any], name: str
) -> None:
    folder = export_tiny(name, is_verified=False).folder
    before, after = load_model(save_tiny(name)), import_folder(folder)
    ours, theirs = before.model.state_dict(), after.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    ids = torch.arange(20, 50)[None]
    with torch.no_grad():
        assert torch.equal(before.model(ids), after.model(ids))
    again = load_model_after_save(after, folder.parent / "again.safetensors")
    assert torch.equal(again.state_dict()["embedding.weight"], ours["embedding.weight"])


def load_model_after_save(imported: Any, path: Path) -> Any:
    imported.save(path)
    return load_model(path).model


@pytest.mark.parametrize("kind", ["char", "unigram", "bpe", "byte-level"])
def test_imported_tokenizer_encodes_alike(
    save_tiny: Callable[..., Path], export_tiny: Callable[..., Any], tiny_texts: list[str], kind: str
) -> None:
    imported = import_folder(export_tiny("respsann", tokenizer=kind, is_verified=False).folder).tokenizer
    original = load_model(save_tiny("respsann", kind)).tokenizer
    assert imported is not None
    assert original is not None
    for text in [*tiny_texts, "</s><pad> <0x41> 日本語\u2581\uf8f00", "  a   b\r\n\0"]:
        assert imported.encode(text) == original.encode(text)
        assert imported.decode(imported.encode(text)) == text
    assert imported.special_ids == original.special_ids


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden_act": "softsign"}, ConfigError, "missing or unknown"),
        ({"short_conv_places": 7}, ConfigError, "damaged"),
        ({"sine_bounds": None}, ConfigError, "damaged"),
        ({"num_hidden_layers": 9}, ArtifactError, "does not fit|configured with"),
        ({"short_conv_kernel_size": 10**12}, ConfigError, "kernel_size|reach"),
    ],
)
def test_import_of_a_changed_configuration_is_refused(
    export_tiny: Callable[..., Any], changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder = export_tiny("waveresnet", is_verified=False).folder
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changed}))
    with pytest.raises(error, match=message):
        import_folder(folder)

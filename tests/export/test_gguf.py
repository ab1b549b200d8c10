"""GGUF files, read back by transformers, by the gguf package and, where it is installed, by llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from psannlm.errors import ConfigError, TokenizerError
from psannlm.export.comparison import VerificationFailed
from psannlm.export.export import ExportSettings
from psannlm.export.export_gguf import export_gguf
from psannlm.export.gguf import gguf_tensors, pair_rotated_rows, write_gguf
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer

gguf = pytest.importorskip("gguf")
Build = Callable[..., Transformer]
Fit = Callable[[str], Tokenizer]
# Of one head size that transformers and llama.cpp compute with.
SIZES: dict[str, Any] = {"base": "transformer", "d_model": 32, "n_heads": 4, "vocab_size": 330, "max_seq_len": 96}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"n_kv_heads": 2, "residual_scale": True},
    "qwen3": {"qk_norm": True, "tie_embeddings": True, "rope_theta": 500.0, "norm_eps": 1e-3},
    "arcee": {"mlp": "relu2"},
}


def verifiable(architecture: str) -> bool:
    return find_spec("llama_cpp") is not None or (
        architecture != "arcee" and find_spec("transformers") is not None and find_spec("accelerate") is not None
    )


@pytest.fixture
def export(build_tiny: Build, fitted: Fit, tmp_path: Path) -> Callable[..., Any]:
    """Return an export of a tiny model of an architecture to ``tmp_path / "out"``."""
    from psannlm.models.artifact import save_model

    def run(architecture: str, tokenizer: str = "byte-level", model: Transformer | None = None, **settings: Any) -> Any:
        tiny = model or build_tiny(**SIZES, **ARCHITECTURES[architecture])
        save_model(tmp_path / "tiny.safetensors", tiny, fitted(tokenizer), {})
        return export_gguf(tmp_path / "tiny.safetensors", tmp_path / "out", ExportSettings(**settings))

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokenizer", "dtype"),  # of the weights, which the tokenizer does not concern
    [("byte-level", "float32"), ("byte-level", "float16"), ("byte-level", "bfloat16"), ("bpe", "float32")],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gguf_computes_what_the_checkpoint_does(
    export: Callable[..., Any], tmp_path: Path, architecture: str, tokenizer: str, dtype: str, request: Any
) -> None:
    if (architecture, dtype) != ("llama", "float32"):
        request.getfixturevalue("less_text")
    if not verifiable(architecture):
        pytest.skip("nothing that reads this architecture is installed")
    result = export(architecture, tokenizer, dtype=dtype)
    assert result.architecture == architecture
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    assert (find_spec("llama_cpp") is None) or "greedy tokens" in str(result.verification)


@pytest.mark.slow
@pytest.mark.usefixtures("less_text")
def test_changed_weight_fails_the_verification(
    export: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setattr("psannlm.export.gguf.pair_rotated_rows", lambda weight, n_heads: weight)
    with pytest.raises(VerificationFailed, match="the logit of token"):
        export("llama")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stored_tensors_and_settings_are_those_of_the_model(
    export: Callable[..., Any], build_tiny: Build, tmp_path: Path, architecture: str
) -> None:
    model = build_tiny(**SIZES, **ARCHITECTURES[architecture])
    export(architecture, model=model, is_verified=False, dtype="float16")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    expected = dict(gguf_tensors(model))
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        kind = "F16" if tensor.ndim == 2 else "F32"
        assert stored[name].tensor_type.name == kind
        found = np.array(stored[name].data).reshape(tensor.shape)
        assert np.array_equal(found, tensor.to(torch.float16 if kind == "F16" else torch.float32).numpy())

    def field(name: str) -> Any:
        return reader.get_field(f"{architecture}.{name}").contents()

    config = model.config
    assert field("rope.freq_base") == config.rope_theta
    assert field("attention.layer_norm_rms_epsilon") == pytest.approx(config.norm_eps)
    assert (field("context_length"), field("block_count")) == (config.max_seq_len, config.n_layers)
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is True
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == config.vocab_size


def test_paired_rows_rotate_as_halves_do() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(2 * 6, 5), torch.randn(5)
    halves, pairs = (weight @ x).view(2, 6), (pair_rotated_rows(weight, 2) @ x).view(2, 6)
    assert torch.equal(pairs[:, 0::2], halves[:, :3])
    assert torch.equal(pairs[:, 1::2], halves[:, 3:])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mlp": "geglu"}, "feed-forward geglu"),
        ({"mlp": "gelu"}, "feed-forward gelu"),
        ({"mlp": "sine"}, "sine activation"),
        ({"positional_encoding": "alibi"}, "positional_encoding: alibi"),
        ({"positional_encoding": "sinusoidal"}, "positional_encoding: sinusoidal"),
        ({"short_conv": {"enabled": True}}, "short convolutions"),
        ({"mlp": "relu2", "qk_norm": True}, "qk_norm"),
    ],
    ids=str,
)
def test_inexpressible_model_names_part_and_way_out(
    export: Callable[..., Any], build_tiny: Build, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"{said}.*--format hf"):
        export("llama", model=build_tiny(**SIZES, **settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "said"), [("unigram", "unigram"), ("char", "simple")])
def test_inexpressible_tokenizer_names_part_and_way_out(export: Callable[..., Any], kind: str, said: str) -> None:
    with pytest.raises(TokenizerError, match=f"{said}.*--format hf"):
        export("llama", kind, is_verified=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"normalizer": {"type": "NFC"}}, "a normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "other words"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "other words",
        ),
    ],
    ids=str,
)
def test_foreign_tokenizer_files_are_held_to_gpt2(
    build_tiny: Build, fitted: Fit, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    from psannlm.tokenizers.huggingface import HuggingFaceTokenizer

    data = {**json.loads(fitted("byte-level").to_bytes()), **change}
    with pytest.raises(TokenizerError, match=said):
        write_gguf(tmp_path / "a.gguf", build_tiny(**SIZES), HuggingFaceTokenizer(json.dumps(data).encode()))


def test_weight_beyond_float16_is_refused(export: Callable[..., Any], build_tiny: Build, tmp_path: Path) -> None:
    model = build_tiny(**SIZES)
    with torch.no_grad():
        model.embedding.weight[0, 0] = 70_000.0
    with pytest.raises(ConfigError, match=r"token_embd\.weight.*bfloat16"):
        export("llama", model=model, is_verified=False, dtype="float16")
    assert not (tmp_path / "out").exists()

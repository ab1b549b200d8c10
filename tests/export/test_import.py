"""Import of transformers folders: the tensors bit for bit, the logits of transformers, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from psannlm.errors import ArtifactError, ConfigError, PsannlmError, TokenizerError
from psannlm.export.custom_mapping import custom_config, custom_tensors
from psannlm.export.import_hf import import_folder
from psannlm.export.plain_mapping import plain_config, plain_tensors
from psannlm.models.artifact import load_model
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.huggingface import HuggingFaceTokenizer

Build = Callable[..., Transformer]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
}


def write_plain_folder(folder: Path, model: Transformer, **changes: Any) -> Path:
    """Write the two files of a folder that the import reads; a change to None removes the key."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {**plain_config(model.config), **changes}
    fields = {key: value for key, value in fields.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(dict(plain_tensors(model.state_dict())), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def folder(tmp_path: Path, build_tiny: Build) -> Path:
    return write_plain_folder(tmp_path / "folder", build_tiny(base="transformer"))


def change(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def imported_state(folder: Path, out: Path) -> dict[str, Tensor]:
    import_folder(folder, with_tokenizer=False).save(out)
    return dict(load_model(out).model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"qk_norm": True, "n_kv_heads": 1}, {"mlp": "relu2", "tie_embeddings": True}, {"mlp": "geglu"}],
    ids=str,
)
def test_exported_tensors_come_back_bit_for_bit(
    tmp_path: Path, build_tiny: Build, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = build_tiny(base="transformer", rope_theta=500.0, norm_eps=1e-3, **options).to(dtype)
    state = imported_state(write_plain_folder(tmp_path / "a", model), tmp_path / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name].to(dtype), tensor)
        assert torch.equal(state[name], tensor.float())
    assert load_model(tmp_path / "model.safetensors").model.config == model.config


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("Llama", {"tie_word_embeddings": True, "hidden_act": "gelu"}),
        ("Qwen3", {"rms_norm_eps": 1e-3}),
        ("Qwen3", {"tie_word_embeddings": True}),
        ("Arcee", {}),
        ("Arcee", {"hidden_act": "gelu"}),
    ],
    ids=str,
)
@torch.no_grad()
def test_imported_model_has_logits_of_transformers(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 1))
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size=3000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    ids = torch.randint(0, 40, (2, 50))
    expected = theirs(ids).logits
    for folder in ("whole", "sharded"):
        model = import_folder(tmp_path / folder, with_tokenizer=False).model
        assert float((model(ids) - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_bias": True}, "attention_bias: True; our layers of this kind have no biases"),
        ({"mlp_bias": True}, "mlp_bias: True"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8}}, "rope_parameters.rope_type"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"rope_type": "default", "factor": 8}}, "rope_parameters.factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": "yarn"}, "rope_parameters: 'yarn' is not an object"),
        ({"use_sliding_window": True}, "sliding_window"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "sliding_window"),
        ({"head_dim": 128}, "head_dim: 128"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act: 'gelu_pytorch_tanh'"),
        ({"hidden_act": "relu2"}, "hidden_act: 'relu2'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "model.Model"}}, "auto_map"),
        ({"architectures": ["MixtralForCausalLM"]}, "architectures: MixtralForCausalLM"),
        ({"architectures": ["LlamaForCausalLM", "B"]}, "architectures"),
        ({"architectures": None, "model_type": "mamba"}, "architectures"),
        ({"num_attention_heads": None}, "num_attention_heads: is missing"),
        ({"num_attention_heads": "two"}, "num_attention_heads"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ],
    ids=str,
)
def test_inexpressible_settings_are_refused_by_their_name(folder: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        import_folder(change(folder, **changes), with_tokenizer=False)
    assert f"  {said}" in str(caught.value)
    assert "config.json" in str(caught.value)


def test_all_inexpressible_settings_are_named_at_once(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)attention_bias.*head_dim"):
        import_folder(change(folder, attention_bias=True, head_dim=3), with_tokenizer=False)


def test_absent_keys_take_the_class_defaults(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoConfig

    from psannlm.export.import_config import NATIVE_CLASSES, native_model_config

    needed = {key: SIZES[key] for key in SIZES if key not in ("num_key_value_heads", "head_dim")}
    needed.pop("max_position_embeddings")
    for architecture in NATIVE_CLASSES:
        kind = architecture.removesuffix("ForCausalLM").lower()
        given = {**needed, "architectures": [architecture]} | ({"head_dim": 4} if kind == "qwen3" else {})
        theirs = AutoConfig.for_model(kind, **needed)
        if kind == "qwen3":
            given["num_key_value_heads"] = theirs.num_key_value_heads = 4
        ours = native_model_config(given)
        assert ours.n_kv_heads in (None, theirs.num_key_value_heads)
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.max_seq_len == theirs.max_position_embeddings
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.tie_embeddings == theirs.tie_word_embeddings


def rewrite(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "kind", "said"),
    [
        (lambda t: t.pop("lm_head.weight"), ArtifactError, "head.weight is missing"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(12)}), ConfigError, "q_proj.bias"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}), ArtifactError, "blocks.2"),
        (lambda t: t.update({"model.norm.weight": torch.ones(13)}), ArtifactError, r"final_norm.weight is \(13,\)"),
        (lambda t: t.update({"model.norm.weight": torch.ones(12).double()}), ConfigError, "'F64'"),
        (lambda t: t.update({"model.norm.weight": torch.ones(12).to(torch.float8_e4m3fn)}), ConfigError, "'F8_E4M3'"),
    ],
)
def test_unfitting_tensors_are_refused(
    folder: Path, edit: Callable[[dict[str, Tensor]], None], kind: type[PsannlmError], said: str
) -> None:
    rewrite(folder, edit)
    with pytest.raises(kind, match=said):
        import_folder(folder, with_tokenizer=False)


def test_derived_buffers_of_old_folders_are_left_out(folder: Path) -> None:
    before = import_folder(folder, with_tokenizer=False).model.state_dict()
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}))
    after = import_folder(folder, with_tokenizer=False).model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tied_folder_may_hold_equal_output_matrix_only(tmp_path: Path, build_tiny: Build) -> None:
    folder = write_plain_folder(tmp_path / "folder", build_tiny(base="transformer", tie_embeddings=True))
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert import_folder(folder, with_tokenizer=False).model.head is None
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        import_folder(folder, with_tokenizer=False)


def test_pickles_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model.bin is a pickle.*save_pretrained"):
        import_folder(folder, with_tokenizer=False)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin"])
def test_index_names_files_of_the_folder_only(folder: Path, name: str) -> None:
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="not a safetensors file of the folder"):
        import_folder(folder, with_tokenizer=False)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_truncated_weights_are_refused(folder: Path, cut: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ArtifactError):
        import_folder(folder, with_tokenizer=False)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"architectures": [["a"]]}', "[" * 100_000])
def test_damaged_config_is_one_error(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(PsannlmError):
        import_folder(folder, with_tokenizer=False)


def test_linked_files_of_a_download_cache_are_read(tmp_path: Path, folder: Path) -> None:
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    assert import_folder(linked, with_tokenizer=False).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "settings",
    [
        {"base": "waveresnet", "residual_scale": True},
        {"base": "respsann", "sine_params": {"amp_bounds": [2.0, 3.0], "amp_init": 2.5, "learnable": ["frequency"]}},
        {"base": "waveresnet", "short_conv": {"places": ["mlp"], "kernel_size": 3, "dilation_growth": 2}},
        {"base": "transformer", "positional_encoding": "alibi", "tie_embeddings": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_folders_of_our_own_class_come_back(tmp_path: Path, build_tiny: Build, settings: dict[str, Any]) -> None:
    model = build_tiny(**settings)
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(custom_config(model.config)))
    save_file(dict(custom_tensors(model.state_dict())), folder / "model.safetensors", {"format": "pt"})
    imported = import_folder(folder, with_tokenizer=False)
    imported.save(tmp_path / "model.safetensors")
    back = load_model(tmp_path / "model.safetensors").model
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    ids = torch.randint(0, 17, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(back(ids), model(ids))


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "softsign"), ("hidden_size", "wide"), ("sine_bounds", None), ("short_conv_places", 3)],
)
def test_damaged_config_of_our_own_class_is_refused(tmp_path: Path, build_tiny: Build, key: str, value: Any) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**custom_config(build_tiny().config), key: value}))
    with pytest.raises(ConfigError, match=r"config\.json"):
        import_folder(folder, with_tokenizer=False)


@pytest.fixture
def tokenized(tmp_path: Path, build_tiny: Build, tiny_texts: list[str]) -> Path:
    tokenizer = HuggingFaceTokenizer.fit(tiny_texts, 300)
    folder = write_plain_folder(tmp_path / "tokenized", build_tiny(base="transformer", vocab_size=300))
    tokenizer.save(folder / "tokenizer.json")
    return folder


def test_tokenizer_comes_with_the_model(tokenized: Path, tmp_path: Path, tiny_texts: list[str]) -> None:
    imported = import_folder(tokenized)
    imported.save(tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.encode(tiny_texts[0]) == HuggingFaceTokenizer.fit(tiny_texts, 300).encode(tiny_texts[0])
    assert loaded.notes == {"imported": {"architecture": "LlamaForCausalLM"}}
    assert imported.notices == ()


def test_other_end_of_text_is_noted(tokenized: Path) -> None:
    (tokenized / "generation_config.json").write_text(json.dumps({"eos_token_id": [77, 78]}))
    (notice,) = import_folder(tokenized).notices
    assert "eos_token_id is [77, 78]" in notice


def test_tokenizer_that_cannot_be_held_is_refused(folder: Path) -> None:
    with pytest.raises(TokenizerError, match="--no-tokenizer"):
        import_folder(folder)
    (folder / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {}}, "added_tokens": []}')
    with pytest.raises(TokenizerError, match="--no-tokenizer"):
        import_folder(folder)


def test_tokenizer_larger_than_the_model_is_refused(folder: Path, tiny_texts: list[str]) -> None:
    HuggingFaceTokenizer.fit(tiny_texts, 300).save(folder / "tokenizer.json")
    with pytest.raises(TokenizerError, match="300 ids, and the model only 17"):
        import_folder(folder)


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [("llama", "byte-level"), ("waveresnet", "unigram"), ("respsann", "char"), ("arcee-gelu", "bpe")],
)
def test_export_then_import_gives_model_and_ids_back(
    export_tiny: Callable[..., Any],
    fitted: Callable[[str], Any],
    tmp_path: Path,
    name: str,
    tokenizer: str,
    tiny_texts: list[str],
) -> None:
    export_tiny(name, tokenizer, is_verified=False)
    imported = import_folder(tmp_path / "out")
    before = load_model(tmp_path / "tiny.safetensors").model.state_dict()
    after = imported.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert imported.tokenizer is not None
    texts = [*tiny_texts, "</s> <s> <0x41>", " a  b\n\n\tc", "\u2581 \uf8f0 🎉 日本"]
    assert imported.tokenizer.encode_batch(texts) == fitted(tokenizer).encode_batch(texts)
    assert [imported.tokenizer.decode(ids) for ids in imported.tokenizer.encode_batch(texts)] == texts
    assert imported.notices == ()

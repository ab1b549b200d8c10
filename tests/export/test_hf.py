"""Exported folders under the real transformers: every base and option, and what a folder holds.

``docs/guides/export.md`` has a table whose "yes" for transformers are the parameters of these tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.export import custom_mapping
from psannlm.export.hf import choose_target, reference_model
from psannlm.models.artifact import load_model
from psannlm.models.transformer import Transformer
from tests.export.conftest import CUSTOM, PLAIN

transformers = pytest.importorskip("transformers")

ALL = [*PLAIN, *CUSTOM]
# One of each class that computes an export.
QUICK = ("llama", "qwen3", "arcee", "waveresnet")
PROMPT_LENGTHS = (17, 9, 2)


@pytest.fixture(autouse=True)
def own_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Custom code is copied to a cache, which must be that of the test."""
    dynamic = pytest.importorskip("transformers.dynamic_module_utils")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def load_theirs(folder: Path, **settings: Any) -> Any:
    is_custom = (folder / "modeling_psannlm.py").exists()
    options = {"dtype": torch.float32, "trust_remote_code": is_custom, **settings}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def padded(rows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    longest = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def greedy(model: Transformer, ids: torch.Tensor, n_new: int, suppressed: Sequence[int]) -> list[int]:
    """Return the most likely tokens by whole passes of our model, without any cache."""
    row = ids[None]
    for _ in range(n_new):
        logits = model(row)[0, -1]
        logits[list(suppressed)] = float("-inf")
        row = torch.cat((row, logits.argmax()[None, None]), dim=1)
    return row[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
@torch.no_grad()
def test_every_base_and_option_agrees_with_transformers(
    save_tiny: Callable[..., Path], export_tiny: Callable[..., Any], name: str
) -> None:
    """Logits, and greedy text with and without cache, alone and left-padded."""
    result = export_tiny(name, is_verified=False)
    assert result.target.architecture == (PLAIN[name][1] if name in PLAIN else "PsannLMForCausalLM")
    ours, theirs = load_model(save_tiny(name)).model, load_theirs(result.folder)
    assert type(theirs).__name__ == result.target.architecture
    rows = [torch.randint(4, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in PROMPT_LENGTHS]
    expected = ours(rows[0][None])
    assert (theirs(rows[0][None]).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    wanted = [greedy(ours, row, 12, theirs.generation_config.suppress_tokens) for row in rows]
    batch = theirs.generate(**padded(rows), **settings)[:, max(PROMPT_LENGTHS) :].tolist()
    assert batch == wanted
    for use_cache in (True, False):
        alone = [theirs.generate(**padded([row]), **settings, use_cache=use_cache)[0, len(row) :] for row in rows]
        assert [tokens.tolist() for tokens in alone] == wanted


@pytest.mark.parametrize("name", ["waveresnet-dilated", "waveresnet-alibi", "respsann-sinusoidal"])
@torch.no_grad()
def test_custom_code_searches_beams_alike_with_and_without_cache(export_tiny: Callable[..., Any], name: str) -> None:
    """Beams exchange rows of the cache, convolution states included; a static cache and drafts take other paths."""
    model = load_theirs(export_tiny(name, is_verified=False).folder)
    rows = padded([torch.arange(20, 31), torch.arange(40, 44)])
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    beams = model.generate(**rows, **settings, num_beams=3)
    assert torch.equal(beams, model.generate(**rows, **settings, num_beams=3, use_cache=False))
    plain = model.generate(**rows, **settings)
    assert torch.equal(plain, model.generate(**rows, **settings, cache_implementation="static", disable_compile=True))
    one = padded([torch.arange(20, 31)])
    drafted = model.generate(**one, **settings, prompt_lookup_num_tokens=3)
    assert torch.equal(drafted, model.generate(**one, **settings))


@pytest.mark.parametrize("name", ["waveresnet", "respsann-alibi"])
@torch.no_grad()
def test_custom_code_computes_the_same_by_eager_attention(export_tiny: Callable[..., Any], name: str) -> None:
    folder = export_tiny(name, is_verified=False).folder
    rows = padded([torch.arange(20, 31), torch.arange(40, 44)])
    by_sdpa = load_theirs(folder)(**rows).logits[:, -1]
    eager = load_theirs(folder, attn_implementation="eager")
    torch.testing.assert_close(eager(**rows).logits[:, -1], by_sdpa, rtol=1e-4, atol=1e-5)
    assert eager(**rows, output_attentions=True).attentions[0].shape[-1] == 11


def test_custom_code_trains_what_the_configuration_trains(export_tiny: Callable[..., Any]) -> None:
    model = load_theirs(export_tiny("respsann-sine", is_verified=False).folder).train()
    ids = torch.arange(20, 40)[None]
    loss = model(ids, labels=ids).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if "raw_" in name}
    trained = {name.rpartition(".")[2] for name, grad in gradients.items() if grad is not None}
    assert trained == {"raw_frequency"}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    torch.testing.assert_close(model(ids, labels=ids).loss, loss)


@pytest.mark.parametrize("name", ["respsann-alibi", "waveresnet"])
def test_custom_code_refuses_backends_that_would_ignore_it(export_tiny: Callable[..., Any], name: str) -> None:
    """vLLM puts its own attention in place, without bias and without convolution states: text would be wrong."""
    folder = export_tiny(name, is_verified=False).folder
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config._attn_implementation_internal = "vllm"
    model_class = type(load_theirs(folder))
    with pytest.raises(ValueError, match=r"vLLM|vllm"):
        model_class(config)


def test_pipeline_continues_text(export_tiny: Callable[..., Any]) -> None:
    folder = export_tiny("waveresnet", tokenizer="unigram", is_verified=False).folder
    pipe = transformers.pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
    texts = pipe(["The tide", "A much longer beginning of"], max_new_tokens=8, do_sample=False, batch_size=2)
    assert [row[0]["generated_text"][:8] for row in texts] == ["The tide", "A much l"]


def test_auto_classes_load_the_folder_after_importing_psannlm_hf(export_tiny: Callable[..., Any]) -> None:
    hf = pytest.importorskip("psannlm.hf")
    folder = export_tiny("waveresnet", is_verified=False).folder
    assert type(transformers.AutoConfig.from_pretrained(folder)) is hf.PsannLMConfig
    assert type(transformers.AutoModel.from_pretrained(folder)) is hf.PsannLMModel
    assert type(transformers.AutoModelForCausalLM.from_pretrained(folder)) is hf.PsannLMForCausalLM


def test_exported_code_equals_package_copy_and_stands_alone(export_tiny: Callable[..., Any]) -> None:
    folder = export_tiny("respsann", is_verified=False).folder
    for name in custom_mapping.CODE_FILES:
        content = (folder / name).read_bytes()
        assert content == resources.files("psannlm.export").joinpath(name).read_bytes()
        assert b"import psannlm" not in content
        assert b"from psannlm" not in content


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_configuration_and_names_can_be_undone(build_tiny: Callable[..., Any], name: str) -> None:
    model = build_tiny(**CUSTOM[name])
    fields = json.loads(json.dumps(custom_mapping.custom_config(model.config)))
    again = custom_mapping.model_config(fields)
    assert custom_mapping.custom_config(again) == fields
    state = model.state_dict()
    assert [custom_mapping.our_name(custom_mapping.custom_name(key)) for key in state] == list(state)
    assert build_tiny(**again.model_dump()).state_dict().keys() == state.keys()


@pytest.mark.parametrize("name", ["llama-scaled", "waveresnet-tied-grouped"])
def test_dtype_rounds_weights_but_not_the_sine(
    save_tiny: Callable[..., Path], export_tiny: Callable[..., Any], name: str
) -> None:
    folder = export_tiny(name, is_verified=False, dtype="bfloat16").folder
    loaded = load_theirs(folder, dtype="auto")
    kinds = {key: parameter.dtype for key, parameter in loaded.named_parameters()}
    assert {dtype for key, dtype in kinds.items() if ".raw_" not in key} == {torch.bfloat16}
    assert {dtype for key, dtype in kinds.items() if ".raw_" in key} <= {torch.float32}
    model = load_model(save_tiny(name)).model
    reference = reference_model(model, choose_target(model.config), torch.bfloat16)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        expected = reference(ids)
        assert (load_theirs(folder)(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (loaded(ids).logits.float() - expected).abs().max() <= 0.05 * expected.abs().max()


def test_shards_hold_what_one_file_holds(export_tiny: Callable[..., Any]) -> None:
    from psannlm.export.export import ExportSettings

    whole = load_theirs(export_tiny("llama", is_verified=False).folder).state_dict()
    folder = export_tiny("llama", is_verified=False, max_shard_bytes=20_000, is_forced=True).folder
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert not (folder / "model.safetensors").exists()
    in_shards = load_theirs(folder).state_dict()
    assert whole.keys() == in_shards.keys()
    assert all(torch.equal(tensor, in_shards[key]) for key, tensor in whole.items())
    assert ExportSettings().max_shard_bytes == 5 * 10**9


def test_generation_never_emits_what_ours_never_emits(
    save_tiny: Callable[..., Path], export_tiny: Callable[..., Any]
) -> None:
    folder = export_tiny("llama", is_verified=False).folder
    loaded = load_model(save_tiny("llama"))
    settings = json.loads((folder / "generation_config.json").read_text())
    assert loaded.tokenizer is not None
    unused = range(loaded.tokenizer.vocab_size, loaded.model.config.vocab_size or 0)
    assert settings["suppress_tokens"] == [0, 1, 3, *unused]
    assert len(unused) == 3
    assert (settings["eos_token_id"], settings["pad_token_id"]) == (2, 0)

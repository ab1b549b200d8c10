"""The Python API: documented signatures, texts and paths, fit, generate, save, load."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import psann.lm
import psannlm
from psannlm import psannLM, psannLMDataPrep
from psannlm.data.dataset import LMDataset
from psannlm.errors import ArtifactError, ConfigError, CorpusError, GenerationError, Interrupted, TokenizerError

FIT = {"batch_tokens": 64, "lr": 1e-2, "amp": "fp32", "device": "cpu", "verbose": False}


@pytest.fixture(scope="module")
def data(tiny_texts: list[str]) -> psannLMDataPrep:
    return psannLMDataPrep(tiny_texts, tokenizer="simple", max_length=16, val_split=0.2, vocab_size=300)


def small(**settings: Any) -> psannLM:
    return psannLM(**{"d_model": 16, "n_layers": 1, "n_heads": 2, **settings})


@pytest.fixture(scope="module")
def fitted(data: psannLMDataPrep) -> psannLM:
    return small(vocab_size=data.vocab_size).fit(data, max_steps=3, **FIT)


def test_api_surface_is_documented() -> None:
    def shown(function: Any) -> list[str]:
        return [f"{p.name}={p.default!r}" for p in inspect.signature(function).parameters.values()]

    assert shown(psannLMDataPrep)[1:7] == [
        "tokenizer='auto'",
        "tokenizer_model_path=None",
        "max_length=256",
        "pack_sequences=True",
        "val_split=0.0",
        "seed=1337",
    ]
    assert shown(psannLM)[:7] == [
        "base='waveresnet'",
        "d_model=512",
        "n_layers=8",
        "n_heads=8",
        "d_mlp=None",
        "vocab_size=None",
        "positional_encoding='rope'",
    ]
    assert shown(psannLM.fit)[1:8] == [
        "train_data=None",
        "val_data=None",
        "epochs=1",
        "batch_tokens=65536",
        "lr=0.0002",
        "amp='bf16'",
        "ddp='auto'",
    ]
    knobs = ["max_new_tokens=128", "top_k=None", "top_p=0.9", "temperature=1.0", "repetition_penalty=None"]
    assert shown(psannLM.generate)[2:7] == knobs
    assert shown(psannLM.generate_batch)[2:7] == knobs


def test_api_older_import_path_gives_same_classes() -> None:
    assert psann.lm.psannLM is psannlm.psannLM
    assert psann.lm.psannLMDataPrep is psannlm.psannLMDataPrep


@pytest.mark.slow
def test_api_import_loads_no_torch() -> None:
    program = (
        "import sys, psannlm, psann.lm; assert 'torch' not in sys.modules; "
        "psannlm.psannLM; assert 'torch' in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_data_prep_exposes_tokenizer_and_sizes(data: psannLMDataPrep) -> None:
    assert data.tokenizer_backend == "simple"
    assert data.vocab_size == data.tokenizer.vocab_size
    assert len(data) == len(data.dataset) > 0
    assert data.val_dataset is not None
    input_ids, labels = data.dataset[0]
    assert input_ids.shape == labels.shape == (16,)
    assert (input_ids[1:] == labels[:-1])[labels[:-1] >= 0].all()
    assert torch.equal(data.dataset[-1][0], data.dataset[len(data) - 1][0])


def test_data_prep_builds_datasets_once(tiny_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[LMDataset] = []

    def build(*args: Any, **settings: Any) -> LMDataset:
        built.append(LMDataset(*args, **settings))
        return built[-1]

    monkeypatch.setattr("psannlm.api.LMDataset", build)
    data = psannLMDataPrep(tiny_texts, tokenizer="simple", max_length=16, val_split=0.2, vocab_size=300)
    assert built == []
    assert data.dataset is data.dataset
    assert data.val_dataset is data.val_dataset is not None
    assert [id(one) for one in built] == [id(data.dataset), id(data.val_dataset)]
    assert all(isinstance(one, torch.utils.data.Dataset) for one in built)
    assert psannLMDataPrep(tiny_texts, tokenizer="simple", max_length=16, vocab_size=300).val_dataset is None


def test_data_prep_distinguishes_texts_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("the words of file a, some of them")
    Path("folder").mkdir()
    Path("folder/b.txt").write_text("the words of file b")
    options: dict[str, Any] = {"tokenizer": "simple", "max_length": 4, "vocab_size": 300}
    mixed = psannLMDataPrep(["a.txt", Path("folder"), "a text of its own"], **options)
    texts = [mixed.tokenizer.decode(mixed.prepared.train.document(i)) for i in range(3)]
    assert texts == ["the words of file a, some of them", "the words of file b", "a text of its own"]
    assert psannLMDataPrep("one long enough text", **options).prepared.train.n_documents == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    assert psannLMDataPrep("~/folder/b.txt", **options).prepared.train.names == (str(tmp_path / "folder" / "b.txt"),)
    with pytest.raises(CorpusError, match=r"misspelt\.txt.*no such file"):
        psannLMDataPrep(["a.txt", "misspelt.txt"], **options)
    for misspelt in ("foldr/", "folder/c.tx", "data.csv", "./folder/*.md"):
        with pytest.raises(CorpusError, match="looks like a path"):
            psannLMDataPrep(["a.txt", misspelt], **options)
    assert psannLMDataPrep(["folder/*.txt"], **options).prepared.train.document(0).size == len("the words of file b")
    with pytest.raises(CorpusError):
        psannLMDataPrep(Path("nowhere"), **options)
    with pytest.raises(CorpusError, match="int"):
        psannLMDataPrep([3], **options)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("call", "near"),
    [
        (lambda: small(d_modle=32), "d_model"),
        (lambda: small(sine_params={"freq_int": 2.0}), "freq_init"),
        (lambda: small(vocab_size=300).fit(psannLMDataPrep("x" * 50, "simple", max_length=8), epoch=2), "epochs"),
    ],
)
def test_unknown_keyword_raises_type_error_with_suggestion(call: Any, near: str) -> None:
    with pytest.raises(TypeError, match=near):
        call()


def test_fit_with_texts_explains_data_prep(tiny_texts: list[str]) -> None:
    with pytest.raises(TypeError, match=r"fit\(psannLMDataPrep\(texts\)\)"):
        small().fit(tiny_texts)  # type: ignore[arg-type]


def test_invalid_values_raise_config_error() -> None:
    with pytest.raises(ConfigError, match="wavresnet"):
        small(base="wavresnet")
    with pytest.raises(ConfigError, match="do not divide"):
        small(n_heads=3)


def test_fit_returns_itself_and_learns(data: psannLMDataPrep) -> None:
    model = small(vocab_size=data.vocab_size)
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    assert model.fit(data, max_steps=3, **FIT) is model
    assert model.result is not None
    assert model.result.steps == 3
    assert model.result.best is not None
    assert any(not torch.equal(p, before[name]) for name, p in model.model.named_parameters())


def test_fit_takes_vocabulary_and_context_from_data(data: psannLMDataPrep) -> None:
    model = small().fit(data, max_steps=1, **FIT)
    assert model.model.config.vocab_size == data.vocab_size
    assert model.model.config.max_seq_len == 16
    with pytest.raises(ConfigError, match="vocab_size"):
        small(vocab_size=data.vocab_size - 1).fit(data, max_steps=1, **FIT)


@pytest.mark.slow
def test_fit_writes_files_only_to_checkpoint_dir(
    data: psannLMDataPrep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small().fit(data, max_steps=1, **FIT)
    assert list(tmp_path.iterdir()) == []
    small().fit(data, max_steps=1, checkpoint_dir="kept", **FIT)
    assert (tmp_path / "kept" / "metrics.jsonl").is_file()


def test_fit_uses_given_validation_texts(data: psannLMDataPrep, tiny_texts: list[str]) -> None:
    model = small().fit(data, val_data=["another text to validate on"], max_steps=1, **FIT)
    assert model.result is not None
    assert model.result.best is not None
    assert model.result.best["bytes"] == len("another text to validate on")
    other = psannLMDataPrep(tiny_texts[:4], tokenizer="tokenizers", max_length=16, vocab_size=300)
    with pytest.raises(TokenizerError, match=other.tokenizer.fingerprint[:12]):
        small().fit(data, val_data=other, max_steps=1, **FIT)


def test_generate_matches_generate_batch(fitted: psannLM) -> None:
    prompts = ["The", "A clock", ""]
    for knobs in ({"temperature": 0.0}, {"seed": 3}, {"seed": 3, "top_k": 5, "repetition_penalty": 1.3}):
        together = fitted.generate_batch(prompts, max_new_tokens=6, **knobs)  # type: ignore[arg-type]
        assert together == [fitted.generate(p, max_new_tokens=6, **knobs) for p in prompts]  # type: ignore[arg-type]
    pieces: list[str] = []
    text = fitted.generate("The", max_new_tokens=6, seed=3, on_text=pieces.append)
    assert "".join(pieces) == text


def test_generate_batch_refuses_string_and_untrained_model(fitted: psannLM) -> None:
    with pytest.raises(TypeError, match="list of prompts"):
        fitted.generate_batch("The")
    with pytest.raises(GenerationError, match="tokenizer"):
        small(vocab_size=300).generate("The")


def test_save_load_roundtrip(fitted: psannLM, tmp_path: Path) -> None:
    wanted = fitted.generate("The", max_new_tokens=8, temperature=0.0)
    for target in (tmp_path / "model.safetensors", tmp_path / "any name"):
        assert psannLM.load(fitted.save(target)).generate("The", max_new_tokens=8, temperature=0.0) == wanted
    assert fitted.save(tmp_path) == tmp_path / "model.safetensors"
    assert psannLM.load(tmp_path).generate("The", max_new_tokens=8, temperature=0.0) == wanted
    with pytest.raises(ArtifactError):
        psannLM.load(tmp_path / "absent")


def test_loaded_model_can_train_further(fitted: psannLM, data: psannLMDataPrep, tmp_path: Path) -> None:
    again = psannLM.load(fitted.save(tmp_path / "m"))
    start = again.model.embedding.weight.clone()
    again.fit(data, max_steps=1, **FIT)
    assert not torch.equal(again.model.embedding.weight, start)


def test_trained_model_keeps_its_tokenizer(fitted: psannLM, tiny_texts: list[str], tmp_path: Path) -> None:
    assert fitted.tokenizer is not None
    options: dict[str, Any] = {"max_length": 16, "vocab_size": 261}
    other = psannLMDataPrep(tiny_texts, tokenizer="tokenizers", **options)
    for model in (fitted, psannLM.load(fitted.save(tmp_path / "m"))):
        with pytest.raises(
            TokenizerError, match=f"{fitted.tokenizer.fingerprint[:12]}.*{other.tokenizer.fingerprint[:12]}"
        ):
            model.fit(other, max_steps=1, **FIT)
    file = fitted.tokenizer.save(tmp_path / "tokenizer.json")
    same = psannLMDataPrep(tiny_texts[:4], tokenizer_model_path=file, **options)
    assert psannLM.load(tmp_path / "m").fit(same, max_steps=1, **FIT).tokenizer is same.tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("max_seq_len", [None, 64])
def test_fit_with_longer_windows_extends_open_context(
    data: psannLMDataPrep, tiny_texts: list[str], max_seq_len: int | None
) -> None:
    model = small(max_seq_len=max_seq_len).fit(data, max_steps=1, **FIT)
    assert model.model.config.max_seq_len == (max_seq_len or 16)
    longer = psannLMDataPrep(tiny_texts, tokenizer="simple", max_length=32, val_split=0.2, vocab_size=300)
    model.fit(longer, max_steps=1, **FIT)
    assert model.model.config.max_seq_len == (max_seq_len or 32)
    model.fit(data, max_steps=1, **FIT)
    assert model.model.config.max_seq_len == (max_seq_len or 32)


def test_copied_or_pickled_model_generates_the_same(fitted: psannLM) -> None:
    text = fitted.generate("the", max_new_tokens=5, temperature=0)
    for twin in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        assert twin.generate("the", max_new_tokens=5, temperature=0) == text
        assert twin.model is not fitted.model


def test_load_takes_a_run_folder_without_latest(data: psannLMDataPrep, tmp_path: Path) -> None:
    """As after a copy of the checkpoints alone; one that is damaged is passed over."""
    run = tmp_path / "run"
    small(vocab_size=data.vocab_size).fit(
        data, max_steps=2, checkpoint_dir=str(run), save_interval_steps=1, log_interval_steps=0, **FIT
    )
    newest = psannLM.load(run / "step_00000002")
    assert torch.equal(psannLM.load(run).model.output_weight, newest.model.output_weight)
    for name in ("latest", "best"):
        (run / name).unlink(missing_ok=True)
    assert torch.equal(psannLM.load(str(run)).model.output_weight, newest.model.output_weight)
    (run / "step_00000002" / "model.safetensors").write_bytes(b"cut short")
    older = psannLM.load(run / "step_00000001")
    assert torch.equal(psannLM.load(run).model.output_weight, older.model.output_weight)


def test_arguments_are_readable_attributes(data: psannLMDataPrep, tmp_path: Path) -> None:
    assert (data.max_length, data.pack_sequences, data.val_split, data.seed) == (16, True, 0.2, 1337)
    assert data.tokenizer_model_path is None
    model = small(vocab_size=300, positional_encoding="alibi", sine_params={"amp_init": 1.5}, d_mlp=24)
    for one in (model, psannLM.load(model.save(tmp_path / "m"))):
        assert (one.base, one.d_model, one.n_layers, one.n_heads, one.d_mlp) == ("waveresnet", 16, 1, 2, 24)
        assert (one.vocab_size, one.positional_encoding) == (300, "alibi")
        assert one.sine_params["amp_init"] == 1.5


@pytest.mark.slow
def test_fit_accepts_documented_and_former_keyword(data: psannLMDataPrep) -> None:
    for keyword in ("train_data", "data"):
        assert small().fit(**{keyword: data}, max_steps=1, **FIT).result is not None
    with pytest.raises(TypeError, match="two names"):
        small().fit(data, data=data, **FIT)


def test_generate_follows_global_generator_seed(fitted: psannLM) -> None:
    texts = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        texts.append(fitted.generate_batch(["The", "A"], max_new_tokens=12))
    assert texts[0] == texts[1] != texts[2]
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    fitted.generate("The", max_new_tokens=4, seed=1)
    assert torch.equal(torch.rand(3), wanted)


def test_generate_warns_when_context_is_full(fitted: psannLM) -> None:
    assert fitted.model.config.max_seq_len == 16
    with pytest.warns(UserWarning, match=r"text ends after \d+ of 128 new tokens.*context of 16 tokens") as caught:
        fitted.generate("The", seed=0)
    assert caught[0].filename == __file__
    prompts = ["The", "A clock", "B"]
    with pytest.warns(UserWarning, match=r"text 1 \(and 2 more\) ends after \d+ of 99") as caught:
        fitted.generate_batch(prompts, max_new_tokens=99, seed=0)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted.generate("The", max_new_tokens=4, seed=0)
        fitted.generate("The", max_new_tokens=40, seed=0, context="slide")


@pytest.mark.slow
def test_two_short_texts_suffice_to_train_and_generate() -> None:
    for packs in (True, False):
        texts = ["hello world", "goodnight moon"]
        tiny = psannLMDataPrep(texts, tokenizer="simple", max_length=64, pack_sequences=packs)
        model = small(vocab_size=tiny.vocab_size).fit(tiny, epochs=1, batch_tokens=65_536, amp="bf16", verbose=False)
        assert isinstance(model.generate("Once upon a time", top_p=0.9, max_new_tokens=8), str)
        assert len(model.generate_batch(["hello", "goodnight"], max_new_tokens=8)) == 2


def test_oversize_model_raises_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"model: [\d,]+ parameters need .* GB for the model alone \(weights\)"):
        psannLM(d_model=1 << 20, n_heads=8)
    with pytest.raises(ConfigError, match="for the model alone"):
        psannLM(n_layers=10_000_000)
    model = psannLM(d_model=16, n_layers=1, n_heads=2)
    data = psannLMDataPrep(["some words to learn from, and more of them"] * 20, max_length=8, tokenizer="simple")
    # Room for the weights, and none for what training adds.
    monkeypatch.setattr("psannlm.io.limits._physical_bytes", lambda: 100_000)
    with pytest.raises(ConfigError, match="weights, gradients and optimizer state"):
        model.fit(data, verbose=False, device="cpu", amp="fp32")
    assert model.result is None


def test_stopped_fit_names_no_removed_folder(data: psannLMDataPrep, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(trainer: object) -> None:
        raise Interrupted("saved in /tmp/scratch")

    monkeypatch.setattr("psannlm.api.Trainer.train", stopped)
    model = psannLM(d_model=16, n_heads=2, n_layers=1)
    with pytest.raises(Interrupted, match="nothing was kept; with checkpoint_dir"):
        model.fit(data, verbose=False)
    with pytest.raises(Interrupted, match="saved in /tmp/scratch"):
        model.fit(data, verbose=False, checkpoint_dir="run")

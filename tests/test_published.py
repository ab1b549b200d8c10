"""The published document on the Python surface, kept word for word in tests/published: what it prints runs."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from psann.lm import LMDataset, Trainer, psannLM, psannLMDataPrep
from psann.lm.config import DataConfig, ModelConfig, TrainConfig
from psannlm.errors import ArtifactError, ConfigError, CorpusError, GenerationError, StorageError, TokenizerError

TEXT = (Path(__file__).parent / "published" / "python_surface.md").read_text(encoding="utf-8")
QUICKSTART = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2}
FIT: dict[str, Any] = {"max_steps": 1, "batch_tokens": 64, "amp": "fp32", "verbose": False}


def section(name: str) -> str:
    """The text of a section, up to the heading of the next."""
    return re.split(r"\n\S.*\n-{4,}\n", TEXT[TEXT.index(f"{name}\n---") :])[0]


def prepared(texts: Any, **settings: Any) -> psannLMDataPrep:
    return psannLMDataPrep(texts, **{"tokenizer": "simple", "max_length": 16, **settings})


@pytest.fixture(scope="module")
def data(tiny_texts: list[str]) -> psannLMDataPrep:
    return prepared(tiny_texts, val_split=0.2)


@pytest.mark.slow
def test_published_quickstart_runs_byte_for_byte(tmp_path: Path) -> None:
    (block,) = QUICKSTART
    assert block.startswith("from psann.lm import psannLM, psannLMDataPrep\n")
    assert "d_model=512,\n    n_layers=8," in block
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert re.search(r"^\[.*\]$", done.stdout, flags=re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["list", "tuple", "generator", "dict keys", "file paths", "path objects"])
def test_data_prep_takes_every_published_input(kind: str, tiny_texts: list[str], tmp_path: Path) -> None:
    texts = tiny_texts[:3]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    given: Iterable[Any] = {
        "list": list(texts),
        "tuple": tuple(texts),
        "generator": (text for text in texts),
        "dict keys": dict.fromkeys(texts).keys(),
        "file paths": [str(tmp_path / f"{number}.txt") for number in range(3)],
        "path objects": [tmp_path / f"{number}.txt" for number in range(3)],
    }[kind]
    data = prepared(given)
    store = data.prepared.train
    assert [data.tokenizer.decode(store.document(i)) for i in range(3)] == texts  # type: ignore[attr-defined]


def test_published_knobs_and_properties_answer(data: psannLMDataPrep) -> None:
    names = re.findall(r"`(\w+)`", section("Public API Reference").split("Key knobs:")[1].split("\n")[0])
    assert names == ["max_length", "pack_sequences", "val_split", "seed"]
    assert [getattr(data, name) for name in names] == [16, True, 0.2, 1337]
    assert isinstance(data.vocab_size, int)
    assert isinstance(data.dataset, LMDataset)
    assert isinstance(data.val_dataset, LMDataset)
    assert data.tokenizer.vocab_size == data.vocab_size
    assert data.tokenizer_backend == "simple"
    assert len(data) == len(data.dataset)


def test_data_seed_decides_the_split(tiny_texts: list[str]) -> None:
    def held_out(seed: int) -> tuple[str, ...]:
        val = prepared(tiny_texts, val_split=0.2, seed=seed).prepared.val
        assert val is not None
        return tuple(val.name(i) for i in range(val.n_documents))

    assert held_out(1) == held_out(1)
    assert len({held_out(seed) for seed in range(4)}) > 1


def test_backends_resolve_in_the_published_order(monkeypatch: pytest.MonkeyPatch, tiny_texts: list[str]) -> None:
    kinds = {"sentencepiece": "SentencePieceTokenizer", "tokenizers": "HuggingFaceTokenizer", "simple": "CharTokenizer"}
    missing: list[str] = []
    for backend, kind in kinds.items():
        for package in missing:
            monkeypatch.setitem(sys.modules, package, None)
        data = psannLMDataPrep(tiny_texts, tokenizer="auto", max_length=16, vocab_size=300)
        assert (data.tokenizer_backend, type(data.tokenizer).__name__) == (backend, kind)
        missing.append(backend)
    # Named, a backend is never replaced by another.
    with pytest.raises(TokenizerError, match="sentencepiece"):
        psannLMDataPrep(tiny_texts, tokenizer="sentencepiece", max_length=16)


def test_a_tokenizer_file_is_used_where_it_is_named(data: psannLMDataPrep, tmp_path: Path) -> None:
    path = data.tokenizer.save(tmp_path / "tokenizer.json")
    again = psannLMDataPrep(["another text"], "auto", path, 8)
    assert again.tokenizer.fingerprint == data.tokenizer.fingerprint
    assert (again.max_length, again.tokenizer_model_path) == (8, str(path))


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("texts", [["hello world"], ["hello world", "goodnight moon"], ["ab"], ["a", "b"]])
@pytest.mark.parametrize("val_split", [0.01, 0.5, 0.99])
def test_a_short_corpus_can_hold_out_text(texts: list[str], pack: bool, val_split: float) -> None:
    data = prepared(texts, max_length=64, val_split=val_split, pack_sequences=pack)
    assert data.val_dataset is not None
    assert len(data) == len(data.val_dataset) == 1
    assert data.dataset.n_labels > 0
    # Nothing stands on both sides, and nothing is lost: the ids of the texts and an end for each part.
    n_parts = 2 if len(texts) == 1 else len(texts)
    n_ids = sum(len(data.tokenizer.encode(text)) for text in texts)
    assert data.dataset.n_labels + data.val_dataset.n_labels == n_ids + n_parts


def test_a_short_corpus_trains_and_validates() -> None:
    data = prepared(["hello world"], max_length=64, val_split=0.5)
    model = psannLM(**SMALL).fit(data, **FIT)
    assert model.result is not None
    assert model.result.best is not None
    assert model.result.best["bytes"] == len("world")


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["x"], "too few to hold out 0.5 of them; add text, or set data.val_split to 0"),
        (["😀"], "too few to hold out"),
        ([], "the corpus holds no text"),
        ([" \n"], "the corpus holds no text"),
    ],
)
def test_unsplittable_corpus_is_refused_with_reason(texts: list[str], said: str) -> None:
    with pytest.raises(CorpusError, match=re.escape(said)):
        prepared(texts, val_split=0.5)


def test_constructor_mirrors_the_published_config() -> None:
    line = section("Public API Reference").split("Constructor mirrors the model config:")[1].split("\n")[0]
    names = re.findall(r"`(\w+)`", line)
    assert names == list(inspect.signature(psannLM).parameters)[: len(names)]
    values = ("respsann", 16, 1, 2, 24, 300, "alibi", {"amp_init": 1.5})
    model = psannLM(*values)
    assert [getattr(model, name) for name in names[:-1]] == list(values[:-1])
    assert model.sine_params["amp_init"] == 1.5


@pytest.mark.slow
@pytest.mark.parametrize("base", ["waveresnet", "respsann"])
@pytest.mark.parametrize("position", ["rope", "alibi", "sinusoidal"])
def test_every_base_and_position_goes_through_a_file(
    base: str, position: str, data: psannLMDataPrep, tmp_path: Path
) -> None:
    sine = {"amp_init": 1.3, "freq_init": 0.9, "damp_init": 0.02, "trainable": False}
    model = psannLM(base, vocab_size=data.vocab_size, positional_encoding=position, sine_params=sine, **SMALL)
    assert model.fit(data, val_data=None, epochs=1, lr=1e-3, ddp="off", **FIT) is model
    again = psannLM.load(model.save(tmp_path / "new" / "model"))
    assert (again.base, again.positional_encoding) == (base, position)
    assert {key: again.sine_params[key] for key in sine} == sine
    knobs: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0}
    together = again.generate_batch(["The", "A clock", ""], **knobs)
    assert together == [model.generate(prompt, **knobs) for prompt in ("The", "A clock", "")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist or is not a file"),
        (b"", "cut short"),
        (b"x" * 1000, "cut short or is not a safetensors file"),
        (b"PK\x03\x04" + b"x" * 100, "written by torch.save.*safetensors"),
        (b"\x80\x02\x8a\nl" + b"x" * 100, "written by torch.save.*safetensors"),
        (b"\x02\0\0\0\0\0\0\0{}", "not a psannlm file"),
    ],
)
def test_load_names_what_is_wrong_with_a_file(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=said) as caught:
        psannLM.load(path)
    assert str(path) in str(caught.value)


def test_save_and_load_take_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = psannLM(vocab_size=300, **SMALL)
    assert model.save("~/new/story") == tmp_path / "new" / "story"
    untrained = psannLM.load("~/new/story")
    with pytest.raises(GenerationError, match="no tokenizer yet"):
        untrained.generate("The")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="a file is in the place of a folder"):
        model.save(tmp_path / "file" / "model")


def test_rope_is_the_default_and_alibi_takes_odd_heads() -> None:
    assert {ModelConfig(base=base).positional_encoding for base in ("waveresnet", "respsann")} == {"rope"}
    odd: dict[str, Any] = {"d_model": 20, "n_heads": 4, "n_layers": 1, "vocab_size": 300}
    with pytest.raises(ConfigError, match="odd head size 5"):
        psannLM(**odd)
    for position in ("alibi", "sinusoidal"):
        assert psannLM(**odd, positional_encoding=position).model.config.d_model == 20


def test_alibi_goes_past_its_training_length(data: psannLMDataPrep) -> None:
    model = psannLM(positional_encoding="alibi", **SMALL).fit(data, **FIT)
    assert isinstance(model.generate("A clock " * 5, max_new_tokens=20, seed=0), str)


@pytest.mark.parametrize("amp", ["bf16", "fp16", "fp32", None])
@pytest.mark.parametrize("ddp", ["auto", "off", False])
def test_fit_takes_every_published_precision(amp: Any, ddp: Any, data: psannLMDataPrep) -> None:
    model = psannLM(**SMALL).fit(train_data=data, ddp=ddp, **{**FIT, "amp": amp})
    assert model.result is not None
    assert model.result.steps == 1


def test_fit_wires_up_the_trainer(data: psannLMDataPrep, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Trainer] = []

    class Watched(Trainer):
        def train(self) -> Any:
            made.append(self)
            return super().train()

    monkeypatch.setattr("psannlm.api.Trainer", Watched)
    model = psannLM(**SMALL).fit(data, **FIT)
    assert [trainer.model for trainer in made] == [model.model]
    assert made[0].result is model.result


@pytest.mark.parametrize("config", [ModelConfig, DataConfig, TrainConfig])
def test_published_keys_and_choices_are_taken(config: Any) -> None:
    part = section("Configuration").split(f"psann.lm.config.{config.__name__}")[1].split("\n**")[0]
    n_keys = 0
    for line in part.splitlines():
        keys, _, choices = line.removeprefix("- ").partition(":") if ":" in line else (line, "", "")
        for key in re.findall(r"`(\w+)`", keys):
            assert key in config.model_fields, key
            n_keys += 1
            for choice in re.findall(r"`(\w+)`", choices) if "|" in choices else []:
                assert getattr(config(**{key: choice}), key) == choice
    assert n_keys >= 6


def test_a_model_larger_than_memory_is_refused(data: psannLMDataPrep, monkeypatch: pytest.MonkeyPatch) -> None:
    for layers, width in ((64, 1 << 20), (10**6, 4096)):
        with pytest.raises(ConfigError, match="this machine has"):
            psannLM(d_model=width, n_heads=64, n_layers=layers)
    # Weights that fit, where gradients and the optimizer's state do not.
    n_parameters = sum(
        weight.numel() for weight in psannLM(d_model=64, n_heads=2, n_layers=2, vocab_size=300).model.parameters()
    )
    model = psannLM(d_model=64, n_heads=2, n_layers=2)
    monkeypatch.setattr("psannlm.api.build_model", lambda *args, **settings: pytest.fail("built"))
    monkeypatch.setattr("psannlm.models.accounting.machine_memory_bytes", lambda: 8 * n_parameters + 200_000)
    with pytest.raises(ConfigError, match="gradients and optimizer state"):
        model.fit(data, **FIT)
    assert model.vocab_size is None

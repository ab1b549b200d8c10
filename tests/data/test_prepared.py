"""Prepared folders: equal to loaded documents, and errors for damage or other settings."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.config.data import BuiltinSource, DataConfig, PathSource
from psannlm.data.corpus.documents import Document
from psannlm.data.prepare import load_corpus, load_documents
from psannlm.data.prepared import find_prepared, open_folder
from psannlm.data.windows import Windows
from psannlm.errors import ArtifactError, ConfigError
from psannlm.tokenizers.char import CharTokenizer

TEXTS = [f"line {i}: {'waves ' * (i % 7)}" for i in range(23)]
HELD_OUT = ["the first that was held out", "the second"]
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer() -> CharTokenizer:
    return CharTokenizer("éü")


@pytest.fixture(scope="module")
def original(prepare_folder: Build, tokenizer: CharTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("prepared"), tokenizer, TEXTS, HELD_OUT)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "prepared"))


def config(*sources: Path | str | dict[str, Any], **settings: Any) -> DataConfig:
    return DataConfig.model_validate({"sources": [s if isinstance(s, dict) else str(s) for s in sources], **settings})


@pytest.mark.parametrize("pack", [True, False])
def test_prepared_folder_equals_loaded_documents(
    folder: Path, tokenizer: CharTokenizer, pack: bool, logged: pytest.LogCaptureFixture
) -> None:
    data = load_corpus(config(folder, max_length=16))
    told = list(logged.messages)
    twin = load_documents([Document(t, "t") for t in TEXTS], config("x", max_length=16), tokenizer)
    assert data.tokenizer.fingerprint == tokenizer.fingerprint
    assert data.val is not None
    assert (data.val.n_documents, data.val.n_bytes) == (2, sum(map(len, HELD_OUT)))
    assert (data.train.n_tokens, data.train.n_bytes) == (twin.train.n_tokens, twin.train.n_bytes)
    one, other = (Windows(d.train, 16, pad_id=tokenizer.pad_id, pack=pack) for d in (data, twin))
    for a, b in zip(one.batch(range(len(one))), other.batch(range(len(other))), strict=True):
        assert torch.equal(a, b)
    assert told[0] == f"prepared folder: {folder}"
    assert any(line.startswith("left out: blank document x 2") for line in told)
    assert any(line.startswith("left out: duplicate x 1") for line in told)
    assert told[-1].endswith("25.0% of its text occurs verbatim in the training text")


def test_the_folder_and_its_manifest_name_the_same_data(folder: Path) -> None:
    shas = {load_corpus(config(path, max_length=16)).report.sha256 for path in (folder, folder / "manifest.json")}
    assert shas == {open_folder(folder / "manifest.json").manifest.content_sha256}


def test_text_file_is_not_a_prepared_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "manifest.json").write_text('{"name": "another tool"}', encoding="utf-8")
    assert find_prepared([PathSource(path=str(tmp_path)), PathSource(path=str(tmp_path / "*.txt"))]) is None
    assert find_prepared([BuiltinSource(builtin="python-reference")]) is None


@pytest.mark.parametrize(
    ("others", "settings", "said"),
    [
        (["examples/lm/sample_texts.txt"], {}, r"data.sources: .* beside other sources; .*psannlm prep"),
        ([{"builtin": "python-reference"}], {}, r"data.sources: .* beside other sources"),
        (["TWIN"], {}, r"data.sources: .* two prepared folders, .*psannlm prep --merge"),
        ([], {"tokenizer": "tokenizers"}, r"data.tokenizer: tokenizers is configured.*prepared with simple"),
        ([], {"tokenizer_model_path": "OTHER"}, r"data.tokenizer_model_path: .*OTHERPRINT.*OWNPRINT"),
        ([], {"val_split": 0.1}, r"data.val_split: 0.1 is configured, but .* 2 documents held out already"),
    ],
)
def test_prepared_folder_rejects_other_settings(
    folder: Path, tmp_path: Path, tokenizer: CharTokenizer, others: list[Any], settings: dict[str, Any], said: str
) -> None:
    twin = shutil.copytree(folder, tmp_path / "twin")
    other = CharTokenizer("äö")
    if "tokenizer_model_path" in settings:
        settings = {"tokenizer_model_path": str(other.save(tmp_path / "other.json"))}
        said = said.replace("OTHERPRINT", other.fingerprint).replace("OWNPRINT", tokenizer.fingerprint)
    sources = [twin if source == "TWIN" else source for source in others]
    with pytest.raises(ConfigError, match=said):
        load_corpus(config(folder, *sources, max_length=16, **settings))


def test_prepared_folder_without_validation_rejects_val_split(
    prepare_folder: Build, tokenizer: CharTokenizer, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    folder = prepare_folder(tmp_path, tokenizer, TEXTS)
    assert load_corpus(config(folder, max_length=16)).val is None
    with pytest.raises(ConfigError, match=r"nothing held out; set it to 0, or .* psannlm prep --val-split 0.1"):
        load_corpus(config(folder, max_length=16, val_split=0.1))
    load_corpus(config(folder, max_length=5000))
    assert [line for line in logged.messages if "padded to data.max_length 5,000" in line]


def test_prepared_folder_rejects_text_settings(folder: Path) -> None:
    for settings in ({"per_line": True}, {"text_key": "body"}):
        (key,) = settings
        with pytest.raises(ConfigError, match=rf"data.sources\[0\].{key}: .* decided by psannlm prep"):
            load_corpus(config({"path": str(folder), **settings}))


def test_prepared_folder_accepts_its_own_tokenizer(folder: Path, tokenizer: CharTokenizer, tmp_path: Path) -> None:
    same = tokenizer.save(tmp_path / "same.json")
    load_corpus(config(folder, max_length=16, tokenizer="simple", tokenizer_model_path=str(same)))


def test_prepared_folder_with_changed_tokenizer_raises(folder: Path, tokenizer: CharTokenizer) -> None:
    other = CharTokenizer("äö")
    other.save(folder / "tokenizer.json")
    with pytest.raises(ArtifactError, match=rf"tokenizer.json .*{other.fingerprint}.*{tokenizer.fingerprint}"):
        load_corpus(config(folder))
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"tokenizer.json"):
        load_corpus(config(folder))


@pytest.mark.parametrize("what", ["missing", "swapped", "cut", "foreign"])
def test_prepared_folder_damaged_shard_is_named(
    folder: Path, prepare_folder: Build, tmp_path: Path, tokenizer: CharTokenizer, what: str
) -> None:
    shard = folder / "train_00002.safetensors"
    if what == "missing":
        shard.unlink()
    elif what == "swapped":
        shutil.copy(folder / "train_00001.safetensors", shard)
    elif what == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        other = prepare_folder(tmp_path / "other", CharTokenizer("äö"), TEXTS)
        shutil.copy(other / shard.name, shard)
    expected = {"missing": "is missing", "swapped": "another shard", "cut": "cut short", "foreign": "another tokenizer"}
    with pytest.raises(ArtifactError, match=rf"train_00002.safetensors .*{expected[what]}"):
        load_corpus(config(folder, max_length=16))


@pytest.mark.slow
def test_a_thousand_flipped_bits_of_a_folder_are_noticed(folder: Path) -> None:
    """On opening it or on reading all of it. White space in JSON decides nothing, and is left out."""
    chance = random.Random(5)
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    files += [folder / "manifest.json"] * 2
    contents = {path: path.read_bytes() for path in files}
    n_flipped = n_noticed = 0
    while n_flipped < 1000:
        path = chance.choice(files)
        at, bit = chance.randrange(len(contents[path])), 1 << chance.randrange(8)
        content = bytearray(contents[path])
        content[at] ^= bit
        if path.suffix == ".json" and _same_json(content, contents[path]):
            continue
        n_flipped += 1
        path.write_bytes(content)
        try:
            opened = open_folder(folder / "manifest.json")
            for store in (opened.train, opened.validation):
                assert store is not None
                for shard in store.segments:
                    shard.verify()
        except ArtifactError as error:
            n_noticed += str(folder) in str(error)
        path.write_bytes(contents[path])
    assert n_noticed == n_flipped


def _same_json(content: bytes | bytearray, former: bytes) -> bool:
    try:
        return bool(json.loads(content) == json.loads(former))
    except ValueError:
        return False

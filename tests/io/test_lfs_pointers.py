"""Every reader detects pointers of Git LFS and git-annex and names the command that fetches."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from psannlm.config.data import PathSource
from psannlm.config.run import load_config
from psannlm.data.corpus.documents import read_documents
from psannlm.data.corpus.files import KNOWN_SUFFIXES
from psannlm.data.corpus.reading import read_text
from psannlm.data.prepared import open_folder
from psannlm.errors import PsannlmError
from psannlm.gpu_suite.baseline import read_baseline
from psannlm.io.lfs_pointers import pointer_at, pointer_in
from psannlm.io.readers import Unreadable, read_json
from psannlm.models.artifact import load_model
from psannlm.prep.pipeline import PrepSettings, prepare_corpus
from psannlm.tokenizers.char import CharTokenizer
from psannlm.tokenizers.resolve import load_tokenizer
from psannlm.training.checkpoint import latest_valid_checkpoint, read_state

OID = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{OID}\nsize 12345\n".encode()
ANNEX = f"/annex/objects/SHA256E-s12345--{OID}.txt\n".encode()
POINTERS = {
    "lfs": (LFS, "git lfs pull"),
    "lfs with extension": (LFS.replace(b"\noid", b"\next-0-foo sha256:" + OID.encode() + b"\noid"), "git lfs pull"),
    "lfs, line ends of Windows": (LFS.replace(b"\n", b"\r\n"), "git lfs pull"),
    "lfs, first draft": (LFS.replace(b"git-lfs.github.com", b"hawser.github.com"), "git lfs pull"),
    "annex": (ANNEX, "git annex get"),
    "annex link as a file": (b"../.git/annex/objects/zQ/5V/SHA256E-s5--ab/SHA256E-s5--ab.txt", "git annex get"),
}


@pytest.fixture(params=["lfs", "annex", "annex link"])
def put(request: pytest.FixtureRequest) -> tuple[Callable[[Path], None], str]:
    """What puts a pointer at a path, and what its message must say."""

    def place(path: Path) -> None:
        path.unlink(missing_ok=True)
        if request.param == "annex link":
            path.symlink_to(f"../.git/annex/objects/zQ/5V/KEY/{path.name}")
        else:
            path.write_bytes(LFS if request.param == "lfs" else ANNEX)

    return place, "run git lfs pull" if request.param == "lfs" else "run git annex get"


@pytest.mark.parametrize("kind", POINTERS)
def test_pointer_is_known_by_its_content(kind: str) -> None:
    content, remedy = POINTERS[kind]
    assert remedy in (pointer_in(content) or "")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"A pointer begins with: " + LFS,
        LFS + b"\nThese three lines are what a pointer looks like.\n",
        LFS.replace(b"size 12345", b"size unknown"),
        LFS + b"\n" * 2000,
        b"see /annex/objects/ for more",
        b"x" * 100_000,
    ],
)
def test_text_about_pointers_is_text(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert pointer_in(content) is None
    assert pointer_at(path) is None
    assert pointer_at(tmp_path) is None
    assert pointer_at(tmp_path / "missing") is None


@pytest.mark.parametrize("suffix", [*KNOWN_SUFFIXES, ".md"])
def test_corpus_names_every_pointer_before_reading(
    suffix: str, put: tuple[Callable[[Path], None], str], tmp_path: Path
) -> None:
    place, remedy = put
    (tmp_path / "a.txt").write_text("a text that is here\n", encoding="utf-8")
    pointers = [tmp_path / f"{name}{suffix}" for name in ("b", "c")]
    for pointer in pointers:
        place(pointer)
    named = [tmp_path] if suffix in KNOWN_SUFFIXES else pointers
    with pytest.raises(PsannlmError) as caught:
        read_documents([PathSource(path=str(path)) for path in named])
    assert all(f"{pointer}: a git" in str(caught.value).lower() for pointer in map(str, pointers))
    assert str(caught.value).count(remedy) == 2
    CharTokenizer.fit(["a text"], 300).save(tmp_path / "t.json")
    with pytest.raises(PsannlmError, match=remedy):
        prepare_corpus([str(path) for path in named], tmp_path / "t.json", tmp_path / "out", PrepSettings())
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("piece*"))


def test_remote_pointer_is_named_when_it_is_read() -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for name, content in (("/pointed/a.txt", LFS), ("/whole/a.txt", b"a text that is here\n")):
        memory.pipe_file(name, content)
    with pytest.raises(PsannlmError, match="git lfs pull"):
        list(read_documents([PathSource(path="memory://pointed/a.txt")]))
    [document] = read_documents([PathSource(path="memory://whole/a.txt")])
    assert document.text == "a text that is here\n"


def test_tokenizer_prompts_and_configuration_pointers_are_named(
    put: tuple[Callable[[Path], None], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, remedy = put
    monkeypatch.chdir(tmp_path)
    for name in ("t.model", "t.json", "prompts", "config.yaml", "summary.json"):
        place(Path(name))
    with pytest.raises(PsannlmError, match=remedy):
        load_tokenizer("t.model")
    with pytest.raises(PsannlmError, match=remedy):
        load_tokenizer("t.json")
    with pytest.raises(PsannlmError, match=remedy):
        read_text("prompts")
    with pytest.raises(PsannlmError, match=remedy):
        load_config("config.yaml")
    with pytest.raises(PsannlmError, match=remedy):
        read_baseline(Path("summary.json"), {}, is_dry_run=False, any_machine=False)
    with pytest.raises(Unreadable, match="symbolic link" if Path("t.json").is_symlink() else remedy):
        read_json(Path("t.json"))
    Path("a.txt").write_text("a text that is here\n", encoding="utf-8")
    place(Path("b.txt"))
    Path("config.yaml").unlink()
    Path("config.yaml").write_text("data: {sources: [a.txt, b.txt], tokenizer_model_path: t.model}", encoding="utf-8")
    if Path("b.txt").is_symlink():
        with pytest.raises(PsannlmError) as caught:
            load_config("config.yaml")
        assert str(caught.value).count(remedy) == 2


def test_prepared_folder_of_pointers_is_named(put: tuple[Callable[[Path], None], str], tmp_path: Path) -> None:
    place, remedy = put
    (tmp_path / "a.txt").write_text("one line\nand another\n" * 3, encoding="utf-8")
    CharTokenizer.fit(["one line and another"], 300).save(tmp_path / "t.json")
    settings = PrepSettings(per_line=True, keep_duplicates=True, val_split=0.0)
    whole = prepare_corpus([str(tmp_path / "a.txt")], tmp_path / "t.json", tmp_path / "whole", settings, n_workers=1)
    for name in ("manifest.json", "t.json", "train_00000.safetensors"):
        folder = tmp_path / f"without {name}"
        shutil.copytree(whole.folder, folder)
        name = "tokenizer.json" if name == "t.json" else name
        assert (folder / name).is_file()
        place(folder / name)
        with pytest.raises(PsannlmError, match=remedy):
            open_folder(folder / "manifest.json")


def test_model_and_checkpoint_pointers_are_named(
    put: tuple[Callable[[Path], None], str], tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    place, remedy = put
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    for name in ("model.safetensors", "trainer.json"):
        place(folder / name)
        # Not passed over as damaged: the run would resume from an older step, or start from scratch.
        with pytest.raises(PsannlmError, match=remedy):
            latest_valid_checkpoint(tmp_path)
    assert logged.messages == []
    for read in (load_model, read_state):
        with pytest.raises(PsannlmError, match=remedy):
            read(folder)

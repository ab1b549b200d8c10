"""Hostile files: ten thousand mutations and known pickle attacks raise errors, and no code runs."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from psannlm.errors import ArtifactError, PsannlmError, TokenizerError
from psannlm.models.artifact import load_model, save_model
from psannlm.models.tensorfile import read_tensors, write_tensors
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.char import CharTokenizer
from psannlm.tokenizers.resolve import load_tokenizer

Build = Callable[..., Transformer]
N_DAMAGED = 10_000
_MARK = b'"sha256":"'
_TOKENS = (b"0", b"9", b"-", b'"', b"{", b"}", b"[", b"]", b",", b":", b"e9", b"1e999", b"NaN", b"\\", b"\xff", b"F64")


@contextmanager
def bounded(megabytes: int, seconds: int) -> Iterator[None]:
    """Limit the memory above what is in use, and the time until :func:`signal.alarm` is set again."""

    def hang(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"a file took more than {seconds} s")

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    former = signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 1_000_000, hard))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Damage of one kind or several: bits, bytes, runs, cuts, copies, and what a header is written with."""
    found = bytearray(content)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if not found:
            break
        # Half of the mutations in the header.
        at = rng.randrange(min(header, len(found)) if rng.random() < 0.5 else len(found))
        size = rng.randint(1, 40)
        kind = rng.randrange(8)
        if kind == 0:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at : at + size] = rng.choice((b"\0", b"\xff")) * len(found[at : at + size])
        elif kind == 2:
            found[at : at + size] = rng.randbytes(len(found[at : at + size]))
        elif kind == 3:
            del found[at:]
        elif kind == 4:
            del found[at : at + size]
        elif kind == 5:
            found[at:at] = found[at : at + size]
        elif kind == 6:
            found[at : at + rng.randint(0, 6)] = rng.choice(_TOKENS) * rng.randint(1, 3)
        else:
            found[:8] = struct.pack("<Q", rng.choice((0, 1, header, len(found), 2**31, 2**63, rng.randrange(2**64))))
    return bytes(found)


def with_fitting_hash(content: bytes) -> bytes:
    """The file as an attacker would finish it, so that the code behind the hash check is reached."""
    at = content.find(_MARK) + len(_MARK)
    if at < len(_MARK) or at + 64 > len(content):
        return content
    digest = hashlib.sha256(content[:at] + b"0" * 64 + content[at + 64 :]).hexdigest().encode("ascii")
    return content[:at] + digest + content[at + 64 :]


@pytest.mark.slow
def test_hostile_files_ten_thousand_mutations_raise_or_load(build_tiny: Build, tmp_path: Path) -> None:
    """No crash, no hang, no allocation beyond a fixed bound, one line each; every damage the hash sees is refused."""
    path = tmp_path / "m"
    tokenizer = CharTokenizer("é")
    save_model(path, build_tiny(d_model=4, n_layers=1, d_mlp=4, vocab_size=tokenizer.vocab_size), tokenizer)
    content = path.read_bytes()
    load_model(path)
    rng = random.Random(3)
    messages: set[str] = set()
    n_loaded = 0
    with bounded(megabytes=256, seconds=20):
        for number in range(N_DAMAGED):
            bad = damaged(content, rng)
            is_forged = number % 2 == 1
            path.write_bytes(with_fitting_hash(bad) if is_forged else bad)
            signal.alarm(20)
            try:
                load_model(path)
            except ArtifactError as error:
                message = str(error)
                assert "\n" not in message, message
                assert str(path) in message
                assert len(message) < 1500
                messages.add(message.removeprefix(str(path))[:24])
            else:
                n_loaded += 1
                assert is_forged or bad == content
    # Many a check was reached, the ones behind the hash too; and weights of another value make a file as good as any.
    assert len(messages) > 20
    assert N_DAMAGED / 30 < n_loaded < N_DAMAGED / 2


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def raw_pickles(canary: Path) -> dict[str, bytes]:
    """Pickles that call os.mkdir, through every opcode that calls."""
    name = str(canary).encode("utf-8")
    found = {f"protocol {number}": pickle.dumps(Canary(canary), protocol=number) for number in range(6)}
    found["GLOBAL, REDUCE"] = b"cos\nmkdir\n(V" + name + b"\ntR."
    found["INST"] = b"(V" + name + b"\nios\nmkdir\n."
    found["OBJ"] = b"(cos\nmkdir\nV" + name + b"\no."
    found["STACK_GLOBAL"] = b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93X" + struct.pack("<I", len(name)) + name + b"\x85R."
    found["within a dictionary"] = pickle.dumps({"weight": [1.0, 2.0], "hook": Canary(canary)})
    return found


def hostile_files(canary: Path, honest: bytes) -> dict[str, bytes]:
    """The same in every wrapping that some loader of models unpacks."""
    found = raw_pickles(canary)
    inner = found["protocol 4"]
    for name, is_zip in (("torch.save", True), ("torch.save of old", False)):
        page = io.BytesIO()
        torch.save({"model": Canary(canary)}, page, _use_new_zipfile_serialization=is_zip)
        found[name] = page.getvalue()
    for name, compression in (("zip", zipfile.ZIP_STORED), ("deflated zip", zipfile.ZIP_DEFLATED)):
        page = io.BytesIO()
        with zipfile.ZipFile(page, "w", compression) as archive:
            archive.writestr("archive/data.pkl", inner)
            archive.writestr("archive/version", "3\n")
        found[name] = page.getvalue()
    page = io.BytesIO()
    with tarfile.open(fileobj=page, mode="w") as tar:
        member = tarfile.TarInfo("pickle")
        member.size = len(inner)
        tar.addfile(member, io.BytesIO(inner))
    found["tar"] = page.getvalue()
    found["gzip"] = gzip.compress(inner)
    for name, write in (("npy", np.save), ("npz", np.savez)):
        page = io.BytesIO()
        write(page, np.array([Canary(canary)], dtype=object), allow_pickle=True)  # type: ignore[operator]
        found[name] = page.getvalue()
    found["after an honest file"] = honest + inner
    found["in an honest file's place"] = struct.pack("<Q", len(inner)) + inner
    return found


def test_hostile_files_pickles_are_never_executed(build_tiny: Build, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    honest = tmp_path / "honest"
    save_model(honest, build_tiny(), None)
    for name, content in raw_pickles(canary).items():
        pickle.loads(content)
        assert canary.is_dir(), f"{name} is harmless, and proves nothing"
        canary.rmdir()
    files = hostile_files(canary, honest.read_bytes())
    assert len(files) >= 20
    for name, content in files.items():
        for suffix in (".pt", ".bin", ".ckpt", ".safetensors"):
            path = tmp_path / f"model{suffix}"
            path.write_bytes(content)
            with pytest.raises(ArtifactError) as caught:
                load_model(tmp_path if suffix == ".safetensors" else path)
            assert "\n" not in str(caught.value), name
            with pytest.raises(PsannlmError):
                read_tensors(path)
            for kind in (".model", ".json"):
                shutil.copy(path, tmp_path / f"tokenizer{kind}")
                with pytest.raises(TokenizerError):
                    load_tokenizer(tmp_path / f"tokenizer{kind}")
        assert not canary.exists(), name


def test_hostile_files_pickled_tokenizer_is_not_executed(build_tiny: Build, tmp_path: Path) -> None:
    """With a hash that fits: the last place in a model file where bytes are interpreted."""
    canary, path = tmp_path / "canary", tmp_path / "m"
    save_model(path, build_tiny(), None)
    content = read_tensors(path)
    for inner in raw_pickles(canary).values():
        entries = {"tokenizer": base64.b64encode(inner).decode("ascii"), "tokenizer_fingerprint": "0" * 64}
        write_tensors(path, content.tensors, {**content.metadata, **entries})
        with pytest.raises(ArtifactError):
            load_model(path)
        assert not canary.exists()


@pytest.mark.parametrize("max_seq_len", [None, 2**62])
def test_hostile_files_unbounded_convolution_raises(build_tiny: Build, tmp_path: Path, max_seq_len: int | None) -> None:
    path = tmp_path / "m"
    save_model(path, build_tiny(base="waveresnet", n_layers=2), None)
    content = read_tensors(path)
    config = json.loads(content.metadata["config"])
    config["max_seq_len"] = max_seq_len
    config["short_conv"]["dilation_growth"] = 10**9
    write_tensors(path, content.tensors, {**content.metadata, "config": json.dumps(config)})
    with pytest.raises(ArtifactError, match="dilation"):
        load_model(path)


def test_hostile_files_sparse_file_raises_before_hashing(build_tiny: Build, tmp_path: Path) -> None:
    """100 GB of nothing behind a header: hashing it would take minutes."""
    path = tmp_path / "m"
    save_model(path, build_tiny(), None)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    fields = json.loads(content[8 : 8 + length])
    size = 10**11
    fields = {
        "__metadata__": fields["__metadata__"],
        "embedding.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]},
    }
    header = json.dumps(fields, separators=(",", ":")).encode("utf-8")
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + size)
    with bounded(megabytes=256, seconds=10):
        signal.alarm(10)
        with pytest.raises(ArtifactError, match="configuration"):
            load_model(path)


def test_hostile_files_header_with_many_values_raises(tmp_path: Path) -> None:
    path = tmp_path / "m"
    header = b'{"__metadata__":{},"a":[' + b"{}," * 19_000_000 + b"0]}"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with bounded(megabytes=256, seconds=10):
        signal.alarm(10)
        with pytest.raises(ArtifactError, match="values"):
            load_model(path)


def test_hostile_files_oversized_tokenizers_raise(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.touch()
    os.truncate(path, 10**11)
    with pytest.raises(TokenizerError, match="at most"):
        load_tokenizer(path)
    with pytest.raises(TokenizerError, match="regular file"):
        load_tokenizer("/dev/zero")
    vocab = {"a": 0, "<s>": 1, "</s>": 4_000_000_000}
    added = [
        {
            "id": i,
            "content": c,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for c, i in vocab.items()
        if c != "a"
    ]
    data = {"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(TokenizerError, match="4,000,000,000"):
        load_tokenizer(path)


def test_hostile_files_header_resembling_pickle_loads(tmp_path: Path) -> None:
    from psannlm.io.safetensors_header import read_header

    path = tmp_path / "a.safetensors"
    content = struct.pack("<Q", 640) + b"{}".ljust(640)
    assert content[:2] == b"\x80\x02"
    path.write_bytes(content)
    with open(path, "rb") as file:
        assert read_header(path, file, len(content)) == content

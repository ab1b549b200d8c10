"""Model files: round trip, format versions, and refusal of every damaged or hostile file."""

from __future__ import annotations

import ast
import json
import os
import pickle
import random
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from psannlm.errors import ArtifactError
from psannlm.models.artifact import FORMAT, FORMAT_VERSION, MODEL_FILE, load_model, save_model
from psannlm.models.tensorfile import read_tensors, write_tensors
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import fit_tokenizer

Build = Callable[..., Transformer]
BASES = ("respsann", "waveresnet", "transformer")
REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = "Naïve façade: 12 ▁ 🙂\n\ttabs, and </s> spelt out."


@pytest.fixture(scope="module", params=["simple", "tokenizers", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tiny_texts: list[str]) -> Tokenizer:
    if request.param != "simple":
        pytest.importorskip(request.param)
    return fit_tokenizer(tiny_texts, request.param, 300)


@torch.no_grad()
def logits(model: Transformer) -> Tensor:
    ids = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(3))
    return model.logits(model.eval().hidden_states(ids))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("positions", ["rope", "alibi", "sinusoidal"])
def test_artifact_roundtrip_gives_identical_logits(
    build_tiny: Build, tmp_path: Path, base: str, tied: bool, positions: str
) -> None:
    model = build_tiny(
        base=base, tie_embeddings=tied, positional_encoding=positions, sine_params={"learnable": ["decay"]}
    )
    save_model(tmp_path / "m.safetensors", model, None, {"step": 3, "loss": 0.1 + 0.2, "é": None})
    loaded = load_model(tmp_path / "m.safetensors")
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.model.config == model.config
    assert loaded.tokenizer is None
    assert loaded.notes == {"step": 3, "loss": 0.1 + 0.2, "é": None}
    assert not loaded.model.training
    learnable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.model.named_parameters() if p.requires_grad} == learnable


def test_artifact_roundtrip_keeps_tokenizer(build_tiny: Build, tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_model(tmp_path / MODEL_FILE, build_tiny(vocab_size=tokenizer.vocab_size), tokenizer)
    loaded = load_model(tmp_path).tokenizer  # of a folder
    assert loaded is not None
    assert (loaded.fingerprint, loaded.backend) == (tokenizer.fingerprint, tokenizer.backend)
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert loaded.decode(loaded.encode(TEXT)) == TEXT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_artifact_roundtrip_keeps_dtype(build_tiny: Build, tmp_path: Path, dtype: torch.dtype) -> None:
    model = build_tiny().to(dtype)
    save_model(tmp_path / "m", model, None)
    loaded = load_model(tmp_path / "m").model.state_dict()
    assert all(loaded[name].dtype == dtype and torch.equal(loaded[name], t) for name, t in model.state_dict().items())


def test_artifact_loaded_model_is_trainable(build_tiny: Build, tmp_path: Path) -> None:
    save_model(tmp_path / "m", build_tiny(), None)
    before = (tmp_path / "m").read_bytes()
    model = load_model(tmp_path / "m").model.train()
    ids = torch.randint(0, 17, (2, 9))
    model(ids[:, :-1], ids[:, 1:]).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    assert (tmp_path / "m").read_bytes() == before


def hostile(
    path: Path,
    model: Transformer,
    config: dict[str, Any] | None = None,
    metadata: dict[str, str | None] | None = None,
) -> Path:
    """A model file with a hash that fits, whose configuration or metadata was tampered with."""
    plain = {**json.loads(model.config.model_dump_json()), **(config or {})}
    entries: dict[str, str | None] = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(plain),
        "notes": "{}",
        **(metadata or {}),
    }
    write_tensors(path, model.state_dict(), {key: value for key, value in entries.items() if value is not None})
    return path


def refused(path: Path) -> str:
    """Load, expecting a one-line error quickly, without allocating what the file claims."""
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(ArtifactError) as caught:
            load_model(path)
        seconds, peak = time.monotonic() - began, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds < 5
    assert peak < 50e6
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 1000
    return message


def test_artifact_untampered_forgery_loads(build_tiny: Build, tmp_path: Path) -> None:
    load_model(hostile(tmp_path / "m", build_tiny()))


HUGE = 10**9


@pytest.mark.parametrize(
    "config",
    [
        {"d_model": HUGE},
        {"d_model": 2**62},
        {"n_layers": HUGE},
        {"n_layers": 2**62},
        {"vocab_size": HUGE},
        {"d_mlp": HUGE},
        {"d_mlp": 2**62},
        {"vocab_size": 2**62, "d_model": 2**40},
        {"n_heads": HUGE, "d_model": HUGE},
        {"short_conv": {"enabled": True, "kernel_size": HUGE}},
        {"short_conv": {"enabled": True, "kernel_size": 2**62}},
        {"n_layers": 20, "short_conv": {"enabled": True, "dilation_growth": 2**62}},
        {"d_model": -1},
        {"d_model": "twelve"},
        {"d_model": 10**400},
        {"d_model": 12.5},
        {"base": "gpt"},
        {"surplus": 1},
        {"mlp": None},
        {"d_mlp": None},
        {"n_kv_heads": None},
        {"vocab_size": None},
        {"residual_scale": None},
        {"n_heads": 5},
        {"sine_params": {"amp_init": float("nan")}},
        {"n_layers": 1},
        {"tie_embeddings": True},
    ],
    ids=lambda config: json.dumps(config)[:60],
)
def test_artifact_config_not_matching_tensors_raises(build_tiny: Build, tmp_path: Path, config: dict[str, Any]) -> None:
    refused(hostile(tmp_path / "m", build_tiny(base="respsann"), config))


@pytest.mark.parametrize(
    "metadata",
    [
        {"config": None},
        {"config": ""},
        {"config": "[" * 100_000},
        {"config": '{"sine_params":' * 100_000},
        {"config": "[]"},
        {"config": "null"},
        {"notes": None},
        {"notes": "[" * 100_000},
        {"notes": "[]"},
        {"notes": "{"},
        {"tokenizer": "not base64!"},
        {"tokenizer": ""},
        {"tokenizer": "e30="},
        {"tokenizer": "gAN9cQAu", "tokenizer_fingerprint": "0"},
        {"tokenizer": "W1tbW1tb"},
        {"tokenizer": "ey" * 50_000},
        {"format": None},
        {"format": "gpt2"},
        {"format_version": None},
        {"format_version": "one"},
    ],
    ids=lambda metadata: str(metadata)[:60],
)
def test_artifact_invalid_metadata_raises(build_tiny: Build, tmp_path: Path, metadata: dict[str, str | None]) -> None:
    refused(hostile(tmp_path / "m", build_tiny(), metadata=metadata))


def test_artifact_unknown_format_version_is_refused(build_tiny: Build, tmp_path: Path) -> None:
    message = refused(hostile(tmp_path / "m", build_tiny(), metadata={"format_version": "3"}))
    assert "format version 3, this psannlm reads 1 and 2" in message
    assert "install" in message


def write_version_1(path: Path, model: Transformer, *, keep_present_names: bool = False) -> None:
    """A model file as November 2026 wrote it: another version, another key of the configuration, other names."""
    save_model(path, model, None)
    content = read_tensors(path)
    config = json.loads(content.metadata["config"])
    config["wave"] = config.pop("short_conv")
    tensors = {name.replace("_conv.", "_wave."): tensor for name, tensor in content.tensors.items()}
    if keep_present_names:
        tensors |= content.tensors
    write_tensors(path, tensors, {**content.metadata, "format_version": "1", "config": json.dumps(config)})


@pytest.mark.parametrize("is_large", [False, True])
def test_artifact_version_1_loads_under_present_names(
    build_tiny: Build, tmp_path: Path, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny(base="waveresnet", short_conv={"activation": "sine"})
    write_version_1(tmp_path / "m", model)
    if is_large:
        monkeypatch.setattr("psannlm.models.artifact.HASHED_FIRST_BYTES", 0)
    loaded = load_model(tmp_path / "m").model
    assert loaded.config == model.config
    assert "blocks.0.attention_conv.activation.raw_decay" in loaded.state_dict()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_artifact_version_1_with_doubled_names_is_refused(build_tiny: Build, tmp_path: Path) -> None:
    write_version_1(tmp_path / "m", build_tiny(base="waveresnet"), keep_present_names=True)
    assert "under its former and under its present name" in refused(tmp_path / "m")


def test_artifact_tokenizer_fingerprint_mismatch_raises(build_tiny: Build, tmp_path: Path) -> None:
    import base64

    content = base64.b64encode(fit_tokenizer(["é"], "simple", 300).to_bytes()).decode("ascii")
    model = build_tiny(vocab_size=300)
    metadata: dict[str, str | None] = {"tokenizer": content, "tokenizer_fingerprint": "f" * 64}
    message = refused(hostile(tmp_path / "m", model, metadata=metadata))
    assert "fingerprint" in message


def test_artifact_tokenizer_larger_than_vocabulary_raises(build_tiny: Build, tmp_path: Path) -> None:
    save_model(tmp_path / "m", build_tiny(), fit_tokenizer(["é"], "simple", 300))
    assert "its tokenizer has 261 ids, its model 17" in refused(tmp_path / "m")


@pytest.mark.parametrize("change", ["missing", "surplus", "shape", "dtype"])
def test_artifact_foreign_tensors_are_named(build_tiny: Build, tmp_path: Path, change: str) -> None:
    model = build_tiny()
    save_model(tmp_path / "m", model, None)
    content = read_tensors(tmp_path / "m")
    tensors = dict(content.tensors)
    name = "final_norm.weight"
    if change == "missing":
        del tensors[name]
    elif change == "surplus":
        name = "zz.weight"
        tensors[name] = torch.zeros(2)
    elif change == "shape":
        tensors[name] = torch.zeros(5)
    else:
        tensors[name] = torch.zeros(12, dtype=torch.int64)
    write_tensors(tmp_path / "m", tensors, content.metadata)
    assert name in refused(tmp_path / "m")


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["pickle", "torch", "zip", "renamed"])
def test_artifact_hostile_pickle_is_not_executed(tmp_path: Path, kind: str) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / ("model.safetensors" if kind == "renamed" else "model.pt")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Canary(canary)))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Canary(canary)))
    else:
        torch.save({"model": Canary(canary)}, path)
    refused(path)
    refused(tmp_path if kind == "renamed" else path)
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "device"])
def test_artifact_foreign_file_raises(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/zero") if kind == "device" else tmp_path / "m"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    refused(path)


def test_artifact_random_bytes_raise(tmp_path: Path) -> None:
    rng = random.Random(1)
    for _ in range(50):
        path = tmp_path / "m"
        path.write_bytes(rng.randbytes(rng.randrange(200)))
        refused(path)


FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "save"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("os", "system"),
    ("os", "popen"),
    ("numpy", "load"),
    ("np", "load"),
}


def unsafe(source: str) -> list[str]:
    """What in a Python source could run code that a file brings along."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            names += [f"{names[0]}.{alias.name}" for alias in node.names]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS]
            found += [name for name in names if tuple(name.split(".")) in FORBIDDEN_ATTRIBUTES]
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in FORBIDDEN_CALLS:
                found.append(function.id)
            for keyword in node.keywords:
                is_false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and not is_false:
                    found.append(str(keyword.arg))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in FORBIDDEN_ATTRIBUTES:
                found.append(f"{node.value.id}.{node.attr}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import os, marshal",
        "torch.load('x', weights_only=True)",
        "from torch import load",
        "eval('1')",
        "exec(compile('1', '', 'exec'))",
        "yaml.load(x, Loader)",
        "f(x, shell=True)",
        "f(x, shell=flag)",
        "f(trust_remote_code=True)",
        "np.load(x)",
    ],
)
def test_unsafe_call_scanner_detects_unsafe_calls(source: str) -> None:
    assert unsafe(source)
    assert not unsafe("import json\nmodel.eval()\nre.compile('x')\nyaml.safe_load(x)\ntorch.compile(m)\nf(shell=False)")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["psannlm", "psann", "commands", "scripts", "examples"])
def test_sources_never_execute_file_content(folder: str) -> None:
    sources = sorted((REPOSITORY / folder).rglob("*.py"))
    assert sources or folder == "scripts"
    found = {path.relative_to(REPOSITORY).as_posix(): unsafe(path.read_text(encoding="utf-8")) for path in sources}
    # An export is verified with the code that it ships, which is a copy of our own, in a process of its own.
    assert found.pop("psannlm/export/verify_child.py", ["trust_remote_code"] * 2) == ["trust_remote_code"] * 2
    # Compiled steps are code, which torch keeps as a pickle: only files of the user's own cache are read
    # (test_step_file_that_others_can_write_is_not_read).
    allowed = ["pickle", "pickle.UnpicklingError"]
    assert found.pop("psannlm/kernels/torch_private.py", allowed) == allowed
    assert {path: what for path, what in found.items() if what} == {}

"""Tiny trained-looking models of every base as model files, and their export."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from psannlm.tokenizers.base import Tokenizer
from psannlm.tokenizers.resolve import fit_tokenizer

if TYPE_CHECKING:
    from psannlm.export.export import ExportResult

# Feed-forward and option combinations: the name, the model's settings, and the class that must compute it.
PLAIN = {
    "llama": ({"base": "transformer"}, "LlamaForCausalLM"),
    "llama-tied-grouped": ({"base": "transformer", "tie_embeddings": True, "n_kv_heads": 1}, "LlamaForCausalLM"),
    "llama-scaled": ({"base": "transformer", "residual_scale": True}, "LlamaForCausalLM"),
    "llama-theta": ({"base": "transformer", "rope_theta": 500.0, "norm_eps": 1e-4}, "LlamaForCausalLM"),
    "geglu": ({"base": "transformer", "mlp": "geglu"}, "LlamaForCausalLM"),
    "qwen3": ({"base": "transformer", "qk_norm": True, "n_kv_heads": 1}, "Qwen3ForCausalLM"),
    "qwen3-geglu": ({"base": "transformer", "qk_norm": True, "mlp": "geglu"}, "Qwen3ForCausalLM"),
    "arcee": ({"base": "transformer", "mlp": "relu2", "residual_scale": True}, "ArceeForCausalLM"),
    "arcee-gelu": ({"base": "transformer", "mlp": "gelu", "tie_embeddings": True}, "ArceeForCausalLM"),
    "respsann-swiglu": ({"base": "respsann", "mlp": "swiglu"}, "LlamaForCausalLM"),
}
_SINE = {"decay_mode": "relu", "amp_bounds": [0.5, 1.2], "learnable": ["frequency"], "freq_std": 0.2}
CUSTOM = {
    "respsann": {"base": "respsann"},
    "respsann-alibi": {"base": "respsann", "positional_encoding": "alibi", "n_kv_heads": 1},
    "respsann-sinusoidal": {"base": "respsann", "positional_encoding": "sinusoidal", "qk_norm": True},
    "respsann-sine": {"base": "respsann", "sine_params": _SINE, "rope_theta": 300.0, "norm_eps": 1e-4},
    "waveresnet": {"base": "waveresnet"},
    "waveresnet-tied-grouped": {"base": "waveresnet", "tie_embeddings": True, "n_kv_heads": 1, "residual_scale": True},
    "waveresnet-alibi": {"base": "waveresnet", "positional_encoding": "alibi"},
    "waveresnet-sinusoidal": {"base": "waveresnet", "positional_encoding": "sinusoidal"},
    "waveresnet-dilated": {
        "base": "waveresnet",
        "short_conv": {"dilation_growth": 3, "kernel_size": 3, "activation": "sine"},
    },
    "waveresnet-one-place": {"base": "waveresnet", "short_conv": {"places": ["mlp"]}, "mlp": "gelu"},
    "waveresnet-one-tap": {"base": "waveresnet", "short_conv": {"kernel_size": 1}},
    "transformer-alibi": {"base": "transformer", "positional_encoding": "alibi", "n_heads": 3, "d_model": 18},
    "transformer-sinusoidal": {"base": "transformer", "positional_encoding": "sinusoidal"},
    "transformer-short-conv": {"base": "transformer", "short_conv": {"enabled": True}},
    "relu2-qk-norm": {"base": "transformer", "mlp": "relu2", "qk_norm": True},
    "gelu-qk-norm": {"base": "transformer", "mlp": "gelu", "qk_norm": True},
    "clampedsine": {"base": "respsann", "mlp": "clampedsine", "sine_params": {"freq_init": 2.0}},
    "clampedsineglu": {"base": "waveresnet", "mlp": "clampedsineglu"},
    "gelusine": {"base": "transformer", "mlp": "gelusine", "sine_params": {"freq_bounds": [0.9, 1.1]}},
    "sinerelu2": {"base": "transformer", "mlp": "sinerelu2"},
    "phase": {"base": "respsann", "sine_phase": 0.8},
    "phase-clampedsine": {"base": "transformer", "mlp": "clampedsineglu", "sine_phase": 0.8},
    "phase-gelusine": {"base": "transformer", "mlp": "gelusine", "sine_phase": 0.8},
    "phase-sinerelu2": {"base": "transformer", "mlp": "sinerelu2", "sine_phase": 0.8},
    "quadrature": {"base": "respsann", "sine_quadrature": True, "d_mlp": 15},
    "quadrature-gains": {"base": "waveresnet", "sine_quadrature": True, "activation_gains": True},
    "activation-norm": {"base": "transformer", "activation_norm": True, "norm_eps": 1e-3},
    "activation-norm-sine": {"base": "respsann", "activation_norm": True, "sine_phase": 0.8},
    "embedding-norm": {"base": "transformer", "embedding_norm": True, "positional_encoding": "sinusoidal"},
    "fan": {"base": "transformer", "qkv_features": "fan", "d_model": 18, "n_heads": 3},
    "fan-linear": {"base": "waveresnet", "qkv_features": "fan_linear", "n_kv_heads": 1},
    "fan-control": {"base": "transformer", "qkv_features": "gelu", "qk_norm": True},
    "gains": {"base": "transformer", "activation_gains": True},
    "gains-sineglu": {"base": "waveresnet", "activation_gains": True},
    "silu": {"base": "transformer", "mlp": "silu"},
    "tanhglu": {"base": "transformer", "mlp": "tanhglu"},
    "sigmoidglu": {"base": "waveresnet", "mlp": "sigmoidglu"},
}
SETTINGS: dict[str, dict[str, Any]] = {name: settings for name, (settings, _) in PLAIN.items()} | CUSTOM


@pytest.fixture(scope="session")
def fitted(tiny_texts: list[str]) -> Callable[[str], Tokenizer]:
    """Return a fit of each kind of tokenizer on the tiny corpus."""
    kinds: dict[str, dict[str, Any]] = {
        "char": {"backend": "simple"},
        "unigram": {"backend": "sentencepiece"},
        "bpe": {"backend": "sentencepiece", "model_type": "bpe"},
        "byte-level": {"backend": "tokenizers"},
    }
    made: dict[str, Tokenizer] = {}

    def fit(kind: str) -> Tokenizer:
        if kind not in made:
            made[kind] = fit_tokenizer(tiny_texts, vocab_size=320, **kinds[kind])
        return made[kind]

    return fit


@pytest.fixture
def save_tiny(
    build_tiny: Callable[..., Any], fitted: Callable[[str], Tokenizer], tmp_path: Path
) -> Callable[..., Path]:
    """Return a writer of model files: ``save("waveresnet", tokenizer="unigram")``, with settings of ``SETTINGS``."""

    def save(name: str, tokenizer: str | None = "byte-level", file: str = "tiny.safetensors", **more: Any) -> Path:
        from psannlm.models.artifact import save_model

        fit = None if tokenizer is None else fitted(tokenizer)
        sizes = {"vocab_size": (320 if fit is None else fit.vocab_size) + 3, "max_seq_len": 96}
        model = build_tiny(**{**sizes, **SETTINGS[name], **more})
        save_model(tmp_path / file, model, fit, {"step": 5, "tokens": 320, "val_loss": 2.5})
        return tmp_path / file

    return save


@pytest.fixture
def export_tiny(save_tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., ExportResult]:
    """Return an export of a tiny model to ``tmp_path / "out"``; keywords are those of ``ExportSettings``."""

    def export(name: str, tokenizer: str = "byte-level", **settings: Any) -> ExportResult:
        from psannlm.export.export import ExportSettings, export_hf

        return export_hf(save_tiny(name, tokenizer), tmp_path / "out", ExportSettings(**settings))

    return export


# What a client of forking_process.py does: it ends as the program that it sends does.
CLIENT = """
import json, os, socket, sys
path, program, *arguments = sys.argv[1:]
request = json.dumps({"program": program, "arguments": arguments, "environment": dict(os.environ)}).encode()
connection = socket.socket(socket.AF_UNIX)
connection.connect(path)
socket.send_fds(connection, [request[:1]], [2])
connection.sendall(request[1:])
connection.shutdown(socket.SHUT_WR)
sys.exit(int(connection.recv(16)))
"""


@pytest.fixture(scope="session")
def loaded_process() -> Iterator[str]:
    """The socket of a process that has loaded torch and transformers, which takes a fresh one eight seconds."""
    pytest.importorskip("transformers")
    with tempfile.TemporaryDirectory() as folder:  # a socket has a short path
        path = f"{folder}/socket"
        settings = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": f"{folder}/cache"}
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forking_process.py")), path],
            cwd=folder,
            env={**os.environ, **settings, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"},
        )
        while not os.path.exists(path):
            assert process.poll() is None
            time.sleep(0.05)
        yield path
        process.kill()
        process.wait()


@pytest.fixture
def less_text(monkeypatch: pytest.MonkeyPatch, loaded_process: str) -> None:
    """Compare on a twentieth of the text, in a process that is kept, where the law is another one."""
    from psannlm.export import comparison, gguf_verify, held_out, verify

    def forked(program: str, *arguments: str) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", CLIENT, loaded_process, program, *arguments]

    monkeypatch.setattr(comparison, "python_program", forked)
    monkeypatch.setattr(held_out, "TEXT_BYTES", held_out.TEXT_BYTES // 20)
    few = held_out.random_texts(held_out.N_RANDOM // 20)
    for module in (verify, gguf_verify):
        monkeypatch.setattr(module, "random_texts", lambda: few)

"""What tests of several rooms share: a tiny corpus and a tokenizer that needs no fitting."""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings

from psannlm.tokenizers.base import BOS, EOS, PAD, SPECIALS, UNK, Tokenizer, refuse_surrogates

if TYPE_CHECKING:
    from psannlm.models.transformer import Transformer

# How long an example takes depends on what else the machine does: no test fails for it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# One thread: sums repeat bit for bit, and suites that run beside each other do not fight for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Compile in the process itself: processes for it load torch once more, which takes longer than what tests compile.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
_MKL_CBWR = os.environ.get("MKL_CBWR")

# Under nohup a hangup is ignored, by this process and by all that it starts; tests send it and expect the default.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The user's cache is neither read nor written.
_cache = tempfile.TemporaryDirectory(prefix="psannlm-tests-")
os.environ["PSANNLM_CACHE_DIR"] = _cache.name

REPOSITORY = Path(__file__).resolve().parents[1]


# Ends with its standard input, and so with this process.
_S3_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte after the four specials: small enough to check a result by hand."""

    backend = "bytes"
    vocab_size = 256 + len(SPECIALS)
    pad_id, bos_id, eos_id, unk_id = (SPECIALS.index(name) for name in (PAD, BOS, EOS, UNK))

    def encode(self, text: str) -> list[int]:
        refuse_surrogates(text)
        return [byte + len(SPECIALS) for byte in text.encode("utf-8")]

    def encode_batch(self, texts: Sequence[str], threads: int = 0) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - len(SPECIALS) for i in ids if i >= len(SPECIALS)).decode("utf-8", errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [SPECIALS[i] if i < len(SPECIALS) else f"<0x{i - len(SPECIALS):02X}>" for i in ids]

    def to_bytes(self) -> bytes:
        return b"bytes"


def pytest_runtest_teardown() -> None:
    """Take back what commands that run in this process set for its children, whose sums would differ from its own."""
    if _MKL_CBWR is None:
        os.environ.pop("MKL_CBWR", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="cuda: train on the GPU in tests of training, and refuse to run without one; cpu: see no GPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    wanted = config.getoption("--device")
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif wanted == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda was given, and torch sees no GPU")
        # Laws of bits hold there too, where the kernels repeat themselves.
        os.environ["PSANNLM_TEST_DEVICE"] = "cuda"
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        config.addinivalue_line("filterwarnings", "ignore:.*deterministic.*")


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_left_alone() -> None:
    """Keep garbage collection short, with which runs and measurements end: it skips what is older than the module."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The messages that psannlm logs, as ``logged.messages``."""
    caplog.set_level(logging.INFO, logger="psannlm")
    return caplog


@pytest.fixture(scope="session")
def largest_file() -> Callable[[int], AbstractContextManager[None]]:
    """Return a context in which the system refuses to write beyond so many bytes in a file, as on a full disk."""

    @contextmanager
    def context(n_bytes: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return context


@pytest.fixture(scope="session")
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def tiny_corpus() -> Path:
    """A dozen lines of English, one document per line."""
    return REPOSITORY / "examples" / "lm" / "sample_texts.txt"


@pytest.fixture(scope="session")
def tiny_texts(tiny_corpus: Path) -> list[str]:
    return tiny_corpus.read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="session")
def build_tiny() -> Callable[..., Transformer]:
    """Return a builder of two-layer models in which every parameter shows in the output: none is left at zero or one.

    Keywords are those of ``ModelConfig``, and ``seed``.
    """
    import torch

    from psannlm.config.model import ModelConfig
    from psannlm.models.registry import build_model, resolve

    defaults = {"d_model": 12, "n_layers": 2, "n_heads": 2, "d_mlp": 16, "vocab_size": 17, "max_seq_len": 32}

    def build(seed: int = 0, **settings: Any) -> Transformer:
        model = build_model(resolve(ModelConfig(**{**defaults, **settings})), seed=seed).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim == 2:
                    parameter.copy_(noise * parameter.shape[1] ** -0.5)
                else:
                    parameter.add_(noise * 0.3)
        return model

    return build


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A file system of S3 with the empty bucket ``corpora``, on a server of its own."""
    pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    command = [sys.executable, "-c", _S3_SERVER]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            port = next(int(line) for line in server.stdout if line.strip().isdigit())
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            patch.setenv("AWS_ACCESS_KEY_ID", "testing")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            system = s3fs.S3FileSystem()
            system.mkdir("s3://corpora")
            yield system
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            server.stdin.close()


@pytest.fixture
def norms_of_a_gpu() -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which norms keep for the backward pass what torch's kernel on a GPU keeps of them."""
    import torch

    class Norm(torch.autograd.Function):
        """A norm that saves what ``aten._fused_rms_norm`` does: input, weight, and the factor of each row."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
            factor = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
            ctx.save_for_backward(x, weight, factor)
            return x * factor if weight is None else x * factor * weight

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            x, weight, factor = ctx.saved_tensors
            by_normed = grads[0] * weight
            along = (by_normed * x).mean(-1, keepdim=True) * factor**3
            return by_normed * factor - x * along, (grads[0] * x * factor).flatten(0, -2).sum(0), None

    @contextmanager
    def context() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.RMSNorm, "forward", lambda norm, x: Norm.apply(x, norm.weight, norm.eps))
            yield

    return context


@pytest.fixture(scope="session")
def prepare_folder() -> Callable[..., Path]:
    """Return a writer of prepared folders: ``write(folder, tokenizer, train texts, held-out texts, shard sizes)``."""
    from psannlm.data.framing import DocumentBatch, frame, pack_origin, text_hash
    from psannlm.data.manifest import (
        Manifest,
        ManifestSettings,
        SourceEntry,
        SplitEntry,
        TokenizerEntry,
        write_manifest,
    )
    from psannlm.data.memory_store import token_dtype
    from psannlm.data.shard_file import ShardEntry, write_shard

    def split(folder: Path, kind: str, tokenizer: Tokenizer, texts: Sequence[str], size: int) -> SplitEntry:
        entries: list[ShardEntry] = []
        dtype = token_dtype(tokenizer.vocab_size)
        for first in range(0, len(texts), size):
            chosen = texts[first : first + size]
            ids, lengths = tokenizer.encode_flat(chosen)
            tokens, framed = frame(ids, lengths, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, dtype=dtype)
            content = [text.encode("utf-8") for text in chosen]
            batch = DocumentBatch(
                tokens,
                framed,
                np.array([len(c) for c in content], dtype=np.int64),
                np.frombuffer(b"".join(map(text_hash, content)), dtype=np.uint8).reshape(-1, 16),
                np.array([pack_origin(0, first + i + 1) for i in range(len(chosen))], dtype=np.int64),
            )
            entries.append(
                write_shard(
                    folder / f"{kind}_{len(entries):05d}.safetensors",
                    dtype=dtype,
                    fingerprint=tokenizer.fingerprint,
                    n_tokens=len(tokens),
                    n_documents=len(chosen),
                    batches=[batch],
                )
            )
        return SplitEntry.of(tuple(entries))

    def write(
        folder: Path, tokenizer: Tokenizer, texts: Sequence[str], held_out: Sequence[str] = (), size: int = 5
    ) -> Path:
        file = "tokenizer.json" if tokenizer.to_bytes()[:1] == b"{" else "tokenizer.model"
        tokenizer.save(folder / file)
        manifest = Manifest(
            tokenizer=TokenizerEntry(
                file,
                tokenizer.backend,
                tokenizer.vocab_size,
                tokenizer.fingerprint,
                tokenizer.bos_id,
                tokenizer.eos_id,
                tokenizer.pad_id,
            ),
            dtype=np.dtype(token_dtype(tokenizer.vocab_size)).name,
            settings=ManifestSettings(0.0, 1337, None, None, False, "text", True, "strict", size),
            part="1/1",
            sources=(SourceEntry("lines.txt", 1, "0" * 64, len(texts) + len(held_out)),),
            train=split(folder, "train", tokenizer, texts, size),
            validation=split(folder, "validation", tokenizer, held_out, size),
            drops={"blank document": 2},
            duplicates=1,
            val_overlap=0.25 if held_out else None,
            lost_fraction=0.0,
        )
        write_manifest(folder, manifest)
        return folder

    return write

"""Tables of docs/reference/scaling.md: predicted memory per device and tokens per second of models on devices.

Run as ``python scripts/scaling_table.py``; ``--write`` puts the tables into the document.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from psannlm.config.model import ModelConfig
from psannlm.models.accounting import TrainingMemory, count_parameters, training_memory
from psannlm.models.parallel_estimates import Device, sharded_memory, tokens_per_s
from psannlm.models.registry import resolve

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "reference" / "scaling.md"
# Memory, dense bfloat16 peak and links as its maker states them; 40 % of the peak is what good training code reaches.
GPU = Device("H100 SXM, 80 GB", 80e9, 989e12, 0.4, 360e9, 40e9)
SEQ_LEN, WINDOWS, VOCAB = 2048, 4, 32_000
SHAPES = {
    "100M": (640, 12),
    "350M": (1024, 24),
    "1.3B": (2048, 24),
    "7B": (4096, 32),
    "13B": (5120, 40),
    "70B": (8192, 86),
}
DEVICES = (1, 2, 8, 64, 256, 1024)


def config_of(shape: tuple[int, int]) -> ModelConfig:
    """Return the waveresnet of a width and depth, with 128-wide heads."""
    d_model, n_layers = shape
    config = ModelConfig(base="waveresnet", d_model=d_model, n_layers=n_layers, n_heads=max(1, d_model // 128))
    return resolve(config, vocab_size=VOCAB, max_seq_len=SEQ_LEN)


def rows() -> list[list[str]]:
    """Return one row per model and mode: memory per device, then tokens per second, for each number of devices."""
    found = []
    for shape in SHAPES.values():
        config = config_of(shape)
        total = sum(count_parameters(config).values())
        whole = training_memory(
            config, WINDOWS, SEQ_LEN, dtype=torch.bfloat16, grad_checkpoint=True, device_type="cuda"
        )
        for mode in ("off", "full", "hybrid"):
            cells = [cell(config, whole, n, mode) for n in DEVICES]
            found.append([f"{total / 1e9:.2f}B", f"`{mode}`", *cells])
    return found


def cell(config: ModelConfig, whole: TrainingMemory, n_devices: int, mode: str) -> str:
    """Return GB per device and total thousands of tokens per second; a dash where the mode does not apply."""
    n_shards = {"off": 1, "full": n_devices, "hybrid": GPU.per_node}[mode]
    if n_devices <= {"off": 0, "full": 1, "hybrid": GPU.per_node}[mode]:
        return "-"
    memory = whole
    if mode != "off":
        memory = sharded_memory(whole, config, n_shards, dtype=torch.bfloat16, grad_checkpoint=True)
    if memory.total > 0.9 * GPU.memory_bytes:
        return f"({memory.total / 1e9:,.0f} GB)"
    rate = tokens_per_s(
        config,
        GPU,
        n_devices,
        n_shards,
        seq_len=SEQ_LEN,
        tokens_per_device=WINDOWS * SEQ_LEN,
        grad_checkpoint=True,
    )
    return f"{memory.total / 1e9:,.1f} GB, {rate / 1e3:,.0f}k"


def table() -> str:
    """Return the Markdown table."""
    head = ["parameters", "mode", *(f"{n:,}" for n in DEVICES)]
    lines = [head, ["---"] * len(head), *rows()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Print the table, or write it between its markers in the document."""
    text = table()
    if "--write" in sys.argv[1:]:
        document = DOCUMENT.read_text(encoding="utf-8")
        marked = re.sub(r"(<!-- table -->\n).*?(<!-- end -->)", rf"\1\n{text}\n\n\2", document, flags=re.DOTALL)
        DOCUMENT.write_text(marked, encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()

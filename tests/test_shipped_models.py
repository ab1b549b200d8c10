"""Every shipped configuration builds the model it asks for, and the three of one budget are of one size."""

from __future__ import annotations

from pathlib import Path

import pytest

from psannlm.config.run import load_config
from psannlm.models.accounting import count_parameters, flops_per_token
from psannlm.models.registry import build_model, resolve

FOLDER = Path(__file__).resolve().parents[1] / "configs"
# A plan for psannlm compare is no configuration.
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.startswith(("compare_", "study_")))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_builds(path: Path) -> None:
    config = load_config(path, check_files=False)
    resolved = resolve(config.model, vocab_size=config.data.vocab_size, max_seq_len=config.data.max_length)
    model = build_model(resolved, device="meta")
    assert len(model.blocks) == config.model.n_layers
    assert sum(p.numel() for p in model.parameters()) == sum(count_parameters(resolved).values())


def test_the_cpu_configs_are_of_one_size_and_cost() -> None:
    sizes, costs = [], []
    for name in ("waveresnet_cpu", "respsann_cpu", "transformer_cpu"):
        config = load_config(CONFIGS[0].with_name(f"{name}.yaml"))
        resolved = resolve(config.model, vocab_size=config.data.vocab_size)
        sizes.append(sum(count_parameters(resolved).values()))
        costs.append(flops_per_token(resolved, config.data.max_length))
    assert max(sizes) <= 1.01 * min(sizes)
    assert max(costs) <= 1.01 * min(costs)

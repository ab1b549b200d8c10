from __future__ import annotations

from pathlib import Path

import pytest

from psannlm.config.run import differences, load_config, plan_batches

ROOT = Path(__file__).resolve().parents[2]
# A plan for psannlm compare is no configuration, and what the study shares needs a corpus that no clone has.
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith(("compare_", "study_")))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(path)
    assert config.train.checkpoint_dir == f"runs/{path.stem}"
    assert plan_batches(config).micro_batch_size >= 1


def test_documented_configs_exist() -> None:
    assert {path.stem for path in CONFIGS} >= {
        "waveresnet_cpu",
        "respsann_cpu",
        "transformer_cpu",
        "smoke",
        "waveresnet_small",
        "tiny_corpus_benchmark",
    }


@pytest.mark.parametrize("name", ["respsann_cpu", "transformer_cpu"])
def test_the_cpu_configs_share_one_budget(name: str) -> None:
    ours, other = (load_config(ROOT / "configs" / f"{stem}.yaml") for stem in ("waveresnet_cpu", name))
    keys = {line.split(":")[0] for line in differences(ours, other)}
    assert keys <= {"model.base", "model.mlp", "train.lr", "train.min_lr", "train.weight_decay", "train.checkpoint_dir"}


def test_the_gpu_config_has_the_documented_size() -> None:
    config = load_config(ROOT / "configs" / "waveresnet_small.yaml")
    assert (config.model.n_layers, config.model.d_model, config.train.batch_tokens) == (8, 512, 131_072)
    assert (config.train.amp, config.train.compile) == ("bf16", True)

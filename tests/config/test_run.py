from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from psannlm.config.data import BuiltinSource, DataConfig, PathSource
from psannlm.config.model import ModelConfig, SineConfig
from psannlm.config.run import (
    RunConfig,
    config_from_mapping,
    differences,
    load_config,
    plan_batches,
    section_from_kwargs,
    to_yaml,
    total_steps,
)
from psannlm.config.train import TrainConfig
from psannlm.errors import EXIT_USAGE, ConfigError, UnknownKeyError


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str, *overrides: str) -> dict[str, str]:
    """Return path -> message (the line in front) for a configuration that must be refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    found = [(p.path, f"{p.line}: {p.message}") for p in caught.value.problems]
    assert len(found) == len({path for path, _ in found}), found
    assert caught.value.exit_code == EXIT_USAGE
    assert all("\n" not in message for _, message in found)
    return dict(found)


def test_sections_are_optional_and_defaults_live_in_code(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "{}")) == RunConfig()
    config = load_config(
        write(tmp_path, "train:\n  lr: 2e-4\n  ddp: on\ndata:\nmodel:\n  sine_params:\n  short_conv: {}\n")
    )
    assert config.train == TrainConfig(lr=2e-4, ddp="on")
    assert config.model == ModelConfig()


@pytest.mark.parametrize(
    ("written", "read"), [("on", "on"), ("off", "off"), ("true", "on"), ("false", "off"), ("auto", "auto")]
)
def test_ddp_means_what_is_written(tmp_path: Path, written: str, read: str) -> None:
    assert load_config(write(tmp_path, f"train: {{ddp: {written}}}")).train.ddp == read


@pytest.mark.parametrize(
    ("written", "read"), [("on", True), ("off", False), ("true", True), ("false", False), ("auto", "auto")]
)
def test_compile_means_what_is_written(tmp_path: Path, written: str, read: bool | str) -> None:
    assert load_config(write(tmp_path, f"train: {{compile: {written}}}")).train.compile == read


def test_config_warmup_longer_than_max_steps_names_remedy(tmp_path: Path) -> None:
    text = "train: {warmup_steps: 20}"
    found = problems(tmp_path, text, "train.max_steps=5")
    assert "--set train.warmup_steps=0" in found["train.warmup_steps"]
    config = load_config(write(tmp_path, text), ["train.max_steps=5", "train.warmup_steps=0"])
    assert config.train.max_steps == 5


def test_config_eval_without_validation_split_names_remedy(tmp_path: Path) -> None:
    text = "train: {eval_interval_steps: 20}"
    off = "data.val_split=0"
    assert "--set train.eval_interval_steps=null" in problems(tmp_path, text, off)["train.eval_interval_steps"]
    assert load_config(write(tmp_path, text), [off, "train.eval_interval_steps=null"]).data.val_split == 0


def test_every_problem_is_reported_at_once_with_its_line(tmp_path: Path) -> None:
    text = """\
model:
  base: wavresnet
  d_modle: 64
  d_model: 100
  n_heads: 7
  lr: 1
  sine_params:
    freq_int: 3
    trainable: false
    learnable: [decay]
data:
  max_length: "256"
  val_split: 1
train:
  lr: 2e-4x
  max_steps: 3.5
  min_lr: 1
  warmup_steps: 9
  epochs: true
  device: gpu
  device: cpu
trian:
  lr: 4
"""
    found = problems(tmp_path, text)
    assert found == {
        "model.base": "2: 'wavresnet' is not one of respsann, waveresnet, transformer (did you mean 'waveresnet'?)",
        "model.d_modle": "3: unknown key (did you mean 'd_model'?)",
        "model.n_heads": "5: 7 heads do not divide d_model 100; try n_heads 2 or 5 or 10",
        "model.lr": "6: unknown key here; lr belongs to train",
        "model.sine_params.freq_int": "8: unknown key (did you mean 'freq_init'?)",
        "model.sine_params.learnable": (
            "10: ['decay'] cannot learn while trainable is false; set trainable: true or drop learnable"
        ),
        "data.max_length": "12: '256' is not a whole number; remove the quotes",
        "data.val_split": "13: 1 is too large: it must be less than 1",
        "train.lr": "15: '2e-4x' is not a number",
        "train.max_steps": "16: 3.5 is not a whole number",
        "train.epochs": "19: true is not a whole number",
        "train.device": "20: given twice, in lines 20 and 21; keep one",
        "trian": "22: unknown section (did you mean 'train'?); the sections are model, data, train",
    }


def test_config_rule_skips_invalid_fields(tmp_path: Path) -> None:
    assert set(problems(tmp_path, "train: {lr: oops, min_lr: 1, warmup_steps: 9, max_steps: 5}")) == {
        "train.lr",
        "train.warmup_steps",
    }
    assert set(problems(tmp_path, "model: {d_model: '512', n_heads: 7}")) == {"model.d_model"}
    assert set(problems(tmp_path, "data: {max_length: x}\ntrain: {batch_tokens: 255}")) == {"data.max_length"}
    bounds = "model: {sine_params: {amp_bounds: [2, 3], amp_init: x}}"
    assert set(problems(tmp_path, bounds)) == {"model.sine_params.amp_init"}
    assert set(problems(tmp_path, "data: 3\nmodel: {max_seq_len: 8}")) == {"data"}


@pytest.mark.parametrize(
    ("text", "path", "part"),
    [
        ("model: {n_heads: 5, d_model: 25}", "model.positional_encoding", "odd head size 5"),
        ("model: {d_model: 1000000007, n_heads: 12}", "model.n_heads", "change d_model"),
        ("model: {n_heads: 8, n_kv_heads: 3}", "model.n_kv_heads", "do not divide 8"),
        ("model: {sine_params: {amp_bounds: [2, 3]}}", "model.sine_params.amp_bounds", "amp_init 1.0 lies outside"),
        ("model: {sine_params: {amp_bounds: [2]}}", "model.sine_params.amp_bounds[1]", "[lowest, highest]"),
        ("model: {sine_params: {amp_bounds: [1, 2, 3]}}", "model.sine_params.amp_bounds", "3 items; it takes 2"),
        ("model: {sine_params: 3}", "model.sine_params", "3 is not a group of keys"),
        ("model: {short_conv: {enabled: true, places: []}}", "model.short_conv.places", "empty while"),
        ("model: {short_conv: {places: mlp}}", "model.short_conv.places", "'mlp' is not a list; write [mlp]"),
        (
            "model: {mlp: swiglo}",
            "model.mlp",
            "sine, sineglu, gelu, geglu, swiglu, relu2, silu, tanh, tanhglu, sigmoid, sigmoidglu, clampedsine, "
            "clampedsineglu, gelusine, sinerelu2, null (did you mean 'swiglu'?)",
        ),
        ("model: {tie_embeddings: y}", "model.tie_embeddings", "'y' is not true or false; write true"),
        ("model: {tie_embeddings: 0}", "model.tie_embeddings", "write false"),
        ("model: {d_model: 99999999999999999999}", "model.d_model", "too large"),
        ("model: {dropout: .nan}", "model.dropout", "nan is not a finite number"),
        ("model: {freq_init: 1}", "model.freq_init", "freq_init belongs to model.sine_params"),
        ("model: {bacth_tokens: 1}", "model.bacth_tokens", "did you mean 'batch_tokens', which belongs to train?"),
        ("model: {zzz: 1}", "model.zzz", "known here: base, d_model"),
        ("model: {<<: {base: respsann}}", "model.<<", "merge keys"),
        ("model: [1]", "model", "[1] is not a group of keys"),
        ("data: {sources: []}", "data.sources", "no corpus; list files"),
        ("data: {sources: 3}", "data.sources", "3 is not a list; write '3'"),
        ("data: {sources: [3]}", "data.sources[0]", "3 is not a source"),
        ("data: {sources: [{pth: x}]}", "data.sources[0].pth", "did you mean 'path'?"),
        ("data: {sources: [{builtn: x}]}", "data.sources[0].builtn", "did you mean 'builtin'?"),
        ("data: {sources: [{}]}", "data.sources[0].path", "missing"),
        ("data: {sources: [{builtin: shakespeare}]}", "data.sources[0].builtin", "is not one of python-reference"),
        ("data: {sources: [{path: a, builtin: python-reference}]}", "data.sources[0].path", "either a path or builtin"),
        ("data: {sources: [{path: 2024}]}", "data.sources[0].path", 'quote it: "2024"'),
        ("data: {sources: ['']}", "data.sources[0].path", "is empty"),
        ('data: {sources: ["a\\0b"]}', "data.sources[0].path", "NUL"),
        ("train: {batch_tokens: 131_072}", "train.batch_tokens", "write 131072"),
        ("train: {batch_tokens: 255}", "train.batch_tokens", "are less than one window of data.max_length 256"),
        ("model: {max_seq_len: 128}", "model.max_seq_len", "are fewer than a training window of data.max_length 256"),
        ("train: {eval_interval_steps: 5}", "train.eval_interval_steps", "nothing is held out"),
        ("train: {checkpoint_dir: 2024}", "train.checkpoint_dir", '2024 is not text; quote it: "2024"'),
        ("train: {lr: 0}", "train.lr", "0 is too small: it must be greater than 0"),
        ("train: {device: gpu}", "train.device", "is not one of auto, cpu, cuda, cuda:N or mps"),
        (
            "train: {max_steps: 10, schedule: wsd, cooldown_share: 0.5, warmup_steps: 6}",
            "train.cooldown_share",
            "a cooldown of 5 steps after 6 of warm-up does not fit into max_steps 10",
        ),
        ("train: {schedule: wds}", "train.schedule", "did you mean 'wsd'?"),
        ("train: {on_nonfinite: skp}", "train.on_nonfinite", "did you mean 'skip'?"),
        ("train: {epochs: null}", "train.epochs", "null is not a whole number"),
        ("train: {lr: !!python/name:os.system ''}", "train.lr", "is not allowed; write a plain value"),
        ("lr: 1", "lr", "it belongs to train"),
        ("seed: 1", "seed", "it belongs to data or to train"),
        ("train.lr: 1", "'train.lr'", "write lr below train:"),
        ("12: 1", "12", "unknown section"),
    ],
)
def test_one_mistake_gives_one_sentence(tmp_path: Path, text: str, path: str, part: str) -> None:
    found = problems(tmp_path, text)
    assert list(found) == [path]
    assert part in found[path]
    assert found[path].startswith("1: ")


@pytest.mark.parametrize("written", ["3", "3.0", "3e0", "0x3", "03"])
def test_whole_numbers_may_be_written_as_yaml_allows(tmp_path: Path, written: str) -> None:
    epochs = load_config(write(tmp_path, f"train: {{epochs: {written}}}")).train.epochs
    assert epochs == 3
    assert type(epochs) is int


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is empty"),
        ("# only this\n", "is empty"),
        ("[model]", "where the sections model, data, train are expected"),
        ("3", "where the sections"),
        ("model: [", "line 1"),
    ],
)
def test_config_that_is_not_a_mapping_is_refused(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), ["train.lr=1"])
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_across_sections_are_compared_once_each_is_valid() -> None:
    with pytest.raises(ConfigError, match="max_length 512"):
        RunConfig(data=DataConfig(max_length=512), train=TrainConfig(batch_tokens=511))
    assert RunConfig(data=DataConfig(max_length=512), train=TrainConfig(batch_tokens=512))


def test_a_mapping_is_read_by_the_same_rules() -> None:
    config = config_from_mapping({"model": {"d_model": 64, "sine_params": {"freq_init": 2}}, "train": TrainConfig()})
    assert config.model.sine_params == SineConfig(freq_init=2.0)
    with pytest.raises(ConfigError) as caught:
        config_from_mapping({"model": {"d_modle": 1, 3: 4}, "train": {"lr": "1"}, "x": 1}, "the checkpoint's settings")
    assert str(caught.value).startswith("4 problems in the checkpoint's settings:")


def test_unread_files_need_not_exist() -> None:
    mapping = {"data": {"sources": ["no/such/corpus"]}}
    assert config_from_mapping(mapping, check_files=False).data.sources == (PathSource(path="no/such/corpus"),)
    with pytest.raises(ConfigError, match=r"data.sources\[0\].path"):
        config_from_mapping(mapping)


def test_section_from_keywords_suggests_nearest_key() -> None:
    assert section_from_kwargs(ModelConfig, "model", {"n_layers": 2, "sine_params": None}) == ModelConfig(n_layers=2)
    with pytest.raises(UnknownKeyError, match=r"model.n_layer: unknown key \(did you mean 'n_layers'\?\)"):
        section_from_kwargs(ModelConfig, "model", {"n_layer": 2})
    with pytest.raises(TypeError, match="3 heads do not divide"):
        section_from_kwargs(ModelConfig, "model", {"n_layer": 2, "n_heads": 3})
    with pytest.raises(ConfigError, match="3 heads do not divide") as caught:
        section_from_kwargs(ModelConfig, "model", {"n_heads": 3})
    assert not isinstance(caught.value, TypeError)


def test_config_former_key_equals_the_present_one(tmp_path: Path) -> None:
    """`model.wave` is the former name of `model.short_conv`; only the present one is written."""
    former = load_config(write(tmp_path, "model: {wave: {kernel_size: 3}}"))
    assert former == load_config(write(tmp_path, "model: {short_conv: {kernel_size: 3}}"))
    assert former.model.short_conv.kernel_size == 3
    assert "short_conv:" in to_yaml(former)
    assert "wave:" not in to_yaml(former)
    assert RunConfig.model_validate({"model": {"wave": {"kernel_size": 3}}}).model == former.model
    assert section_from_kwargs(ModelConfig, "model", {"wave": {"kernel_size": 3}}) == former.model


@pytest.mark.parametrize("written", ["wave", "short_conv"])
@pytest.mark.parametrize("override", ["wave", "short_conv"])
def test_config_override_reaches_former_and_present_key(tmp_path: Path, written: str, override: str) -> None:
    path = write(tmp_path, f"model: {{{written}: {{kernel_size: 3, dilation_growth: 2}}}}")
    conv = load_config(path, [f"model.{override}.kernel_size=5"]).model.short_conv
    assert (conv.kernel_size, conv.dilation_growth) == (5, 2)


def test_config_former_and_present_key_together_are_refused(tmp_path: Path) -> None:
    both = {"wave": {"kernel_size": 3}, "short_conv": {"kernel_size": 3}}
    found = problems(tmp_path, "model:\n  wave: {kernel_size: 3}\n  short_conv: {kernel_size: 4}\n")
    assert found == {"model.wave": "2: is the former name of short_conv, and both are given; keep short_conv"}
    for build in (ModelConfig.model_validate, lambda given: section_from_kwargs(ModelConfig, "model", given)):
        with pytest.raises(ConfigError, match="both are given"):
            build(both)


def test_config_error_below_former_key_has_its_line(tmp_path: Path) -> None:
    found = problems(tmp_path, "model:\n  wave:\n    kernel_size: 0\n    placs: [mlp]\n")
    assert found["model.short_conv.kernel_size"].startswith("3: 0 is too small")
    assert found["model.short_conv.placs"].startswith("4: unknown key (did you mean 'places'?)")


def test_a_config_is_frozen() -> None:
    config = RunConfig()
    with pytest.raises(ValidationError):
        config.train.lr = 1.0
    with pytest.raises(ValidationError):
        config.train = TrainConfig()


_NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
_TRICKY_NAMES = st.sampled_from(["2024", "on", "null", "1e5", "~", "a: b", "# c", " d ", "0o7"])
_MODELS = st.builds(
    ModelConfig,
    base=st.sampled_from(["respsann", "waveresnet", "transformer"]),
    d_model=st.sampled_from([64, 128]),
    n_heads=st.sampled_from([2, 4]),
    mlp=st.sampled_from([None, "sine", "swiglu"]),
    dropout=st.floats(0, 1, exclude_max=True),
    sine_params=st.builds(
        SineConfig,
        freq_init=st.floats(0, exclude_min=True, allow_infinity=False),
        learnable=st.none() | st.lists(st.sampled_from(["amplitude", "decay"])).map(tuple),
        amp_bounds=st.just((0.5, 2.0)) | st.none(),
    ),
)
_SOURCES = st.one_of(
    st.builds(PathSource, path=_NAMES | _TRICKY_NAMES, per_line=st.booleans(), text_key=_NAMES | _TRICKY_NAMES),
    st.just(BuiltinSource(builtin="python-reference")),
)
_DATA = st.builds(
    DataConfig,
    sources=st.lists(_SOURCES, min_size=1, max_size=3).map(tuple),
    val_split=st.floats(0.01, 0.9),
    max_length=st.integers(1, 1024),
    seed=st.integers(0, 2**63 - 1),
)
_TRAIN = st.builds(
    TrainConfig,
    lr=st.floats(1e-12, 1e3),
    batch_tokens=st.integers(1024, 2**40),
    grad_clip=st.none() | st.floats(1e-6, 1e6),
    ddp=st.sampled_from(["auto", "on", "off"]),
    amp=st.sampled_from([None, "bf16"]),
    checkpoint_dir=_NAMES | _TRICKY_NAMES,
    max_steps=st.none() | st.integers(1, 100),
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    on_nonfinite=st.sampled_from(["stop", "skip"]),
)
_RUNS = st.builds(RunConfig, model=_MODELS, data=_DATA, train=_TRAIN)


@pytest.mark.slow
@given(_RUNS)
@settings(deadline=None, max_examples=60)
def test_config_yaml_roundtrip(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> None:
    path = write(tmp_path_factory.getbasetemp(), to_yaml(config))
    again = load_config(path, check_files=False)
    assert again == config
    assert differences(again, config) == []
    assert config_from_mapping(config.model_dump(), check_files=False) == config


def test_differences_name_the_key_and_both_values() -> None:
    changed: dict[str, Any] = {
        "train": {"lr": 3e-4},
        "model": {"sine_params": {"amp_init": 2}},
        "data": {"sources": "."},
    }
    assert differences(RunConfig(), config_from_mapping(changed)) == [
        "model.sine_params.amp_init: 1 -> 2",
        "data.sources.0: {builtin: python-reference, weight: null} -> "
        "{path: ., per_line: false, text_key: text, errors: strict, weight: null}",
        "train.lr: 0.0002 -> 0.0003",
    ]


@given(st.integers(1, 300), st.integers(300, 10**6), st.integers(1, 64), st.integers(1, 64))
def test_batches_hold_whole_windows_within_batch_tokens(window: int, batch: int, accumulate: int, ranks: int) -> None:
    train = TrainConfig(batch_tokens=batch, grad_accum_steps=accumulate)
    plan = plan_batches(RunConfig(data=DataConfig(max_length=window), train=train), ranks)
    assert batch - window < plan.tokens_per_micro_batch <= batch
    assert plan.tokens_per_micro_batch % window == 0
    assert plan.tokens_per_step == plan.tokens_per_micro_batch * accumulate * ranks == plan.windows_per_step * window


def test_max_steps_decides_over_epochs() -> None:
    assert total_steps(RunConfig(train=TrainConfig(epochs=3)), 7) == 21
    assert total_steps(RunConfig(train=TrainConfig(epochs=3, max_steps=100)), 7) == 100


def test_reading_a_configuration_needs_no_torch() -> None:
    code = "import sys, psannlm.config.run, psannlm.config.reference; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("key", ["save_interval_steps", "eval_interval_steps", "log_interval_steps"])
def test_an_interval_of_zero_means_never(key: str) -> None:
    zero, null = (config_from_mapping({"train": {key: value}}, check_files=False) for value in (0, None))
    assert zero == null
    assert getattr(zero.train, key) is None
    with pytest.raises(ConfigError):
        config_from_mapping({"train": {key: -1}}, check_files=False)


@pytest.mark.parametrize(
    ("model", "is_refused"),
    [
        ("{mlp: gelu, sine_params: {freq_init: 2}}", True),
        ("{base: transformer, sine_params: {freq_init: 2}}", True),
        ("{base: transformer, short_conv: {activation: sine}, sine_params: {freq_init: 2}}", True),
        ("{mlp: gelu, sine_params: {freq_init: 1.0}}", False),
        ("{mlp: gelusine, sine_params: {freq_init: 2}}", False),
        ("{base: respsann, sine_params: {freq_init: 2}}", False),
        ("{mlp: gelu, short_conv: {activation: sine}, sine_params: {freq_init: 2}}", False),
    ],
)
def test_sine_params_without_sine_are_refused(tmp_path: Path, model: str, is_refused: bool) -> None:
    path = write(tmp_path, f"model: {model}\n")
    # A run of an earlier version remains readable.
    assert load_config(path, check_files=False).model.sine_params.freq_init in (1, 2)
    if not is_refused:
        load_config(path)
        return
    with pytest.raises(
        ConfigError, match=r"model\.sine_params\.freq_init .line 1.: has no effect with mlp: (gelu|swiglu)"
    ):
        load_config(path)


@pytest.mark.parametrize(("mlp", "n_lines"), [("gelu", 0), ("sine", 1)])
def test_sine_params_without_sine_are_no_difference(tmp_path: Path, mlp: str, n_lines: int) -> None:
    """A run that an earlier version began with them resumes without them."""
    former = load_config(
        write(tmp_path, f"model: {{base: transformer, mlp: {mlp}, sine_params: {{freq_init: 2}}}}\n"), check_files=False
    )
    now = load_config(write(tmp_path, f"model: {{base: transformer, mlp: {mlp}}}\n"), check_files=False)
    assert len(differences(former, now)) == n_lines

"""Survey, choice and files of a new project: what is written loads, validates, trains and overwrites nothing."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from psannlm.config.model import BaseName
from psannlm.config.run import RunConfig, load_config, plan_batches
from psannlm.config.schema import config_schema
from psannlm.config.yaml_loader import read_yaml
from psannlm.errors import ConfigError, CorpusError, StorageError
from psannlm.experiments.plan import load_plan
from psannlm.experiments.plan_schema import plan_schema
from psannlm.scaffold.choice import SIZES, SizeName, choose
from psannlm.scaffold.files import Project, describe_text, run_name, write_project
from psannlm.scaffold.survey import (
    Machine,
    TextSurvey,
    cpu_has_bf16,
    sources_of,
    survey_machine,
    survey_text,
)
from psannlm.tokenizers.resolve import fit_tokenizer

BASES: tuple[BaseName, ...] = ("waveresnet", "respsann", "transformer")
SENTENCE = "The tide comes in twice a day, and the sea is never late. "
TWO_CORES = Machine(2, False)


def schemas() -> dict[str, Any]:
    return {"config": config_schema(), "plan": plan_schema()}


def scaffold(
    folder: Path,
    *paths: str,
    size: SizeName = "tiny",
    base: BaseName = "waveresnet",
    machine: Machine = TWO_CORES,
    **settings: str,
) -> Project:
    text = survey_text(sources_of(paths, **settings))
    return write_project(folder, text, machine, choose(text, machine, size, base), schemas())


def text_of(n_bytes: int, n_documents: int = 100) -> TextSurvey:
    return TextSurvey(sources_of(["corpus.txt"]), n_bytes, n_documents, False, True)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a text in it."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text(SENTENCE * 400, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("size", "base"), [*product(SIZES, BASES)])
@pytest.mark.parametrize("paths", [(), ("corpus.txt",)], ids=["builtin", "text"])
@pytest.mark.usefixtures("here")
def test_written_files_load_and_validate(paths: tuple[str, ...], size: SizeName, base: BaseName) -> None:
    project = scaffold(Path("new"), *paths, size=size, base=base)
    config = load_config("new/config.yaml")
    assert (config.model.base, config.train.checkpoint_dir) == (base, "runs/new")
    assert config.data.val_split > 0
    assert plan_batches(config).micro_batch_size >= 1
    plan = load_plan(Path("new/plan.yaml"))
    assert {variant.name for variant in plan.variants} == {"transformer", "waveresnet" if base == BASES[2] else base}
    assert all(variant.config.model.base == variant.name for variant in plan.variants)
    assert plan.baseline.config.model.mlp == "swiglu"
    others = [variant.config.model.mlp for variant in plan.variants if variant.name != "transformer"]
    assert others == [None], "the base's own"
    steps = plan_batches(config).tokens_per_step * (config.train.max_steps or 0)
    assert plan.settings.budget.tokens == steps
    for name, schema in schemas().items():
        value = read_yaml(Path(f"new/{name}.yaml")).value
        assert [error.message for error in Draft202012Validator(schema).iter_errors(value)] == []
        first = Path(f"new/{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        assert first == f"# yaml-language-server: $schema=schemas/{name}.schema.json"
        assert json.loads(Path(f"new/schemas/{name}.schema.json").read_text(encoding="utf-8")) == schema
    assert all(path.is_file() for path in project.files)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
@pytest.mark.usefixtures("here")
def test_tiny_configuration_trains_two_steps(base: BaseName) -> None:
    from psannlm.training.run import train

    scaffold(Path(), "corpus.txt", base=base)
    result = train(load_config("config.yaml", ["train.max_steps=2", "train.warmup_steps=1", "train.device=cpu"]))
    assert result.steps == 2
    assert result.folder == Path(f"runs/{base}_tiny")


@pytest.mark.parametrize(("size", "base"), [*product(SIZES[1:], BASES)])
@pytest.mark.usefixtures("here")
def test_larger_configurations_train_when_narrowed(size: SizeName, base: BaseName) -> None:
    """On a CPU a model of the written size would take minutes: width and depth alone are changed."""
    from psannlm.training.run import train

    scaffold(Path(), "corpus.txt", size=size, base=base)
    narrow = ["model.d_model=16", "model.n_layers=1", "model.n_heads=1", "data.tokenizer=simple"]
    result = train(load_config("config.yaml", [*narrow, "train.max_steps=2", "train.warmup_steps=1"]))
    assert result.steps == 2


def test_scaffold_has_one_comment_per_value(here: Path) -> None:
    for size, base in product(SIZES, BASES):
        folder = Path(f"{size}_{base}")
        scaffold(folder, size=size, base=base)
        for line in (folder / "config.yaml").read_text(encoding="utf-8").splitlines():
            assert len(line) <= 120, line
            assert line == line.rstrip()


@pytest.mark.parametrize(
    ("n_bytes", "vocab", "val_split"),
    [
        (20_000, 512, 0.1),
        (1_000_000, 2048, 0.1),
        (20_000_000, 4096, 0.05),
        (200_000_000, 8192, 0.01),
        (2_000_000_000, 16_384, 0.01),
        (10**10, 32_000, 0.01),
    ],
)
def test_size_of_text_decides_vocabulary_and_split(n_bytes: int, vocab: int, val_split: float) -> None:
    choice = choose(text_of(n_bytes), TWO_CORES, "gpu", "waveresnet")
    assert (choice.vocab_size, choice.val_split) == (vocab, val_split)
    assert (choose(text_of(n_bytes), TWO_CORES, "tiny", "waveresnet").vocab_size or 0) <= 1024


def test_size_of_text_decides_passes_and_regularization() -> None:
    little, much = (choose(text_of(n), TWO_CORES, "small", "waveresnet") for n in (100_000, 100_000_000))
    assert little.passes > 3
    assert little.is_small_text
    assert little.passes <= 16
    assert much.passes < 1
    assert not much.is_small_text
    assert little.max_steps < much.max_steps


def test_cores_decide_batch_and_budget() -> None:
    few, many = (choose(text_of(10**8), Machine(n, None), "small", "waveresnet") for n in (2, 16))
    assert (few.batch_tokens, few.budget_tokens) == (4096, 1_638_400)
    assert (many.batch_tokens, many.budget_tokens) == (8192, 8 * 1_638_400)


def test_gpu_memory_decides_micro_batch_but_not_the_step() -> None:
    choices = [
        choose(text_of(10**9), Machine(16, True, "GPU", gib << 30), "gpu", "waveresnet") for gib in (8, 24, 80, 141)
    ]
    batches = [choice.batch_tokens for choice in choices]
    assert batches == sorted(batches)
    assert batches[0] < batches[1] < batches[2]
    assert {choice.step_tokens for choice in choices} == {131_072}
    assert {choice.amp for choice in choices} == {"auto"}
    assert choose(text_of(10**9), Machine(16, False, "GPU", 16 << 30), "gpu", "waveresnet").amp == "fp16"


@pytest.mark.parametrize("n_bytes", [1_000, 3_000, 10_000, 77_777, 10**6, 10**9, 10**12])
@pytest.mark.parametrize("size", SIZES)
def test_any_size_of_text_gives_a_valid_batch(n_bytes: int, size: SizeName) -> None:
    choice = choose(text_of(n_bytes), TWO_CORES, size, "waveresnet")
    assert choice.max_length <= choice.batch_tokens
    assert choice.step_tokens == choice.batch_tokens * choice.grad_accum_steps
    assert choice.warmup_steps < choice.max_steps
    assert 1 <= choice.eval_interval_steps <= choice.max_steps


@pytest.mark.usefixtures("here")
def test_smallest_text_trains() -> None:
    from psannlm.training.run import train

    Path("few.txt").write_text(SENTENCE * 18, encoding="utf-8")
    scaffold(Path(), "few.txt")
    assert train(load_config("config.yaml", ["train.max_steps=3", "train.device=cpu"])).steps == 3


@pytest.mark.usefixtures("here")
def test_too_little_text_is_refused() -> None:
    Path("few.txt").write_text(SENTENCE, encoding="utf-8")
    with pytest.raises(CorpusError, match=r"holds 58 bytes of text.*at least 1,000"):
        scaffold(Path(), "few.txt")
    assert not Path("config.yaml").exists()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("path", ["missing.txt", "corpus.tx", "no/*.txt", "corpus.txt.bak/", "ftp://host/a.txt"])
def test_text_that_is_not_there_is_refused_before_writing(path: str) -> None:
    with pytest.raises(CorpusError, match="cannot read the corpus"):
        scaffold(Path("new"), path)
    assert not Path("new").exists()


@pytest.mark.usefixtures("here")
def test_text_that_cannot_be_read_is_refused_before_writing() -> None:
    Path("latin.txt").write_bytes("été ".encode("latin-1") * 500)
    with pytest.raises(CorpusError, match="UTF-8"):
        scaffold(Path("new"), "latin.txt")
    assert not Path("new").exists()
    scaffold(Path("new"), "latin.txt", errors="replace")
    [source] = load_config("new/config.yaml").data.sources
    assert getattr(source, "errors", None) == "replace"


def write_lines(path: str, key: str) -> None:
    Path(path).write_text("".join(json.dumps({key: SENTENCE * 3}) + "\n" for _ in range(50)), encoding="utf-8")


@pytest.mark.usefixtures("here")
def test_json_lines_have_documents_and_a_key() -> None:
    write_lines("a.jsonl", "content")
    with pytest.raises(CorpusError, match="text_key"):
        scaffold(Path("new"), "a.jsonl")
    scaffold(Path("new"), "a.jsonl", text_key="content")
    content = Path("new/config.yaml").read_text(encoding="utf-8")
    assert "in 50 documents" in content
    assert "text_key: content" in content
    assert "per_line" not in content, "only a .txt file is one document as a whole"
    load_config("new/config.yaml")


@pytest.mark.usefixtures("here")
def test_parquet_files_are_surveyed() -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": [SENTENCE * 3] * 40}), "a.parquet")
    survey = survey_text(sources_of(["a.parquet"]))
    assert (survey.n_documents, survey.n_bytes, survey.has_plain_text) == (40, 40 * 3 * len(SENTENCE), False)


@pytest.mark.usefixtures("here")
def test_folders_globs_and_several_paths_are_one_corpus() -> None:
    Path("texts").mkdir()
    for name in ("a.txt", "b.txt"):
        Path("texts", name).write_text(SENTENCE * 50 + name, encoding="utf-8")
    write_lines("more.jsonl", "text")
    scaffold(Path("new"), "texts", "*.jsonl")
    content = Path("new/config.yaml").read_text(encoding="utf-8")
    assert "in 52 documents" in content
    assert content.count("# per_line: true") == 2
    config = load_config("new/config.yaml")
    assert [getattr(source, "path", "") for source in config.data.sources] == ["texts", "*.jsonl"]


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_large_text_is_estimated_from_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psannlm.scaffold.survey.SAMPLE_BYTES", 200_000)
    monkeypatch.setattr("psannlm.scaffold.survey._SEGMENT_BYTES", 50_000)
    # Noise that compresses to about the third that prose does.
    noise = random.Random(1)
    whole = "".join(noise.choice("eta o\n") for _ in range(2_000_000)).encode()
    Path("large.txt").write_bytes(whole)
    Path("large.txt.gz").write_bytes(gzip.compress(whole))
    for name in ("large.txt", "large.txt.gz"):
        survey = survey_text(sources_of([name]))
        assert (survey.is_estimate, survey.n_documents) == (True, 1)
        assert survey.n_bytes == pytest.approx(len(whole), rel=0.4), name
        assert describe_text(survey).startswith("about ")
    records = [json.dumps({"text": SENTENCE * 10}) + "\n" for _ in range(4_000)]
    Path("large.jsonl").write_text("".join(records), encoding="utf-8")
    assert survey_text(sources_of(["large.jsonl"])).n_documents == pytest.approx(4_000, rel=0.1)


@pytest.mark.usefixtures("here")
def test_prepared_folder_brings_tokenizer_and_validation(prepare_folder: Callable[..., Path]) -> None:
    texts = [SENTENCE * 20 + str(number) for number in range(40)]
    tokenizer = fit_tokenizer(texts, "simple", vocab_size=300)
    prepare_folder(Path("shards"), tokenizer, texts[:36], texts[36:])
    scaffold(Path("new"), "shards")
    config: RunConfig = load_config("new/config.yaml")
    assert config.data.val_split == 0
    assert "vocab_size" not in Path("new/config.yaml").read_text(encoding="utf-8").split("data:")[1]
    load_plan(Path("new/plan.yaml"))


@pytest.mark.usefixtures("here")
def test_prepared_folder_without_validation_is_refused(prepare_folder: Callable[..., Path]) -> None:
    tokenizer = fit_tokenizer([SENTENCE], "simple", vocab_size=300)
    prepare_folder(Path("shards"), tokenizer, [SENTENCE * 40], [])
    with pytest.raises(CorpusError, match="prepare it again with psannlm prep --val-split"):
        scaffold(Path("new"), "shards")
    assert not Path("new").exists()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["config.yaml", "plan.yaml", "schemas", "schemas/config.schema.json"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_existing_file_is_refused_and_nothing_is_written(name: str, kind: str) -> None:
    path = Path("new", name)
    path.parent.mkdir(parents=True)
    if kind == "file":
        path.write_text("{}", encoding="utf-8")
    else:
        path.symlink_to("nowhere")
    before = sorted(Path("new").rglob("*"))
    with pytest.raises(StorageError, match=rf"{path} exists, and psannlm init overwrites nothing"):
        scaffold(Path("new"), "corpus.txt")
    assert sorted(Path("new").rglob("*")) == before


@pytest.mark.usefixtures("here")
def test_schemas_of_an_earlier_version_are_replaced() -> None:
    scaffold(Path("new"), "corpus.txt")
    schema = Path("new/schemas/config.schema.json")
    earlier = {**config_schema(), "properties": {}}
    schema.write_text(json.dumps(earlier), encoding="utf-8")
    for name in ("config.yaml", "plan.yaml"):
        Path("new", name).unlink()
    scaffold(Path("new"), "corpus.txt")
    assert json.loads(schema.read_text(encoding="utf-8")) == config_schema()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["it's #1: {a}.txt", "two\nlines.txt", "-dash.txt", "ünï.txt", "no.txt", "[1].txt"])
def test_any_file_name_is_written_as_the_same_name(name: str) -> None:
    Path(name).write_text(SENTENCE * 400, encoding="utf-8")
    scaffold(Path("new"), name)
    [source] = load_config("new/config.yaml").data.sources
    assert getattr(source, "path", "") == name


def test_run_is_named_after_folder(here: Path) -> None:
    choice = choose(text_of(10**6), TWO_CORES, "tiny", "respsann")
    assert run_name(Path(), choice) == "respsann_tiny"
    assert run_name(Path("my novel"), choice) == "my_novel"
    assert run_name(Path("a/.hidden"), choice) == "hidden"
    assert run_name(Path("…"), choice) == "respsann_tiny"
    assert len(run_name(Path("x" * 200), choice)) == 40
    assert run_name(here, choice) == run_name(here / ".", choice)


def test_bf16_is_read_from_the_list_of_features(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    assert cpu_has_bf16(path) is None
    for text, found in (
        ("processor\t: 0\nflags\t\t: fpu sse2 avx512_bf16 amx_tile\n", True),
        ("processor\t: 0\nflags\t\t: fpu sse2 avx2\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", True),
        ("nothing\n", None),
    ):
        path.write_text(text, encoding="utf-8")
        assert cpu_has_bf16(path) is found


def test_machine_without_gpu_is_surveyed() -> None:
    machine = survey_machine(with_gpu=False)
    assert machine.gpu is None
    assert 1 <= machine.n_cores <= (os.cpu_count() or 1)


def test_gpu_is_asked_for_name_memory_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("psannlm.runtime.device.pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr("psannlm.runtime.device.computes_in_bf16", lambda device: True)
    monkeypatch.setattr("psannlm.runtime.device.gpu_memory_bytes", lambda device: 80 << 30)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100")
    machine = survey_machine(with_gpu=True)
    assert (machine.gpu, machine.gpu_bytes, machine.has_bf16) == ("NVIDIA H100", 80 << 30, True)


def test_options_are_refused_as_the_configuration_refuses_them() -> None:
    with pytest.raises(ConfigError, match="errors"):
        sources_of(["a.txt"], errors="ignore")
    with pytest.raises(ConfigError, match="text_key"):
        sources_of(["a.txt"], text_key="")

"""lm-evaluation-harness on psannlm's engine: likelihoods, offline refusals, scores."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from psannlm.data.corpus.documents import Document
from psannlm.data.memory_store import encode_documents
from psannlm.data.windows import Windows
from psannlm.errors import ConfigError, GenerationError
from psannlm.evaluation.loss import evaluate
from psannlm.evaluation.tasks.harness import EngineModel, run_harness
from psannlm.generation.engine import Engine
from psannlm.generation.generate import generate
from psannlm.generation.requests import SamplingConfig
from psannlm.generation.scoring import Scorer
from psannlm.models.transformer import Transformer
from psannlm.runtime.device import Precision
from psannlm.tokenizers.base import Tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")

Build = Callable[..., Transformer]
FP32 = Precision(torch.device("cpu"), torch.float32, "fp32 as asked")
COLOURS = ("blue", "green", "red", "white")
TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: a
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.5}}
"""
ROLLING = """\
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{q}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
"""
UNTIL = """\
task: spelling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{choices[a]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def tasks_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "home")
    file = tmp_path / "questions.jsonl"
    things = ["The sky is", "Grass is", "Blood is", "Snow is"]
    rows = [{"q": f"{thing} very", "choices": COLOURS, "a": at} for at, thing in enumerate(things)]
    file.write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("colours", TASK), ("texts", ROLLING), ("spelling", UNTIL)):
        (folder / f"{name}.yaml").write_text(text.format(file=file))
    return folder


def run(model: EngineModel, names: list[str], folder: Path, **more: Any) -> dict[str, Any]:
    return {score.task: score for score in run_harness(names, model, tasks_dir=folder, **more)}


@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("length", [0, 1, 30, 31, 32, 33, 200])
def test_rolling_likelihood_equals_nats_of_eval(
    length: int, positions: str, byte_tokenizer: Tokenizer, build_tiny: Build
) -> None:
    model = build_tiny(vocab_size=byte_tokenizer.vocab_size, max_seq_len=32, positional_encoding=positions)
    text = ("The tide is out and the boats lie on the sand. " * 5)[:length]
    (found,) = EngineModel(Scorer(Engine(model)), byte_tokenizer).rolling([text])
    windows = Windows(encode_documents([Document(text, "a")], byte_tokenizer), 32, pad_id=byte_tokenizer.pad_id)
    if length:
        nats = evaluate(model, windows, precision=FP32).nats
        assert -found == pytest.approx(nats, rel=1e-5)
    else:
        assert math.isfinite(found)


@pytest.mark.slow
def test_harness_scores_multiple_choice(scorer: Scorer, byte_tokenizer: Tokenizer, tasks_dir: Path) -> None:
    found = run(EngineModel(scorer, byte_tokenizer), ["colours"], tasks_dir)["colours"]
    best = []
    for thing in ("The sky is", "Grass is", "Blood is", "Snow is"):
        context = [byte_tokenizer.bos_id, *byte_tokenizer.encode(f"{thing} very")]
        model = EngineModel(scorer, byte_tokenizer)
        requests = [(("", ""), context, byte_tokenizer.encode(f" {colour}")) for colour in COLOURS]
        logprobs = [logprob for logprob, _ in model.likelihoods(requests)]
        best.append(logprobs.index(max(logprobs)))
    right = [float(at == choice) for at, choice in enumerate(best)]
    assert (found.metric, found.n, found.version) == ("acc", 4, "1.5")
    assert (found.value, list(found.outcomes)) == (sum(right) / 4, right)
    assert found.chance == 0.25
    assert found.stderr == pytest.approx(float(torch.tensor(right).std()) / 2)


@pytest.mark.slow
def test_harness_scores_do_not_depend_on_batch_size(scorer: Scorer, byte_tokenizer: Tokenizer, tasks_dir: Path) -> None:
    names = ["colours", "texts", "spelling"]
    models = [EngineModel(Scorer(scorer.engine, size), byte_tokenizer) for size in (1, 3, 50)]
    alone, *others = (run(model, names, tasks_dir, num_fewshot=1, limit=3) for model in models)
    assert [alone[name].n for name in names] == [3, 3, 3]
    assert others == [alone, alone]


@pytest.mark.slow
def test_harness_word_perplexity_is_that_of_the_texts(
    scorer: Scorer, byte_tokenizer: Tokenizer, tasks_dir: Path
) -> None:
    model = EngineModel(scorer, byte_tokenizer)
    found = run(model, ["texts"], tasks_dir)["texts"]
    texts = ["The sky is very", "Grass is very", "Blood is very", "Snow is very"]
    nats = -sum(model.rolling(texts))
    assert found.value == pytest.approx(math.exp(nats / sum(len(text.split()) for text in texts)), rel=1e-6)
    assert (found.chance, found.higher_is_better) == (None, False)


def test_harness_generation_ends_before_until(byte_tokenizer: Tokenizer, build_tiny: Build) -> None:
    engine = Engine(build_tiny(vocab_size=byte_tokenizer.vocab_size, max_seq_len=64))
    model = EngineModel(Scorer(engine, 2), byte_tokenizer)
    prompts = ["a", "the tide", "é"]
    free = generate(engine, byte_tokenizer, prompts, max_new_tokens=12, sampling=SamplingConfig(temperature=0.0))
    stop = free[1].text[3:5]
    settings = {"until": ["never 1", "never 2", "never 3", "never 4", stop], "max_gen_toks": 12}
    found = model.generations([(prompt, settings) for prompt in prompts])
    assert found == [done.text.partition(stop)[0] for done in free]
    # A context that leaves no space for the answer loses its beginning.
    assert model.generations([("x" * 100, settings)])
    assert model.scorer.n_truncated == 1


def test_harness_refuses_downloads_in_one_line(
    scorer: Scorer, byte_tokenizer: Tokenizer, tasks_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: reached.append(address))
    model = EngineModel(scorer, byte_tokenizer)
    remote = (tasks_dir / "colours.yaml").read_text().replace("colours", "faraway")
    (tasks_dir / "faraway.yaml").write_text(remote.replace("dataset_path: json", "dataset_path: OWNER/NAME"))
    with pytest.raises(
        ConfigError, match=r"the data of faraway are not on this machine .*OWNER/NAME.*--allow-download"
    ):
        run(model, ["faraway"], tasks_dir)
    (tasks_dir / "code.py").write_text(
        "import socket\n\ndef load(**_):\n    socket.create_connection(('203.0.113.1', 80), timeout=1)\n"
    )
    (tasks_dir / "faraway.yaml").write_text(remote + "custom_dataset: !function code.load\n")
    with pytest.raises(ConfigError, match="downloads are not allowed"):
        run(model, ["faraway"], tasks_dir)
    assert reached == []


def test_harness_unknown_task_names_the_nearest(
    scorer: Scorer, byte_tokenizer: Tokenizer, tasks_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda **options: TaskManager(**{**options, "include_defaults": False})
    )
    with pytest.raises(ConfigError, match=r"there is no task 'color' \(did you mean 'colours'\?\)"):
        run_harness(["color"], EngineModel(scorer, byte_tokenizer), tasks_dir=tasks_dir)


def test_harness_missing_says_how_to_install_it(
    scorer: Scorer, byte_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psannlm.evaluation.tasks.harness.is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"hellaswag is not a task of psannlm, .*pip install -c constraints.txt '.\[eval\]'"
    ):
        run_harness(["hellaswag"], EngineModel(scorer, byte_tokenizer))


def test_harness_continuation_without_tokens_raises(scorer: Scorer, byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(GenerationError, match="the continuation 's' after 'cat' has no token of its own"):
        EngineModel(scorer, byte_tokenizer).likelihoods([(("cat", "s"), [1, 2], [])])

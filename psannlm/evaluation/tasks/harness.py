"""Tasks of lm-evaluation-harness on psannlm's own engine, offline unless downloads are allowed."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psannlm.errors import ConfigError, GenerationError, describe, install_extra, nearest
from psannlm.evaluation.tasks.packs import PACK_GROUPS, PACKS
from psannlm.evaluation.tasks.score import TaskScore
from psannlm.generation.generate import complete_ids
from psannlm.generation.requests import SamplingConfig
from psannlm.generation.scoring import Continuation, Likelihood, Scorer
from psannlm.generation.stop_texts import MAX_STOP_TEXTS, StopScanner
from psannlm.runtime.progress import OnProgress, ProgressCounter, ignore_progress
from psannlm.tokenizers.base import Tokenizer

# Draws of the bootstrap, for the standard errors of metrics that are not means. lm-eval's default takes minutes.
_BOOTSTRAP_DRAWS = 1000
# What lm-eval generates at most where a task sets no number.
_MAX_NEW_TOKENS = 256
_SWITCHES = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# Accuracies of a choice, whose chance level is one over the number of choices.
_CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes", "exact_match")


def is_available() -> bool:
    """Whether lm-eval is installed."""
    return importlib.util.find_spec("lm_eval") is not None


class EngineModel:
    """The requests of lm-eval, answered with a scorer and its engine.

    Contexts start with BOS, as every training document does. The log-likelihood of a whole text is the one that
    ``psannlm eval`` measures: over the same windows, with the end of the text, which most models of lm-eval leave out.
    """

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, on_progress: OnProgress = ignore_progress) -> None:
        self.scorer, self.tokenizer, self.on_progress = scorer, tokenizer, on_progress

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return the ids of ``text``, after BOS unless ``add_special_tokens`` is false."""
        ids = self.tokenizer.encode(text)
        return ids if add_special_tokens is False else [self.tokenizer.bos_id, *ids]

    def likelihoods(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy) of (texts, context ids, continuation ids).

        Raises:
            GenerationError: a continuation has no token of its own.
        """
        for texts, _, ids in requests:
            if not ids:
                raise GenerationError(
                    f"the continuation {texts[1]!r:.40} after {texts[0][-40:]!r} has no token of its own: the "
                    "tokenizer joins it to the context; leave the task out"
                )
        return [
            (found.logprob, found.is_greedy)
            for found in self._score([Continuation(context, ids) for _, context, ids in requests])
        ]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Return the log-likelihood in nats of each text and its end, over the windows of ``psannlm eval``."""
        window = self.scorer.engine.model.config.max_seq_len or 256
        parts: list[Continuation] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            ids = [self.tokenizer.bos_id, *self.tokenizer.encode(text), self.tokenizer.eos_id]
            for start in range(0, len(ids) - 1, window):
                parts.append(Continuation(ids[start : start + 1], ids[start + 1 : start + window + 1]))
                owners.append(number)
        sums = [0.0] * len(texts)
        for owner, found in zip(owners, self._score(parts), strict=True):
            sums[owner] += found.logprob
        return sums

    def generations(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Return the continuation of each (context, settings), up to the first of its ``until`` texts."""
        answers = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for number, (_, settings) in enumerate(requests):
            by_settings.setdefault(repr(sorted(settings.items(), key=str)), []).append(number)
        generated = ProgressCounter(self.on_progress, "generating", "answers", len(requests))
        for numbers in by_settings.values():
            settings = requests[numbers[0]][1]
            for start in range(0, len(numbers), self.scorer.batch_size):
                batch = numbers[start : start + self.scorer.batch_size]
                for number, text in zip(batch, self._generate([requests[n][0] for n in batch], settings), strict=True):
                    answers[number] = text
                generated.add(len(batch))
        return answers

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        stops = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        n_new = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or _MAX_NEW_TOKENS)
        limit = self.scorer.limit
        if limit is not None:
            n_new = max(1, min(n_new, limit // 2))
        prompts = []
        for context in contexts:
            ids = self.encode(context)
            if limit is not None and len(ids) > limit - n_new:
                ids = ids[-(limit - n_new) :]
                self.scorer.n_truncated += 1
            prompts.append(ids)
        temperature = float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0
        sampling = SamplingConfig(temperature, settings.get("top_k"), settings.get("top_p"), seed=0)
        completions = complete_ids(
            self.scorer.engine,
            self.tokenizer,
            prompts,
            max_new_tokens=n_new,
            sampling=sampling,
            stop=stops[:MAX_STOP_TEXTS],
        )
        return [_before(done.text, stops) for done in completions]

    def _score(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        return self.scorer.score(continuations, self.on_progress)


def _before(text: str, stops: tuple[str, ...]) -> str:
    """Return the part of ``text`` before the first stop text."""
    scanner = StopScanner(stops)
    part = scanner.add(text)
    return text if scanner.found is None else part


def harness_model(model: EngineModel) -> Any:
    """Return ``model`` as an ``lm_eval.api.model.TemplateLM``."""
    base: Any = importlib.import_module("lm_eval.api.model").TemplateLM

    class PsannlmModel(base):  # type: ignore[misc]
        @property
        def eot_token_id(self) -> int:
            return model.tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:
            return model.tokenizer.bos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return model.encode(string, add_special_tokens)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return found

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return model.likelihoods(requests)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            return model.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            return model.generations([request.args for request in requests])

    return PsannlmModel()


def run_harness(
    names: Sequence[str],
    model: EngineModel,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    tasks_dir: Path | None = None,
    allow_download: bool = False,
) -> list[TaskScore]:
    """Return the scores of tasks of lm-eval, in the order of ``names``.

    Args:
        names: of tasks, groups or tags.
        num_fewshot: solved examples before each question; None: the number that the task sets.
        limit: most questions of each task; None: all.
        tasks_dir: folder of further tasks, as YAML files of lm-eval.
        allow_download: fetch data sets from the Hugging Face hub. Otherwise no connection is made, and data must be on
            this machine.

    Raises:
        ConfigError: lm-eval is not installed, a task is unknown, needs data that are not on this machine or a package
            that is not installed, runs generated code, or needs images.
        GenerationError: a request of a task cannot be answered.
    """
    if not is_available():
        raise ConfigError(
            f"--tasks: {', '.join(names)} {'is' if len(names) == 1 else 'are'} not a task of psannlm, and lm-eval, "
            f"which has more, is not installed; {install_extra('eval')}"
        )
    with _network(allow_download):
        manager = _manager(names, tasks_dir)
        loaded = [_load(manager, name) for name in names]
        tasks = {task: made for part in loaded for task, made in part["tasks"].items()}
        _refuse_unsafe(tasks)
        evaluator: Any = importlib.import_module("lm_eval.evaluator")
        specs = [*tasks.values()] if not any(part["groups"] for part in loaded) else _specs(loaded)
        results = evaluator.simple_evaluate(
            model=harness_model(model),
            tasks=specs,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP_DRAWS,
            log_samples=True,
        )
    return _scores(results, tasks)


def _specs(loaded: Sequence[Any]) -> list[Any]:
    """Return the groups, and the tasks that belong to none of them."""
    specs: list[Any] = []
    for part in loaded:
        children = {name for names in part.get("group_map", {}).values() for name in names}
        specs += [group for name, group in part["groups"].items() if name not in children]
        if not part["groups"]:
            specs += part["tasks"].values()
    return specs


@contextmanager
def _network(is_allowed: bool) -> Iterator[None]:
    """Set up the libraries of lm-eval before they are imported, and refuse connections unless they are allowed."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if is_allowed:
        yield
        return
    former = {name: os.environ.get(name) for name in _SWITCHES}
    os.environ.update(_SWITCHES)
    # The switches are read when these modules are imported, which another library may have done.
    modules = {"datasets.config": "HF_DATASETS_OFFLINE", "huggingface_hub.constants": "HF_HUB_OFFLINE"}
    for module, name in modules.items():
        if module in sys.modules:
            setattr(sys.modules[module], name, True)
    real_connect = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise ConnectionError("downloads are not allowed")
        real_connect(self, address)

    # Tasks bring code of their own, which may download without these libraries.
    socket.socket.connect = connect  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        socket.socket.connect = real_connect  # type: ignore[method-assign]
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _manager(names: Sequence[str], tasks_dir: Path | None) -> Any:
    """Return a task manager that knows ``names``. Raises ConfigError for an unknown one, with the nearest known."""
    tasks: Any = importlib.import_module("lm_eval.tasks")
    folder = None if tasks_dir is None else str(tasks_dir)
    if folder is not None:
        # Reading lm-eval's own 14,000 files takes up to a minute.
        manager = tasks.TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= {*manager.all_tasks}:
            return manager
    manager = tasks.TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"--tasks: there is no task {name!r:.80}{nearest(name, manager.all_tasks)}; psannlm has "
                f"{', '.join([*PACKS, *PACK_GROUPS])}, and lm-eval ls tasks lists those of lm-eval"
            )
    return manager


def _load(manager: Any, name: str) -> Any:
    """Return a task or group with its data. Raises ConfigError where its data or a package it needs are missing."""
    try:
        return manager.load([name])
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--tasks: {name} needs the package {error.name}, which is not installed; run pip install {error.name}"
        ) from error
    except OSError as error:
        # Also what datasets and the hub raise for data that are neither here nor may be fetched.
        found = describe(error) if error.filename else str(error).strip().split("\n")[0]
        raise ConfigError(
            f"--tasks: the data of {name} are not on this machine ({found}); fetch them with --allow-download"
        ) from error


def _refuse_unsafe(tasks: dict[str, Any]) -> None:
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"--tasks: {name} runs code that the model generates, which psannlm does not do")
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"--tasks: {name} shows images, which the model does not read")


def _scores(results: Any, tasks: dict[str, Any]) -> list[TaskScore]:
    """Return the scores of lm-eval's results: tasks first, then averages of groups."""
    scores = []
    for name, figures in results["results"].items():
        samples = results.get("samples", {}).get(name, [])
        for key, value in figures.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = figures.get(f"{metric}_stderr,{rule}")
            n = results.get("n-samples", {}).get(name, {}).get("effective")
            outcomes = [sample.get(metric) for sample in samples if sample.get("filter") == rule]
            scores.append(
                TaskScore(
                    task=name,
                    metric=metric if rule == "none" else f"{metric} ({rule})",
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                    chance=_chance(tasks.get(name), metric, samples),
                    n=n,
                    version=str(results.get("versions", {}).get(name, "")),
                    outcomes=tuple(map(float, outcomes))
                    if outcomes and all(isinstance(outcome, (int, float)) for outcome in outcomes)
                    else (),
                    higher_is_better=results.get("higher_is_better", {}).get(name, {}).get(metric) is not False,
                )
            )
    return scores


def _chance(task: Any, metric: str, samples: Sequence[Any]) -> float | None:
    """Return the chance level of a multiple-choice task: the mean of one over the number of choices."""
    if getattr(task, "OUTPUT_TYPE", None) != "multiple_choice" or metric not in _CHOICE_METRICS or not samples:
        return None
    numbers = [len(task.doc_to_choice(sample["doc"])) for sample in samples]
    return sum(1 / number for number in numbers) / len(numbers)

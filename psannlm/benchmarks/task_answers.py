"""A trained model and held-out documents of a task: how many of the answers it gives."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from psannlm.benchmarks.compare import study_figures
from psannlm.benchmarks.study_runs import Study
from psannlm.benchmarks.study_work import look
from psannlm.data.stream import Stream
from psannlm.data.windows import Windows
from psannlm.errors import CorpusError
from psannlm.models.artifact import load_model
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer
from psannlm.training.checkpoint import BEST, LATEST, pointed

Answers = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class AnswerScore:
    """Answers given and documents with every answer given, as shares in [0, 1]; a document's text is shown whole."""

    right: float
    documents_right: float
    nats_per_answer: float
    n_answers: int
    n_documents: int


@torch.no_grad()
def score_answers(
    model: Transformer, store: Stream, tokenizer: Tokenizer, answers: Answers, *, batch_size: int = 64
) -> AnswerScore:
    """Return how a model does at the places that ``answers`` names, each foretold from the document's text before it.

    Every document stands in a window of its own. An answer is right if its token is the likeliest one.

    Raises:
        CorpusError: there is no document, or one that is not a token for each character.
    """
    if store.n_documents == 0:
        raise CorpusError("there is no document to look for answers in")
    starts = store.starts(0, store.n_documents + 1)
    windows = Windows(store, int((starts[1:] - starts[:-1]).max()) - 1, pad_id=tokenizer.pad_id, pack=False)
    right = whole = n_answers = 0
    nats = 0.0
    for first in range(0, store.n_documents, batch_size):
        rows = range(first, min(first + batch_size, store.n_documents))
        input_ids, labels = windows.batch(rows)
        logits = model.logits(model.hidden_states(input_ids)).float()
        is_right = logits.argmax(-1) == labels
        for row, document in enumerate(rows):
            begin, end = int(starts[document]), int(starts[document + 1])
            text = tokenizer.decode(store.tokens(begin + 1, end - 1).tolist())
            if len(text) != end - begin - 2:
                raise CorpusError(f"{store.name(document)}: {end - begin - 2} tokens for {len(text)} characters")
            # Label i is token i + 1, and the first token is the begin of text.
            places = torch.tensor(answers(text))
            given = is_right[row, places]
            right += int(given.sum())
            whole += bool(given.all())
            n_answers += len(places)
            nats += float(torch.nn.functional.cross_entropy(logits[row, places], labels[row, places], reduction="sum"))
    return AnswerScore(right / n_answers, whole / store.n_documents, nats / n_answers, n_answers, store.n_documents)


def score_study(study: Study, answers: Answers) -> list[dict[str, Any]]:
    """Return for each variant the scores of its runs at its best learning rate, by seed, and their means.

    Raises:
        TrainingError: not one run came to its end.
        CorpusError: as :func:`score_answers`.
        ArtifactError: a model cannot be read.
    """
    rates = {variant["name"]: variant["learning_rate"] for variant in study_figures(study)["variants"]}
    rows = []
    for sized in study.variants:
        variant = sized.variant
        runs = [run for run in study.runs if run.variant is sized and run.lr == rates[variant.name]]
        data = study.data[variant.config.data]
        scores: dict[str, AnswerScore] = {}
        for run in runs:
            checkpoint = pointed(run.folder, BEST if study.plan.settings.measure == "best" else LATEST)
            if look(run).state == "done" and checkpoint is not None and data.val is not None:
                model = load_model(checkpoint).model.eval()
                scores[str(run.seed)] = score_answers(model, data.val, data.tokenizer, answers)
        mean = {
            key: statistics.fmean(getattr(score, key) for score in scores.values()) if scores else None
            for key in ("right", "documents_right", "nats_per_answer")
        }
        by_seed = {seed: asdict(score) for seed, score in scores.items()}
        rows.append({"name": variant.name, "learning_rate": rates[variant.name], "mean": mean, "seeds": by_seed})
    return rows

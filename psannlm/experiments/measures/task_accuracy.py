"""Accuracy of trained models on the held-out documents of an algorithmic task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from psannlm.data.stream import Stream
from psannlm.data.synthetic.algorithmic import TASKS
from psannlm.data.windows import Windows
from psannlm.errors import CorpusError
from psannlm.experiments.finished_runs import Measured, keep_measured
from psannlm.experiments.measures.document_losses import reported_documents
from psannlm.experiments.model import Study
from psannlm.experiments.run_state import read_status
from psannlm.io.artifact_schema import read_figures
from psannlm.models.artifact import load_model
from psannlm.models.transformer import Transformer
from psannlm.reports.schemas.study import AnswerScore
from psannlm.tokenizers.base import Tokenizer
from psannlm.training.checkpoint import BEST, LATEST, read_pointer

Answers = Callable[[str], Sequence[int]]


@torch.no_grad()
def score_answers(
    model: Transformer,
    store: Stream,
    tokenizer: Tokenizer,
    answers: Answers,
    *,
    batch_size: int = 64,
    documents: Sequence[int] | None = None,
) -> AnswerScore:
    """Return a model's accuracy at the positions that ``answers`` names, each predicted from the text before it.

    Every document has a window of its own. An answer is correct if its token has the highest logit.

    Args:
        documents: numbers of the documents that count; None: all.

    Raises:
        CorpusError: there is no document, or a document is not of the task or not one token per character.
    """
    chosen = range(store.n_documents) if documents is None else documents
    if not chosen:
        raise CorpusError("there is no held-out document to score")
    starts = store.starts(0, store.n_documents + 1)
    windows = Windows(store, int((starts[1:] - starts[:-1]).max()) - 1, pad_id=tokenizer.pad_id, pack=False)
    right = whole = n_answers = 0
    nats = 0.0
    for first in range(0, len(chosen), batch_size):
        rows = chosen[first : first + batch_size]
        input_ids, labels = windows.batch(rows)
        logits = model.logits(model.hidden_states(input_ids)).float()
        is_right = logits.argmax(-1) == labels
        for row, document in enumerate(rows):
            begin, end = int(starts[document]), int(starts[document + 1])
            text = tokenizer.decode(store.tokens(begin + 1, end - 1).tolist())
            if len(text) != (n_tokens := end - begin - 2):
                name = store.name(document)
                raise CorpusError(f"{name}: {n_tokens} tokens for {len(text)} characters; use tokenizer: simple")
            # Label i is token i + 1, and the first token is BOS.
            positions = torch.tensor(_positions(text, answers, store.name(document)))
            given = is_right[row, positions]
            right += int(given.sum())
            whole += bool(given.all())
            n_answers += len(positions)
            nats += float(
                torch.nn.functional.cross_entropy(logits[row, positions], labels[row, positions], reduction="sum")
            )
    return AnswerScore(right / n_answers, whole / len(chosen), nats / n_answers, n_answers, len(chosen))


def _positions(text: str, answers: Answers, name: str) -> Sequence[int]:
    """Return the positions of a document's answers. Raises CorpusError if it has none."""
    try:
        positions = answers(text)
    except ValueError:
        positions = ()
    if not positions:
        raise CorpusError(f"{name} is not a document of this task: {text[:40]!r}; correct answers: in the plan")
    return positions


def score_runs(
    study: Study, on_status: Callable[[str], None] = lambda text: None, *, is_kept: bool = False
) -> dict[str, AnswerScore]:
    """Return the scores, by name, of a study's finished runs on an algorithmic task.

    A run's model is that of its last step, or of its best validation if the plan measures that. With ``choose_on:
    tune``, only the reported half of the held-out documents counts.

    Args:
        is_kept: add the scores to the study's ``runs.jsonl``.

    Raises:
        CorpusError: the text is not of the task.
        ArtifactError: a model cannot be read.
    """
    task = study.plan.settings.answers
    if task is None:
        return {}
    scores = {}
    reported = reported_documents(study)
    documents = None if reported is None else reported.tolist()
    for run in study.runs:
        data = study.data[run.variant.variant.config.data]
        folder = read_pointer(run.folder, BEST if study.plan.settings.measure == "best" else LATEST)
        state = read_status(run)
        if folder is None and state.record is not None and isinstance(kept := state.record.origin.get("answers"), dict):
            scores[run.name] = read_figures(AnswerScore, kept)
        if data.val is None or folder is None or state.state != "done":
            continue
        on_status(f"scoring answers: {run.name}")
        model = load_model(folder).model.eval()
        score = score_answers(model, data.val, data.tokenizer, TASKS[task].answers, documents=documents)
        scores[run.name] = score
        if is_kept:
            keep_measured(study, state, Measured(answers=score, task=task, measure=study.plan.settings.measure))
    return scores

"""A trained model and held-out documents of a counting task to how many of the answers it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from psannlm.data.stream import Stream
from psannlm.data.synthetic.algorithmic import TASKS
from psannlm.data.windows import Windows
from psannlm.errors import CorpusError
from psannlm.experiments.model import Study
from psannlm.experiments.runner import read_status
from psannlm.models.artifact import load_model
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer
from psannlm.training.checkpoint import BEST, LATEST, read_pointer

Answers = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class AnswerScore:
    """Answers given, and documents with every answer given, as shares in [0, 1]."""

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
        CorpusError: there is no document, or one that is not a token for each character or not of the task.
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
            if len(text) != (n_tokens := end - begin - 2):
                name = store.name(document)
                raise CorpusError(f"{name}: {n_tokens} tokens for {len(text)} characters; use tokenizer: simple")
            # Label i is token i + 1, and the first token is the begin of text.
            places = torch.tensor(_places(text, answers, store.name(document)))
            given = is_right[row, places]
            right += int(given.sum())
            whole += bool(given.all())
            n_answers += len(places)
            nats += float(torch.nn.functional.cross_entropy(logits[row, places], labels[row, places], reduction="sum"))
    return AnswerScore(right / n_answers, whole / store.n_documents, nats / n_answers, n_answers, store.n_documents)


def _places(text: str, answers: Answers, name: str) -> Sequence[int]:
    """The places of a document's answers. Raises CorpusError if it has none."""
    try:
        places = answers(text)
    except ValueError:
        places = ()
    if not places:
        raise CorpusError(f"{name} is no document of this counting task: {text[:40]!r}; correct answers: in the plan")
    return places


def score_runs(study: Study, tell: Callable[[str], None] = lambda text: None) -> dict[str, AnswerScore]:
    """Return the scores, by name, of those runs of a study on a counting task that came to their end.

    A run's model is that of its last step, or where the plan measures the best validation, of that.

    Raises:
        CorpusError: the text is not that of the task.
        ArtifactError: a model cannot be read.
    """
    task = study.plan.settings.answers
    if task is None:
        return {}
    scores = {}
    for run in study.runs:
        data = study.data[run.variant.variant.config.data]
        folder = read_pointer(run.folder, BEST if study.plan.settings.measure == "best" else LATEST)
        if data.val is None or folder is None or read_status(run).state != "done":
            continue
        tell(f"counting answers: {run.name}")
        model = load_model(folder).model.eval()
        scores[run.name] = score_answers(model, data.val, data.tokenizer, TASKS[task].answers)
    return scores

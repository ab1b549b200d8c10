"""Task packs as a validation of a model in training: prepared once, scored again and again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from psannlm.data.stream import Stream
from psannlm.errors import ConfigError, CorpusError, Problem
from psannlm.evaluation.loss import decode_documents
from psannlm.evaluation.tasks.packs import LAST_WORD, expand_packs, prepare_pack, score_pack
from psannlm.evaluation.tasks.score import TaskScore
from psannlm.generation.batch_decode import context_limit
from psannlm.generation.engine import Engine
from psannlm.generation.scoring import Scorer
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.base import Tokenizer

_BATCH_ROWS = 16
# Held-out documents that are read for sentences.
_MOST_DOCUMENTS = 10_000


class ValidationTasks:
    """The task packs ``names``, with the same questions at every validation.

    Args:
        names: packs, or names of several.
        tokenizer: of the model.
        held_out: documents that the model is not trained on, for ``psannlm_last_word``; None: there are none.
        model: its context must hold every answer.

    Raises:
        ConfigError: a pack cannot be asked: the model's context or the held-out text is too short for it.
    """

    def __init__(self, names: Sequence[str], tokenizer: Tokenizer, held_out: Stream | None, model: Transformer) -> None:
        limit = context_limit(model)
        self._packs = []
        for name in expand_packs(names):
            texts = decode_documents(held_out, tokenizer) if name == LAST_WORD and held_out is not None else ()
            try:
                pack = prepare_pack(name, tokenizer, texts=islice(texts, _MOST_DOCUMENTS))
            except CorpusError as error:
                raise ConfigError(Problem("train.eval_tasks", f"{name}: {error}")) from error
            longest = max(len(row.ids) for row in pack.rows)
            if limit is not None and longest > limit:
                message = f"{name} has answers of {longest} tokens, and the model's context is {limit}; leave it out"
                raise ConfigError(Problem("train.eval_tasks", message))
            self._packs.append(pack)

    def score(self, model: Transformer) -> list[TaskScore]:
        """Return the scores of ``model``, in uncompiled float32; it is not changed.

        Raises:
            GenerationError: its logits are not finite.
        """
        scorer = Scorer(Engine(model), _BATCH_ROWS)
        return [score_pack(pack, scorer) for pack in self._packs]


def task_figures(scores: Sequence[TaskScore]) -> dict[str, float | None]:
    """Return the scores as a row of a metrics log: by task, with ``/stderr`` and ``/chance`` after its name."""
    row: dict[str, float | None] = {}
    for score in scores:
        row |= {score.task: score.value, f"{score.task}/stderr": score.stderr, f"{score.task}/chance": score.chance}
    return row

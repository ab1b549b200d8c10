"""Algorithmic tasks: correct answers, seeds, and the count of a model's answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from psannlm.config.model import ModelConfig
from psannlm.data.corpus.documents import Document
from psannlm.data.memory_store import encode_documents
from psannlm.data.synthetic.algorithmic import MODULUS, TASKS, TaskName, write_task
from psannlm.errors import CorpusError
from psannlm.experiments.measures.task_accuracy import score_answers
from psannlm.models.registry import build_model, resolve
from psannlm.models.transformer import Transformer
from psannlm.tokenizers.char import CharTokenizer


def lines(name: TaskName, n_bytes: int = 20_000, seed: int = 1) -> list[str]:
    return [line.rstrip("\n") for line in write_task(name, seed, n_bytes)]


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_decides_everything_and_the_size_is_kept(name: TaskName) -> None:
    assert lines(name) == lines(name)
    assert lines(name) != lines(name, seed=2)
    assert lines(name, 10_000) == lines(name)[: len(lines(name, 10_000))]
    assert 9_800 < sum(len(line) + 1 for line in lines(name, 10_000)) <= 10_000


@pytest.mark.parametrize("name", TASKS)
def test_task_answer_follows_from_the_text_before_it(name: TaskName) -> None:
    """Two documents that agree up to an answer agree in it; elsewhere they need not."""
    after: dict[str, set[str]] = {}
    for line in lines(name, 40_000):
        places = TASKS[name].answers(line)
        assert len(places) > 0
        for place in places:
            # All that matters stands in the same group of bits, or anywhere before.
            known = re.split("[eo]", line[:place])[-1] if name == "parity" else line[:place]
            after.setdefault(known, set()).add(line[place])
    assert all(len(answers) == 1 for answers in after.values())


def test_addition_is_modular_without_repeated_pairs() -> None:
    """Neither the same pair nor the same one turned round may be learnt from and then asked for."""
    documents = lines("modular_addition", 10**6)
    assert len(documents) == MODULUS * (MODULUS + 1) // 2
    assert len({frozenset((line[0], line[2])) for line in documents}) == len(documents)
    totals = {(line[0], line[2]): line[4] for line in documents}
    zero = next(pair[0] for pair, total in totals.items() if pair[0] == pair[1] == total)
    # One added again and again goes round once, through every number of the ring.
    both = {**totals, **{(b, a): total for (a, b), total in totals.items()}}
    one = next(number for number in {a for a, _ in both} if number != zero)
    seen = [zero]
    for _ in range(MODULUS):
        seen.append(both[seen[-1], one])
    assert seen[-1] == zero
    assert len(set(seen)) == MODULUS


def test_parities_are_those_of_their_own_group() -> None:
    lengths = set()
    for line in lines("parity", 20_000):
        groups = re.findall("([01]+)=([eo])", line)
        assert "".join(f"{bits}={answer}" for bits, answer in groups) == line
        assert [line[place] for place in TASKS["parity"].answers(line)] == [answer for _, answer in groups]
        assert all(answer == "eo"[bits.count("1") % 2] for bits, answer in groups)
        lengths |= {len(bits) for bits, _ in groups}
    assert lengths == set(range(1, 9))


def test_copy_task_has_one_answer_per_letter() -> None:
    for line in lines("copying", 3_000):
        places = TASKS["copying"].answers(line)
        assert "".join(line[place] for place in places) * 2 == line.replace("|", "")


class Oracle(Transformer):
    """A model that predicts every next token except the given ones."""

    def __init__(self, texts: Sequence[str], tokenizer: CharTokenizer, missed: Sequence[tuple[int, int]]) -> None:
        config = ModelConfig(base="transformer", d_model=8, n_layers=1, n_heads=1, vocab_size=tokenizer.vocab_size)
        super().__init__(resolve(config, max_seq_len=64))
        self.texts, self.tokenizer, self.missed = list(texts), tokenizer, set(missed)

    def hidden_states(self, input_ids: Tensor, state: object = None, n_new: object = None) -> Tensor:
        return input_ids

    def logits(self, hidden: Tensor) -> Tensor:
        scores = torch.zeros(*hidden.shape, self.tokenizer.vocab_size)
        for row, ids in enumerate(hidden.tolist()):
            text = self.tokenizer.decode(ids[1:])
            index = next(at for at, known in enumerate(self.texts) if known.startswith(text[: len(known)]))
            for place, token in enumerate(self.tokenizer.encode(self.texts[index])):
                scores[row, place, token + ((index, place) in self.missed)] = 20.0
        return scores


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_every_answer_is_counted_once_and_nothing_else(batch_size: int) -> None:
    """Of three copies of different lengths, one answer is missed, and one place that is no answer."""
    texts = ["abcd|abcd", "xy|xy", "pqrst|pqrst"]
    tokenizer = CharTokenizer("")
    store = encode_documents([Document(text, "test") for text in texts], tokenizer)
    model = Oracle(texts, tokenizer, [(0, 8), (2, 1)])
    score = score_answers(model, store, tokenizer, TASKS["copying"].answers, batch_size=batch_size)
    assert (score.n_answers, score.n_documents) == (11, 3)
    assert score.right == pytest.approx(10 / 11)
    assert score.documents_right == pytest.approx(2 / 3)
    assert score.nats_per_answer == pytest.approx(20 / 11, rel=1e-4)


@pytest.mark.slow
def test_an_untrained_model_answers_by_chance() -> None:
    tokenizer = CharTokenizer("")
    documents = [Document(line, "test") for line in lines("modular_addition", 10**6)]
    config = ModelConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=tokenizer.vocab_size, max_seq_len=8)
    model = build_model(resolve(config), seed=1).eval()
    score = score_answers(model, encode_documents(documents, tokenizer), tokenizer, TASKS["modular_addition"].answers)
    assert score.right < 0.05
    assert score.nats_per_answer > 4


def test_documents_of_other_tokens_are_refused() -> None:
    tokenizer = CharTokenizer("")
    store = encode_documents([Document("äb|äb", "here")], tokenizer)
    model = Oracle(["äb|äb"], tokenizer, [])
    with pytest.raises(CorpusError, match="here: 7 tokens for 5 characters"):
        score_answers(model, store, tokenizer, TASKS["copying"].answers)


@pytest.mark.parametrize("name", TASKS)
def test_documents_of_another_task_are_refused(name: TaskName) -> None:
    tokenizer = CharTokenizer("")
    store = encode_documents([Document("once upon a time", "a tale")], tokenizer)
    with pytest.raises(CorpusError, match="a tale is not a document of this task: 'once upon a time'"):
        score_answers(Oracle(["once upon a time"], tokenizer, []), store, tokenizer, TASKS[name].answers)

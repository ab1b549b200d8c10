"""Log-likelihoods of continuations: those of the full forward pass, bit for bit the same in any batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from psannlm.errors import GenerationError
from psannlm.generation.engine import Engine
from psannlm.generation.quantize import WeightDtype
from psannlm.generation.scoring import Continuation, Scorer
from psannlm.models.transformer import Transformer
from psannlm.runtime.progress import Progress

Build = Callable[..., Transformer]


def examples(n: int = 24, longest: int = 60) -> list[Continuation]:
    generator = torch.Generator().manual_seed(0)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(1, most, (1,), generator=generator))
        return torch.randint(0, 17, (length,), generator=generator).tolist()

    found = [Continuation(ids(longest), ids(20)) for _ in range(n)]
    # Several last tokens after the same tokens share one pass.
    return [*found, *(Continuation(found[0].context, [*found[0].ids[:-1], token]) for token in range(17))]


@pytest.mark.parametrize("base", ["waveresnet", "respsann", "transformer"])
@torch.no_grad()
def test_scorer_matches_full_forward(base: str, build_tiny: Build) -> None:
    model = build_tiny(base=base, max_seq_len=200)
    greedy: list[int] = []
    for _ in range(5):
        hidden = model.hidden_states(torch.tensor([[1, 2, 3, *greedy]]))
        greedy.append(int(model.logits(hidden[:, -1]).argmax()))
    rows = [*examples(), Continuation([1, 2, 3], greedy)]
    for row, found in zip(rows, Scorer(Engine(model), 5).score(rows), strict=True):
        ids = torch.tensor([[*row.context, *row.ids]])
        logprobs = model.logits(model.hidden_states(ids))[0].double().log_softmax(-1)
        places = range(len(row.context) - 1, ids.shape[1] - 1)
        wanted = sum(float(logprobs[place, ids[0, place + 1]]) for place in places)
        assert found.logprob == pytest.approx(wanted, abs=1e-4)
        assert found.is_greedy == all(int(logprobs[place].argmax()) == int(ids[0, place + 1]) for place in places)
    assert found.is_greedy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_scorer_figures_do_not_depend_on_batch_size(dtype: WeightDtype, build_tiny: Build) -> None:
    engine = Engine(build_tiny(max_seq_len=200), dtype=dtype)
    rows = examples()
    alone = [Scorer(engine, 1).score([row])[0] for row in rows]
    for batch_size in (1, 3, 100):
        assert Scorer(engine, batch_size).score(rows) == alone


def test_scorer_probabilities_of_all_last_tokens_sum_to_one(build_tiny: Build) -> None:
    model = build_tiny(max_seq_len=200)
    rows = [Continuation([1, 2, 3], [token]) for token in range(17)]
    found = Scorer(Engine(model)).score(rows)
    assert sum(torch.tensor(likelihood.logprob).exp() for likelihood in found) == pytest.approx(1.0, abs=1e-6)
    assert sum(likelihood.is_greedy for likelihood in found) == 1


def test_scorer_long_context_loses_its_beginning(build_tiny: Build) -> None:
    model = build_tiny(max_seq_len=8)
    scorer = Scorer(Engine(model))
    long = Continuation([5, 6, 7, 8, 9, 10, 11, 12], [1, 2, 3])
    assert scorer.score([long]) == scorer.score([Continuation([7, 8, 9, 10, 11, 12], [1, 2, 3])])
    assert scorer.n_truncated == 1
    with pytest.raises(GenerationError, match=r"has 9 tokens, and the model's context is 8"):
        scorer.score([Continuation([1], [2] * 9)])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (Continuation([], [1]), "has no tokens"),
        (Continuation([1], []), "has no tokens"),
        (Continuation([1], [17]), "outside the vocabulary of 17"),
    ],
)
def test_scorer_invalid_continuations_raise(row: Continuation, said: str, build_tiny: Build) -> None:
    with pytest.raises(GenerationError, match=said):
        Scorer(Engine(build_tiny())).score([row])
    with pytest.raises(GenerationError, match="batch_size 0"):
        Scorer(Engine(build_tiny()), 0)


def test_scorer_beyond_memory_raises_before_work(build_tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(build_tiny(max_seq_len=200))
    monkeypatch.setattr("psannlm.generation.scoring.machine_memory_bytes", lambda: 10**5)
    rows = [Continuation([1] * 100, [token, 1]) for token in range(17)]
    with pytest.raises(GenerationError, match=r"17 rows of 101 tokens per pass need .*lower the batch size"):
        Scorer(engine, 10**6).score(rows)


def test_scoring_progress_counts_every_continuation(build_tiny: Callable[..., Transformer]) -> None:
    rows = [Continuation([1, 2], [3]), Continuation([1, 2], [4]), Continuation([1], [5, 6]), Continuation([7], [8])]
    seen: list[Progress] = []
    Scorer(Engine(build_tiny()), 2).score(rows, seen.append, "pack")
    assert [progress.done for progress in seen] == sorted({progress.done for progress in seen})
    assert (seen[-1].what, seen[-1].done, seen[-1].total) == ("pack", 4, 4)

"""Continuous batching: a scheduler whose rows join and leave the batch between two decoding steps.

A row gets the tokens that it would get alone, whatever joins or leaves: every pass gives a row the same sums in any
batch, a prompt in parts gives the same numbers as in one (``generation.engine``), and each row has settings and random
numbers of its own (``generation.rows``).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product, zip_longest

import torch
from torch import Tensor

from psannlm.generation.batch_decode import context_limit
from psannlm.generation.engine import Engine, whole_query_blocks
from psannlm.generation.logprobs import token_logprobs
from psannlm.generation.requests import SamplingConfig, TokenLogprob
from psannlm.generation.row_text import RowText, forbidden_ids
from psannlm.generation.rows import Row, RowBatch
from psannlm.models.attention import PREFILL_QUERIES
from psannlm.models.kv_cache import MAX_DECODE_TOKENS, KVCache
from psannlm.models.transformer import Transformer
from psannlm.serving.messages import Counters, GenerationRequest, RequestLimits, Update
from psannlm.tokenizers.base import Tokenizer

# Prompt tokens of one pass, the longest that other rows wait for a prompt while no more sequences wait for a row than
# decode. Whole blocks of queries, so that a prompt in
# parts gives the same numbers as in one. A pass over half as many costs a quarter more per token (29.9M parameters on a
# CPU with AVX2): reading and packing the weights takes as long as computing a hundred tokens.
PREFILL_CHUNK_TOKENS = 256
# Prompt tokens of one pass while more sequences wait for a free row than decode: longer passes, which fewer rows wait
# for, take less time per prompt (2 prompts of 96 tokens 40 ms, 8 of them 143 ms; the model and machine of below).
_CROWD_TOKENS = 1024
# Passes over whole prompts before a decoding step, in that case.
_MOST_PREFILL_PASSES = 4
# Decoding steps that prompts of less than half a pass wait for others to share it: a pass over one prompt of 96 tokens
# takes 26 ms, over two 33 ms, and a step of 15 rows 12 ms (29.9M parameters in bfloat16, two cores with AVX-512).
_MOST_WAITED_STEPS = 2
# Sequences that decode for each token that an event of a stream holds, and the most tokens of one. An event takes HTTP
# and its reader 0.1 ms of CPU time, which the engine lacks where all cores compute: 1.6 ms of a step of 16 rows, which
# takes 15 ms itself (the model of above). Sixteen streams get a part every 60 to 80 ms then.
_ROWS_PER_STREAMED_TOKEN, _MOST_STREAMED_TOKENS = 4, 4


class Handle:
    """A submitted sequence, as its submitter and the scheduler know it.

    Attributes:
        request: what was asked for.
        is_cancelled: whether nobody waits for the rest.
    """

    def __init__(
        self, request: GenerationRequest, on_update: Callable[[Update], None], after_updates: Callable[[], None]
    ) -> None:
        self.request, self.on_update, self.after_updates = request, on_update, after_updates
        self.is_cancelled = False
        self.n_prefilled = 0
        self.row: Row | None = None
        self.text: RowText | None = None
        self.update = Update()
        self.has_update = False
        self.prompt_logprobs: list[TokenLogprob] = []


def request_limits(model: Transformer, tokenizer: Tokenizer) -> RequestLimits:
    """Return what a sequence of ``model`` must keep to."""
    config, limit = model.config, context_limit(model)
    # A model may have more rows in its embedding than the tokenizer has entries: these ids are no text.
    vocab_size = min(config.vocab_size or 0, tokenizer.vocab_size)
    # With alibi a sequence has no limit, but a row of the cache has.
    return RequestLimits(vocab_size, limit or config.max_seq_len or 0, is_endless=limit is None)


class Scheduler:
    """Scheduler of sequences over one engine.

    One thread calls :meth:`step`; any thread may submit and cancel.

    Args:
        engine: the model.
        tokenizer: of the model.
        max_batch: most rows that decode at a time.
        speculate: most draft tokens per pass, which do not change the result.
        stream_interval: fewest tokens of an update of a streamed sequence but the first and the last; None: 1 while up
            to 4 sequences decode, and 4 from 13 on.

    Attributes:
        limits: what a sequence must keep to.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 16,
        speculate: int = 0,
        stream_interval: int | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.max_batch = engine, tokenizer, max_batch
        self._stream_interval = stream_interval
        self._limit = context_limit(engine.model)
        self.limits = request_limits(engine.model, tokenizer)
        # Slots for every row at full context, and for draft tokens behind it, so that nothing grows under load.
        capacity = self.limits.context + MAX_DECODE_TOKENS
        self._pool = engine.new_cache(max_batch, capacity)
        # One row for a prompt in parts, and some for several whole prompts.
        self._staging = engine.new_cache(1, capacity)
        self._group = engine.new_cache(min(max_batch, _CROWD_TOKENS // PREFILL_QUERIES), PREFILL_CHUNK_TOKENS)
        forbidden = torch.tensor(
            forbidden_ids(tokenizer, engine.model.config.vocab_size or 0), dtype=torch.long, device=engine.device
        )
        self._batch = RowBatch(
            engine, [], self._pool.view(0, 0), forbidden=forbidden, speculate=speculate, limit=self._limit
        )
        self._speculates = speculate > 0
        # An idle slot of a compiled step, whose batch size is fixed.
        self._idle = Row([0], max_new_tokens=0, sampling=SamplingConfig(temperature=0.0), eos_id=None)
        if engine.compiles:
            self._batch.rows, self._batch.cache = [self._idle] * max_batch, self._pool
        self._lock = threading.Condition()
        self._waiting: deque[Handle] = deque()
        # Several that one pass computes wholly, or one that is computed in parts.
        self._prefilling: list[Handle] = []
        self._n_waited_steps = 0
        self._decoding: dict[Row, Handle] = {}
        # Callbacks of those who were informed in this step, each once, in order.
        self._informed: dict[Callable[[], None], None] = {}
        self._n_generated = self._n_prompt_tokens = 0

    @torch.inference_mode()
    def warm_up(self, limit_s: float = 2.0) -> None:
        """Compile the steps, where steps are compiled, which takes up to a minute; then make passes of every size.

        On a CPU, oneDNN keeps 1 to 3 MB for each number of rows that a product has had: the memory of the server is
        flat once it has had them all.

        Args:
            limit_s: seconds after which no further pass begins, the compilation not counted.
        """
        if self.engine.compiles:
            for width in self._widths:
                self._decode_padding(self._pool, width)
        end = time.monotonic() + limit_s
        passes = self._padding_passes() if self.engine.device.type == "cpu" else ()
        for make_pass in passes:
            if time.monotonic() >= end:
                break
            make_pass()
        self._pool.clear()

    @property
    def _widths(self) -> set[int]:
        """Tokens per row of a decoding pass: one, or with as many draft tokens as there may be."""
        return {1, 1 + self._batch.speculate}

    def _padding_passes(self) -> Iterator[Callable[[], object]]:
        """Yield a pass of each size over padding, those of few tokens first."""
        decoded = [] if self.engine.compiles else product(range(1, self.max_batch + 1), self._widths)
        steps = [partial(self._decode_padding, self._pool.view(0, n), width) for n, width in decoded]
        joined = [partial(self._choose_padding, n) for n in range(1, len(self._group.lengths) + 1)]
        prompts = [
            partial(self._prefill_padding, self._group.view(0, n), n_tokens // n)
            for n_tokens in range(PREFILL_QUERIES, _CROWD_TOKENS + 1, PREFILL_QUERIES)
            if (n := self._fewest_rows(n_tokens))
        ]
        scored = [
            partial(self._score_padding, n) for n in range(PREFILL_QUERIES, PREFILL_CHUNK_TOKENS + 1, PREFILL_QUERIES)
        ]
        for together in zip_longest(steps, prompts, joined, scored):
            yield from (make_pass for make_pass in together if make_pass is not None)

    def _decode_padding(self, cache: KVCache, n_tokens: int) -> None:
        ids = torch.zeros(len(cache.lengths), n_tokens, dtype=torch.long, device=self.engine.device)
        self.engine.forward_tokens(ids, cache)
        cache.commit([0] * len(cache.lengths))

    def _prefill_padding(self, cache: KVCache, n_tokens: int) -> None:
        cache.clear()
        self.engine.extend([[0] * n_tokens] * len(cache.lengths), cache)

    def _choose_padding(self, n_rows: int) -> None:
        self.engine.next_logits(torch.zeros(n_rows, self.engine.model.config.d_model, device=self.engine.device))

    def _score_padding(self, n_tokens: int) -> None:
        self.engine.model.logits(torch.zeros(1, n_tokens, self.engine.model.config.d_model, device=self.engine.device))

    def _fewest_rows(self, n_tokens: int) -> int:
        """Return the fewest rows of whole prompts whose pass has ``n_tokens``; 0: it cannot have them."""
        longest = min(PREFILL_CHUNK_TOKENS, whole_query_blocks(self.limits.context))
        fitting = (n for n in range(1, len(self._group.lengths) + 1) if n_tokens % (n * PREFILL_QUERIES) == 0)
        return next((n for n in fitting if n_tokens // n <= longest), 0)

    @property
    def counters(self) -> Counters:
        """Sequences that wait for a row, sequences whose prompt is computed or that decode, and tokens so far."""
        n_running = len(self._decoding) + len(self._prefilling)
        return Counters(len(self._waiting), n_running, self._n_generated, self._n_prompt_tokens)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._decoding or self._prefilling)

    def submit(
        self,
        requests: Sequence[GenerationRequest],
        on_update: Callable[[int, Update], None],
        after_updates: Callable[[], None] = lambda: None,
    ) -> list[Handle]:
        """Queue sequences, all or none, and return their handles.

        Args:
            on_update: called in the thread of :meth:`step` with (number in ``requests``, what steps have added).
            after_updates: called in that thread once all updates of a step are out.

        Raises:
            GenerationError: a request is refused.
        """
        for request in requests:
            self.limits.check(request)

        def listener(number: int) -> Callable[[Update], None]:
            return lambda update: on_update(number, update)

        handles = [Handle(request, listener(number), after_updates) for number, request in enumerate(requests)]
        with self._lock:
            self._waiting.extend(handles)
            self._lock.notify_all()
        return handles

    def cancel(self, handles: Sequence[Handle]) -> None:
        """Drop sequences: the next step frees their rows."""
        with self._lock:
            for handle in handles:
                handle.is_cancelled = True
            self._lock.notify_all()

    def wait_for_work(self, timeout_s: float) -> None:
        """Return once there is work, or after ``timeout_s``."""
        with self._lock:
            self._lock.wait_for(lambda: self.has_work, timeout_s)

    @torch.inference_mode()
    def step(self) -> None:
        """Drop cancelled sequences, compute a pass over prompts or some, then one over the decoding rows."""
        self._drop_cancelled()
        for _ in range(0 if self._await_company() else _MOST_PREFILL_PASSES):
            for handle in self._prefill():
                self._publish(handle)
            # Before the next pass, so that the first tokens do not wait for it.
            self._end_updates()
            # A pass over few rows takes hardly less time than one over many: the others join first.
            n_joining = min(len(self._waiting), self.max_batch - len(self._decoding))
            if self._prefilling or n_joining <= len(self._decoding):
                break
        if self._decoding:
            logits = self._batch.forward()
            rows = list(self._batch.rows)
            for slot, token in self._batch.settle(logits):
                self._add_token(self._decoding[rows[slot]], token)
            for handle in self._decoding.values():
                self._publish(handle)
            self._remove([slot for slot, row in enumerate(rows) if row.is_finished and row is not self._idle])
        self._end_updates()

    def fail_all(self, error: Exception) -> None:
        """End every sequence with ``error``, after the tokens that it has."""
        with self._lock:
            handles = [*self._waiting, *self._prefilling]
            self._waiting.clear()
        handles += self._decoding.values()
        for handle in handles:
            if handle.update.ids:
                self._tell(handle, handle.update)
        self._prefilling = []
        self._remove([slot for slot, row in enumerate(self._batch.rows) if row is not self._idle])
        for handle in handles:
            self._tell(handle, Update(error=error))
        self._end_updates()

    def _drop_cancelled(self) -> None:
        with self._lock:
            if any(handle.is_cancelled for handle in self._waiting):
                self._waiting = deque(handle for handle in self._waiting if not handle.is_cancelled)
        self._prefilling = [handle for handle in self._prefilling if not handle.is_cancelled]
        rows = self._batch.rows
        self._remove(
            [slot for slot, row in enumerate(rows) if row in self._decoding and self._decoding[row].is_cancelled]
        )

    def _await_company(self) -> bool:
        """Whether the waiting prompts, little work for a pass, wait for more of them while the other rows decode."""
        n_free = self.max_batch - len(self._decoding)
        waits = False
        if self._waiting and self._decoding and not self._prefilling and self._n_waited_steps < _MOST_WAITED_STEPS:
            with self._lock:
                prompts = [handle.request.prompt for handle, _ in zip(self._waiting, range(n_free), strict=False)]
            waits = 0 < 2 * sum(whole_query_blocks(len(prompt)) for prompt in prompts) < PREFILL_CHUNK_TOKENS
        self._n_waited_steps = self._n_waited_steps + 1 if waits else 0
        return waits

    def _prefill(self) -> list[Handle]:
        """Make one pass over prompts; return the sequences whose prompts it has completed."""
        handles = self._prefilling or self._take_next()
        if not handles:
            return []
        first = handles[0].n_prefilled
        parts = [handle.request.prompt[first : first + PREFILL_CHUNK_TOKENS] for handle in handles]
        cache = self._staging
        if first + len(parts[0]) == len(handles[0].request.prompt) <= PREFILL_CHUNK_TOKENS:
            cache = self._group.view(0, len(handles))
        if not first:
            cache.clear()
        hidden = self.engine.extend(parts, cache)
        for at, (handle, part) in enumerate(zip(handles, parts, strict=True)):
            if handle.request.scores_prompt:
                self._score(handle, hidden[at : at + 1], len(part))
            handle.n_prefilled += len(part)
            self._n_prompt_tokens += len(part)
        if handles[0].n_prefilled < len(handles[0].request.prompt):
            return []
        self._complete(handles, hidden, [len(part) - 1 for part in parts], cache)
        self._prefilling = []
        return handles

    def _take_next(self) -> list[Handle]:
        """Take the next waiting sequences: as many as one pass over whole prompts holds, or a longer one alone."""
        n_free, longest = self.max_batch - len(self._decoding), 0
        with self._lock:
            is_crowd = min(len(self._waiting), n_free) > len(self._decoding)
            n_most = _CROWD_TOKENS if is_crowd else PREFILL_CHUNK_TOKENS
            while self._waiting and len(self._prefilling) < n_free:
                longest = max(longest, whole_query_blocks(len(self._waiting[0].request.prompt)))
                n_tokens = longest * (len(self._prefilling) + 1)
                if self._prefilling and (n_tokens > n_most or longest > PREFILL_CHUNK_TOKENS):
                    break
                self._prefilling.append(self._waiting.popleft())
        for handle in self._prefilling:
            self._start(handle)
        return self._prefilling

    def _start(self, handle: Handle) -> None:
        request = handle.request
        handle.text = RowText(self.tokenizer, request.prompt, request.stop)
        handle.row = Row(
            request.prompt,
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            eos_id=self.tokenizer.eos_id,
            context=self._limit,
            speculates=self._speculates,
            n_top=request.n_top,
        )

    def _complete(self, handles: Sequence[Handle], hidden: Tensor, last: Sequence[int], cache: KVCache) -> None:
        """Choose the first tokens of prefilled rows, and let those join the batch that have not ended with them.

        Args:
            hidden: states (B, T, D) of the last pass.
            last: index in T of each row's last token.
            cache: of these rows.
        """
        rows = []
        for handle in handles:
            assert handle.row is not None
            rows.append(handle.row)
            if handle.request.scores_prompt:
                handle.update.prompt_logprobs = handle.prompt_logprobs
        if not all(row.is_finished for row in rows):
            at = torch.arange(len(rows), device=hidden.device)
            logits = self.engine.next_logits(hidden[at, torch.tensor(last, device=hidden.device)])
            batch = RowBatch(self.engine, rows, cache, forbidden=self._batch.forbidden)
            for slot, token in batch.settle(logits.unsqueeze(1)):
                self._add_token(handles[slot], token)
        joining = [slot for slot, row in enumerate(rows) if not row.is_finished]
        if joining:
            self._join([rows[slot] for slot in joining], cache if len(joining) == len(rows) else cache.select(joining))
            self._decoding.update({rows[slot]: handles[slot] for slot in joining})

    def _score(self, handle: Handle, hidden: Tensor, n_tokens: int) -> None:
        """Record the log probabilities of the prompt's tokens that follow the ``n_tokens`` of ``hidden``."""
        following = list(handle.request.prompt[handle.n_prefilled + 1 : handle.n_prefilled + 1 + n_tokens])
        if following:
            # In whole blocks: few sizes of products, of which each takes memory (`warm_up`).
            logits = self.engine.model.logits(hidden[:, : whole_query_blocks(len(following))])[:, : len(following)]
            handle.prompt_logprobs += token_logprobs(logits, [following], handle.request.n_top or 0)[0]

    def _join(self, rows: Sequence[Row], cache: KVCache) -> None:
        """Copy prefilled rows, which ``cache`` holds, into slots of the batch."""
        batch = self._batch
        if self.engine.compiles:
            slots = [slot for slot, row in enumerate(batch.rows) if row is self._idle][: len(rows)]
            for slot, row in zip(slots, rows, strict=True):
                batch.rows[slot] = row
            self._pool.copy_rows_(slots, cache)
            return
        lengths = [*batch.cache.lengths, *cache.lengths]
        self._pool.copy_rows_(range(len(batch.rows), len(lengths)), cache)
        batch.rows += rows
        self._show(lengths)

    def _remove(self, slots: Sequence[int]) -> None:
        """Free slots of the batch."""
        batch = self._batch
        for slot in sorted(slots, reverse=True):
            del self._decoding[batch.rows[slot]]
            if self.engine.compiles:
                batch.rows[slot] = self._idle
                self._pool.lengths[slot] = 0
                self._pool.offsets[slot] = 0
                continue
            # The last row moves into the gap, so that the rows stay the first of the pool: no other one is copied.
            last = len(batch.rows) - 1
            if slot < last:
                batch.cache.copy_row_within_(last, slot)
                batch.rows[slot] = batch.rows[last]
            batch.rows.pop()
            self._show(batch.cache.lengths[:last])

    def _show(self, lengths: list[int]) -> None:
        """Set the cache of the batch to the first rows of the pool."""
        self._batch.cache = self._pool.view(0, len(lengths))
        self._batch.cache.lengths = lengths

    def _add_token(self, handle: Handle, token: int) -> None:
        """Add a token that its row has got to the sequence's text; a stop text ends the row."""
        row, text, update = handle.row, handle.text, handle.update
        assert row is not None
        assert text is not None
        self._n_generated += 1
        update.ids.append(token)
        update.offsets.append(text.n_certain)
        if row.n_top is not None:
            update.logprobs.append(row.logprobs[-1])
        update.text += text.add(token)
        if text.stop_text is not None:
            row.finish()

    def _publish(self, handle: Handle) -> None:
        """Pass what steps have added to the submitter if it is due, with the end of the text if the row has ended."""
        row, text, update = handle.row, handle.text, handle.update
        assert row is not None
        assert text is not None
        if row.is_finished:
            n_returned = text.n_returned
            whole, update.stop_text = text.end(row.generated)
            update.text += whole[n_returned:]
            update.finish_reason = row.finish_reason if update.stop_text is None else "stop"
            update.end_logprob = row.end_logprob
        elif not self._is_due(handle):
            return
        if update.ids or update.text or update.is_last:
            handle.update, handle.has_update = Update(), True
            self._tell(handle, update)

    def _is_due(self, handle: Handle) -> bool:
        """Whether a sequence that continues has an update: its first token, and then the tokens of an event."""
        if not handle.has_update:
            return True
        if not handle.request.is_streamed:
            return False
        interval = self._stream_interval
        if interval is None:
            interval = min(_MOST_STREAMED_TOKENS, -(-len(self._decoding) // _ROWS_PER_STREAMED_TOKEN))
        return len(handle.update.ids) >= interval

    def _tell(self, handle: Handle, update: Update) -> None:
        if not handle.is_cancelled:
            handle.on_update(update)
            self._informed[handle.after_updates] = None

    def _end_updates(self) -> None:
        """Call back those who were informed in this step."""
        informed, self._informed = self._informed, {}
        for after_updates in informed:
            after_updates()

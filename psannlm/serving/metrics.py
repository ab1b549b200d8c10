"""Metrics in the form of Prometheus."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from psannlm.serving.messages import Counters

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of their own.

    Attributes:
        first_token_s: seconds from a request to its first token.
        request_s: seconds from a request to the end of its answer.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "psannlm_requests", "Completion requests by HTTP status.", ["status"], registry=self._registry
        )
        self.first_token_s = Histogram(
            "psannlm_time_to_first_token_seconds",
            "Seconds from a completion request to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.request_s = Histogram(
            "psannlm_request_seconds",
            "Seconds from a completion request to the end of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._waiting = Gauge("psannlm_queue_sequences", "Sequences that wait for a row.", registry=self._registry)
        self._running = Gauge("psannlm_batch_sequences", "Sequences that are computed.", registry=self._registry)
        self._generated = Gauge("psannlm_generated_tokens_total", "Tokens generated.", registry=self._registry)
        self._prompts = Gauge("psannlm_prompt_tokens_total", "Prompt tokens computed.", registry=self._registry)

    def count_request(self, status: int) -> None:
        """Count a completion request that was answered with ``status``."""
        self._requests.labels(str(status)).inc()

    def render(self, counters: Counters) -> tuple[bytes, str]:
        """Return the text and its media type."""
        self._waiting.set(counters.n_waiting)
        self._running.set(counters.n_running)
        self._generated.set(counters.n_generated)
        self._prompts.set(counters.n_prompt_tokens)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

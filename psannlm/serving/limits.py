"""Limits of the server on requests, connections and time."""

from __future__ import annotations

MAX_BODY_BYTES = 1 << 20
# Choices of one request: prompts times n.
MAX_CHOICES = 128
MAX_N = 64
# New tokens of a sequence where a request does not say, as in OpenAI's API; fewer where the server's limit is lower.
DEFAULT_MAX_TOKENS = 16
MAX_LOGPROBS = 5
# Seconds for the request line and headers, and for the body after them; slower clients are dropped.
HEADER_TIMEOUT_S = 10.0
BODY_TIMEOUT_S = 30.0
KEEP_ALIVE_S = 30
# Seconds in which a client must read something of an answer that waits to be sent.
STALL_TIMEOUT_S = 60.0
# Seconds that open requests have to end after SIGTERM; then those left are cut off, which takes a few seconds more: all
# in 30.
DRAIN_TIMEOUT_S = 25.0
# Seconds between the comments that keep a silent stream alive through proxies.
PING_S = 15

"""Limits of the server on requests, connections and time."""

from __future__ import annotations

MAX_BODY_BYTES = 1 << 20
# Choices of one request: prompts times n.
MAX_CHOICES = 128
MAX_N = 64
MAX_LOGPROBS = 5
# Seconds for the request line and headers, and for the body after them; slower clients are dropped.
HEADER_TIMEOUT_S = 10.0
BODY_TIMEOUT_S = 30.0
KEEP_ALIVE_S = 30
# Seconds that open requests have to end after SIGTERM.
DRAIN_TIMEOUT_S = 30.0
# Seconds between the comments that keep a silent stream alive through proxies.
PING_S = 15

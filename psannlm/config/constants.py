"""Numbers that several packages must agree on."""

from __future__ import annotations

# Label of a position that is not a target (padding, BOS); the default ``ignore_index`` of torch's cross-entropy.
IGNORE_INDEX = -100

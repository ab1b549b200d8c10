"""Numbers and names that several packages must agree on."""

from __future__ import annotations

from typing import Literal

# Label of a position that is not a target (padding, BOS); the default ``ignore_index`` of torch's cross-entropy.
IGNORE_INDEX = -100

# Task packs, and names that stand for several of them.
TaskPack = Literal[
    "psannlm_agreement",
    "psannlm_negation",
    "psannlm_number",
    "psannlm_pairs",
    "psannlm_modular_addition",
    "psannlm_parity",
    "psannlm_copying",
    "psannlm_algorithmic",
    "psannlm_last_word",
]

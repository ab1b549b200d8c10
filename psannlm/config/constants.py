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

# Bits of quantized activations, fewest and most.
ACTIVATION_BITS = (2, 16)
# Inputs of matrix products with weights. `qkv_features` is the input of a FAN layer before the projections, in models
# that have one. `gate_up` is the input of the up projection, and of the gate where there is one.
MatrixPlace = Literal["qkv_features", "qkv", "attention_output", "gate_up", "down", "head"]

"""The language model: blocks, KV cache, positions, model files, parameter counts and memory estimates.

Tensor letters in docstrings of the whole library, one meaning each:

    B   batch (rows)
    T   query tokens: the new tokens of a forward pass
    S   key tokens: cached and new ones, or slots of a cache
    H   attention (query) heads
    G   key/value heads
    K   features of a head (head dim)
    D   features of the residual stream (d_model)
    F   hidden features of a feed-forward (d_mlp)
    V   vocabulary
    W   taps of a short convolution

A plain matrix product is (M, In) x (In, Out); M is all leading dimensions together, usually B * T. A module that
needs another letter defines it in its own docstring.
"""

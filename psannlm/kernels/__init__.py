"""Hand-written kernels: which implementation runs on which device and in which mode, and its measured gain.

The model calls one function per idea; this table lists what it dispatches to. Gains are those of docs/research/log.md
with the date of the entry, measured on one or two CPU cores: "before -> after" against torch's default operator. "Not
measured": no entry measures this implementation alone.

| idea | device, mode | implementation | measured gain |
|---|---|---|---|
| linear layer | CPU, float32 training, AMD, AVX-512 | `onednn.linear`, compiled too | compiled step +4 % (11-30) |
| linear layer | else in training | `F.linear` | default |
| linear layer | CPU, decoding, float32 | oneDNN, reordered weight | step of 1 row: 9.95 -> 5.52 ms (11-24) |
| linear layer | CPU, decoding, bfloat16 | oneDNN, reordered weight | step of 1 row: 5.23 -> 3.38 ms (11-24) |
| linear layer | CPU, decoding, int8 | `torch_private.int8_matmul` | step of 1 row: 1.46 ms, 8 rows: 3.63 ms (11-24) |
| linear layer | CPU, compiled decoding | `cpu_decoding.few_row_linear` | bfloat16, 8 rows: 7.1 -> 3.9 ms (12-01) |
| matrices | CPU, Linux, decoding | `huge_pages` | bfloat16 step of 8 rows: 6.97 -> 6.61 ms (11-30) |
| attention | CPU, bfloat16 training | `blocked_attention` | layer 30.5 -> 17.3 ms, step 708 -> 657 ms (11-25) |
| attention | CPU, compiled training | `blocked_attention` | float32 layer 78 -> 49 ms, bfloat16 54 -> 42 ms (11-30) |
| attention | CPU, prefill | SDPA, 32 queries at a time, float32 | not measured; makes rows batch-invariant |
| attention | CPU, decoding | SDPA, keys and values widened | bfloat16, 320 slots: 276 -> 43 us (11-24) |
| attention | CPU, compiled decoding | `cpu_decoding.few_query_attention` | the same: 3.9 -> 3.3 ms (12-01) |
| attention | GPU, compiled decoding | float32 reductions with `realize` | not measured |
| attention | else | SDPA | default |
| short convolution | CPU, float32 activations, training | `recompute.fused_norm_conv` | not measured alone |
| short convolution | 16 tokens or fewer, or compiled | sum over taps | not measured |
| short convolution | else | `F.conv1d` | default |
| damped sine | CPU, training | `recompute.fused_sine_down_proj`, blocks in cache | not measured alone |
| damped sine | CPU, compiled | formula with `realize` | bfloat16 backward 7.05 -> 3.29 ns an element (11-26) |
| damped sine | GPU | formula, compiled also in an uncompiled model | not measured |
| GELU, SiLU | CPU, training | `recompute.fused_act_down_proj` | not measured alone |
| other activations | all | plain formulas of `models.activations`, which a compiler fuses | default |
| output layer and loss | CPU, training | `cross_entropy`, chunks of 8 MiB, in place | not measured alone |
| output layer and loss | GPU, training | `cross_entropy`, chunks of 128 MiB, compiled | not measured |

Together the CPU training passes of 11-24 (fused norm and convolution, recomputation in the feed-forward, in-place sine
and loss, oneDNN) took `waveresnet` from 0.94 to 1.02-1.05 times the speed of transformers' Llama in float32, and from
0.93 to 0.99 in bfloat16.
"""

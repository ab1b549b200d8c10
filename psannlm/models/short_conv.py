"""Short causal depthwise convolution over time, added to its input, with a state for decoding.

Applied to the normalised inputs of attention and feed-forward, as in Canon layers (arXiv 2512.17351); a block may have
one at either place or both. Causal dilated convolutions after WaveNet (van den Oord et al. 2016, arXiv 1609.03499);
carrying the last inputs through decoding after Griffin (De et al. 2024, arXiv 2402.19427). Letters as in
``psannlm.models``; R is the length of the state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.config.model import ModelConfig
from psannlm.models.activations import SineActivation
from psannlm.models.kv_cache import MAX_DECODE_TOKENS


class ShortConv(nn.Module):
    """x + act(conv(x)), where output t depends on inputs t, t - dilation, ... t - (W - 1) dilation, and none later.

    Uncompiled training on a CPU computes the same with ``kernels.recompute.fused_norm_conv`` instead. The kernel starts
    at zero, so that the module starts as the identity.
    """

    def __init__(self, config: ModelConfig, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.state_length = (config.short_conv.kernel_size - 1) * dilation
        self.weight = nn.Parameter(torch.zeros(config.d_model, config.short_conv.kernel_size))
        # The kernel as (W, D), contiguous, in a model prepared for inference.
        self.taps: Tensor | None = None
        self.has_activation = config.short_conv.activation == "sine"
        self.activation: nn.Module = nn.Identity()
        if self.has_activation:
            self.activation = SineActivation(config.d_model, config.sine_params)

    def forward(
        self, x: Tensor, conv_state: Tensor | None = None, document_positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve (B, T, D) over time.

        Args:
            x: the new inputs.
            conv_state: (B, R, D), the inputs before them; None: x starts the sequence, and zeros precede it.
            document_positions: (B, T) of each input in its document, which zeros precede; None: one document per row.

        Returns:
            The output (B, T, D), and all inputs (B, R + T, D): the state followed by x.
        """
        if conv_state is None:
            inputs = F.pad(x, (0, 0, self.state_length, 0))
        else:
            # Rounded to the state's dtype, so that results do not depend on how a sequence was split into passes.
            inputs = torch.cat((conv_state, x.to(conv_state.dtype)), dim=1).to(x.dtype)
        taps = self.weight.t().to(x.dtype) if self.taps is None else self.taps
        if document_positions is not None:
            # mixed[t] = sum over w of inputs[t + w * dilation] * taps[w], where that input is of the same document.
            mixed = torch.zeros_like(x)
            for tap, weight in enumerate(taps):
                at, reach = tap * self.dilation, self.state_length - tap * self.dilation
                is_inside = (document_positions >= reach).unsqueeze(-1)
                mixed = mixed + inputs[:, at : at + x.shape[1]].where(is_inside, 0) * weight
        elif x.shape[1] == 1:
            mixed = (inputs[:, :: self.dilation] * taps).sum(1, keepdim=True)
        elif x.shape[1] <= MAX_DECODE_TOKENS or (conv_state is None and torch.compiler.is_compiling()):
            # mixed[t] = sum over w of inputs[t + w * dilation] * taps[w]. For few tokens setting up a convolution costs
            # more than these sums; a compiler fuses them with the norm before.
            starts = (self.dilation * tap for tap in range(len(taps)))
            mixed = sum((inputs[:, at : at + x.shape[1]] * tap for at, tap in zip(starts, taps, strict=True)))
        else:
            mixed = F.conv1d(
                _channels_first(inputs),
                self.weight.unsqueeze(1).to(x.dtype),
                dilation=self.dilation,
                groups=self.weight.shape[0],
            ).transpose(1, 2)
        return x + self.activation(mixed), inputs


def _channels_first(inputs: Tensor) -> Tensor:
    """Return (B, R + T, D) as (B, D, R + T), the layout that ``F.conv1d`` takes.

    A transposed view counts as channels-last, which a GPU passes to cuDNN, and cuDNN multiplies float32 in TF32 (ten
    bits) by default. A contiguous copy goes to torch's own depthwise kernel, which computes in float32.
    """
    transposed = inputs.transpose(1, 2)
    is_float32 = transposed.dtype == torch.float32 and not torch.is_autocast_enabled(transposed.device.type)
    return transposed.contiguous() if transposed.is_cuda and is_float32 else transposed

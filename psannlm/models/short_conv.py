"""Wave mixing: a short causal depthwise convolution over time, added to its input; its tail is decoding state.

Causal dilated convolutions after WaveNet (van den Oord et al. 2016, arXiv 1609.03499); carrying the last inputs through
decoding after Griffin (De et al. 2024, arXiv 2402.19427). Letters: B rows, T tokens, D width, R tail length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.config.model import ModelConfig
from psannlm.models.activations import SineActivation

_FEW_TOKENS = 16


class ShortConv(nn.Module):
    """x + act(conv(x)), where output t sees inputs t, t - dilation, ... t - (kernel - 1) dilation, and none later.

    The kernel starts at zero, so the module starts as the identity.
    """

    def __init__(self, config: ModelConfig, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.tail_length = (config.short_conv.kernel_size - 1) * dilation
        self.weight = nn.Parameter(torch.zeros(config.d_model, config.short_conv.kernel_size))
        # The kernel tap by tap, (kernel, D), in a model packed for inference.
        self.taps: Tensor | None = None
        self.has_activation = config.short_conv.activation == "sine"
        self.activation: nn.Module = nn.Identity()
        if self.has_activation:
            self.activation = SineActivation(config.d_model, config.sine_params)

    def forward(self, x: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mix (B, T, D) over time.

        Args:
            x: the new inputs.
            tail: (B, R, D), the inputs before them; None means that x starts the sequence.

        Returns:
            The mixed (B, T, D), and the history (B, R + T, D): the tail followed by x.
        """
        if tail is None:
            history = F.pad(x, (0, 0, self.tail_length, 0))
        else:
            # Rounded as in the tail, so that it is all one whether a token's past was seen before or comes with it.
            history = torch.cat((tail, x.to(tail.dtype)), dim=1).to(x.dtype)
        taps = self.weight.t().to(x.dtype) if self.taps is None else self.taps
        if x.shape[1] == 1:
            mixed = (history[:, :: self.dilation] * taps).sum(1, keepdim=True)
        elif x.shape[1] <= _FEW_TOKENS or (tail is None and torch.compiler.is_compiling()):
            # Tap by tap: to set up a convolution costs more than these sums, and a compiler fuses them with the norm.
            reach = (self.dilation * tap for tap in range(len(taps)))
            mixed = sum((history[:, at : at + x.shape[1]] * tap for at, tap in zip(reach, taps, strict=True)))
        else:
            mixed = F.conv1d(
                _by_feature(history),
                self.weight.unsqueeze(1).to(x.dtype),
                dilation=self.dilation,
                groups=self.weight.shape[0],
            ).transpose(1, 2)
        return x + self.activation(mixed), history


def _by_feature(history: Tensor) -> Tensor:
    """(B, R + T, D) as the (B, D, R + T) that a convolution takes.

    A view of it counts as channels-last, which a GPU hands to cuDNN, and cuDNN multiplies float32 in TF32 unless told
    otherwise: ten bits. Laid out anew, it meets torch's own depthwise kernel, which keeps to float32.
    """
    turned = history.transpose(1, 2)
    is_float32 = turned.dtype == torch.float32 and not torch.is_autocast_enabled(turned.device.type)
    return turned.contiguous() if turned.is_cuda and is_float32 else turned

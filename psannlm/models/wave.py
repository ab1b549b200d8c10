"""Wave mixing: a short causal depthwise convolution over time, added to its input; its tail is decoding state.

Causal dilated convolutions after WaveNet (van den Oord et al. 2016, arXiv 1609.03499); carrying the last inputs through
decoding after Griffin (De et al. 2024, arXiv 2402.19427). Letters: B rows, T tokens, D width, R tail length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from psannlm.config.model import ModelConfig
from psannlm.models.sine import SineActivation


class Wave(nn.Module):
    """x + act(conv(x)), where output t sees inputs t, t - dilation, ... t - (kernel - 1) dilation, and none later.

    The kernel starts at zero, so the module starts as the identity.
    """

    def __init__(self, config: ModelConfig, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.tail_length = (config.wave.kernel_size - 1) * dilation
        self.weight = nn.Parameter(torch.zeros(config.d_model, config.wave.kernel_size))
        is_sine = config.wave.activation == "sine"
        self.activation = SineActivation(config.d_model, config.sine_params) if is_sine else nn.Identity()

    def forward(
        self, x: Tensor, tail: Tensor | None = None, n_new: list[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Mix (B, T, D) over time.

        Args:
            x: the new inputs.
            tail: (B, R, D), the inputs before them; None means that x starts the sequence and no tail is wanted.
            n_new: how many of a row's T inputs are real, when not all are.

        Returns:
            The mixed (B, T, D), and the next tail (or None if none was given).
        """
        if tail is None:
            history = F.pad(x, (0, 0, self.tail_length, 0))
        else:
            history = torch.cat((tail.to(x.dtype), x), dim=1)
        if x.shape[1] == 1:
            taps = history[:, :: self.dilation]
            mixed = (taps * self.weight.t().to(x.dtype)).sum(1, keepdim=True)
        else:
            mixed = F.conv1d(
                history.transpose(1, 2),
                self.weight.unsqueeze(1).to(x.dtype),
                dilation=self.dilation,
                groups=self.weight.shape[0],
            ).transpose(1, 2)
        out = x + self.activation(mixed)
        return out, None if tail is None else self._next_tail(history, n_new).to(tail.dtype)

    def _next_tail(self, history: Tensor, n_new: list[int] | None) -> Tensor:
        """The last R real inputs of each row of ``history`` (B, R + T, D)."""
        if n_new is None:
            return history[:, history.shape[1] - self.tail_length :]
        first = torch.tensor(n_new, device=history.device)[:, None]
        index = first + torch.arange(self.tail_length, device=history.device)
        return history.gather(1, index.unsqueeze(-1).expand(-1, -1, history.shape[-1]))

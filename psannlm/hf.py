"""psannlm's classes for transformers: importing this module lets its Auto classes load exported folders.

``AutoModelForCausalLM.from_pretrained(folder)`` then needs no ``trust_remote_code``. Needs the extra ``hf``.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from psannlm.export.configuration_psannlm import PsannLMConfig
from psannlm.export.modeling_psannlm import PsannLMForCausalLM, PsannLMModel

AutoConfig.register(PsannLMConfig.model_type, PsannLMConfig, exist_ok=True)
AutoModel.register(PsannLMConfig, PsannLMModel, exist_ok=True)
AutoModelForCausalLM.register(PsannLMConfig, PsannLMForCausalLM, exist_ok=True)

__all__ = ["PsannLMConfig", "PsannLMForCausalLM", "PsannLMModel"]

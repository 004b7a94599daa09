"""`FusedModel`: a fused decoder in the form in which programs call a model of transformers.

Letters: B batch, T sequence, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from lit_logits.modules.dynamic_fusion.fused_lm import FusedCausalLM
from lit_logits.modules.dynamic_fusion.inputs import context_of

__all__ = ["FusedModel"]


class FusedModel(nn.Module):
    """Has what evaluation programs ask of a causal language model: its output, `generate`, config and device.

    Args:
        fused: large model, base and experts.
        eos_token_id: ids that end a text, if not those of the large model.
    """

    def __init__(self, fused: FusedCausalLM, eos_token_id: int | list[int] | None = None) -> None:
        super().__init__()
        self.fused, self.eos_token_id = fused, eos_token_id

    @property
    def config(self) -> PretrainedConfig:
        """The large model's."""
        return self.fused.large.config

    @property
    def device(self) -> torch.device:
        """The large model's, where inputs go."""
        return self.fused.large.device

    @property
    def context(self) -> int | None:
        """Tokens that all models can read, or None if none of them tells."""
        found = [context_of(model.config) for model in self.fused.models]
        return min((size for size in found if size is not None), default=None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CausalLMOutput:
        """Return fused logits (B, T, V) in nats, as `logits` of an output of transformers."""
        return CausalLMOutput(logits=self.fused(input_ids, attention_mask))

    def generate(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Continue prompts; see `FusedCausalLM.generate`."""
        if self.eos_token_id is not None:
            kwargs.setdefault("eos_token_id", self.eos_token_id)
        return self.fused.generate(input_ids, attention_mask, **kwargs)

    def tie_weights(self) -> None:
        """Do nothing: the models are as they were loaded."""

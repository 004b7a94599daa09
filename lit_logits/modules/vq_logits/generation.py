"""Generation without token logits, for heads with `greedy` and `sample` of their own.

Letters: B batch, T sequence.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_logits.contracts import DecodingHead
from lit_logits.functional.vq_decoding import sample_logits
from lit_logits.modules.language_models.calls import check_left_padding, read_with_cache
from lit_logits.modules.language_models.probes import OutputRule

__all__ = ["VQGeneration", "continue_prompts"]


def continue_prompts(
    backbone: nn.Module,
    head: DecodingHead | nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    hidden_scale: float = 1.0,
) -> Tensor:
    """Continue prompts with a KV cache, a token at a time, by the head's `greedy` or `sample`.

    Args:
        backbone: of transformers, with a key–value cache.
        head: its output layer; one without `greedy` and `sample` is called for token logits.
        input_ids: (B, T) prompts, left-padded where they differ in length.
        attention_mask: (B, T), 0 at padding; default all 1.
        max_new_tokens: how many tokens to add to each.
        temperature: 0 for the most likely token, else sample.
        eos_token_id: token that ends a text, or several; texts that have ended are filled with the first. Stops when
            all have ended.
        generator: source of randomness, on the device of the model.
        hidden_scale: factor of the hidden states that the head reads.

    Returns:
        (B, at most T + max_new_tokens) token ids.

    Raises:
        ValueError: If a prompt ends with padding.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    padded = not bool(mask.all())
    check_left_padding(mask)
    ends = input_ids.new_tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or []))
    fresh, cache = input_ids, None
    ended = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
    for _ in range(max_new_tokens):
        inputs = {"input_ids": fresh, "attention_mask": mask}
        if padded:  # positions count from the first token of each text; without padding the model's own are right
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
        output, cache = read_with_cache(backbone, inputs, cache, num_read=mask.shape[1])
        hidden = output.last_hidden_state[:, -1] * hidden_scale
        token = _next_token(head, hidden, temperature, generator)
        if len(ends):
            token = token.masked_fill(ended, int(ends[0]))
            ended |= torch.isin(token, ends)
        fresh = token.unsqueeze(1)
        input_ids, mask = torch.cat([input_ids, fresh], 1), torch.cat([mask, torch.ones_like(fresh)], 1)
        if bool(ended.all()):
            break
    return input_ids


def _next_token(
    head: DecodingHead | nn.Module, hidden: Tensor, temperature: float, generator: torch.Generator | None
) -> Tensor:
    if isinstance(head, DecodingHead):
        return head.sample(hidden, temperature, generator) if temperature else head.greedy(hidden)
    return sample_logits(head(hidden), temperature, generator) if temperature else head(hidden).argmax(-1)


class VQGeneration:
    """The part of `VQLogitsLM` that continues prompts; the attributes are that module's."""

    backbone: PreTrainedModel
    head: Any
    output_rule: OutputRule

    # `continue_prompts` is public too; arguments and their descriptions are repeated there for editors.
    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        eos_token_id: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts with a KV cache and without dropout.

        Args:
            input_ids: (B, T) prompts, left-padded where they differ in length.
            attention_mask: (B, T), 0 at padding; default all 1.
            max_new_tokens: how many tokens to add to each.
            temperature: 0 for the most likely token, else sample.
            eos_token_id: token that ends a text, or several; texts that have ended are filled with the first. Stops
                when all have ended.
            generator: source of randomness, on the device of the model.

        Returns:
            (B, at most T + max_new_tokens) token ids.

        Raises:
            ValueError: If a prompt ends with padding.
        """
        module: Any = self
        was_training = module.training
        module.eval()
        try:
            return continue_prompts(
                self.backbone,
                self.head,
                input_ids,
                attention_mask,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                eos_token_id=eos_token_id,
                generator=generator,
                hidden_scale=self.output_rule.bias_free_scale,
            )
        finally:
            module.train(was_training)

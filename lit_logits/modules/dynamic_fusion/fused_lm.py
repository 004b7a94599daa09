"""A large causal language model that small experts specialise while it decodes or scores.

Letters: B batch, P prompt, N generated tokens, T sequence, R rows (positions that count), V vocabulary, S experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_logits.functional.checks import check_labels
from lit_logits.functional.labels import IGNORE_INDEX, next_token_labels
from lit_logits.functional.prompt_fusion import prompt_fusion_weights
from lit_logits.modules.dynamic_fusion.decoding import (
    FusedStep,
    FusionTrace,
    SmallModels,
    check_decoding,
    is_drafted,
)
from lit_logits.modules.dynamic_fusion.fusing import FusedModels
from lit_logits.modules.dynamic_fusion.inputs import (
    check_context,
    check_ids,
    given_prompts,
    prompt_mask,
)
from lit_logits.modules.dynamic_fusion.reading import logits_at, prompt_targets
from lit_logits.modules.dynamic_fusion.routing import (
    TextRouter,
    likelihoods_of_tokens,
)
from lit_logits.modules.language_models.calls import check_left_padding
from lit_logits.modules.language_models.inspect import eos_token_ids

__all__ = ["FusedCausalLM", "FusedScores"]


class FusedScores(NamedTuple):
    """Result of `FusedCausalLM.score`: (B, T − 1) log-probabilities in nats, 0 where ignored, and the trace."""

    log_probs: Tensor
    trace: FusionTrace


class FusedCausalLM(FusedModels):
    """Language model with logits M^L + Σ_t α_t (M_t − M^S) and new weights for every token; see `fusion_weights`.

    The models are held as in `FrozenModels`, and keep their dtype.

    Args:
        large: the model to specialise.
        base: small model.
        experts: S fine-tuned descendants of `base`; without experts the logits are the large model's.
        expert_names: one for each expert, for logs.
        vocab_size: V, the ids that all models have; the logits of others are −inf. Default the smallest output layer.
        criterion: of `fusion_weights`; or `prompt`, one weight for each text, under which its prompt is likeliest, see
            `prompt_fusion_weights`: the models read the prompt once more.
        solver: of `fusion_weights`.
        mode: of `fusion_weights`.
        bounds: of `fusion_weights`.
        step: of `fusion_weights`.
        scale: of `fusion_weights`.
        min_entropy: of `fusion_weights`; not with `prompt`.
        routing: which of several experts acts where weights are searched for. `step`: the criterion chooses, at each
            token. `text`: the expert under which the text so far is likeliest, prompt and answer; the criterion finds
            its weight. The experts read a text once more, with the logits (B, T, V) of one at a time. Of several
            experts not with the criterion `prompt`, which chooses by itself, with `mode="joint"`, where all act, or
            with drafts.
        static_alpha: fixed weights instead of a search: one for all experts, or one each. 1 is proxy tuning, 0 the
            large model.
        chunk_size: positions of `score` whose logits are fused at a time; None goes by the memory that they take.

    Raises:
        ValueError: If an argument is out of range.
    """

    # ------------------------------------------------------------------ scoring

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return fused logits (B, T, V) in nats of token ids (B, T), by one pass of each model over whole sequences.

        With `criterion="prompt"` the whole text is the prompt.
        """
        keep = torch.ones_like(input_ids, dtype=torch.bool)
        rows = self._rows(input_ids, attention_mask, keep)
        alpha = self.prompt_weights(input_ids, attention_mask) if self._asks_prompts else None
        alpha = None if alpha is None else alpha.repeat_interleave(input_ids.shape[1], 1)
        acting = self.route(input_ids, attention_mask) if self._searches else None
        steps = self._fuse_rows(rows, alpha, None if acting is None else acting.flatten())
        return torch.cat([step.logits for step in steps]).view(*input_ids.shape, -1)

    @torch.no_grad()
    def score(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> FusedScores:
        """Return log-probabilities of given texts under the fused distribution, by one pass of each model.

        With `routing="text"` the experts read the texts once more.

        Args:
            input_ids: (B, T).
            labels: (B, T) the same ids, unshifted; −100 is ignored, and so is the first token of a text. What stands
                before the first label is the prompt.
            attention_mask: (B, T), 0 at padding, on either side; default all 1.

        Raises:
            ValueError: If a label is outside the models' vocabulary, a sequence is longer than a model's context, or a
                model emits NaN.
        """
        self.check_texts(input_ids, attention_mask, labels)
        device = self.large.device
        # The first token after padding on the left has nothing to be predicted from.
        targets, keep = next_token_labels(labels.to(device), keep=attention_mask)
        alpha = None
        if self._asks_prompts:
            before = (labels != IGNORE_INDEX).cumsum(1) == 0
            weights = self.prompt_weights(input_ids, attention_mask, before)
            alpha = weights.repeat_interleave(keep.sum(1), 1)
        acting = self.route(input_ids, attention_mask) if self._searches else None
        acting = None if acting is None else acting[keep]
        parts, start, chosen = [], 0, targets[keep]
        for step in self._fuse_rows(self._rows(input_ids, attention_mask, keep), alpha, acting):
            wanted = chosen[start : start + len(step.logits)].unsqueeze(1)
            log_probs = step.logits.log_softmax(-1).gather(1, wanted).squeeze(1)
            parts.append((log_probs, *step[1:]))
            start += len(step.logits)
        log_probs, *traced = [torch.cat(part, -1) for part in zip(*parts, strict=True)]
        mask = keep[:, :-1]
        trace = FusionTrace(targets[:, :-1].clamp(min=0), mask, *(_scatter(values, mask) for values in traced))
        return FusedScores(_scatter(log_probs, mask), self._hand_out(trace))

    @torch.no_grad()
    def prompt_weights(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, is_prompt: Tensor | None = None
    ) -> Tensor:
        """Return the weights (S, B) under which prompts are likeliest, by one pass of each model.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 at padding; default all 1.
            is_prompt: (B, T) the tokens that count; default all. A prompt of fewer than two has nothing to choose by,
                and gets weights of 1, with `mode="single"` that of the first expert.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        counted = mask.bool() if is_prompt is None else mask.bool() & is_prompt.to(mask.device)
        device = self.large.device
        targets, keep = prompt_targets(input_ids.to(device), counted.to(device))
        large, base, *experts = self._rows(input_ids, mask, keep)
        self.check_logits(large, base, *experts)
        rows = torch.stack(experts), targets[keep], keep.nonzero()[:, 0]
        return prompt_fusion_weights(large, base, *rows, num_prompts=len(input_ids), **self.search)

    @torch.no_grad()
    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor | None:
        """Return the expert (B, T) that acts after each token of texts (B, T), or None where the criterion chooses.

        The experts read the texts once. After the first token, of which nothing is known, it is the first expert.

        Raises:
            ValueError: As in `score`.
        """
        if not self.routes:
            return None
        mask = self.check_texts(input_ids, attention_mask)
        return self._likelihoods(input_ids, mask).cumsum(2).argmax(0).to(self.large.device)

    def _likelihoods(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the log-probabilities (S, B, T) of the tokens of texts under the experts; see `check_logits`."""
        device, names = self.large.device, self._labels[2:]

        def check(number: int, logits: Tensor) -> None:
            self._refuse_broken(names[number], logits)

        inputs = input_ids.to(device), mask.to(device)
        return likelihoods_of_tokens(self.experts, *inputs, self.vocab_size, check)

    def _rows(self, input_ids: Tensor, attention_mask: Tensor | None, keep: Tensor) -> list[Tensor]:
        """Return the logits (R, V) of each model where `keep` (B, T) is true, on the large model's device."""
        models = self.models if self.is_active else self.models[:1]
        mask, keep = self.check_texts(input_ids, attention_mask), keep.to(self.large.device)
        return logits_at(models, input_ids, mask, keep, self.vocab_size)

    def check_texts(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return the mask (B, T) of texts, default all 1; refuse those that the models cannot read.

        Raises:
            ValueError: If a text is empty or longer than a model's context, an id or label is not of the vocabulary, or
                shapes differ.
        """
        if labels is not None:
            if labels.shape != input_ids.shape:
                raise ValueError(
                    f"Expected `labels` of the shape of `input_ids`, {tuple(input_ids.shape)}, but got"
                    f" {tuple(labels.shape)}."
                )
            check_labels(labels, self.vocab_size, wait=True)
        mask = check_ids(input_ids, attention_mask, self.vocab_size)
        check_context(self._named_models, mask)
        return mask

    # ------------------------------------------------------------------ decoding

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | Mapping[str, Tensor] | None = None,
        attention_mask: Any = None,
        *,
        trace_logits: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts by the large model's own `generate`, whose logits are fused at every step.

        Base and experts read what the large model reads, each with its own key–value cache; temperature, top-k, top-p,
        penalties and stopping then act on the fused logits. For one prompt an `assistant_model`, such as the base, may
        draft tokens, which the fused distribution verifies: the texts are distributed as without it.

        Args:
            input_ids: (B, P) prompts, left-padded where they differ in length; or what a tokenizer returns. As in
                transformers they may be called `inputs`, and a `GenerationConfig` may come second.
            attention_mask: (B, P), 0 at padding; default as in transformers.
            trace_logits: k; with `return_dict_in_generate` the output then also has `top_tokens`, the k likeliest ones
                of each model, a `TopTokens`.
            **kwargs: of `transformers.GenerationMixin.generate`, for greedy search and sampling.

        Returns:
            Ids (B, at most P + N), or with `return_dict_in_generate` the output of `generate`, which then also has
            `trace`, a `FusionTrace` of the N tokens, and its `alpha`, `kl_forward` and `kl_reverse`.

        Raises:
            ValueError: If a prompt is empty, ends with padding or is longer than a model's context, decoding is neither
                greedy nor by sampling, or a model emits NaN.
        """
        input_ids, attention_mask = given_prompts(input_ids, attention_mask, kwargs)
        if trace_logits < 0:
            raise ValueError(f"Expected `trace_logits` to be at least 0, but got {trace_logits}.")
        mask = check_ids(input_ids, attention_mask, self.vocab_size)
        check_left_padding(mask)
        config = check_decoding(self.large, kwargs, len(input_ids))
        new_tokens = config.max_new_tokens or (config.max_length or 0) - input_ids.shape[1]
        check_context(self._named_models, mask, max(0, new_tokens))
        prompt_length = input_ids.shape[1]
        followers = self.models[1:] if self.is_active else ()
        drafted, device = is_drafted(config, kwargs), self.large.device
        routes = self.routes and self._searches
        if routes and drafted:
            raise ValueError(
                "Expected no drafts with routing='text', which goes by tokens that are kept, but got some."
            )
        weights: Tensor | None = None
        router: TextRouter | None = None

        def fuse(large: Tensor, small: Sequence[Tensor], inputs: Mapping[str, Any]) -> FusedStep:
            nonlocal weights, router
            acting = None
            if self._asks_prompts and weights is None:
                weights = self.prompt_weights(input_ids, prompt_mask(inputs, input_ids))
            if routes:
                if router is None:
                    router = TextRouter(self._likelihoods(input_ids, prompt_mask(inputs, input_ids)).sum(2))
                acting = router.choose(torch.stack(list(small[1:])), inputs["input_ids"][:, -1].to(large.device))
            copies = len(large) // len(input_ids)  # with `num_return_sequences`, side by side
            alpha = None if weights is None else weights.repeat_interleave(copies, 1)
            return self.fuse(large, small, alpha, acting=acting)

        sizes = {"vocab_size": self.vocab_size, "prompt_length": prompt_length, "trace_logits": trace_logits}
        small = SmallModels(followers, fuse, **sizes, drafted=drafted)
        inputs = {"input_ids": input_ids.to(device)}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask.to(device)
        output = small.leading(self.large).generate(**inputs, **kwargs)  # type: ignore[operator]
        sequences = output if isinstance(output, Tensor) else output.sequences
        ends = eos_token_ids(self.large) if config.eos_token_id is None else config.eos_token_id
        trace = self._hand_out(small.trace(sequences[:, prompt_length:], ends, config.pad_token_id))
        if not isinstance(output, Tensor):
            output["trace"] = trace
            if trace_logits:
                output["top_tokens"] = small.top_tokens(trace.token_ids.shape[1])
            for name in ("alpha", "kl_forward", "kl_reverse"):
                output[name] = getattr(trace, name)
        return output


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Put values (..., R) where `mask` (B, N) is true, and 0 elsewhere."""
    spread = values.new_zeros(*values.shape[:-1], *mask.shape)
    spread[..., mask] = values
    return spread

"""`DynamicFusionDecoder`: a large model that small experts specialise at decoding time, with new weights at each step.

Letters: B batch, T sequence, N generated tokens, V vocabulary, S experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lit_logits.contracts import HasTokenizer, offers
from lit_logits.functional.dynamic_fusion import FusionCriterion, FusionMode, FusionSolver
from lit_logits.modules.dynamic_fusion.answers import (
    GSM8K_PATTERN,
    check_pattern,
    choice_likelihoods,
    extract_answer,
    has_labels,
    of_right_answers,
)
from lit_logits.modules.dynamic_fusion.as_model import FusedModel
from lit_logits.modules.dynamic_fusion.calibration import FusionCalibration
from lit_logits.modules.dynamic_fusion.decoding import FusionTrace, check_decoding, split_prompts
from lit_logits.modules.dynamic_fusion.fused_lm import FusedCausalLM, FusedScores
from lit_logits.modules.dynamic_fusion.inputs import check_generation, given_prompts
from lit_logits.modules.dynamic_fusion.loading import load_fusion_models
from lit_logits.modules.dynamic_fusion.records import sample_record, top_record
from lit_logits.modules.dynamic_fusion.routing import FusionRouting
from lit_logits.modules.language_models.inspect import digest_model, eos_token_ids
from lit_logits.modules.language_models.tokenizers import check_same_tokenizer
from lit_logits.modules.metrics import StageMeans, TokenMean, loss_and_perplexity

__all__ = ["DynamicFusionDecoder"]

_TRACED = 5  # tokens of each model in a record


class DynamicFusionDecoder(LightningModule):
    """A large model whose logits are moved by what small experts learned, at decoding time [0]; nothing is trained.

    The fused logits are M^L + Σ_t α_t (M_t − M^S), with α chosen at every step so that, by default, the move is as far
    from the large model as the experts are from the base; see `functional.fusion_weights`.

    `predict` continues the prompts of the batches and gives a dict for each: `row`, `prompt`, `reference`, `text`,
    `tokens`, `alpha` (by expert, one weight a token), `kl_forward`, `kl_reverse`. If `num_return_sequences` is above 1,
    the last five stand in each dict of a list `samples`. `JsonLinesWriter` writes them.

    `test` scores the responses under the fused distribution and logs `test/loss` (nats a token), `test/ppl`,
    `fusion/alpha` (summed over experts), `fusion/kl_forward` and `fusion/kl_reverse`, all means over tokens; with
    `exact_match` also `test/exact_match`; for batches with `choices` also `test/acc` and
    `test/acc_norm`, where the answer is the choice whose text is likeliest, by its log-likelihood and by that a
    character, without what a template puts behind it, as lm-evaluation-harness has them.

    `validate` finds how likely the responses of the validation split are under every criterion and every fixed weight
    of `scale_grid`, from the same logits of the models, and logs `val/loss` and `val/ppl` of the present settings.
    `FusionCalibrationWriter` writes the best ones into a recipe.

    Args:
        model: the large model: hub id, local folder, `.gguf` path, or from Python a loaded model of transformers.
        base: small model with the same tokenizer.
        experts: fine-tuned descendants of `base`. A list within the list is merged into one by task arithmetic. Without
            experts the large model decodes alone.
        tokenizer: of all models; default: the one beside them, or the data's.
        criterion: what weights are to reach: `distance`, the paper's; `projection`, the fused distribution nearest to
            the expert; `equal` divergences; `uncertain`, where the large model is, see `functional.fusion_weights`; or
            `prompt`, one weight a text, under which its prompt is likeliest.
        solver: `tilting`, or `grid`, the paper's search; of `distance`.
        mode: `single`, one expert acts at a step as in the paper, or `joint`.
        bounds: smallest and largest α.
        step: of the grid.
        scale: factor on the weights that are found.
        min_entropy: nats; experts act only where the large model has as much entropy. Default 0.5 with `uncertain`.
        routing: which of several experts acts: `step`, as the criterion chooses at each token, or `text`, the one under
            which the text so far is likeliest.
        static_alpha: fixed weights instead: one number for all experts, or a list; 1 is proxy tuning.
        scale_grid: factors, and fixed weights of all experts, that `validate` tries.
        merge_weight: λ of experts that are merged.
        eos_token_id: ids that end a text, if those of the models differ.
        generation: arguments of transformers' `generate` for `predict` and `exact_match`, such as `max_new_tokens`,
            `do_sample`, `temperature`.
        trace_logits: in `predict`, also give the five likeliest tokens of each model at every token, as `top_tokens`.
        exact_match: in `test`, also generate and compare the final answers, which is slow.
        answer_pattern: regular expression whose group is the final answer; see `extract_answer`.
        model_kwargs: for `from_pretrained` of the large model, such as `dtype: bfloat16` and `device_map: auto`.
        small_kwargs: the same for base and experts.

    Raises:
        ValueError: If the models do not fit each other or an argument is out of range; the message says what to pass.

    References:
        [0]: On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion, 2024, arXiv 2406.15480.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2)
        >>> large, base, expert = (LlamaForCausalLM(config) for _ in range(3))
        >>> decoder = DynamicFusionDecoder(large, base, [expert])
        >>> output = decoder.generate(torch.tensor([[3, 4]]), max_new_tokens=2, min_new_tokens=2, pad_token_id=0,
        ...     return_dict_in_generate=True)
        >>> output.sequences.shape, output.trace.alpha.shape
        (torch.Size([1, 4]), torch.Size([1, 1, 2]))
    """

    def __init__(
        self,
        model: nn.Module | str,
        base: nn.Module | str | None = None,
        experts: Sequence[nn.Module | str | list[nn.Module | str]] = (),
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        criterion: FusionCriterion | Literal["prompt"] = "distance",
        solver: FusionSolver = "tilting",
        mode: FusionMode = "single",
        bounds: tuple[float, float] = (0.0, 2.0),
        step: float = 0.1,
        scale: float = 1.0,
        min_entropy: float | None = None,
        routing: FusionRouting = "step",
        static_alpha: float | list[float] | None = None,
        scale_grid: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
        merge_weight: float = 0.5,
        eos_token_id: int | list[int] | None = None,
        generation: dict[str, Any] | None = None,
        trace_logits: bool = False,
        exact_match: bool = False,
        answer_pattern: str = GSM8K_PATTERN,
        model_kwargs: dict[str, Any] | None = None,
        small_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=_without_names(model=model, base=base, experts=experts, tokenizer=tokenizer))
        # The arguments of both parts are written out, here and there: the typed signature is what recipes are read by.
        parts = load_fusion_models(
            model,
            base,
            experts,
            tokenizer=tokenizer,
            eos_token_id=eos_token_id,
            merge_weight=merge_weight,
            large_kwargs=model_kwargs,
            small_kwargs=small_kwargs,
        )
        for note in parts.notes:
            rank_zero_info(note)
        self.fused = FusedCausalLM(
            parts.large,
            parts.base,
            parts.experts,
            expert_names=parts.expert_names,
            vocab_size=parts.vocab_size,
            criterion=criterion,
            solver=solver,
            mode=mode,
            bounds=bounds,
            step=step,
            scale=scale,
            min_entropy=min_entropy,
            routing=routing,
            static_alpha=static_alpha,
        )
        self.tokenizer = parts.tokenizer
        self.eos_token_id = eos_token_id
        self.generation = dict(generation or {})
        self.trace_logits = trace_logits
        self.exact_match, self.answer_pattern = exact_match, answer_pattern
        # What the model's own config says of decoding is no matter here: `score` works whatever it says.
        config = check_decoding(parts.large, {"generation_config": GenerationConfig(), **self.generation})
        check_generation(config, self.generation)
        check_pattern(answer_pattern)
        self.calibration = FusionCalibration(self.fused, scale_grid)
        self.means = StageMeans("nll", "alpha", "kl_forward", "kl_reverse")
        self.matches, self.choice_acc, self.choice_acc_norm = TokenMean(), TokenMean(), TokenMean()

    # ------------------------------------------------------------------ from Python

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return fused logits (B, T, V) in nats."""
        return self.fused(input_ids, attention_mask)

    def generate(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Continue prompts; see `FusedCausalLM.generate`. Of the module's arguments only `eos_token_id` holds here."""
        input_ids, attention_mask = given_prompts(input_ids, attention_mask, kwargs)
        config = kwargs.get("generation_config")
        if self.eos_token_id is not None and getattr(config, "eos_token_id", None) is None:
            kwargs.setdefault("eos_token_id", self.eos_token_id)
        if kwargs.get("stop_strings") or getattr(config, "stop_strings", None):
            kwargs.setdefault("tokenizer", self.tokenizer)
        return self.fused.generate(input_ids, attention_mask, **kwargs)

    def score(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> FusedScores:
        """Return log-probabilities of texts; see `FusedCausalLM.score`."""
        return self.fused.score(input_ids, labels, attention_mask)

    def as_model(self) -> FusedModel:
        """Return the decoder in the form in which programs such as lm-evaluation-harness call a model."""
        return FusedModel(self.fused, self.eos_token_id)

    # ------------------------------------------------------------------ validate and test

    def setup(self, stage: str) -> None:
        """Take the data's tokenizer; refuse one that does not fit the models, and to calibrate without experts."""
        if stage == "validate" and not self.fused.num_experts:
            raise ValueError(
                "Expected `experts`, whose weights `validate` chooses, but got none. Take `test` for the large model"
                " alone."
            )
        data = getattr(self.trainer, "datamodule", None)
        theirs = data.tokenizer if offers(data, HasTokenizer) else None
        if theirs is None:
            return
        if self.tokenizer is not None:
            check_same_tokenizer(self.tokenizer, theirs, "the models", "the data")
        elif len(theirs) > self.fused.vocab_size:
            raise ValueError(
                f"Expected data in the models' {self.fused.vocab_size} tokens, but the data's tokenizer has"
                f" {len(theirs)}. Give the data the models' tokenizer."
            )
        self.tokenizer = self.tokenizer or theirs

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Rate all candidates by the responses, with `choices` by the right ones."""
        batch = of_right_answers(batch)
        if len(batch["input_ids"]):  # none, where rows only fill up the batches of several processes
            self.calibration.update(self.fused, batch["input_ids"], batch["labels"], batch.get("attention_mask"))

    def on_validation_epoch_start(self) -> None:
        """Forget what an earlier run rated."""
        self.calibration.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the loss of the present settings, the first candidate, over all tokens of all ranks."""
        nll = torch.tensor(self.calibration.compute()[0].nll, device=self.device)
        self.log_dict(loss_and_perplexity("val", nll), sync_dist=True)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Score the responses; with `choices` judge them, with `exact_match` judge generated answers."""
        scores = self.score(batch["input_ids"], batch["labels"], batch.get("attention_mask"))
        mask = scores.trace.mask
        if "choices" in batch:
            self._judge_choices(batch, scores)
            mask = mask & batch["correct"].bool().unsqueeze(1).to(mask.device)  # perplexity is of the right answers
        values = {
            "nll": -scores.log_probs,
            "alpha": scores.trace.alpha.sum(0),
            "kl_forward": scores.trace.kl_forward,
            "kl_reverse": scores.trace.kl_reverse,
        }
        self.means.update("test", **{name: value[mask] for name, value in values.items()})
        if self.exact_match:
            self._judge_answers(of_right_answers(batch))

    def _judge_answers(self, batch: Mapping[str, Tensor]) -> None:
        """Count the generated answers that are those of the references."""
        found = []
        for record in self._continue(batch):
            right = extract_answer(record["reference"], self.answer_pattern)
            for sample in record.get("samples", [record]):
                answer = extract_answer(sample["text"], self.answer_pattern)
                found.append(float(answer is not None and answer == right))
        self.matches.update(torch.tensor(found))

    def _judge_choices(self, batch: Mapping[str, Tensor], scores: FusedScores) -> None:
        """Count for each example whether the likeliest choice is the right one."""
        if "response_ends" not in batch:
            raise ValueError(
                "Expected `response_ends`, the characters read after each token, in a batch with `choices`, as"
                f" `InstructionDataModule` gives them, but got {sorted(batch)}."
            )
        sums, lengths = choice_likelihoods(scores, batch["response_ends"])
        correct = batch["correct"].to(sums.device)
        examples = [(batch["rows"] == row).to(sums.device) for row in batch["rows"][has_labels(batch)].unique()]
        for metric, values in ((self.choice_acc, sums), (self.choice_acc_norm, sums / lengths)):
            metric.update(torch.tensor([float(correct[own][values[own].argmax()]) for own in examples]))

    def on_test_epoch_end(self) -> None:
        """Log means over all tokens and examples of all ranks."""
        means = self.means.compute("test")
        self.log_dict(loss_and_perplexity("test", means.pop("nll")), sync_dist=True)
        if self.fused.num_experts:
            self.log_dict({f"fusion/{name}": value for name, value in means.items()}, sync_dist=True)
        judged = {"exact_match": self.matches, "acc": self.choice_acc, "acc_norm": self.choice_acc_norm}
        for name, metric in judged.items():
            if metric.update_called:  # on all ranks or on none, so `compute` does not wait: each rank gets a batch
                self.log(f"test/{name}", metric.compute(), sync_dist=True)
            metric.reset()

    # ------------------------------------------------------------------ predict

    @property
    def prediction_settings(self) -> dict[str, Any]:
        """Settings that the texts of `predict` depend on: digests of the models' weights, and arguments."""
        roles = ["model", "base", *(f"experts[{number}]" for number in range(self.fused.num_experts))]
        search: dict[str, Any] = {"static_alpha": self.fused.static_alpha}
        return {
            **{role: digest_model(model) for role, model in zip(roles, self.fused.models, strict=False)},
            **({"criterion": self.fused.criterion, **self.fused.search} if self.fused.static_alpha is None else search),
            **({"routing": self.fused.routing} if self.fused.routing != "step" else {}),
            "eos_token_id": self.eos_token_id,
            "generation": self.generation,
            **({"trace_logits": True} if self.trace_logits else {}),
        }

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """Continue each prompt and return the records that the class's docstring describes."""
        return self._continue(batch)

    def _continue(self, batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        if self.tokenizer is None:
            raise ValueError("Expected a `tokenizer` to write text with, but got none. Pass `tokenizer`.")
        if len(batch["input_ids"]) == 0:  # as when no row of a batch counts
            return []
        prompts, mask = split_prompts(batch, pad=self._pad_token_id())
        kwargs = {"pad_token_id": self._pad_token_id(), **self.generation, "return_dict_in_generate": True}
        # By its first row, so that a run that goes on after a kill draws what it would have.
        with _seeded_by(int(batch["rows"][0]), prompts.device) if "rows" in batch else nullcontext():
            output = self.generate(prompts, mask, trace_logits=_TRACED if self.trace_logits else 0, **kwargs)
        trace: FusionTrace = output.trace
        copies = len(trace.token_ids) // len(prompts)
        records = []
        for index, prompt in enumerate(prompts):
            labels = batch["labels"][index] if "labels" in batch else prompt.new_zeros(0)
            texts = range(index * copies, (index + 1) * copies)
            samples = [self._sample(trace, text) | self._top_tokens(output, text) for text in texts]
            record = {
                "row": int(batch["rows"][index]) if "rows" in batch else None,
                "prompt": self.tokenizer.decode(prompt[mask[index].bool()]),
                "reference": self.tokenizer.decode(labels[labels >= 0], skip_special_tokens=True),
            }
            records.append(record | (samples[0] if copies == 1 else {"samples": samples}))
        return records

    def _sample(self, trace: FusionTrace, index: int) -> dict[str, Any]:
        """Return one text of the trace, its tokens and their weights."""
        return sample_record(trace, index, cast(PreTrainedTokenizerBase, self.tokenizer), self.fused.expert_names)

    def _top_tokens(self, output: Any, index: int) -> dict[str, Any]:
        """Return what `trace_logits` adds to the record of a text."""
        if not self.trace_logits:
            return {}
        tokenizer, kept = cast(PreTrainedTokenizerBase, self.tokenizer), output.trace.mask[index]
        names = ["large", "base", *self.fused.expert_names][: len(output.top_tokens.token_ids)]
        return {"top_tokens": top_record(output.top_tokens, index, kept, tokenizer, names)}

    def _pad_token_id(self) -> int:
        pad = None if self.tokenizer is None else self.tokenizer.pad_token_id
        return int(pad if pad is not None else min(eos_token_ids(self.fused.large), default=0))

    def configure_optimizers(self) -> None:
        """Refuse to train.

        Raises:
            ValueError: If it is called, as `fit` does.
        """
        raise ValueError(
            "Expected `test` or `predict`, because DynamicFusionDecoder trains nothing, but got `fit`. Experts are"
            " trained with CausalLM: see lm.yaml."
        )

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Do nothing: Lightning asks for this hook before `configure_optimizers` refuses to train."""


@contextmanager
def _seeded_by(row: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers by the seed of the run and a row, and leave the generators as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((torch.initial_seed() + row) % 2**63)
        yield


def _without_names(**arguments: Any) -> list[str]:
    """Return the arguments that hold modules or other objects, which are not hyper-parameters."""

    def named(value: Any) -> bool:
        return value is None or isinstance(value, str) or (isinstance(value, Sequence) and all(map(named, value)))

    return [name for name, value in arguments.items() if not named(value)]

"""`VQLogitsForCausalLM`: a compressed model as a class of transformers, to save, load and generate with.

After `import lit_logits`, `AutoModelForCausalLM.from_pretrained(folder)` finds it; see `VQLogitsConfig`.

Letters: B batch, T sequence, d hidden size, V vocabulary.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple

from lit_logits.functional.labels import IGNORE_INDEX
from lit_logits.functional.reductions import Reduction
from lit_logits.modules.language_models.calls import OUTPUT_CACHE_NAME, cache_argument
from lit_logits.modules.language_models.card import write_card
from lit_logits.modules.language_models.saving import save_any_generation_config
from lit_logits.modules.vq_logits.coded_rows import stages_of_sizes
from lit_logits.modules.vq_logits.config import VQLogitsConfig
from lit_logits.modules.vq_logits.embedding import table_of_settings
from lit_logits.modules.vq_logits.hierarchical import HierarchicalVQLogitsHead
from lit_logits.modules.vq_logits.packed import PackedHierarchicalVQLogitsHead
from lit_logits.modules.vq_logits.residual import ResidualVQLogitsHead

__all__ = ["SavedHead", "VQLogitsForCausalLM", "VQLogitsModel"]

SavedHead = ResidualVQLogitsHead | PackedHierarchicalVQLogitsHead


class VQLogitsModel(PreTrainedModel):
    """The backbone of a compressed model, without its head: what `AutoModel.from_pretrained(folder)` gives.

    Its outputs are the backbone's own. An input table that shares the head's codes keeps the head for them.

    Args:
        config: see `VQLogitsConfig`.
    """

    config_class = VQLogitsConfig
    base_model_prefix = "model"
    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # noqa: RUF012  (transformers' own form)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VQLogitsConfig) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config.text_config)
        if config.table is not None:
            self.head = _residual_head(config) if config.table["tied"] else None
            _code_table(self.model, config, self.head)
        self.post_init()

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing; see `VQLogitsConfig`."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the input embedding of the backbone."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the input embedding of the backbone."""
        self.model.set_input_embeddings(value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the backbone, whose arguments these are."""
        return self.model(*args, **kwargs)


class VQLogitsForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal backbone of transformers with a compressed head; recurrent backbones are left out.

    The head is a `ResidualVQLogitsHead`, or a `PackedHierarchicalVQLogitsHead`, whose logits are log-probabilities.

    Args:
        config: see `VQLogitsConfig`.
    """

    config_class = VQLogitsConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VQLogitsConfig) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config.text_config)
        self.head: SavedHead = _residual_head(config) if config.codebook_sizes is None else _hierarchical_head(config)
        _code_table(self.model, config, self.head)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a folder that `save_pretrained` wrote, and refuse a mapping that does not fit.

        Raises:
            ValueError: If weights are cut off, or codes are another head's.
        """
        with_info = kwargs.pop("output_loading_info", False)
        try:
            loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"Expected the weights of a compressed model, but reading them failed: {error}. The file is cut off or"
                " damaged: save or copy it again."
            ) from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(
                "Expected weights of the sizes that the folder's config names, but they differ (the report above says"
                " which): the mapping is cut off, or config.json and weights are of different models."
            ) from error
        model, info = loaded
        missing = sorted(name for name in info["missing_keys"] if name.startswith("head."))
        if missing:
            raise ValueError(
                f"Expected the folder to hold the compressed head, but {missing} are missing in its weights."
            )
        head: SavedHead = model.head
        if head.packed_codes.device.type != "meta":  # unpacking checks the codes
            _ = head.stages() if isinstance(head, ResidualVQLogitsHead) else head.layout()
        return (model, info) if with_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Do nothing; see `VQLogitsConfig`."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write a folder as all models of transformers do, with a card; a README.md of somebody else's is kept."""
        save = partial(super().save_pretrained, save_directory, *args, **kwargs)
        save_any_generation_config(self, save, Path(save_directory))
        if kwargs.get("is_main_process", True):
            write_card(Path(save_directory), self, f"The output layer is a `{type(self.head).__name__}` (lit-logits).")

    def get_input_embeddings(self) -> nn.Module:
        """Return the input embedding of the backbone."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the input embedding of the backbone."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> SavedHead:
        """Return the head, which gives logits of hidden states; a residual one has `weight` and `bias`, decoded."""
        return self.head

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> Any:
        """Refuse another size: codes of new tokens would have to be fitted.

        Raises:
            ValueError: If the size differs from the present one.
        """
        if new_num_tokens in (None, self.head.vocab_size):
            return self.get_input_embeddings()
        instead = (
            "Resize the original model and compress it again, or save with head='dense' and resize that."
            if isinstance(self.head, ResidualVQLogitsHead)
            else "Train a model with the new vocabulary."
        )
        raise ValueError(
            "Expected the vocabulary that the output head was compressed for, because new tokens have no codes."
            f" {instead}"
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Any = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model as any causal language model; `labels` (B, T) are unshifted, −100 is ignored.

        In training with labels the logits are None: the loss does not need them. `shift_labels` (B, T) are those of the
        next tokens, in place of `labels`. The loss is a mean over the tokens that count, or a sum over
        `num_items_in_batch`. `past_key_values` is the name of the `cache` in transformers below 5.24.
        """
        cache = past_key_values if cache is None else cache
        shift_labels = kwargs.pop(
            "shift_labels", None
        )  # no name of its own: the Trainer would ask for it in each batch
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **({} if cache is None else cache_argument(self.model, cache)),
            **kwargs,
        )
        hidden = output.last_hidden_state * self.config.hidden_scale
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        loss = None
        if shift_labels is not None:
            reduction: Reduction = "mean" if num_items_in_batch is None else "sum"
            loss = self.head.loss(hidden, shift_labels.to(hidden.device), reduction=reduction)
            loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return CausalLMOutputWithPast(
            loss=loss,
            logits=None if self.training and loss is not None else self.head(hidden[:, kept]),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            **{OUTPUT_CACHE_NAME: getattr(output, OUTPUT_CACHE_NAME, None)},
        )


def _residual_head(config: VQLogitsConfig) -> ResidualVQLogitsHead:
    head = ResidualVQLogitsHead(
        config.hidden_size,
        config.vocab_size,
        config.codebook_size,
        num_groups=config.num_groups,
        token_stages=stages_of_sizes(config.stage_sizes, config.vocab_size),
        num_stages=len(config.stage_sizes),
        bias=config.head_bias,
    )
    head.logit_cap = config.logit_cap
    return head


def _hierarchical_head(config: VQLogitsConfig) -> PackedHierarchicalVQLogitsHead:
    sizes = config.codebook_sizes or ()
    options: dict[str, Any] = {"num_groups": config.num_groups, "bias": config.head_bias}
    head = HierarchicalVQLogitsHead(config.hidden_size, config.vocab_size, sizes, **options)
    head.logit_cap = config.logit_cap
    return PackedHierarchicalVQLogitsHead(head)


def _code_table(backbone: Any, config: VQLogitsConfig, head: Any) -> None:
    """Give a backbone the coded input table that the config tells of, if it does."""
    if config.table is not None:
        table = table_of_settings(config.table, head, config.hidden_size, config.vocab_size)
        backbone.set_input_embeddings(table)


AutoModel.register(VQLogitsConfig, VQLogitsModel, exist_ok=True)
AutoModelForCausalLM.register(VQLogitsConfig, VQLogitsForCausalLM, exist_ok=True)
# By this name the Trainer knows that labels are those of the next tokens, where it computes the loss by itself.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[VQLogitsConfig.model_type] = VQLogitsForCausalLM.__name__

"""`VQLogitsConfig`: the config of a compressed model, by which transformers finds its classes."""

from importlib import import_module
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

__all__ = ["VQLogitsConfig"]


class VQLogitsConfig(PreTrainedConfig):
    """Config of `VQLogitsForCausalLM`.

    Importing lit_logits registers it with transformers, and the first config that is made registers the models: they
    import the model code of transformers, which takes longer than all the rest.

    Args:
        text_config: config of the backbone, or its settings with `model_type`.
        codebook_size: K of a `ResidualVQLogitsHead`.
        num_groups: its G.
        stage_sizes: how many tokens own each of its S stages, V first.
        head_bias: whether there is a token bias.
        hidden_scale: factor of the hidden states that the head reads.
        logit_cap: c of the soft cap of the head's logits, or None.
        codebook_sizes: those of a `HierarchicalVQLogitsHead`; None tells that the head is a `ResidualVQLogitsHead`.
    """

    model_type = "vq_logits"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  (transformers' own form)

    def __new__(cls, *_: Any, **__: Any) -> "VQLogitsConfig":
        """Register the models; not in `__init__`, which unpickling leaves out."""
        import_module("lit_logits.modules.vq_logits.export")
        return super().__new__(cls)

    def __init__(
        self,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        codebook_size: int = 256,
        num_groups: int = 1,
        stage_sizes: list[int] | None = None,
        head_bias: bool = False,
        hidden_scale: float = 1.0,
        logit_cap: float | None = None,
        codebook_sizes: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = AutoConfig.for_model("llama") if text_config is None else text_config
        self.codebook_size, self.num_groups, self.head_bias = codebook_size, num_groups, head_bias
        self.hidden_scale, self.logit_cap = hidden_scale, logit_cap
        self.codebook_sizes = None if codebook_sizes is None else list(codebook_sizes)
        if stage_sizes is None:
            stage_sizes = [self.text_config.vocab_size] if codebook_sizes is None else []
        self.stage_sizes = list(stage_sizes)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Vocabulary size V."""
        return self.text_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """Hidden size of the backbone, d."""
        return self.text_config.hidden_size


AutoConfig.register("vq_logits", VQLogitsConfig, exist_ok=True)

"""`VQLogitsConfig`: the config of a compressed model, by which transformers finds its classes."""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

__all__ = ["VQLogitsConfig"]

# With `trust_remote_code=True` transformers runs the module that lies in the folder, and takes these names from it.
_MODULE = "modeling_vq_logits"
_AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.VQLogitsConfig",
    "AutoModel": f"{_MODULE}.VQLogitsModel",
    "AutoModelForCausalLM": f"{_MODULE}.VQLogitsForCausalLM",
}
_CODE = '''"""The classes of this model, which lit-logits holds."""

try:
    from lit_logits.modules import VQLogitsConfig, VQLogitsForCausalLM, VQLogitsModel  # noqa: F401
except ImportError as error:
    raise ImportError("This model needs the package lit_logits (lit-logits): install it from its checkout.") from error
'''


class VQLogitsConfig(PreTrainedConfig):
    """Config of `VQLogitsForCausalLM`.

    Importing lit_logits registers it with transformers, and the first config that is made registers the models: they
    import the model code of transformers, which takes longer than all the rest.

    Args:
        text_config: config of the backbone, or its settings with `model_type`.
        codebook_size: K of a `ResidualVQLogitsHead`.
        num_groups: G of either head.
        stage_sizes: how many tokens own each of its S stages, V first.
        head_bias: whether there is a token bias.
        hidden_scale: factor of the hidden states that the head reads.
        logit_cap: c of the soft cap of the head's logits, or None.
        codebook_sizes: those of a `HierarchicalVQLogitsHead`; None tells that the head is a `ResidualVQLogitsHead`.
        table: of a coded input table, what `CodedEmbedding.settings` gives; None for a dense one.
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
        table: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = AutoConfig.for_model("llama") if text_config is None else text_config
        self.codebook_size, self.num_groups, self.head_bias = codebook_size, num_groups, head_bias
        self.hidden_scale, self.logit_cap = hidden_scale, logit_cap
        self.codebook_sizes = None if codebook_sizes is None else list(codebook_sizes)
        self.table = None if table is None else dict(table)
        if stage_sizes is None:
            stage_sizes = [self.text_config.vocab_size] if codebook_sizes is None else []
        self.stage_sizes = list(stage_sizes)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        kwargs["tie_word_embeddings"] = False
        kwargs["auto_map"] = dict(_AUTO_MAP)
        super().__init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json, and the module by which `trust_remote_code=True` finds the classes."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        Path(save_directory, f"{_MODULE}.py").write_text(_CODE, encoding="utf-8")
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings. peft asks for them before it looks up which layers of a type of model to adapt."""
        _teach_peft(self.model_type, self.text_config.model_type)
        return super().to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is written, without the place where the backbone lay."""
        settings = super().to_diff_dict()
        settings.get("text_config", {}).pop("_name_or_path", None)
        return settings

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: else transformers would copy this file into saved folders, in place of the module there."""

    @property
    def vocab_size(self) -> int:
        """Vocabulary size V."""
        return self.text_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """Hidden size of the backbone, d."""
        return self.text_config.hidden_size


def _teach_peft(model_type: str, like: str) -> None:
    """Let peft, if it is imported, take the layers of one type of model for another where `target_modules` is None.

    Layers of several such types are joined: peft adapts those that a model has.

    Args:
        model_type: of a config of this library.
        like: type of the backbone.
    """
    constants = sys.modules.get("peft.utils.constants")
    for name, layers in vars(constants).items() if constants is not None else ():
        if (
            name.startswith("TRANSFORMERS_MODELS_TO_")
            and isinstance(layers, dict)
            and isinstance(layers.get(like), list)
        ):
            layers[model_type] = list(dict.fromkeys([*layers.get(model_type, []), *layers[like]]))


AutoConfig.register("vq_logits", VQLogitsConfig, exist_ok=True)

"""Names by which version 4 of transformers finds, in a folder that version 5 writes, rotary settings and tokenizer.

Without them it would take its default angles and give other logits, and not know the tokenizer's class.
"""

import copy
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

__all__ = ["rename_tokenizer_settings", "rotary_settings"]

_OTHER_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}


def rotary_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the rotary settings by their names of version 4; none if version 5 would read them as others.

    Example:
        >>> from transformers import LlamaConfig
        >>> rotary_settings(LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
        {'rope_theta': 500.0, 'rope_scaling': None}
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    whole = parameters.get("full_attention", parameters)
    if not isinstance(whole, dict) or "rope_theta" not in whole:
        return {}
    plain = ("rope_theta", "partial_rotary_factor")
    scaling = {name: value for name, value in whole.items() if name not in plain}
    settings = {name: whole[name] for name in plain if name in whole}
    settings["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if isinstance(parameters.get("sliding_attention"), dict):
        settings["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    names = _OTHER_NAMES.get(config.model_type, {})
    settings = {names.get(name, name): value for name, value in settings.items()}
    try:
        again = type(config).from_dict(copy.deepcopy({**config.to_dict(), **settings}))
    except (KeyError, TypeError, ValueError):  # it takes them for settings of another kind
        return {}
    return settings if again.rope_parameters == parameters else {}


def rename_tokenizer_settings(folder: Path) -> None:
    """Give the class and the additional special tokens in tokenizer_config.json their names of version 4."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

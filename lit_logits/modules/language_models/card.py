"""The model card of a saved folder: its base model, what was done to it and measured, and how to load it."""

import functools
import hashlib
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.repocard import metadata_load
from transformers import PreTrainedModel

__all__ = ["Origin", "find_origin", "write_card"]

_MARK = "<!-- Written by lit-logits ({digest}). A card that you change is kept when the model is saved again. -->"
_ELSEWHERE = "MODEL_CARD.md"


class Origin(NamedTuple):
    """What a model was loaded from.

    Attributes:
        name: a hub id, or the name of a folder or file without its place; empty for a model of random weights.
        licence: an SPDX id or what its card says, or "".
        hub_id: of the model, or of the one that a local folder's card names, or "".
    """

    name: str = ""
    licence: str = ""
    hub_id: str = ""


def find_origin(name_or_path: str) -> Origin:
    """Return what is known of a model that was loaded, by the card or file on this disk alone.

    Example:
        >>> find_origin("my/small-model")
        Origin(name='my/small-model', licence='', hub_id='my/small-model')
        >>> find_origin("")
        Origin(name='', licence='', hub_id='')
    """
    path = Path(name_or_path).expanduser()
    if not name_or_path:
        return Origin()
    if path.suffix == ".gguf":
        return Origin(path.name, _gguf_licence(str(path)) if path.is_file() else "")
    if path.is_dir():
        card = _card_data(path / "README.md")
        return Origin(path.resolve().name, card.get("license", ""), card.get("base_model", ""))
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name_or_path):  # a path that is gone
        return Origin(path.name)
    cached = try_to_load_from_cache(name_or_path, "README.md")
    return Origin(
        name_or_path, _card_data(Path(cached)).get("license", "") if isinstance(cached, str) else "", name_or_path
    )


def write_card(
    folder: Path,
    model: PreTrainedModel,
    summary: str,
    *,
    figures: Mapping[str, float] | None = None,
    replaced: Path | None = None,
) -> None:
    """Write README.md into a folder of a saved model.

    A README.md that this library did not write, or that was changed since, is kept as it is; the card then is
    MODEL_CARD.md.

    Args:
        folder: with the saved model.
        model: as saved; its config knows what it was loaded from.
        summary: sentences on what was done to it.
        figures: measured values by name.
        replaced: folder that this one will replace; its own README.md is taken over.
    """
    name = "README.md"
    for old in (folder / name, *([] if replaced is None else [replaced / name])):
        if old.is_file() and not _is_ours(old.read_text(encoding="utf-8", errors="replace")):
            (folder / "README.md").write_bytes(old.read_bytes())
            name = _ELSEWHERE
            break
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    (folder / name).write_text(_text(model, summary, figures or {}, has_tokenizer), encoding="utf-8")


def _text(model: PreTrainedModel, summary: str, figures: Mapping[str, float], has_tokenizer: bool) -> str:
    origin = find_origin(getattr(model.config, "_name_or_path", "") or "")
    head = ["---", "library_name: transformers", "tags: [lit-logits]"]
    head += [f"base_model: {origin.hub_id}"] if origin.hub_id else []
    head += [f"license: {origin.licence}"] if re.fullmatch(r"[\w.+-]+", origin.licence) else []
    size = sum(parameter.numel() for parameter in model.parameters())
    is_ours = type(model).__module__.startswith("lit_logits.")
    readers = "needs transformers 5" if is_ours else "transformers 5 reads it, and 4.57 most architectures"
    unknown = "not known here; that of the base model holds" if origin.name else "none given: a new model"
    rows = [
        ("base model", origin.name or "none: trained from random weights"),
        ("licence of the base", origin.licence or unknown),
        ("class", f"`{type(model).__name__}`, {size:,} parameters"),
        ("written by", f"lit-logits {version('lit-logits')}, transformers {transformers.__version__},"
         f" torch {torch.__version__}; {readers}"),
    ]  # fmt: skip
    body = [f"# {origin.name or type(model).__name__}, changed with lit-logits", "", summary, "", "| | |", "|---|---|"]
    body += [f"| {name} | {value} |" for name, value in rows]
    if figures:
        body += ["", "## Measured", "", "| | |", "|---|---:|", *(f"| `{k}` | {v:.6g} |" for k, v in figures.items())]
    body += ["", "## Load", "", *_loading(model, has_tokenizer), ""]
    content = "\n".join(body)
    return "\n".join([*head, "---", "", _MARK.format(digest=_digest(content)), "", content])


def _loading(model: PreTrainedModel, has_tokenizer: bool) -> list[str]:
    """Return the lines that load the folder."""
    kind = "AutoModelForCausalLM" if model.can_generate() else type(model).__name__
    names = f"{kind}, AutoTokenizer" if has_tokenizer else kind
    lines = [f"from transformers import {names}", "", f'model = {kind}.from_pretrained("path/of/this/folder")']
    if type(model).__module__.startswith("lit_logits."):
        hint = "registers the class; or pass trust_remote_code=True below, with lit-logits installed"
        lines = [f"import lit_logits  # {hint}", *lines]
    if has_tokenizer:
        lines += ['tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")']
    if has_tokenizer and model.can_generate():
        lines += ['print(tokenizer.decode(model.generate(**tokenizer("Once", return_tensors="pt"))[0]))']
    return ["```python", *lines, "```"]


def _is_ours(text: str) -> bool:
    """Return whether this library wrote the card, and nobody changed it."""
    _, mark, after = text.partition("<!-- Written by lit-logits (")
    content = after.partition("-->\n\n")[2]
    return bool(mark) and after.startswith(f"{_digest(content)})")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _card_data(path: Path) -> dict[str, str]:
    """Return the texts in the front matter of a card; empty where there is none that can be read."""
    try:
        data = metadata_load(path) if path.is_file() else None
    except Exception:  # of any kind: the file is somebody else's
        return {}
    return {name: value for name, value in (data or {}).items() if isinstance(value, str)}


@functools.lru_cache(maxsize=8)
def _gguf_licence(path: str) -> str:
    try:
        from gguf import GGUFReader

        field = GGUFReader(path).get_field("general.license")
        return "" if field is None else str(field.contents())
    except Exception:  # of any kind: the file is somebody else's
        return ""

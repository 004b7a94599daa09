"""Heads as parts of a model: made from its argument `head`, checked, and kept in checkpoints as a recipe.

Letters: d hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lit_logits.contracts import CappedHead, DecodingHead, ExportableHead, ImitatingHead, OutputHead
from lit_logits.modules.vq_logits.dense import DenseLogitsHead
from lit_logits.modules.vq_logits.head import VQLogitsHead
from lit_logits.modules.vq_logits.hierarchical import HierarchicalVQLogitsHead
from lit_logits.modules.vq_logits.residual import ResidualVQLogitsHead

__all__ = ["HeadFactory", "check_imitates", "head_recipe", "make_head", "most_likely", "names_embedding", "set_cap"]

HeadFactory = Callable[[int, int], nn.Module]

_HEADS: dict[str, Any] = {
    head.__name__: head for head in (VQLogitsHead, HierarchicalVQLogitsHead, ResidualVQLogitsHead, DenseLogitsHead)
}


def make_head(
    head: HeadFactory | Mapping[str, Any] | None, hidden_size: int, vocab_size: int, *, has_bias: bool
) -> Any:
    """Make a head for a model.

    Args:
        head: called with (d, V); or, as a checkpoint keeps it, `class_path` and `init_args` of one of this library's.
        hidden_size: d.
        vocab_size: V.
        has_bias: whether the layer that it replaces has a bias.

    Raises:
        ValueError: If `head` does not make a head, or makes one without a bias that has to take the layer's.
    """
    if isinstance(head, Mapping) and str(head.get("class_path")).rpartition(".")[2] in _HEADS:
        head = partial(_HEADS[head["class_path"].rpartition(".")[2]], **head.get("init_args", {}))
    if head is None:
        raise ValueError(
            "Expected `head`, but the checkpoint does not tell it, because it was trained with one that only code can"
            " make. Pass the same: `load_from_checkpoint(path, head=...)`."
        )
    if not callable(head):
        raise ValueError(
            "Expected `head` to be called with (hidden_size, vocab_size), such as `VQLogitsHead` or"
            f" `partial(VQLogitsHead, codebook_size=512)`, but got {head!r}. Version 0.1 took a name and the head's"
            " arguments beside it; a recipe says `head: {class_path: VQLogitsHead, init_args: {codebook_size: 512}}` or"
            " `head: DenseLogitsHead`."
        )
    made: Any = head(hidden_size, vocab_size)
    if not (isinstance(made, nn.Module) and isinstance(made, OutputHead)):
        raise ValueError(
            "Expected `head` to make an `nn.Module` with `loss(hidden, labels)` that is called for token logits, see"
            f" `lit_logits.contracts.OutputHead`, but got {type(made).__name__}."
        )
    if has_bias and isinstance(made, ExportableHead) and made.token_bias is None:
        raise ValueError("Expected `bias=True`, because the pretrained output layer has a bias.")
    return made


def set_cap(head: Any, cap: float | None) -> None:
    """Give a head the soft cap of its architecture's logits.

    Raises:
        ValueError: If the head has none and the architecture has one.
    """
    if cap is None:
        return
    if not isinstance(head, CappedHead):
        raise ValueError(
            f"Expected a head with `logit_cap`, because the architecture caps its logits at {cap:g}, but"
            f" {type(head).__name__} has none. See `lit_logits.contracts.CappedHead`, or switch the cap off in the"
            " config (`final_logit_softcapping: null`, or by the architecture's own name for it)."
        )
    head.logit_cap = cap


def names_embedding(compress: Sequence[str]) -> bool:
    """Return whether `compress` names the input table beside the head.

    Raises:
        ValueError: If it names anything else, or leaves out the head.
    """
    named = [compress] if isinstance(compress, str) else list(compress)
    if "head" not in named or set(named) - {"head", "embedding"}:
        raise ValueError(f"Expected `compress` to be [head] or [head, embedding], but got {named}.")
    return "embedding" in named


def check_imitates(head: Any) -> None:
    """Raise unless a head can be trained to imitate the original output layer.

    Raises:
        ValueError: If it cannot.
    """
    if not (isinstance(head, ImitatingHead) and head.can_imitate):
        raise ValueError(
            "Expected a head that can imitate the original with `kd_weight`: a `ResidualVQLogitsHead`, a"
            " `HierarchicalVQLogitsHead`, or a `VQLogitsHead` without latents (mapping='fixed' or 'reassigned'), but"
            f" got {type(head).__name__}."
        )


def head_recipe(head: Any) -> Any:
    """Return what a checkpoint keeps of a head: class and arguments of this library's; None for one that needs code."""
    if not callable(head):  # a recipe from a checkpoint, or something that `make_head` refuses
        return head
    plain = isinstance(head, partial) and not head.args
    made, arguments = (head.func, dict(head.keywords)) if plain else (head, {})
    name = next((name for name, known in _HEADS.items() if known is made), None)
    return None if name is None else {"class_path": f"lit_logits.modules.{name}", "init_args": arguments}


def most_likely(head: Any, hidden: Tensor) -> Tensor:
    """Return the most likely tokens (...) of hidden states (..., d), by the head's own `greedy` if it has one."""
    return head.greedy(hidden) if isinstance(head, DecodingHead) else head(hidden).argmax(-1)

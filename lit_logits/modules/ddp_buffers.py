"""Buffers that DDP need not send at every forward, because all ranks have the same.

DDP sends every buffer of rank 0 before each forward in training. The mapping of a head is a large buffer that changes
rarely, and where it changes the head broadcasts it by itself.
"""

import torch
from torch import nn

from lit_logits.contracts import SettledHead, offers
from lit_logits.functional.distributed import broadcast_

__all__ = ["broadcast_settled", "leave_out_of_ddp", "settled_buffers"]


def settled_buffers(model: nn.Module) -> list[str]:
    """Return the names of the buffers that parts of a model call settled, see `SettledHead`, in their order.

    A part that is reached by two ways has two names.

    Example:
        >>> from lit_logits.modules import VQLogitsHead
        >>> settled_buffers(nn.ModuleDict({"head": VQLogitsHead(4, 10, 2)}))
        ['head.token_to_code']
    """
    found = []
    for path, part in model.named_modules(remove_duplicate=False):
        if offers(part, SettledHead):
            found += [f"{path}.{name}" if path else name for name in part.settled_buffers]
    return found


def leave_out_of_ddp(model: nn.Module) -> None:
    """Tell DDP, which is about to wrap `model`, not to send the settled buffers; nothing else reads the mark.

    DDP does not send them when it wraps the model either: call `broadcast_settled` then.
    """
    marked = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    # The name is DDP's own. It reads the attribute of the module that it wraps, and has no argument for it.
    model._ddp_params_and_buffers_to_ignore = sorted(marked | set(settled_buffers(model)))  # type: ignore[assignment]


@torch.no_grad()
def broadcast_settled(model: nn.Module) -> None:
    """Give all ranks the settled buffers of rank 0; every rank must call it, with the same sizes."""
    for name in settled_buffers(model):
        buffer = model.get_buffer(name)
        if buffer.numel():
            sent = buffer.clone()
            broadcast_(sent)
            buffer.copy_(sent)  # a write that autograd counts: tables that were made of the old codes are made again

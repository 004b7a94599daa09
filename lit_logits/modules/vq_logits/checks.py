"""Checks of what a training run is about to do with a head: averages or pieces of its weights, steps too few to map.

Letters: V vocabulary.
"""

from typing import Any

import torch
from torch import nn

from lit_logits.modules.sharding import shards_weights
from lit_logits.modules.vq_logits.moving import MovingCodes

__all__ = ["check_averages", "check_head_in_pieces", "check_steps", "steps_left"]


def check_averages(model: nn.Module, name: str, *, with_buffers: bool) -> None:
    """Raise unless the weights of a model can be averaged over training.

    A mean of integers is none of them: codes of tokens, packed bits and counts of steps would change. Booleans come
    out as they are. Codes that move stand for other tokens at another step, so a mean over steps belongs to no mapping.

    Args:
        model: holds the head.
        name: of what averages.
        with_buffers: whether it averages buffers as well as parameters.

    Raises:
        ValueError: If codes move, or there are buffers of integers and buffers are averaged.
    """
    for head in model.modules():
        if isinstance(head, MovingCodes) and (head.mapping != "fixed" or head.codebook_update != "gradient"):
            raise ValueError(
                f"Expected codes that stay where they are with {name}, but this head has mapping={head.mapping!r} and"
                f" codebook_update={head.codebook_update!r}: codes of different steps have no mean. Use mapping='fixed'"
                f" and codebook_update='gradient', or leave {name} out."
            )
    counted = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    whole = [label for label, buffer in model.named_buffers() if buffer.dtype in counted]
    if with_buffers and whole:
        raise ValueError(
            f"Expected {name} with use_buffers=False, which averages parameters and copies buffers, because these"
            f" buffers are integers, whose means are other codes: {', '.join(whole[:4])}."
        )


def check_head_in_pieces(head: nn.Module, strategy: object, *, is_ready: bool) -> None:
    """Raise unless a head can be trained by a strategy that keeps parameters in pieces.

    Args:
        head: any.
        strategy: of the Trainer; one that keeps parameters whole passes.
        is_ready: whether the head has started from data, or needs no start.

    Raises:
        ValueError: If the head is yet to start, or its codes are moved by other things than gradients.
    """
    if not shards_weights(strategy):
        return
    name = type(strategy).__name__
    if not is_ready:
        raise ValueError(
            f"Expected a head that has started, but got one that is yet to read data, and {name}, which keeps its"
            " weights in pieces. Call `initialize_head(dataloader)` before `fit`, go on from a checkpoint, or use DDP."
        )
    if isinstance(head, MovingCodes) and (head.mapping != "fixed" or head.codebook_update != "gradient"):
        raise ValueError(
            f"Expected mapping='fixed' and codebook_update='gradient' with {name}, which keeps the vectors that others"
            f" read in pieces, but got {head.mapping!r} and {head.codebook_update!r}. Use DDP, or set these."
        )


def check_steps(head: nn.Module, num_steps: int | None) -> str | None:
    """Return a warning if a mapping that should move is not renewed in the steps that are left, else None.

    Args:
        head: any; those of other kinds have no such mapping.
        num_steps: optimizer steps left in this run, None if unknown.
    """
    if num_steps is None or not isinstance(head, MovingCodes) or head.mapping == "fixed":
        return None
    done, every = int(head.num_updates), head.reassign_every_n_steps
    if (done + num_steps) // every > done // every:
        return None
    return (
        f"Expected at least {every - done % every} training steps for mapping={head.mapping!r}, which is renewed every"
        f" {every} steps, but this run has {num_steps}: the mapping stays as it starts. Use a smaller"
        " `reassign_every_n_steps`, or train for longer."
    )


def steps_left(trainer: Any) -> int | None:
    """Return how many optimizer steps a fit has left, after its loaders are set up; None if that is not known."""
    # Not by `estimated_stepping_batches`, which sets up loaders, and then one that is resumed would start anew.
    if trainer.fast_dev_run:
        return None
    limits = [] if trainer.max_steps == -1 else [trainer.max_steps]
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if epochs not in (None, -1) and batches != float("inf"):
        limits.append(epochs * -(-int(batches) // trainer.accumulate_grad_batches))
    return max(0, min(limits) - trainer.global_step) if limits else None

"""Sizes of a head and of a model with it, in sentences for the log.

Letters: d hidden size, V vocabulary.
"""

from typing import Any

from lit_logits.contracts import SizedHead, WatchedHead
from lit_logits.functional.codebook import Footprint
from lit_logits.modules.language_models.loading import CausalBackbone
from lit_logits.modules.vq_logits.embedding import CodedEmbedding, coded_table

__all__ = ["describe_head", "describe_model", "describe_table", "describe_untying"]


def describe_head(head: SizedHead) -> str:
    """Return one line on the size of a head against the dense one, and its perplexity floor if it has one."""
    size = head.footprint()
    text = (
        f"Output head: {size.parameters:,} parameters ({size.parameters / size.dense_parameters:.2%} of dense),"
        f" {size.bytes:,} bytes ({size.bytes / size.dense_bytes:.2%} of dense; the mapping packed)."
    )
    if isinstance(head, WatchedHead):
        text += f" No backbone gets below perplexity {head.ppl_floor().item():.2f} with this mapping and bias."
    return text


def describe_table(table: CodedEmbedding) -> str:
    """Return one line on an input table that is read from codes."""
    if table.codes is None:
        return "Input table: read from the same codes, for no bytes more."
    size = table.codes.footprint()
    return (
        f"Input table: read from codes of its own, {size.parameters:,} parameters"
        f" ({size.parameters / size.dense_parameters:.2%} of dense), {size.bytes:,} bytes"
        f" ({size.bytes / size.dense_bytes:.2%} of dense; the mapping packed)."
    )


def describe_untying(parts: CausalBackbone, head: SizedHead) -> str:
    """Return what it costs to break the tie of input and output embedding."""
    table = parts.vocab_size * parts.hidden_size
    backbone = sum(parameter.numel() for parameter in parts.model.parameters())
    size: Footprint = head.footprint()
    return (
        f"The output layer was tied to the input embedding, so it cost nothing; the tie is broken. The input table"
        f" stays ({table:,} parameters) and the head adds {size.parameters:,}: {backbone:,} parameters become"
        f" {backbone + size.parameters:,} (an untied dense head would make it {backbone + table:,})."
    )


def describe_model(backbone: Any, head: SizedHead, *, tied: bool) -> str:
    """Return the size of the whole model with this head and with its dense layer, both with the input table.

    Args:
        backbone: the model without its output layer; its parameters include the input table, or the table's codes.
        head: its output layer.
        tied: whether the dense layer was the input table, so that it cost nothing.
    """
    size, table = head.footprint(), coded_table(backbone)
    rest = sum(parameter.numel() for parameter in backbone.parameters())
    rest_bytes = sum(parameter.numel() * parameter.element_size() for parameter in backbone.parameters())
    before, before_bytes = rest, rest_bytes
    after, after_bytes = rest + size.parameters, rest_bytes + size.bytes
    if table is not None:
        before, before_bytes = before + size.dense_parameters, before_bytes + size.dense_bytes
        if table.codes is not None:  # their codebooks are parameters of the backbone, and the mapping is not
            own = table.codes.codebook
            before, before_bytes = before - own.numel(), before_bytes - own.nbytes
            after_bytes += table.codes.footprint().bytes - own.nbytes
    if not tied:
        before, before_bytes = before + size.dense_parameters, before_bytes + size.dense_bytes
    own_line = "" if table is None else f"{describe_table(table)} "
    return (
        f"{own_line}Whole model, input table included: {before:,} parameters, {before_bytes / 1e6:,.1f} MB with"
        f" its {'tied ' if tied else ''}dense layer; {after:,} parameters,"
        f" {after_bytes / 1e6:,.1f} MB ({after_bytes / before_bytes:.1%}) with this head"
        f"{'' if table is None else ' and the input table read from codes'}."
    )

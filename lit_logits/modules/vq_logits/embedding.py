"""`CodedEmbedding`: the input table of a language model, read from codes; its swap for a dense one and back.

Letters: d hidden size, V vocabulary.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_logits.modules.vq_logits.coded_rows import CodedRows, stages_of_sizes

__all__ = ["CodedEmbedding", "code_table", "coded_table", "table_of_settings", "with_dense_table"]


class CodedEmbedding(nn.Module):
    """Input table whose rows are decoded from codes, those of the tokens that come and no others.

    Args:
        codes: a head that also serves as the output layer, or codes of the table's own.
        tied: whether `codes` are the output layer's. They are its parameters then, and not this module's.
        scale: factor of the rows, as of Gemma's input table, in the dtype of the rows.

    Example:
        >>> table = CodedEmbedding(CodedRows(hidden_size=8, vocab_size=100, codebook_size=16, num_groups=4), tied=False)
        >>> table(torch.tensor([[3, 99]])).shape
        torch.Size([1, 2, 8])
    """

    def __init__(self, codes: CodedRows, *, tied: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.tied, self.scale = tied, scale
        self.num_embeddings, self.embedding_dim = codes.vocab_size, codes.hidden_size
        self.padding_idx: int | None = None  # a row of zeros is coded as any other
        self.codes: CodedRows | None = None if tied else codes
        self._shared: tuple[CodedRows, ...] = (codes,) if tied else ()  # in a tuple, so that it is no submodule
        # Dense rows (V, d) that are read until the codes are fitted. Not a buffer: they stay out of checkpoints.
        self.dense: Tensor | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return rows (..., d) of token ids (...)."""
        rows = self.source.rows(input_ids) if self.dense is None else F.embedding(input_ids, self.dense)
        return rows if self.scale == 1 else rows * torch.tensor(self.scale, dtype=rows.dtype)

    @property
    def source(self) -> CodedRows:
        """The codes that the rows are decoded from, whosever they are."""
        return self._shared[0] if self.codes is None else self.codes

    @property
    def weight(self) -> Tensor:
        """The rows (V, d) without the factor, decoded: for programs that read the table instead of calling it."""
        return self.source.dense_weight() if self.dense is None else self.dense

    @property
    def settings(self) -> dict[str, Any]:
        """What a config says of the table; `table_of_settings` makes one of it."""
        if self.codes is None:
            return {"tied": True, "scale": self.scale}
        sizes = {"codebook_size": self.codes.codebook_size, "num_groups": self.codes.num_groups}
        return {"tied": False, "scale": self.scale, **sizes, "stage_sizes": self.codes.stage_sizes()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CodedEmbedding":
        self.dense = None if self.dense is None else fn(self.dense)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Return the settings that `print(module)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, tied={self.tied}, scale={self.scale:g}"


def coded_table(backbone: Any) -> CodedEmbedding | None:
    """Return the coded input table of a backbone, or None if its table is dense."""
    table = backbone.get_input_embeddings()
    return table if isinstance(table, CodedEmbedding) else None


def code_table(backbone: Any, head: Any, *, tied: bool) -> CodedEmbedding:
    """Put a coded table in the place of a backbone's dense one, which it reads until the codes are fitted.

    Args:
        backbone: pretrained, of transformers.
        head: its output layer, a `ResidualVQLogitsHead`.
        tied: whether the output layer was the input table: then both have one set of codes. Else the table gets codes
            of its own, of the same kind and number.

    Raises:
        ValueError: If the head has no rows for a table, or the table is more than rows and a factor.
    """
    if not isinstance(head, CodedRows):
        raise ValueError(
            "Expected a `ResidualVQLogitsHead` for `compress: [head, embedding]`, because the input table needs rows of"
            f" codes, but got {type(head).__name__}."
        )
    dense = backbone.get_input_embeddings()
    scale = _factor(dense)
    if tuple(dense.weight.shape) != (head.vocab_size, head.hidden_size):
        raise ValueError(
            f"Expected an input table of shape {(head.vocab_size, head.hidden_size)}, as the output layer has, for"
            f" `compress: [head, embedding]`, but got {tuple(dense.weight.shape)}. Compress the head alone."
        )
    table = CodedEmbedding(head if tied else _codes_like(head), tied=tied, scale=scale)
    table.dense = dense.weight.detach()
    backbone.set_input_embeddings(table)
    return table


def table_of_settings(settings: Mapping[str, Any], head: Any, hidden_size: int, vocab_size: int) -> CodedEmbedding:
    """Make the table that a config describes, with codes that are still to be loaded.

    Args:
        settings: what `CodedEmbedding.settings` gave.
        head: of the model, whose codes a tied table reads.
        hidden_size: d.
        vocab_size: V.
    """
    tied, scale = bool(settings["tied"]), float(settings["scale"])
    if tied:
        return CodedEmbedding(head, tied=True, scale=scale)
    sizes = list(settings["stage_sizes"])
    codes = CodedRows(
        hidden_size,
        vocab_size,
        settings["codebook_size"],
        num_groups=settings["num_groups"],
        token_stages=stages_of_sizes(sizes, vocab_size),
        num_stages=len(sizes),
    )
    return CodedEmbedding(codes, tied=False, scale=scale)


def with_dense_table(backbone: Any) -> Any:
    """Return a backbone with a dense table in place of a coded one; all other tensors are shared."""
    table = coded_table(backbone)
    if table is None:
        return backbone
    tensors = (*backbone.parameters(), *backbone.buffers())
    # `deepcopy` takes what its memo holds as copied already.
    other = copy.deepcopy(backbone, {id(tensor): tensor for tensor in tensors} | {id(table): table})
    with torch.device("meta"):  # the class of the architecture's own table
        dense: Any = type(backbone)(backbone.config).get_input_embeddings()
    dense.weight = nn.Parameter(table.weight.detach(), requires_grad=False)
    for name, buffer in dense.named_buffers(recurse=False):  # its factor
        setattr(dense, name, torch.full(buffer.shape, table.scale, dtype=buffer.dtype, device=dense.weight.device))
    other.set_input_embeddings(dense)
    return other


@torch.no_grad()
def _factor(table: Any) -> float:
    """Return the factor by which a table multiplies its rows.

    Raises:
        ValueError: If its output is not its rows by a factor.
    """
    ids = torch.arange(min(64, len(table.weight)), device=table.weight.device)
    given, rows = table(ids), table.weight[ids]
    factor = float((given.double() * rows.double()).sum() / rows.double().square().sum())
    if given.shape != rows.shape or not torch.allclose(given, rows * factor, rtol=1e-2, atol=1e-6):
        raise ValueError(
            "Expected an input table that gives its rows, by a factor at most, for `compress: [head, embedding]`, but"
            f" {type(table).__name__} does more. Compress the head alone."
        )
    return factor


def _codes_like(head: CodedRows) -> CodedRows:
    """Return codes of the kind and number of a head's, which are still to be fitted."""
    return CodedRows(
        head.hidden_size,
        head.vocab_size,
        head.codebook_size,
        num_groups=head.num_groups,
        num_stages=head.planned_stages,  # type: ignore[arg-type]
        byte_budget=head.byte_budget,
        metric=head.metric,
        smoothing=head.smoothing,
        num_sweeps=head.num_sweeps,
    )

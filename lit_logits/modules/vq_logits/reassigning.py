"""What a head says of the codes that its tokens got.

Letters: V vocabulary, S stages.
"""

from torch import Tensor

from lit_logits.contracts import Reassigned
from lit_logits.functional.code_reassignment import CodeReassignment, TokenStatistics

__all__ = ["summarize"]


def summarize(found: CodeReassignment, before: Tensor, statistics: TokenStatistics) -> Reassigned:
    """Return what a re-assignment came to, from the codes (V, S) before it and the sums that it rests on."""
    num_positions = int(statistics.counts.sum())
    num_tokens = int((found.token_codes != before).any(1).sum())
    return Reassigned(num_tokens, float(found.gain.sum()) / max(1, num_positions), num_positions)

"""How an output head starts: from token counts and, where there is one, from the pretrained output layer.

Letters: d hidden size, V vocabulary, K codes.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lit_logits.functional.code_assignment import frequency_assignment, weighted_kmeans
from lit_logits.functional.codebook import Footprint, unigram_bias
from lit_logits.functional.distributed import broadcast_
from lit_logits.functional.kmeans import kmeans
from lit_logits.functional.residual_codes import MetricKind
from lit_logits.modules.language_models.loading import CausalBackbone
from lit_logits.modules.vq_logits.calibration import Calibration
from lit_logits.modules.vq_logits.dense import DenseLogitsHead
from lit_logits.modules.vq_logits.fit import fit_output_layer
from lit_logits.modules.vq_logits.head import VQLogitsHead
from lit_logits.modules.vq_logits.residual import ResidualVQLogitsHead

__all__ = [
    "HeadInit",
    "choose_init",
    "describe_head",
    "describe_model",
    "describe_untying",
    "initialize_dense_head",
    "initialize_residual_head",
    "initialize_vq_head",
]

HeadInit = Literal["random", "frequency", "kmeans", "weighted_kmeans"]


def choose_init(init: HeadInit | None, *, pretrained: bool) -> HeadInit:
    """`init`, or the default: `weighted_kmeans` for a pretrained output layer, else `frequency`.

    Raises:
        ValueError: for another name, or k-means without pretrained rows to cluster.

    """
    if init is None:
        return "weighted_kmeans" if pretrained else "frequency"
    if init not in ("random", "frequency", "kmeans", "weighted_kmeans"):
        raise ValueError(
            f"Expected `init` to be 'random', 'frequency', 'kmeans' or 'weighted_kmeans', but got {init!r}."
        )
    if init.endswith("kmeans") and not pretrained:
        raise ValueError(
            f"Expected a pretrained backbone for init={init!r}, which clusters the rows of its output layer, but the"
            " backbone is a config with random weights. Use 'frequency' or 'random'."
        )
    return init


def initialize_vq_head(
    head: VQLogitsHead,
    init: HeadInit,
    calibration: Calibration,
    *,
    output_weight: Tensor | None = None,
    output_bias: Tensor | None = None,
    count_power: float = 0.75,
    progress_bar: bool = False,
) -> None:
    """Put codes, mapping, bias and counts into `head`; under DDP every rank must call it, and gets those of rank 0.

    The bias starts from token counts: as a unigram model where the codes say nothing yet, and as the split of each
    code among its tokens where they come from a pretrained layer.

    Args:
        head: of vocabulary V.
        init: see `VQLogitsLM`.
        calibration: counts (V,) and, for `weighted_kmeans`, the second moment (d, d).
        output_weight: (V, d) pretrained rows; the k-means kinds need them.
        output_bias: (V,) pretrained bias, which is added.
        count_power: exponent of the counts in `weighted_kmeans`.
        progress_bar: show one line of progress on a terminal.

    """
    device = head.codebook.device
    counts = calibration.token_counts
    generator = torch.Generator(device).manual_seed(torch.initial_seed() % (1 << 63))
    codebook, token_to_code, latents = None, None, None
    if init == "frequency":
        token_to_code = frequency_assignment(counts, head.codebook_size)
    elif init != "random":
        if output_weight is None:
            raise ValueError(f"Expected `output_weight` for init={init!r}, but got None.")
        latents = output_weight.to(device)
        if init == "kmeans":
            result = kmeans(latents, head.codebook_size, generator=generator, progress_bar=progress_bar)
        else:
            if calibration.hidden_second_moment is None:
                raise ValueError(
                    "Expected a calibration with a second moment for init='weighted_kmeans', but got None."
                )
            result = weighted_kmeans(
                latents,
                head.codebook_size,
                token_counts=counts,
                hidden_second_moment=calibration.hidden_second_moment,
                power=count_power,
                generator=generator,
                progress_bar=progress_bar,
            )
        codebook, token_to_code = result.centroids, result.assignments
    bias = unigram_bias(counts) if codebook is None else unigram_bias(counts, token_to_code, head.codebook_size)
    if output_bias is not None and codebook is not None:
        bias = bias + output_bias.to(bias)
    head.set_codes(codebook, token_to_code, token_bias=bias, token_counts=counts, latents=latents)


def initialize_residual_head(
    head: ResidualVQLogitsHead,
    calibration: Calibration,
    *,
    output_weight: Tensor,
    output_bias: Tensor | None = None,
    num_stages: int | Mapping[int, int] | None = None,
    byte_budget: float | None = None,
    metric: MetricKind = "full",
    count_power: float = 0.75,
    progress_bar: bool = False,
) -> None:
    """Fit `head` to a pretrained output layer; under DDP every rank must call it, and gets the codes of rank 0.

    Tokens weigh as often as they occurred or, where the calibration has it, by the information of their logits. Other
    arguments as in `fit_output_layer`.
    """
    device = head.codebook.device
    weights, moment = calibration.token_counts, calibration.hidden_second_moment
    if calibration.token_information is not None:
        weights, moment, count_power = calibration.token_information, calibration.informed_second_moment, 1.0
    fit = fit_output_layer(
        output_weight.to(device),
        codebook_size=head.codebook_size,
        num_groups=head.num_groups,
        num_stages=num_stages,
        byte_budget=byte_budget,
        keep_stages=True,  # the parameters of the head are there already
        token_counts=weights,
        hidden_second_moment=moment,
        metric=metric,
        count_power=count_power,
        generator=torch.Generator(device).manual_seed(torch.initial_seed() % (1 << 63)),
        progress_bar=progress_bar,
    )
    bias = None if head.token_bias is None else output_bias
    head.set_codes(fit.codebooks, fit.codes, fit.token_stages, token_bias=bias)
    broadcast_(*(tensor for tensor in head.state_dict().values() if tensor.numel()))
    head.train(head.training)  # forgets what was unpacked of this rank's codes


@torch.no_grad()
def initialize_dense_head(head: DenseLogitsHead, calibration: Calibration) -> None:
    """Start the bias of a new dense head from token counts, as that of a new `VQLogitsHead` does."""
    if head.token_bias is not None:
        head.token_bias.copy_(unigram_bias(calibration.token_counts))


def describe_head(head: VQLogitsHead | ResidualVQLogitsHead | DenseLogitsHead) -> str:
    """One line on the size of a head beside the dense one, and its floor if it has one."""
    size = head.footprint()
    text = (
        f"Output head: {size.parameters:,} parameters ({size.parameters / size.dense_parameters:.2%} of dense),"
        f" {size.bytes:,} bytes ({size.bytes / size.dense_bytes:.2%} of dense; the mapping packed)."
    )
    if isinstance(head, VQLogitsHead):
        text += f" No backbone gets below perplexity {head.ppl_floor().item():.2f} with this mapping and bias."
    return text


def describe_untying(parts: CausalBackbone, head: VQLogitsHead | ResidualVQLogitsHead | DenseLogitsHead) -> str:
    """What breaking the tie of input and output embedding costs."""
    table = parts.vocab_size * parts.hidden_size
    backbone = sum(parameter.numel() for parameter in parts.model.parameters())
    size: Footprint = head.footprint()
    return (
        f"The output layer was tied to the input embedding, so it cost nothing; the tie is broken. The input table"
        f" stays ({table:,} parameters) and the head adds {size.parameters:,}: {backbone:,} parameters become"
        f" {backbone + size.parameters:,} (an untied dense head would make it {backbone + table:,})."
    )


def describe_model(
    backbone: nn.Module, head: VQLogitsHead | ResidualVQLogitsHead | DenseLogitsHead, *, tied: bool
) -> str:
    """What the whole model takes with this head and with its own dense layer, the input table counted in both.

    Args:
        backbone: whose parameters hold the input table.
        head: its output layer.
        tied: whether the dense layer was the input table, so that it cost nothing.

    """
    size = head.footprint()
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    taken = sum(parameter.numel() * parameter.element_size() for parameter in backbone.parameters())
    own, own_bytes = (0, 0) if tied else (size.dense_parameters, size.dense_bytes)
    return (
        f"Whole model, input table included: {parameters + own:,} parameters, {(taken + own_bytes) / 1e6:,.1f} MB with"
        f" its {'tied ' if tied else ''}dense layer; {parameters + size.parameters:,} parameters,"
        f" {(taken + size.bytes) / 1e6:,.1f} MB with this head."
    )

"""Start of codes of one level and of two: from token counts and, if there is one, from the pretrained output layer.

Letters: d hidden size, V vocabulary, K codes, S stages.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_logits.contracts import Calibration, OutputLayer
from lit_logits.functional.code_assignment import frequency_assignment, weighted_kmeans
from lit_logits.functional.code_hierarchy import weighted_kmeans_hierarchy
from lit_logits.functional.codebook import unigram_bias
from lit_logits.functional.cooccurrence import cooccurrence_assignment, cooccurrence_hierarchy
from lit_logits.functional.kmeans import kmeans

__all__ = [
    "PAIR_TOKENS",
    "HeadInit",
    "HierarchyInit",
    "HierarchyStart",
    "VQStart",
    "choose_init",
    "start_codes",
    "start_hierarchy",
]

PAIR_TOKENS = 50_000_000
"""How much text a `cooccurrence` start reads on each rank: enough for the contexts of rare tokens, a few minutes."""

HeadInit = Literal["random", "frequency", "cooccurrence", "kmeans", "weighted_kmeans"]
HierarchyInit = Literal["random", "cooccurrence", "weighted_kmeans"]


def choose_init(init: HeadInit | None, *, pretrained: bool) -> HeadInit:
    """Return `init`, or the default: `weighted_kmeans` for a pretrained output layer, else `cooccurrence`.

    Raises:
        ValueError: If the name is unknown, or there are no pretrained rows for k-means.
    """
    if init is None:
        return "weighted_kmeans" if pretrained else "cooccurrence"
    if init not in get_args(HeadInit):
        raise ValueError(f"Expected `init` to be one of {', '.join(map(repr, get_args(HeadInit)))}, but got {init!r}.")
    if init.endswith("kmeans") and not pretrained:
        raise ValueError(
            f"Expected a pretrained backbone for init={init!r}, which clusters the rows of its output layer, but the"
            " backbone is a config with random weights. Use another start, such as 'cooccurrence'."
        )
    return init


class VQStart(NamedTuple):
    """Result of `start_codes`: codebook (K, d), mapping (V,), latents (V, d), each None to stay as it is; bias (V,)."""

    codebook: Tensor | None
    token_to_code: Tensor | None
    token_bias: Tensor
    latents: Tensor | None


def start_codes(
    init: HeadInit,
    calibration: Calibration,
    layer: OutputLayer,
    *,
    codebook_size: int,
    device: torch.device,
    count_power: float = 0.75,
    progress_bar: bool = False,
) -> VQStart:
    """Find codes, mapping and bias of a `VQLogitsHead` from counts and the rows of a pretrained layer.

    The bias starts from token counts: as a unigram model if the codes are random, and as the split of each code among
    its tokens if they come from a pretrained layer.

    Args:
        init: see `VQLogitsHead`.
        calibration: counts (V,) and, for `weighted_kmeans`, the second moment (d, d).
        layer: of the pretrained model; k-means needs its rows, and then its bias is added.
        codebook_size: K.
        device: of the head.
        count_power: exponent of the counts in `weighted_kmeans`.
        progress_bar: show one line of progress on a terminal.

    Raises:
        ValueError: If k-means has no rows, or `weighted_kmeans` no second moment.
    """
    counts = calibration.token_counts
    generator = _generator(device)
    codebook, token_to_code, latents = None, None, None
    if init == "frequency":
        token_to_code = frequency_assignment(counts, codebook_size)
    elif init == "cooccurrence":
        if calibration.pairs is None:
            raise ValueError("Expected a calibration with pairs of tokens for init='cooccurrence', but got None.")
        token_to_code = cooccurrence_assignment(
            calibration.pairs, counts, codebook_size, generator=generator, progress_bar=progress_bar
        )
    elif init != "random":
        if layer.weight is None:
            raise ValueError(f"Expected the rows of a pretrained output layer for init={init!r}, but got None.")
        latents = layer.weight.to(device)  # the rows themselves, for heads that learn their mapping
        if init == "kmeans":
            result = kmeans(latents, codebook_size, generator=generator, progress_bar=progress_bar)
        else:
            if calibration.hidden_second_moment is None:
                raise ValueError(
                    "Expected a calibration with a second moment for init='weighted_kmeans', but got None."
                )
            result = weighted_kmeans(
                latents,
                codebook_size,
                token_counts=counts,
                hidden_second_moment=calibration.hidden_second_moment,
                power=count_power,
                generator=generator,
                progress_bar=progress_bar,
            )
        codebook, token_to_code = result.centroids, result.assignments
    # A code of a pretrained layer already scores how often its tokens occur together; random codes score nothing.
    bias = unigram_bias(counts) if codebook is None else unigram_bias(counts, token_to_code, codebook_size)
    if layer.bias is not None and codebook is not None:
        bias = bias + layer.bias.to(bias)
    return VQStart(codebook, token_to_code, bias, latents)


class HierarchyStart(NamedTuple):
    """Result of `start_hierarchy`: what `HierarchicalVQLogitsHead.set_codes` takes, None to stay as it is."""

    token_to_cluster: Tensor | None
    token_codes: Tensor | None
    token_bias: Tensor
    clusters: Tensor | None = None
    codes: Tensor | None = None


def start_hierarchy(
    init: HierarchyInit,
    calibration: Calibration,
    layer: OutputLayer,
    *,
    codebook_sizes: Sequence[int],
    max_cluster_size: int,
    device: torch.device,
    count_power: float = 0.75,
    progress_bar: bool = False,
) -> HierarchyStart:
    """Find codes, mapping and bias of a `HierarchicalVQLogitsHead` from counts and the rows of a pretrained layer.

    With random vectors the bias is that of a unigram model. Vectors of a pretrained layer score each token, so then the
    bias is the layer's own, or 0.

    Args:
        init: see `HierarchicalVQLogitsHead`.
        calibration: counts (V,), pairs for `cooccurrence`, the second moment (d, d) for `weighted_kmeans`.
        layer: of the pretrained model; `weighted_kmeans` needs its rows.
        codebook_sizes: number of clusters, and of the codes of each stage.
        max_cluster_size: tokens a cluster.
        device: of the head.
        count_power: exponent of the counts in `weighted_kmeans`.
        progress_bar: show one line of progress on a terminal.

    Raises:
        ValueError: If `cooccurrence` has no pairs, or `weighted_kmeans` no rows or no second moment.
    """
    counts = calibration.token_counts.to(device)
    if init == "random":
        return HierarchyStart(None, None, unigram_bias(counts))
    if init == "cooccurrence":
        if calibration.pairs is None:
            raise ValueError("Expected a calibration with pairs of tokens for init='cooccurrence', but got None.")
        clusters, codes = cooccurrence_hierarchy(
            calibration.pairs,
            counts,
            codebook_sizes,
            max_cluster_size=max_cluster_size,
            generator=_generator(device),
            progress_bar=progress_bar,
        )
        return HierarchyStart(clusters, codes, unigram_bias(counts))
    if layer.weight is None or calibration.hidden_second_moment is None:
        raise ValueError(
            f"Expected the rows of a pretrained output layer and a calibration with a second moment for init={init!r},"
            " but got None."
        )
    found = weighted_kmeans_hierarchy(
        layer.weight.to(device),
        codebook_sizes,
        token_counts=counts,
        hidden_second_moment=calibration.hidden_second_moment,
        max_cluster_size=max_cluster_size,
        power=count_power,
        generator=_generator(device),
        progress_bar=progress_bar,
    )
    bias = torch.zeros_like(counts) if layer.bias is None else layer.bias.to(counts)
    return HierarchyStart(found.token_to_cluster, found.token_codes, bias, found.clusters, found.codes)


def _generator(device: torch.device) -> torch.Generator:
    # Seeded by `seed_everything`, on the device of the rows, and apart from the global stream, so that the batches and
    # dropout that follow do not depend on `init`. Ranks may be seeded differently: `set_codes` broadcasts the result.
    return torch.Generator(device).manual_seed(torch.initial_seed() % (1 << 63))

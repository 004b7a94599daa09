"""Which of several experts acts: the one under which the text so far is likeliest; loops over the definition."""

import pytest
import tiny_llamas
import torch
from tiny_llamas import moved

from lit_logits import DynamicFusionDecoder
from lit_logits.modules import FusedCausalLM
from lit_logits.modules.dynamic_fusion.routing import acting_logits

VOCAB, PAD = 40, 0
BASE = tiny_llamas.llama(1, initializer_range=0.5)
EXPERTS = [moved(BASE, seed, 0.4) for seed in (2, 3, 4)]
LARGE = tiny_llamas.llama(0, hidden=32, initializer_range=0.4)
MODELS = LARGE, BASE, EXPERTS
IDS = torch.randint(1, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 12, [0] * 3 + [1] * 9, [1] * 9 + [0] * 3, [1] * 12])
LABELS = IDS.masked_fill((MASK == 0) | (torch.arange(12) < 5), -100)
GREEDY = {"max_new_tokens": 7, "min_new_tokens": 7, "pad_token_id": PAD, "return_dict_in_generate": True}


@torch.no_grad()
def likeliest(text):
    """The expert after each token of one text (T,), by the definition."""
    found = []
    for end in range(1, len(text) + 1):
        sums = []
        for expert in EXPERTS:
            log_probs = expert(text[None, :end]).logits[0].double().log_softmax(-1)
            sums.append(sum(float(log_probs[at, text[at + 1]]) for at in range(end - 1)))
        found.append(max(range(3), key=lambda t, sums=sums: (sums[t], -t)))
    return found


def test_routes_are_those_of_the_definition():
    routes = FusedCausalLM(*MODELS, routing="text").route(IDS, MASK)
    for row, mask in enumerate(MASK.bool()):
        assert routes[row][mask].tolist() == likeliest(IDS[row][mask])
    assert len(routes[MASK.bool()].unique()) == 3
    assert bool((routes[:, 5:].diff(dim=1) != 0).any())  # a text may turn to another expert


@pytest.mark.parametrize(
    "settings",
    [{}, {"criterion": "projection", "scale": 1.2}, {"criterion": "uncertain"}, {"static_alpha": [0.2, 0.5, 0.9]}],
    ids=str,
)
def test_each_token_has_the_weight_of_its_expert_alone(settings):
    fused = FusedCausalLM(*MODELS, routing="text", chunk_size=3, **settings)
    scores, routes = fused.score(IDS, LABELS, MASK), fused.route(IDS, MASK)[:, :-1]
    logits = fused(IDS, MASK)
    seen = set()
    for number, expert in enumerate(EXPERTS):
        own = {**settings, "static_alpha": settings["static_alpha"][number]} if "static_alpha" in settings else settings
        alone = FusedCausalLM(LARGE, BASE, [expert], **own)
        expected = alone.score(IDS, LABELS, MASK)
        at = scores.trace.mask & (routes == number)
        torch.testing.assert_close(scores.log_probs[at], expected.log_probs[at])
        torch.testing.assert_close(scores.trace.alpha[number][at], expected.trace.alpha[0][at])
        torch.testing.assert_close(scores.trace.kl_forward[at], expected.trace.kl_forward[at])
        others = [t for t in range(3) if t != number]
        assert not bool(scores.trace.alpha[others][:, at].any())
        torch.testing.assert_close(logits[:, :-1][at], alone(IDS, MASK)[:, :-1][at])
        seen |= {number} if bool(at.any()) else set()
    assert len(seen) == 3


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_return_sequences": 3, "do_sample": True}], ids=str)
@pytest.mark.parametrize("trace_logits", [0, 2])
def test_decoding_follows_the_text(options, trace_logits):
    """Prompts of several lengths: the weights are those of a second reading of what came out."""
    fused = FusedCausalLM(*MODELS, routing="text", criterion="equal")
    ids, mask = IDS[:, :6], MASK[:, :6]
    torch.manual_seed(0)
    output = fused.generate(ids, mask, trace_logits=trace_logits, **GREEDY, **options)
    copies = options.get("num_return_sequences", 1)
    whole = torch.cat([mask.repeat_interleave(copies, 0), torch.ones(4 * copies, 7, dtype=torch.long)], 1)
    labels = output.sequences.masked_fill(torch.arange(13) < 6, -100)
    scores = fused.score(output.sequences, labels, whole)
    torch.testing.assert_close(output.trace.alpha, scores.trace.alpha[..., -7:], atol=1e-4, rtol=1e-3)
    acting = fused.route(output.sequences, whole)[:, 5:-1]
    assert bool((output.trace.alpha.gather(0, acting.unsqueeze(0)) > 0).all())
    assert len(acting.unique()) > 1
    if trace_logits:
        assert output.top_tokens.token_ids.shape[0] == 5  # large model, base and all experts
    if "do_sample" not in options:
        for row in range(4):  # as alone, without padding
            own = fused.generate(ids[row][mask[row].bool()][None], **GREEDY, **options)
            assert own.sequences[0].tolist() == output.sequences[row][whole[row].bool()].tolist()


def test_a_text_that_has_ended_reads_padding_of_any_id():
    large = tiny_llamas.llama(0, hidden=32, initializer_range=0.4, vocab_size=VOCAB + 2)
    fused = FusedCausalLM(large, BASE, EXPERTS, routing="text")
    first = fused.generate(IDS[:2, :6], max_new_tokens=4, pad_token_id=PAD)
    ended = {"max_new_tokens": 4, "eos_token_id": int(first[0, 7])}
    reference = fused.generate(IDS[:2, :6], pad_token_id=PAD, **ended)
    found = fused.generate(IDS[:2, :6], pad_token_id=VOCAB - 1, **ended)
    assert found[1].tolist() == reference[1].tolist()


def test_one_expert_and_none_are_as_without():
    for experts in ([EXPERTS[0]], []):
        base = BASE if experts else None
        routed = FusedCausalLM(LARGE, base, experts, routing="text")
        assert routed.route(IDS, MASK) is None
        plain = FusedCausalLM(LARGE, base, experts)
        torch.testing.assert_close(routed.score(IDS, LABELS, MASK).log_probs, plain.score(IDS, LABELS, MASK).log_probs)
    still = FusedCausalLM(*MODELS, routing="text", static_alpha=0.0)
    torch.testing.assert_close(still(IDS, MASK), FusedCausalLM(LARGE)(IDS, MASK))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"Expected `routing` to be one of \('step', 'text'\), but got 'prompt'"):
        FusedCausalLM(*MODELS, routing="prompt")
    for settings in ({"criterion": "prompt"}, {"mode": "joint"}):
        with pytest.raises(ValueError, match="Expected routing='step' with criterion='prompt'"):
            DynamicFusionDecoder(*MODELS, routing="text", **settings)
    fused = FusedCausalLM(*MODELS, routing="text")
    with pytest.raises(ValueError, match="Expected no drafts with routing='text'"):
        fused.generate(IDS[:1, :6], max_new_tokens=3, pad_token_id=PAD, assistant_model=BASE)


def test_an_expert_that_emits_nan_is_named():
    broken = moved(BASE, 9)
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    fused = FusedCausalLM(LARGE, BASE, [EXPERTS[0], broken], expert_names=["good", "bad"], routing="text")
    with pytest.raises(ValueError, match="Expected the expert 'bad' to emit"):
        fused.score(IDS, LABELS, MASK)


def test_logits_of_the_expert_that_acts():
    logits = torch.randn(3, 4, 5)
    found = acting_logits(logits, torch.tensor([2, 0, 1, 1]))
    torch.testing.assert_close(found[0], torch.stack([logits[2, 0], logits[0, 1], logits[1, 2], logits[1, 3]]))


def test_settings_of_predictions_name_the_routing():
    """So that texts of other settings are not mixed; those of earlier versions go on."""
    assert DynamicFusionDecoder(*MODELS, routing="text").prediction_settings["routing"] == "text"
    assert "routing" not in DynamicFusionDecoder(*MODELS).prediction_settings

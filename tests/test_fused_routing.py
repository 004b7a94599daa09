"""Which of several experts acts: the one under which the text so far is likeliest; loops over the definition."""

import pytest
import tiny_llamas
import torch
from tiny_llamas import moved

from lit_logits import DynamicFusionDecoder
from lit_logits.functional.fusion_problem import acting_rows
from lit_logits.modules import FusedCausalLM

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
    [{}, {"criterion": "projection", "scale": 1.2}, {"criterion": "uncertain"}],
    ids=str,
)
def test_each_token_has_the_weight_of_its_expert_alone(settings):
    fused = FusedCausalLM(*MODELS, routing="text", chunk_size=3, **settings)
    scores, routes = fused.score(IDS, LABELS, MASK), fused.route(IDS, MASK)[:, :-1]
    logits = fused(IDS, MASK)
    seen = set()
    for number, expert in enumerate(EXPERTS):
        alone = FusedCausalLM(LARGE, BASE, [expert], **settings)
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


def test_decoding_reads_long_prompts_in_chunks():
    fused = FusedCausalLM(*MODELS, routing="text", criterion="equal")
    whole = fused.generate(IDS[:1], **GREEDY)
    chunks = fused.generate(IDS[:1], prefill_chunk_size=5, **GREEDY)
    assert chunks.sequences.tolist() == whole.sequences.tolist()
    torch.testing.assert_close(chunks.trace.alpha, whole.trace.alpha, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("settings", [{"routing": "text", "criterion": "equal"}, {"criterion": "prompt"}], ids=str)
def test_padding_is_told_by_its_id_where_no_mask_is_given(settings):
    """As transformers infers the mask; routes and prompt weights would else count the padding."""
    for seed in range(6):
        ids = torch.randint(1, VOCAB, (2, 8), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        ids[1, :5], mask[1, :5] = PAD, 0
        fused = FusedCausalLM(*MODELS, **settings)
        given, inferred = fused.generate(ids, mask, **GREEDY), fused.generate(ids, **GREEDY)
        assert inferred.sequences.tolist() == given.sequences.tolist()
        torch.testing.assert_close(inferred.trace.alpha, given.trace.alpha)


def test_a_text_that_has_ended_reads_padding_that_is_not_of_the_vocabulary():
    ids = IDS[:2, :6].clamp(max=37)
    fused = FusedCausalLM(*MODELS, routing="text", vocab_size=38)
    first = fused.generate(ids, max_new_tokens=4, pad_token_id=PAD)
    ended = {"max_new_tokens": 4, "eos_token_id": int(first[0, 7])}
    reference = fused.generate(ids, torch.ones_like(ids), pad_token_id=PAD, **ended)
    found = fused.generate(ids, torch.ones_like(ids), pad_token_id=39, **ended)
    assert found[1].tolist() == reference[1].tolist()
    assert int(found[0, -1]) == 39


def ruling_out(model, token, row):
    """The model, whose output layer emits −inf, or another number, for a token."""
    child = moved(model, 0, 0.0)
    child.lm_head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor(token), row))
    return child


def test_a_token_that_no_expert_can_emit_says_nothing():
    token = int(IDS[0, 3])
    without = [ruling_out(expert, token, -torch.inf) for expert in EXPERTS]
    fused = FusedCausalLM(LARGE, ruling_out(BASE, token, -torch.inf), without, routing="text")
    routes = fused.route(IDS[:1])
    sums = torch.zeros(3, dtype=torch.float64)
    for at in range(11):
        if int(IDS[0, at + 1]) != token:
            rows = [expert(IDS[:1, : at + 1]).logits[0, -1].double().log_softmax(-1) for expert in without]
            sums = sums + torch.stack([row[IDS[0, at + 1]] for row in rows]).detach()
        assert int(routes[0, at + 1]) == int(sums.argmax())
    output = fused.generate(IDS[:1, :6], **GREEDY)
    acting = fused.route(output.sequences)[:, 5:-1]
    assert not bool(output.trace.alpha.scatter(0, acting.unsqueeze(0), 0.0).any())


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_an_expert_that_overflows_is_named_though_it_does_not_act(value):
    broken = ruling_out(EXPERTS[1], 7, value)
    fused = FusedCausalLM(LARGE, BASE, [EXPERTS[0], broken], expert_names=["good", "bad"], routing="text")
    for read in (fused.route, fused, lambda ids: fused.generate(ids, **GREEDY), lambda ids: fused.score(ids, ids)):
        with pytest.raises(ValueError, match="Expected the expert 'bad' to emit"):
            read(IDS[:1])


def test_one_expert_and_none_are_as_without():
    for experts in ([EXPERTS[0]], []):
        base = BASE if experts else None
        routed = FusedCausalLM(LARGE, base, experts, routing="text")
        assert routed.route(IDS, MASK) is None
        plain = FusedCausalLM(LARGE, base, experts)
        torch.testing.assert_close(routed.score(IDS, LABELS, MASK).log_probs, plain.score(IDS, LABELS, MASK).log_probs)
    for alpha in (0.0, [0.2, 0.5, 0.9]):  # weights that are fixed
        routed, plain = (FusedCausalLM(*MODELS, routing=routing, static_alpha=alpha) for routing in ("text", "step"))
        torch.testing.assert_close(routed(IDS, MASK), plain(IDS, MASK))
    for settings in ({"criterion": "prompt"}, {"mode": "joint"}):
        FusedCausalLM(LARGE, BASE, EXPERTS[:1], routing="text", **settings)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"Expected `routing` to be one of \('step', 'text'\), but got 'prompt'"):
        FusedCausalLM(*MODELS, routing="prompt")
    for settings in ({"criterion": "prompt"}, {"mode": "joint"}):
        with pytest.raises(ValueError, match="Expected routing='step' with criterion='prompt'"):
            DynamicFusionDecoder(*MODELS, routing="text", **settings)
    fused = FusedCausalLM(*MODELS, routing="text")
    with pytest.raises(ValueError, match="Expected no drafts with routing='text'"):
        fused.generate(IDS[:1, :6], max_new_tokens=3, pad_token_id=PAD, assistant_model=BASE)


def test_logits_of_the_expert_that_acts():
    logits = torch.randn(3, 4, 5)
    found = acting_rows(logits, torch.tensor([2, 0, 1, 1]))
    torch.testing.assert_close(found, torch.stack([logits[2, 0], logits[0, 1], logits[1, 2], logits[1, 3]]))


def test_settings_of_predictions_name_the_routing():
    """So that texts of other settings are not mixed; those of earlier versions go on."""
    assert DynamicFusionDecoder(*MODELS, routing="text").prediction_settings["routing"] == "text"
    assert "routing" not in DynamicFusionDecoder(*MODELS).prediction_settings

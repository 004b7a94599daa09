"""Fused models: known answers, transformers' own `generate` and loops over the definition as oracles."""

import copy
from functools import partial

import pytest
import tiny_llamas
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from lit_logits import DynamicFusionDecoder
from lit_logits.functional import add_task_vectors, fuse_logits, fusion_weights
from lit_logits.modules.dynamic_fusion.decoding import SmallModels
from lit_logits.modules.dynamic_fusion.fused_lm import FusedCausalLM

VOCAB, PAD, EOS = 48, 0, 2

SMALL = {"vocab_size": VOCAB, "num_hidden_layers": 2, "initializer_range": 0.2, "pad_token_id": PAD}
llama, moved = partial(tiny_llamas.llama, hidden=32, **SMALL), partial(tiny_llamas.moved, by=0.05)


@pytest.fixture(scope="module")
def parts():
    base = llama(1, hidden=16)
    return llama(0), base, [moved(base, 2), moved(base, 3)]


@pytest.fixture
def decoder(parts):
    large, base, experts = parts
    return DynamicFusionDecoder(large, base, experts)


def prompts(lengths, seed=0, vocab=VOCAB):
    """Left-padded prompts and their mask."""
    g = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, vocab, (length,), generator=g)
        mask[row, width - length :] = 1
    return ids, mask


def by_definition(large, base, experts, ids, new_tokens, **search):
    """Greedy decoding of one prompt, every model over the whole text again at every step."""
    alphas = []
    for _ in range(new_tokens):
        a, b = (model(ids).logits[:, -1] for model in (large, base))
        e = torch.stack([model(ids).logits[:, -1] for model in experts])
        found = fusion_weights(a, b, e, **search)
        alphas.append(found.alpha)
        token = fuse_logits(a, b, e, found.alpha).argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        if int(token) == EOS:
            break
    return ids, torch.stack(alphas, -1)


# --- known answers ---


def test_expert_equal_to_base_is_the_large_model_token_for_token(parts):
    large, base, _ = parts
    decoder = DynamicFusionDecoder(large, base, [copy.deepcopy(base)])
    ids, mask = prompts([5, 9, 2])
    kwargs = {"max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True}
    ours, own = decoder.generate(ids, mask, **kwargs), large.generate(ids, attention_mask=mask, **kwargs)
    assert torch.equal(ours.sequences, own.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.scores, own.scores, strict=True))
    assert (ours.alpha == 0).all()
    torch.manual_seed(7)
    ours = decoder.generate(ids, mask, do_sample=True, top_k=20, temperature=0.8, max_new_tokens=20)
    torch.manual_seed(7)
    assert torch.equal(
        ours, large.generate(ids, attention_mask=mask, do_sample=True, top_k=20, temperature=0.8, max_new_tokens=20)
    )


@pytest.mark.parametrize("mode", ["single", "joint"])
def test_large_equal_to_base_is_the_expert(parts, mode):
    _, base, experts = parts
    decoder = DynamicFusionDecoder(copy.deepcopy(base), base, experts[:1], mode=mode)
    ids, mask = prompts([5, 9, 2])
    output = decoder.generate(ids, mask, max_new_tokens=16, return_dict_in_generate=True)
    assert torch.equal(output.sequences, experts[0].generate(ids, attention_mask=mask, max_new_tokens=16))
    torch.testing.assert_close(output.alpha, torch.ones_like(output.alpha), atol=2e-3, rtol=0)


@pytest.mark.parametrize("static_alpha", [0.0, [0.0, 0.0]])
def test_weight_zero_is_the_large_model_and_runs_no_other(parts, static_alpha):
    large, base, experts = parts
    decoder = DynamicFusionDecoder(large, base, experts, static_alpha=static_alpha)
    calls = []
    handles = [model.register_forward_hook(lambda *_: calls.append(1)) for model in (base, *experts)]
    ids, mask = prompts([4, 6])
    assert torch.equal(
        decoder.generate(ids, mask, max_new_tokens=8), large.generate(ids, attention_mask=mask, max_new_tokens=8)
    )
    trace = decoder.generate(ids, mask, max_new_tokens=8, return_dict_in_generate=True).trace
    assert trace.alpha.shape == (2, 2, trace.token_ids.shape[1])
    for handle in handles:
        handle.remove()
    assert calls == []
    alone = DynamicFusionDecoder(large)
    assert torch.equal(alone.generate(ids, mask, max_new_tokens=8), decoder.generate(ids, mask, max_new_tokens=8))


def test_proxy_tuning_adds_the_difference(parts):
    large, base, experts = parts
    decoder = DynamicFusionDecoder(large, base, experts[:1], static_alpha=1.5)
    ids, mask = prompts([6])
    output = decoder.generate(ids, mask, max_new_tokens=1, return_dict_in_generate=True, output_scores=True)
    expected = large(ids).logits[:, -1] + 1.5 * (experts[0](ids).logits[:, -1] - base(ids).logits[:, -1])
    torch.testing.assert_close(output.scores[0], expected, rtol=1e-4, atol=1e-5)
    p, q = expected.log_softmax(-1), large(ids).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(output.kl_forward[:, 0], (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(output.kl_reverse[:, 0], (q.exp() * (q - p)).sum(-1), rtol=1e-3, atol=1e-6)


# --- decoding ---


@pytest.mark.parametrize("search", [{}, {"mode": "joint"}, {"solver": "grid", "step": 0.25}, {"bounds": (0.5, 1.0)}])
def test_greedy_decoding_is_the_definition_step_by_step(parts, search):
    large, base, experts = parts
    decoder = DynamicFusionDecoder(large, base, experts, **search)
    for seed in range(3):
        ids, mask = prompts([6], seed)
        output = decoder.generate(ids, mask, max_new_tokens=12, return_dict_in_generate=True)
        expected, alpha = by_definition(large, base, experts, ids, 12, **search)
        assert torch.equal(output.sequences, expected)
        torch.testing.assert_close(output.alpha, alpha, atol=1e-2, rtol=0)


def test_with_cache_equals_without(decoder):
    ids, mask = prompts([5, 9, 2])
    with_cache = decoder.generate(ids, mask, max_new_tokens=20, return_dict_in_generate=True)
    without = decoder.generate(ids, mask, max_new_tokens=20, return_dict_in_generate=True, use_cache=False)
    assert torch.equal(with_cache.sequences, without.sequences)
    kept = with_cache.trace.mask
    torch.testing.assert_close(with_cache.alpha[:, kept], without.alpha[:, kept], atol=1e-3, rtol=0)


def test_every_small_model_reads_each_token_once(parts, decoder):
    """A cache of their own: after the prompt, one token a step."""
    widths = []
    handles = [
        model.register_forward_pre_hook(
            lambda _m, _a, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        for model in (parts[1], *parts[2])
    ]
    ids, mask = prompts([5])
    decoder.generate(ids, mask, max_new_tokens=4, min_new_tokens=4)
    for handle in handles:
        handle.remove()
    assert widths == [5] * 3 + [1] * 9


def test_batched_equals_one_by_one(decoder):
    lengths = [5, 9, 2]
    ids, mask = prompts(lengths)
    batch = decoder.generate(ids, mask, max_new_tokens=16, return_dict_in_generate=True)
    trace = batch.trace
    for row, length in enumerate(lengths):
        alone = decoder.generate(ids[row : row + 1, -length:], max_new_tokens=16, return_dict_in_generate=True)
        tokens = alone.sequences[0, length:]
        kept = trace.mask[row]
        assert torch.equal(trace.token_ids[row][kept], tokens)
        torch.testing.assert_close(alone.alpha[:, 0], batch.alpha[:, row, kept], atol=2e-3, rtol=0)


def test_a_prompt_read_in_chunks_gives_the_same_text(decoder):
    ids, mask = prompts([9, 7])
    whole = decoder.generate(ids, mask, max_new_tokens=8)
    chunked = decoder.generate(ids, mask, max_new_tokens=8, prefill_chunk_size=4, return_dict_in_generate=True)
    assert torch.equal(chunked.sequences, whole)
    assert chunked.trace.alpha.shape[-1] == whole.shape[1] - 9


def test_gpt2_as_a_small_model(parts):
    """Learned positions: padded prompts need their position ids."""
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, eos_token_id=EOS
    )
    base = GPT2LMHeadModel(config).eval()
    decoder = DynamicFusionDecoder(parts[0], base, [moved(base, 5)])
    ids, mask = prompts([3, 8])
    batch = decoder.generate(ids, mask, max_new_tokens=10)
    alone = decoder.generate(ids[:1, -3:], max_new_tokens=10)
    width = alone.shape[1] - 3
    assert torch.equal(batch[0, 8 : 8 + width], alone[0, 3:])


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class StopAtEight(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 8)


class Forbid(LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([self.token]), -torch.inf)


def test_what_generate_of_transformers_takes(decoder):
    ids, mask = prompts([5])
    plain = decoder.generate(ids, mask, max_new_tokens=10, min_new_tokens=10)
    streamer = Recorder()
    streamed = decoder.generate(ids, mask, max_new_tokens=10, min_new_tokens=10, streamer=streamer)
    assert torch.equal(streamed, plain)
    assert streamer.tokens == plain[0].tolist()
    assert streamer.ended
    criteria = StoppingCriteriaList([StopAtEight()])
    stopped = decoder.generate(ids, mask, max_new_tokens=10, min_new_tokens=10, stopping_criteria=criteria)
    assert torch.equal(stopped, plain[:, :8])
    first = int(plain[0, 5])
    forbidden = decoder.generate(ids, mask, max_new_tokens=10, logits_processor=LogitsProcessorList([Forbid(first)]))
    assert first not in forbidden[0, 5:].tolist()
    penalised = decoder.generate(ids, mask, max_new_tokens=10, min_new_tokens=10, no_repeat_ngram_size=1)
    assert len(set(penalised[0].tolist())) == penalised.shape[1]
    torch.manual_seed(0)
    sampling = {"do_sample": True, "top_p": 0.9, "num_return_sequences": 3, "return_dict_in_generate": True}
    several = decoder.generate(ids, mask, max_new_tokens=6, **sampling)
    assert several.sequences.shape[0] == 3
    assert several.trace.alpha.shape[:2] == (2, 3)
    assert len({tuple(row.tolist()) for row in several.sequences}) > 1


def test_scores_and_penalties_are_of_the_fused_logits(parts, decoder):
    """The repetition penalty acts on fused logits, so it must come behind the fusion."""
    large, base, experts = parts
    ids, mask = prompts([5])
    output = decoder.generate(
        ids,
        mask,
        max_new_tokens=1,
        repetition_penalty=1.7,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    a, b = (model(ids).logits[:, -1] for model in (large, base))
    e = torch.stack([model(ids).logits[:, -1] for model in experts])
    fused = fuse_logits(a, b, e, fusion_weights(a, b, e).alpha)
    torch.testing.assert_close(output.logits[0], fused, atol=1e-4, rtol=1e-4)
    seen = ids.unique()
    expected = fused.clone()
    expected[:, seen] = torch.where(fused[:, seen] > 0, fused[:, seen] / 1.7, fused[:, seen] * 1.7)
    torch.testing.assert_close(output.scores[0], expected, atol=1e-4, rtol=1e-4)


def test_the_trace_ends_with_the_text(decoder):
    """What is behind the end token is padding, not text."""
    ids, mask = prompts([5, 5, 5, 5], seed=3)
    plain = decoder.generate(ids, mask, max_new_tokens=12)
    end = int(plain[1, 8])  # let this token end texts
    output = decoder.generate(ids, mask, max_new_tokens=12, eos_token_id=end, return_dict_in_generate=True)
    for row in range(4):
        own = output.sequences[row, 5:].tolist()
        length = own.index(end) + 1 if end in own else len(own)
        assert output.trace.mask[row].tolist() == [True] * length + [False] * (len(own) - length)


def test_the_large_model_is_left_as_it_was(parts, decoder):
    large = parts[0]
    ids, mask = prompts([5])
    before = large.generate(ids, attention_mask=mask, max_new_tokens=5)
    decoder.generate(ids, mask, max_new_tokens=5)
    assert not large._forward_hooks
    assert torch.equal(large.generate(ids, attention_mask=mask, max_new_tokens=5), before)
    assert list(decoder.parameters()) == []
    assert decoder.state_dict() == {}
    assert not any(model.training for model in decoder.train().fused.models)


# --- scoring ---


@pytest.mark.parametrize("search", [{}, {"mode": "joint"}, {"static_alpha": 0.7}, {"static_alpha": 0.0}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_the_fused_log_probabilities_one_token_at_a_time(parts, search, side):
    large, base, experts = parts
    decoder = DynamicFusionDecoder(large, base, experts, **search)
    decoder.fused.chunk_size = 5
    lengths = [7, 4, 10]
    ids, mask = prompts(lengths, seed=5)
    if side == "right":
        for row, length in enumerate(lengths):
            ids[row], mask[row] = ids[row].roll(length, 0), mask[row].roll(length, 0)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    scores = decoder.score(ids, labels, mask)
    count = 0
    for row in range(3):
        text = ids[row][mask[row].bool()]
        start = int(mask[row].argmax())
        for t in range(1, len(text)):
            column = start + t - 1
            if labels[row, column + 1] == -100:
                assert scores.log_probs[row, column] == 0
                continue
            prefix = text[:t].unsqueeze(0)
            a, b = (model(prefix).logits[:, -1] for model in (large, base))
            e = torch.stack([model(prefix).logits[:, -1] for model in experts])
            if "static_alpha" in search:
                alpha = torch.full((2, 1), search["static_alpha"])
            else:
                alpha = fusion_weights(a, b, e, **search).alpha
            expected = fuse_logits(a, b, e, alpha).log_softmax(-1)[0, text[t]]
            torch.testing.assert_close(scores.log_probs[row, column], expected, atol=2e-3, rtol=1e-3)
            torch.testing.assert_close(scores.trace.alpha[:, row, column], alpha[:, 0], atol=5e-3, rtol=0)
            count += 1
    assert int(scores.trace.mask.sum()) == count


def test_forward_is_what_score_gathers(decoder):
    ids, mask = prompts([6, 6])
    log_probs = decoder(ids, mask).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(decoder.score(ids, ids).log_probs, log_probs, atol=1e-4, rtol=1e-4)


def test_nothing_to_score_is_zero(decoder):
    ids, _ = prompts([6])
    scores = decoder.score(ids, torch.full_like(ids, -100))
    assert scores.log_probs.tolist() == [[0.0] * 5]
    assert not scores.trace.mask.any()


# --- task arithmetic ---


def test_experts_in_a_list_are_merged(parts):
    large, base, experts = parts
    decoder = DynamicFusionDecoder(large, base, [experts], merge_weight=0.4)
    start, (one, two) = base.state_dict(), [expert.state_dict() for expert in experts]
    for name, tensor in decoder.fused.experts[0].state_dict().items():
        torch.testing.assert_close(
            tensor, start[name] + 0.4 * (one[name] - start[name]) + 0.4 * (two[name] - start[name])
        )
    assert decoder.fused.num_experts == 1


def test_merging_refuses_another_architecture(parts):
    with pytest.raises(
        ValueError, match=r"Expected experts of the base's architecture, but `lm_head.weight` is \(48, 16\)"
    ):
        DynamicFusionDecoder(parts[0], parts[1], [[parts[2][0], llama(8)]])
    with pytest.raises(ValueError, match="missing"):
        add_task_vectors({"a": torch.ones(1)}, [{}])


# --- vocabularies ---


def make_tokenizer(folder, words, special=("<pad>", "<s>", "</s>")):
    vocab = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=special[0]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    fast.save_pretrained(folder)
    return fast


WORDS = [f"w{i}" for i in range(37)]  # 40 tokens with the special ones


def test_padded_sizes_of_one_tokenizer_are_cut_to_the_common_ids(parts, tmp_path, caplog):
    tokenizer = make_tokenizer(tmp_path, WORDS)
    large = parts[0]  # 48 rows
    base = llama(1, hidden=16, vocab_size=40)
    experts = [moved(base, 2)]
    with caplog.at_level("INFO"):
        decoder = DynamicFusionDecoder(large, base, experts, tokenizer=tokenizer)
    assert caplog.text.count("fused over the 40 ids that all have") == 1
    ids, mask = prompts([5, 3], vocab=40)
    output = decoder.generate(ids, mask, max_new_tokens=8, return_dict_in_generate=True, output_scores=True)
    assert all((scores[:, 40:] == -torch.inf).all() for scores in output.scores)
    a, b = large(ids[:1]).logits[:, -1, :40], base(ids[:1]).logits[:, -1]
    e = experts[0](ids[:1]).logits[None, :, -1]
    expected = fuse_logits(a, b, e, fusion_weights(a, b, e).alpha)
    torch.testing.assert_close(output.scores[0][:1, :40], expected, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(decoder.score(ids, ids, mask).log_probs).all()


def test_vocabularies_that_disagree_are_refused(parts, tmp_path):
    large, base, experts = parts
    other = llama(1, hidden=16, vocab_size=40)
    with pytest.raises(ValueError, match=r"models of one vocabulary.*model 48, base 40, experts\[0\] 40.*`tokenizer`"):
        DynamicFusionDecoder(large, other, [moved(other, 2)])
    large.save_pretrained(tmp_path / "large")
    base.save_pretrained(tmp_path / "base")
    make_tokenizer(tmp_path / "large", WORDS)
    make_tokenizer(tmp_path / "base", WORDS[::-1])
    with pytest.raises(
        ValueError, match=r"`model` and `base` to have one tokenizer.*token 'w0' has id 3 in the one and 39"
    ):
        DynamicFusionDecoder(str(tmp_path / "large"), str(tmp_path / "base"), experts)
    make_tokenizer(tmp_path / "base", WORDS, special=("<pad>", "</s>", "<s>"))
    with pytest.raises(ValueError, match=r"the special token '<s>' has id 1 in the one and 2 in the other"):
        DynamicFusionDecoder(str(tmp_path / "large"), str(tmp_path / "base"), experts)
    make_tokenizer(tmp_path / "base", WORDS)
    assert len(DynamicFusionDecoder(str(tmp_path / "large"), str(tmp_path / "base"), experts).tokenizer) == 40
    big = make_tokenizer(tmp_path / "big", [f"w{i}" for i in range(60)])
    with pytest.raises(ValueError, match="logits for the 63 tokens of the tokenizer"):
        DynamicFusionDecoder(large, base, experts, tokenizer=big)


def test_different_ends_of_text_have_to_be_named(parts):
    large, base, experts = parts
    odd = copy.deepcopy(experts[0])
    odd.generation_config.eos_token_id = 7
    with pytest.raises(ValueError, match=r"experts\[0\] \[7\]\. Pass `eos_token_id`, one or a list such as \[2, 7\]"):
        DynamicFusionDecoder(large, base, [odd])
    ids, mask = prompts([5])
    plain = DynamicFusionDecoder(large, base, experts[:1]).generate(ids, mask, max_new_tokens=8, min_new_tokens=8)
    end = int(plain[0, 8])  # a token that will be generated
    odd.generation_config.eos_token_id = end
    decoder = DynamicFusionDecoder(large, base, [odd], eos_token_id=[EOS, end])
    ended = decoder.generate(ids, mask, max_new_tokens=8)[0]
    assert ended.tolist() == plain[0, : 5 + plain[0, 5:].tolist().index(end) + 1].tolist()


# --- bad input ---


def test_an_expert_that_emits_nan_is_named(parts):
    large, base, experts = parts
    broken = copy.deepcopy(experts[1])
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.nan
    ids, mask = prompts([5])
    for kwargs in ({}, {"static_alpha": 1.0}):
        decoder = DynamicFusionDecoder(large, base, [experts[0], broken], **kwargs)
        with pytest.raises(ValueError, match="Expected the expert 'expert_1' to emit logits that are finite"):
            decoder.generate(ids, mask, max_new_tokens=2)
        assert not large._forward_hooks
        with pytest.raises(ValueError, match="Expected the expert 'expert_1'"):
            decoder.score(ids, ids)


def test_bad_prompts_and_bad_ways_to_decode(parts, decoder):
    ids, mask = prompts([5, 3])
    with pytest.raises(ValueError, match="at least one token, but text 0 of the batch is empty"):
        decoder.generate(torch.empty(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="but text 1 of the batch is empty"):
        decoder.generate(ids, mask * torch.tensor([[1], [0]]))
    with pytest.raises(
        ValueError, match=r"at most 64 tokens, the context of the large model, but text 0 of the batch has 70"
    ):
        decoder.generate(torch.ones(1, 70, dtype=torch.long), max_new_tokens=1)
    with pytest.raises(ValueError, match=r"but text 0 of the batch has 5 and 60 are to be added"):
        decoder.generate(ids, mask, max_new_tokens=60)
    short = llama(1, hidden=16, max_position_embeddings=8)
    with pytest.raises(ValueError, match="at most 8 tokens, the context of the base, but text 0 of the batch has 9"):
        DynamicFusionDecoder(parts[0], short, [moved(short, 3)]).score(*2 * (torch.full((1, 9), 5),))
    with pytest.raises(ValueError, match="below 48, the common vocabulary, but got 48"):
        decoder.generate(ids + VOCAB - int(ids.max()), mask, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"greedy search or sampling.*but got beam search"):
        decoder.generate(ids, mask, max_new_tokens=2, num_beams=2)
    with pytest.raises(ValueError, match="`cache_implementation` to be None or 'dynamic', but got 'static'"):
        decoder.generate(ids, mask, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="Expected no `past_key_values`"):
        decoder.generate(ids, mask, max_new_tokens=2, past_key_values=object())
    with pytest.raises(ValueError, match=r"shape of `input_ids`, \(2, 5\), but got \(2, 4\)"):
        decoder.generate(ids, mask[:, 1:])
    with pytest.raises(ValueError, match=r"`labels` to be in \[0, 48\)"):
        decoder.score(ids, ids + VOCAB)


def test_bad_arguments(parts):
    large, base, experts = parts
    with pytest.raises(ValueError, match="Expected `base`, which the 2 expert"):
        DynamicFusionDecoder(large, None, experts)
    with pytest.raises(ValueError, match="`experts` to be a list of models"):
        DynamicFusionDecoder(large, base, experts[0])
    with pytest.raises(ValueError, match=r"0 ≤ smallest ≤ largest.*, but got \(2.0, 1.0\)"):
        DynamicFusionDecoder(large, base, experts, bounds=(2.0, 1.0))
    with pytest.raises(ValueError, match="'tilting' or 'grid', but got 'newton'"):
        DynamicFusionDecoder(large, base, experts, solver="newton")
    with pytest.raises(ValueError, match=r"one for each of 2 expert\(s\), but got \[1.0\]"):
        DynamicFusionDecoder(large, base, experts, static_alpha=[1.0])
    with pytest.raises(ValueError, match="`chunk_size` to be at least 1, but got 0"):
        FusedCausalLM(large, base, experts, chunk_size=0)
    with pytest.raises(ValueError, match=r"Expected `base` to be a causal language model of transformers.*got Linear"):
        DynamicFusionDecoder(large, torch.nn.Linear(2, 2), experts)
    with pytest.raises(ValueError, match="'no/such/model', which could not be loaded"):
        DynamicFusionDecoder("no/such/model", base, experts)


# --- what an audit found ---


def test_one_model_in_two_roles(parts):
    """A model that is its own base fed itself through its hook without end."""
    _, base, experts = parts
    ids, mask = prompts([5, 3])
    decoder = DynamicFusionDecoder(base, base, experts[:1])
    expected = experts[0].generate(ids, attention_mask=mask, max_new_tokens=8)
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=8), expected)
    decoder = DynamicFusionDecoder(parts[0], parts[0], [parts[0]])
    assert torch.equal(
        decoder.generate(ids, mask, max_new_tokens=8), parts[0].generate(ids, attention_mask=mask, max_new_tokens=8)
    )


def test_steps_do_not_hold_the_logits(decoder, monkeypatch):
    """A view of no elements kept the whole logits of every step alive."""
    ids, mask = prompts([5])
    held = []
    real = SmallModels.trace

    def trace(self, *args):
        held.extend(tensor.untyped_storage().nbytes() for step in self.steps.values() for tensor in step)
        return real(self, *args)

    monkeypatch.setattr(SmallModels, "trace", trace)
    decoder.generate(ids, mask, max_new_tokens=4)
    assert held
    assert max(held) < VOCAB * 4


def test_texts_that_a_criterion_ended_have_no_padding_in_the_trace(decoder):
    class StopRow(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 8, input_ids.shape[1] >= 11])

    ids, mask = prompts([5, 5])
    kwargs = {"max_new_tokens": 9, "bad_words_ids": [[PAD], [EOS]]}
    traces = []
    handle = decoder.fused.register_trace_hook(traces.append)
    decoder.generate(ids, mask, stopping_criteria=StoppingCriteriaList([StopRow()]), **kwargs)
    assert traces.pop().mask.sum(1).tolist() == [3, 6]
    handle.remove()
    decoder.generate(ids, mask, **kwargs)
    assert traces == []


def test_the_end_of_a_config_of_ones_own_counts(parts):
    large, base, experts = parts
    ids, mask = prompts([5])
    decoder = DynamicFusionDecoder(large, base, experts, eos_token_id=EOS)
    plain = decoder.generate(ids, mask, max_new_tokens=8, min_new_tokens=8)[0, 5:].tolist()
    config = GenerationConfig(eos_token_id=plain[1], max_new_tokens=8, pad_token_id=PAD)
    ended = decoder.generate(ids, mask, generation_config=config)[0, 5:].tolist()
    assert ended == plain[: plain.index(plain[1]) + 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_different_dtypes(parts, dtype):
    large, base, experts = parts
    ids, mask = prompts([5, 3])
    mixed = DynamicFusionDecoder(copy.deepcopy(large).to(dtype), base, experts)
    output = mixed.generate(ids, mask, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    same = DynamicFusionDecoder(large, base, experts)
    expected = same.generate(ids, mask, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    tolerance = 1e-3 if dtype == torch.float64 else 0.3
    torch.testing.assert_close(output.logits[0].float(), expected.logits[0], atol=tolerance, rtol=tolerance)
    assert mixed.to(torch.float16).fused.large.dtype == dtype


def test_a_large_model_that_emits_nan_is_named_even_alone(parts):
    broken = copy.deepcopy(parts[0])
    with torch.no_grad():
        broken.lm_head.weight[5] = torch.nan
    ids, mask = prompts([5])
    with pytest.raises(ValueError, match="Expected the large model to emit logits that are finite"):
        DynamicFusionDecoder(broken).generate(ids, mask, max_new_tokens=2)


def test_arguments_are_judged_at_the_start(parts):
    large, base, experts = parts
    with pytest.raises(ValueError, match=r"but got 'max_new_tokns'. Did you mean 'max_new_tokens'"):
        DynamicFusionDecoder(large, base, experts, generation={"max_new_tokns": 3})
    with pytest.raises(ValueError, match="but got beam search"):
        DynamicFusionDecoder(large, base, experts, generation={"num_beams": 2})
    with pytest.raises(ValueError, match="`answer_pattern` to be a regular expression"):
        DynamicFusionDecoder(large, base, experts, answer_pattern="(")
    with pytest.raises(ValueError, match="`answer_pattern` to have one group"):
        DynamicFusionDecoder(large, base, experts, answer_pattern="x")
    ids, mask = prompts([5])
    with pytest.raises(ValueError, match="neither `guidance_scale` nor `token_healing`"):
        DynamicFusionDecoder(large, base, experts).generate(ids, mask, guidance_scale=1.5, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"`labels` of the shape of `input_ids`, \(1, 5\), but got \(1, 4\)"):
        DynamicFusionDecoder(large, base, experts).score(ids, ids[:, :4])
    with pytest.raises(ValueError, match=r"Expected `experts\[0\]` to be a causal language model.*NoneType"):
        DynamicFusionDecoder(large, base, [None])

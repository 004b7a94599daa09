"""Terms that say what a source knows, which source teaches which sample, weights that change: by their definitions."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Trainer
from test_gld_fusion_module import OTHER_SIZE, PIVOT_SIZE, fit, make, make_batch, make_model, quiet
from torch.utils.data import DataLoader

from lit_logits import GLDFusionModule
from lit_logits.functional import match_vocabularies, matched_kl, response_nll, route_by_nll
from lit_logits.functional.top_k_logits import SourceLogits, top_k_logits
from lit_logits.modules import LinearRamp

PIVOT_TOKENS = [None, *(bytes([65 + i]) for i in range(1, PIVOT_SIZE))]
OTHER_TOKENS = [bytes([60 + i]) if i % 4 else None for i in range(OTHER_SIZE)]  # some are the pivot's, some are not
OTHER_TOKENS[50] = OTHER_TOKENS[9]  # two of one text
TERMS = {"uld": 0.2, "kl": {"near": 0.5}, "matched": {"far": 0.8}, "chunk": 3.0}


def make_with_terms(terms=None, **kwargs):
    module = make(terms=TERMS if terms is None else terms, chunk_temperature=5.0, **kwargs)
    module.pivot_tokens = PIVOT_TOKENS
    module.sources["far"].tokens = OTHER_TOKENS
    return module


# ---------------------------------------------------------------------- from the definitions


def label_positions(view, row):
    return [t for t in range(view["labels"].shape[1] - 1) if int(view["labels"][row, t + 1]) != -100]


def kl_of_buckets(p, log_q, ids, temperature):
    """Of dictionaries: id → the teacher's probability; the student's log-probabilities of all tokens."""
    total, kept = 0.0, torch.tensor(list(ids))
    q = log_q.exp()
    for token in ids:
        total = total + p[token] * (math.log(p[token]) - log_q[token])
    tail = 1 - sum(p[token] for token in ids)
    rest = q.sum() - q[kept].sum()
    return temperature**2 * (total + tail * (math.log(tail) - rest.log()))


def coin(ell_p, ell_s, temperature):
    p, q = math.exp(ell_s / temperature), (ell_p / temperature).exp()
    return p * (math.log(p) - q.log()) + (1 - p) * (math.log(1 - p) - (1 - q).log())


def terms_by_definition(module, batch, name, row):
    """The terms of one source for one sample, by dictionaries and loops."""
    same, source = name == "near", module.sources[name]
    view = batch["sources"].get(name, batch)
    own = module(batch["input_ids"], batch["attention_mask"])[row].log_softmax(-1)
    with torch.no_grad():
        theirs = source.model(input_ids=view["input_ids"], attention_mask=view["attention_mask"]).logits[row]
        theirs = theirs.log_softmax(-1)
    mine, others = label_positions(batch, row), label_positions(view, row)
    if same:
        pairs = [(t, t) for t in mine]
    else:
        at = {int(view["response_ends"][row, u]): u for u in others}
        ends = {t: int(batch["response_ends"][row, t]) for t in mine}
        pairs = [(t, at[end]) for t, end in ends.items() if end in at]
    found = {}
    divergences = []
    for t, u in pairs:
        top = theirs[u].topk(module.top_k)
        p = {int(i): math.exp(float(log_prob)) for i, log_prob in zip(top.indices, top.values, strict=True)}
        if not same:
            carried = {}
            for token, probability in p.items():
                text = OTHER_TOKENS[token]
                if text is not None and text in PIVOT_TOKENS:
                    place = PIVOT_TOKENS.index(text)
                    carried[place] = carried.get(place, 0.0) + probability
            p = carried
        divergences.append(kl_of_buckets(p, own[t], p, 1.0) if p else torch.zeros(()))
    found["kl" if same else "matched"] = sum(divergences) / len(pairs)
    label_of = lambda log_probs, labels, t: log_probs[t, int(labels[row, t + 1])]  # noqa: E731
    chunks = []
    cuts = [*pairs, (mine[-1] + 1, others[-1] + 1)] if same else pairs
    for (begin, source_begin), (end, source_end) in pairwise(cuts):
        ell_p = sum(label_of(own, batch["labels"], t) for t in range(begin, end))
        ell_s = sum(float(label_of(theirs, view["labels"], u)) for u in range(source_begin, source_end))
        chunks.append(coin(ell_p, ell_s, module.chunk_temperature))
    found["chunk"] = sum(chunks) / max(1, len(chunks))
    return found


@pytest.mark.parametrize("chunk_size", [3, 4096])
def test_terms_and_their_gradients_are_the_definition(chunk_size):
    module, batch = quiet(make_with_terms()), make_batch()
    module.chunk_size = chunk_size
    other, expected = copy.deepcopy(module), 0.0
    losses = module.losses(batch)
    assert {name: set(terms) for name, terms in losses.terms.items()} == {
        "near": {"uld", "kl", "chunk"},
        "far": {"uld", "matched", "chunk"},
    }
    for name in ("near", "far"):
        for row in range(4):
            for term, value in terms_by_definition(other, batch, name, row).items():
                torch.testing.assert_close(losses.terms[name][term][row], value.detach(), atol=1e-5, rtol=1e-4)
                weight = TERMS[term] if term == "chunk" else TERMS[term][name]
                expected = expected + module.weights[name] * weight * value / 4
    kl_only = {term: weight for term, weight in TERMS.items() if term != "uld"}
    module = quiet(make_with_terms(kl_only, kd_weight=1.0))
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(
        torch.autograd.grad(loss, list(module.parameters())),
        torch.autograd.grad(expected, list(other.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


def test_the_default_terms_are_those_of_the_paper():
    one, other = (quiet(make(**kwargs)) for kwargs in ({}, {"terms": {"uld": 1.0, "gld": 0.3}}))
    torch.testing.assert_close(one.training_step(make_batch(), 0), other.training_step(make_batch(), 0))
    without = quiet(make(terms={"kl": {"near": 1.0}}))
    losses = without.losses(make_batch())
    assert set(losses.sources) == {"near"}
    assert losses.sources["near"][:2] == (0, 0)


@pytest.mark.parametrize("routing", [None, "nll"])
def test_padding_and_split_change_no_term(routing):
    module = quiet(make_with_terms(source_routing=routing))

    def gradients(batches):
        loss = sum(module.training_step(batch, 0) for batch in batches) / len(batches)
        return [loss.detach(), *torch.autograd.grad(loss, list(module.parameters()))]

    whole = gradients([make_batch()])
    for batches in ([make_batch(extra=5)], [make_batch([r]) for r in range(4)]):
        for one, other in zip(whole, gradients(batches), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_source_that_is_the_pivot_teaches_nothing_by_any_term():
    terms = {"kl": 1.0, "matched": 1.0, "chunk": 1.0}
    for kind in ("forward", "reverse", "jsd"):
        pivot, twin = (make_model(0, PIVOT_SIZE) for _ in range(2))
        module = quiet(GLDFusionModule(pivot, {"twin": twin}, top_k=4, kd_weight=1.0, terms=terms, kl_kind=kind))
        module.pivot_tokens = module.sources["twin"].tokens = [bytes([i]) for i in range(PIVOT_SIZE)]
        loss = module.training_step(make_batch(), 0)
        assert loss.item() == pytest.approx(0, abs=1e-5)
        assert float(module.losses(make_batch()).matched["twin"]) > 0.1
        for grad in torch.autograd.grad(loss, list(module.parameters())):
            torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-4, rtol=0)


def test_nothing_to_learn_is_a_zero_with_a_graph_for_every_term():
    module, batch = quiet(make_with_terms(source_routing="nll")), make_batch()
    for view in (batch, batch["sources"]["far"]):
        view["labels"] = torch.full_like(view["labels"], -100)
    loss = module.training_step(batch, 0)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())


@pytest.mark.parametrize("unmatched", ["tail", "first", "pieces"])
def test_tokens_without_a_partner_teach_their_pieces(unmatched):
    """By the function of one sample; what finds a place is logged."""
    module, batch = quiet(make_with_terms({"matched": {"far": 1.0}}, unmatched=unmatched)), make_batch()
    texts = module.sources["far"].tokens = [bytes([66 + i // 40, 66 + i % 40]) for i in range(OTHER_SIZE)]
    losses, table = module.losses(batch), match_vocabularies(PIVOT_TOKENS, texts, unmatched=unmatched)
    assert (float(losses.matched["far"]) > 0.1) == (unmatched != "tail")
    own = module(batch["input_ids"], batch["attention_mask"])
    source, view = module.sources["far"].model, batch["sources"]["far"]
    theirs = source(input_ids=view["input_ids"], attention_mask=view["attention_mask"]).logits.log_softmax(-1)
    for row in range(4):
        at = {int(view["response_ends"][row, u]): u for u in label_positions(view, row)}
        ends = {t: int(batch["response_ends"][row, t]) for t in label_positions(batch, row)}
        pairs = [(t, at[end]) for t, end in ends.items() if end in at]
        top = theirs[row, [u for _, u in pairs]].topk(module.top_k)
        expected = matched_kl(own[row, [t for t, _ in pairs]], top.indices, top.values, table)
        torch.testing.assert_close(losses.terms["far"]["matched"][row], expected, atol=1e-5, rtol=1e-4)


def test_graphs_are_compared_token_by_token_where_both_have_the_token():
    """`near` has the pivot's vocabulary, `far` a part of it; the graphs are those of `vocabulary_graph`."""
    module, batch = quiet(make_with_terms({"gld": 1.0}, nodes="matched", graph_values="softmax")), make_batch()
    losses, table = module.losses(batch), match_vocabularies(PIVOT_TOKENS, OTHER_TOKENS).tolist()
    own = module(batch["input_ids"], batch["attention_mask"])
    for name, source in module.sources.items():
        view = batch["sources"].get(name, batch)
        theirs = source.model(input_ids=view["input_ids"], attention_mask=view["attention_mask"]).logits
        partner = table if name == "far" else range(PIVOT_SIZE)
        for row in range(4):
            rows, sides = [], ((own[row], batch, range(PIVOT_SIZE)), (theirs[row], view, partner))
            for logits, of_view, map_to in sides:
                places = [
                    t for t in label_positions(of_view, row) if name == "near" or of_view["response_ends"][row, t] >= 0
                ]
                values = torch.zeros(len(places), PIVOT_SIZE)
                kept = torch.zeros(PIVOT_SIZE, dtype=torch.bool)
                for number, t in enumerate(places):
                    top = logits[t].softmax(-1).topk(module.top_k)
                    for token, value in zip(top.indices.tolist(), top.values, strict=True):
                        if map_to[token] in partner and map_to[token] >= 0:
                            values[number, map_to[token]] += value.detach()
                            kept[map_to[token]] = True
                rows.append((values.T @ values / len(places), kept))
            nodes = rows[0][1] | rows[1][1]
            strengths = [(graph[nodes][:, nodes]).mean(1) for graph, _ in rows]
            expected = (strengths[0] - strengths[1]).abs().sum()
            torch.testing.assert_close(losses.terms[name]["gld"][row], expected, atol=1e-6, rtol=1e-4)


def test_matched_graphs_of_the_pivot_itself_teach_nothing_and_ask_for_the_tokenizer_of_others():
    pivot, twin = (make_model(0, PIVOT_SIZE) for _ in range(2))
    options = {"top_k": 4, "kd_weight": 1.0, "terms": {"gld": 1.0}, "nodes": "matched"}
    module = quiet(GLDFusionModule(pivot, {"twin": twin}, **options))
    loss = module.training_step(make_batch(), 0)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    module = make_with_terms({"gld": 1.0}, nodes="matched")
    module.sources["far"].tokens = None
    with pytest.raises(ValueError, match="Expected to know the tokenizer of source 'far'"):
        module.losses(make_batch())


# ---------------------------------------------------------------------- what a term needs


def test_kl_from_another_tokenizer_is_refused():
    batch = make_batch()
    with pytest.raises(ValueError, match="source 'far' to have the pivot's tokenizer, whose next tokens the term 'kl'"):
        make_with_terms({"kl": 1.0}).losses(batch)
    batch["tokenizer_id"] = batch["sources"]["far"]["tokenizer_id"] = torch.tensor(5)  # another layout alone
    for view in batch["sources"].values():
        view["input_ids"] = view["input_ids"].clamp(max=PIVOT_SIZE - 1)
    losses = make_with_terms({"kl": 1.0}).losses(batch)
    assert losses.terms["far"]["kl"].isfinite().all()


@pytest.mark.parametrize(
    ("lacking", "match"), [("pivot", "the pivot's tokenizer"), ("far", "the tokenizer of source 'far'")]
)
def test_matched_without_a_tokenizer_is_refused(lacking, match):
    module = make_with_terms()
    if lacking == "pivot":
        module.pivot_tokens = None
    else:
        module.sources["far"].tokens = None
    with pytest.raises(ValueError, match=f"Expected to know {match}"):
        module.losses(make_batch())


def test_chunks_from_a_cache_of_version_1_are_refused():
    module, batch = make_with_terms({"chunk": 1.0}), make_batch()
    original = module.sources["far"].forward
    module.sources["far"].forward = lambda *args: original(*args)._replace(label_log_probs=None)
    with pytest.raises(ValueError, match=r"cache of 'far' to hold the log-probabilities .* one of version 1"):
        module.losses(batch)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"terms": {"ulb": 1.0}}, r"`terms` to be of .*, but got \['ulb'\]"),
        ({"terms": {"kl": {"fra": 1.0}}}, r"term 'kl' for the sources \['far', 'near'\], but got \['fra'\]"),
        ({"terms": {"kl": -1.0}}, "weight of the term 'kl' to be at least 0 and finite, but got -1.0"),
        ({"terms": {"kl": {"near": math.inf}}}, "at least 0 and finite, but got inf"),
        ({"kl_kind": "backward"}, "`kind` to be one of"),
        ({"unmatched": "last"}, "`unmatched` to be one of"),
        ({"kl_beta": 0.0}, r"`beta` to be in \(0, 1\)"),
        ({"chunk_temperature": 0.0}, "`chunk_temperature` to be positive"),
        ({"source_routing": "best"}, "`source_routing` to be None or one of"),
        ({"routing_temperature": -1.0}, "`routing_temperature` to be non-negative"),
    ],
)
def test_arguments_out_of_range(kwargs, match):
    with pytest.raises(ValueError, match=match):
        make(**kwargs)


# ---------------------------------------------------------------------- which source teaches which sample


def test_nll_a_byte_by_loops():
    """Of seven positions: before the response's end three tokens, one within a character, one after it."""
    log_probs = -torch.arange(1.0, 8.0).view(1, 7)
    ends, mask = torch.tensor([[-1, 0, 2, -1, 6, -1, -1]]), torch.tensor([[False] + [True] * 5 + [False]])
    top = top_k_logits(torch.zeros(1, 7, 3), 1)
    found = response_nll(SourceLogits(top, mask, ends, log_probs))
    assert found.tolist() == pytest.approx([(2 + 3 + 4) / 6])
    without = response_nll(SourceLogits(top, mask, torch.full_like(ends, -1), log_probs))
    assert without.tolist() == pytest.approx([(2 + 3 + 4 + 5 + 6) / 5])
    with pytest.raises(ValueError, match="a source lacks them"):
        response_nll(SourceLogits(top, mask, ends))


def test_shares_by_hand():
    nll = torch.tensor([[0.5, 0.7, 0.9], [1.0, 0.2, 0.2]])
    assert route_by_nll(nll).tolist() == [[1, 0, 0], [0, 1, 0]]
    soft = [math.exp(-value / 0.4) for value in (0.5, 0.7, 0.9)]
    assert route_by_nll(nll, 0.4)[0].tolist() == pytest.approx([value / sum(soft) for value in soft])
    with pytest.raises(ValueError, match="non-negative"):
        route_by_nll(nll, -1.0)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_each_sample_is_taught_by_who_explains_it(temperature):
    """And the loss is that of the shares; what they weigh beside it are the source weights, 1 if not given."""
    options = {"source_routing": "nll", "routing_temperature": temperature, "source_weights": None, "kd_weight": 1.0}
    module, batch = quiet(make_with_terms(**options)), make_batch()
    losses = module.losses(batch)
    nll = {}
    for name, source in module.sources.items():
        view = batch["sources"].get(name, batch)
        log_probs = source.model(input_ids=view["input_ids"], attention_mask=view["attention_mask"]).logits.log_softmax(
            -1
        )
        nll[name] = []
        for row in range(4):
            inside = [t for t in label_positions(view, row) if view["response_ends"][row, t + 1] >= 0]
            total = sum(-float(log_probs[row, t, view["labels"][row, t + 1]]) for t in inside)
            nll[name].append(total / float(view["response_ends"][row].max()))
    for row in range(4):
        near, far = nll["near"][row], nll["far"][row]
        share = float(near < far) if temperature == 0 else 1 / (1 + math.exp((near - far) / temperature))
        assert float(losses.shares["near"][row]) == pytest.approx(share, abs=1e-5)
        assert float(losses.shares["far"][row]) == pytest.approx(1 - share, abs=1e-5)
    expected = 0.0
    for name, terms in losses.terms.items():
        for term, values in terms.items():
            weight = TERMS[term][name] if isinstance(TERMS[term], dict) else TERMS[term]
            expected += weight * float((losses.shares[name] * values).mean())
    assert float(module.training_step(batch, 0)) == pytest.approx(expected, rel=1e-5)


def test_a_column_names_the_teacher_and_the_others_are_not_run():
    module, batch = quiet(make_with_terms(source_routing="column", source_weights=None)), make_batch()
    batch["teachers"] = ["near", "far", "near", "near"]
    losses = module.losses(batch)
    assert losses.shares["near"].tolist() == [1, 0, 1, 1]
    assert losses.shares["far"].tolist() == [0, 1, 0, 0]
    batch["teachers"] = ["near"] * 4
    module.sources["far"].forward = None  # any call would fail
    assert set(module.losses(batch).terms) == {"near"}
    batch["teachers"] = ["near", "middle", "near", "near"]
    with pytest.raises(ValueError, match=r"of the sources \['far', 'near'\], but got \['middle'\]"):
        module.losses(batch)
    del batch["teachers"]
    with pytest.raises(ValueError, match=r"with `teachers`, .* teacher_column"):
        module.losses(batch)


def test_terms_and_shares_are_logged_before_weighting(tmp_path):
    optimizer = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)}
    _, trainer = fit(tmp_path, 2, make_with_terms(source_routing="nll", **optimizer))
    logged = trainer.logged_metrics
    parts = {"near": ("loss_uld", "loss_kl"), "far": ("loss_uld", "loss_matched", "matched")}
    names = {f"train/{part}/{name}" for name, own in parts.items() for part in (*own, "loss_chunk", "aligned", "share")}
    assert names | {"train/loss", "train/loss_ce"} == set(logged)
    assert float(logged["train/share/near"] + logged["train/share/far"]) == pytest.approx(1)
    assert 0 < float(logged["train/matched/far"]) < 1


# ---------------------------------------------------------------------- sources that are not needed


def test_sources_of_weight_0_are_not_run():
    module = quiet(make(source_weights={"near": 1.0, "far": 0.0}))
    module.sources["far"].forward = None  # any call would fail
    losses = module.losses(make_batch())
    assert set(losses.sources) == {"near"}
    assert module.term_weights.used_sources == ["near"]


def test_evaluating_and_loading_a_checkpoint_load_no_source(tmp_path):
    """They once were loaded to be thrown away, and had to be there."""
    make_model(1, PIVOT_SIZE).save_pretrained(tmp_path / "source")
    make_model(0, PIVOT_SIZE).save_pretrained(tmp_path / "pivot")
    sources = {"near": str(tmp_path / "source"), "unused": str(tmp_path / "nowhere")}
    options = {"source_weights": {"near": 1.0, "unused": 0.0}, "top_k": 4}
    model = GLDFusionModule(str(tmp_path / "pivot"), sources, **options)
    _, trainer = fit(tmp_path, 2, model)
    assert "train/aligned" in trainer.logged_metrics
    trainer.save_checkpoint(tmp_path / "fused.ckpt")
    (tmp_path / "source").rename(tmp_path / "away")
    loaded = GLDFusionModule.load_from_checkpoint(tmp_path / "fused.ckpt")
    quick = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    rows = DataLoader(range(4), batch_size=2, collate_fn=make_batch)
    tested = [Trainer(**quick).test(one, rows, verbose=False)[0]["test/loss"] for one in (model, loaded)]
    assert tested[0] == tested[1]
    with pytest.raises(ValueError, match="source"):
        fit(tmp_path, 2, loaded)


# ---------------------------------------------------------------------- weights that change


def test_weights_and_temperature_follow_the_step(tmp_path):
    """Of three steps: λ rises from 0, where no source runs; then the loss is that of the present weights."""
    seen = []

    class Watched(GLDFusionModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses = self.losses(batch)
            seen.append((self.global_step, float(loss), float(losses.ce), losses.terms))
            return loss

    schedule = {"kd_weight": LinearRamp(0.0, 1.0, steps=2), "temperature": lambda step: 1.0 + step}
    sources = {"near": make_model(1, PIVOT_SIZE)}
    model = Watched(
        make_model(0, PIVOT_SIZE),
        sources,
        terms={"kl": lambda step: 2.0 * step, "uld": 0.5},
        top_k=4,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        **schedule,
    )
    trainer = Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, DataLoader(range(4), batch_size=2, collate_fn=make_batch))
    assert [step for step, *_ in seen] == [0, 1, 2]
    for step, loss, ce, terms in seen:
        kd = min(1.0, step / 2)
        assert set(terms) == ({"near"} if kd else set())
        taught = 2.0 * step * float(terms["near"]["kl"].mean()) + 0.5 * float(terms["near"]["uld"].mean()) if kd else 0
        assert loss == pytest.approx((1 - kd) * ce + kd * taught, rel=1e-5)


def test_functions_are_kept_out_of_checkpoints_and_checked_at_their_step():
    module = make(kd_weight=LinearRamp(0.0, 2.0, steps=1), terms={"uld": LinearRamp(0.0, 1.0, steps=4)})
    assert not {"kd_weight", "terms"} & set(module.hparams)
    assert module.term_weights.kd_weight_at(0) == 0
    with pytest.raises(ValueError, match=r"`kd_weight` in \[0, 1\], but got 2.0 at step 1"):
        module.term_weights.at(1)
    with pytest.raises(ValueError, match="`steps` to be at least 1"):
        LinearRamp(0.0, 1.0, steps=0)


def test_a_temperature_that_changes_is_for_models_only():
    module = GLDFusionModule(None, {"near": make_model(1, PIVOT_SIZE)}, temperature=lambda step: 1.0)
    with pytest.raises(ValueError, match="`temperature` to be a number to write logits at"):
        _ = module.cache_settings

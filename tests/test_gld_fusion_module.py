"""`GLDFusionModule`: the loss from its definition, however a batch is cut; sources that stay as they are; bad input."""

import copy

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM

from lit_logits import GLDFusionModule
from lit_logits.functional import co_activation_graph, vocabulary_graph
from lit_logits.modules import LogitSource, new_causal_lm
from lit_logits.modules.gld_fusion.sources import counted_positions

PIVOT_SIZE, OTHER_SIZE = 40, 55


def config(vocab_size, **kwargs):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"model_type": "llama", "vocab_size": vocab_size, "tie_word_embeddings": True, **shape, **kwargs}


def make_model(seed, vocab_size):
    torch.manual_seed(seed)
    model = new_causal_lm(config(vocab_size))
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, logits are all but equal
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    return model


def make(**kwargs):
    sources = {"near": make_model(1, PIVOT_SIZE), "far": make_model(2, OTHER_SIZE)}
    defaults = {"sources": sources, "source_weights": {"near": 0.7, "far": 0.4}, "top_k": 4}
    return GLDFusionModule(make_model(0, PIVOT_SIZE), **{**defaults, "kd_weight": 0.6, "gld_weight": 0.3, **kwargs})


def make_row(seed, prompt, sizes, vocab_size):
    """A prompt of so many tokens and a response whose tokens have so many characters, then an end token."""
    g = torch.Generator().manual_seed(seed)
    length = prompt + len(sizes) + 1
    ids = torch.randint(0, vocab_size, (length,), generator=g)
    ends = torch.tensor([-1] * (prompt - 1) + [0] + torch.tensor(sizes).cumsum(0).tolist() + [-1])
    labels = ids.clone()
    labels[:prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "response_ends": ends}


ROWS = [  # of one response the tokens' characters, in either tokenisation
    (3, [2, 3, 1, 4], 2, [2, 1, 3, 4]),
    (2, [1, 1, 2], 4, [4]),
    (5, [3, 2, 2, 1, 1], 3, [5, 4]),
    (1, [6], 2, [1, 5]),
]


def pad(rows, extra=0):
    length = max(len(row["input_ids"]) for row in rows) + extra
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100, "response_ends": -1}
    return {
        name: torch.stack([torch.nn.functional.pad(row[name], (0, length - len(row[name])), value=v) for row in rows])
        for name, v in fill.items()
    }


def make_batch(rows=range(4), extra=0):
    rows = list(rows)
    near = [make_row(10 + r, ROWS[r][0], ROWS[r][1], PIVOT_SIZE) for r in rows]
    far = [make_row(50 + r, ROWS[r][2], ROWS[r][3], OTHER_SIZE) for r in rows]
    return {**pad(near, extra), "sources": {"far": pad(far, 2 * extra)}, "sample_ids": torch.tensor(rows)}


def quiet(model):
    model.log = model.log_dict = lambda *args, **kwargs: None
    return model


# ---------------------------------------------------------------------- the loss from its definition


def positions(view, row):
    """Places that predict a label and have read the response or a part of it, with the characters read."""
    found = {}
    for t in range(view["labels"].shape[1] - 1):
        if int(view["labels"][row, t + 1]) != -100 and int(view["response_ends"][row, t]) >= 0:
            found[t] = int(view["response_ends"][row, t])
    return found


def values_at(logits, ids, kind):
    if kind == "softmax":
        return logits.softmax(-1)[ids]
    return ((logits - logits.mean()) / logits.std(correction=0))[ids]


def loss_by_definition(module, batch, nodes="rank"):
    """Sample by sample, position by position, with dictionaries, sorted lists and explicit graphs."""
    pivot_logits = module(batch["input_ids"], batch["attention_mask"])
    total, k = 0.0, module.top_k
    for row in range(len(pivot_logits)):
        own = positions(batch, row)
        labelled = [t for t in range(batch["labels"].shape[1] - 1) if int(batch["labels"][row, t + 1]) != -100]
        ce = sum(-pivot_logits[row, t].log_softmax(-1)[batch["labels"][row, t + 1]] for t in labelled) / len(labelled)
        loss = (1 - module.kd_weight) * ce
        for name, source in module.sources.items():
            view = batch["sources"].get(name, batch)
            logits = source.model(input_ids=view["input_ids"], attention_mask=view["attention_mask"]).logits[row]
            theirs = positions(view, row)
            by_end = {end: t for t, end in theirs.items()}  # the last one
            pairs = [(t, by_end[end]) for t, end in own.items() if end in by_end]
            uld = 0.0
            for t, u in pairs:
                p, q = (z.softmax(-1).sort(descending=True).values for z in (pivot_logits[row, t], logits[u]))
                uld = uld + (p[:k] - q[:k]).abs().sum() + (p[k:].sum() - q[k:].sum()).abs()
            graphs = []
            for z, places in ((pivot_logits[row], own), (logits, theirs)):
                tops = torch.stack([z[t].sort(descending=True, stable=True).indices[:k] for t in places])
                values = torch.stack([values_at(z[t], ids, "standardize") for t, ids in zip(places, tops, strict=True)])
                graph = co_activation_graph(values) if nodes == "rank" else vocabulary_graph(values, tops).graph
                graphs.append(graph.mean(-1).sort(descending=True).values)
            n = min(map(len, graphs))
            gld = (graphs[0][:n] - graphs[1][:n]).abs().sum()
            weight = module.kd_weight * module.weights[name]
            loss = loss + weight * (uld / max(1, len(pairs)) + module.gld_weight * gld)
        total = total + loss
    return total / len(pivot_logits)


@pytest.mark.parametrize("nodes", ["rank", "vocabulary"])
@pytest.mark.parametrize("chunk_size", [3, 4096])
def test_loss_and_gradient_are_the_definition(nodes, chunk_size):
    module, batch = quiet(make(nodes=nodes)), make_batch()
    module.chunk_size = chunk_size
    for source in module.sources.values():
        source.chunk_size = chunk_size
    other = copy.deepcopy(module)
    expected = loss_by_definition(other, batch, nodes)
    expected.backward()
    loss = module.training_step(batch, 0)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_aligned_share_by_hand():
    """Ends 0 2 5 6 10 and 0 2 3 6 10; 0 1 2 4 and 0 4; 0 3 5 7 8 9 and 0 5 9; 0 6 and 0 1 6: 11 of 17 are shared."""
    terms = make().losses(make_batch()).sources
    assert float(terms["near"].aligned) == 1
    assert float(terms["far"].aligned) == pytest.approx((4 + 2 + 3 + 2) / (5 + 4 + 6 + 2))


def test_aligned_share_counts_what_a_cut_response_lacks():
    batch = make_batch()
    far = batch["sources"]["far"]
    far["labels"] = far["labels"].masked_fill(far["response_ends"] > 0, -100)
    far["response_ends"] = far["response_ends"].clamp(max=0)
    assert float(make().losses(batch).sources["far"].aligned) == pytest.approx(4 / 17)  # the prompts' ends alone


def within_characters(batch, places):
    """The same batch, whose positions at these places of every sample end within a character."""
    for view in (batch, *batch["sources"].values()):
        rows, columns = (view["response_ends"] > 0).nonzero(as_tuple=True)
        chosen = (columns % 3).unsqueeze(-1).eq(torch.tensor(places)).any(-1)
        view["response_ends"][rows[chosen], columns[chosen]] = -1
    return batch


def test_the_same_tokens_are_aligned_wherever_they_end():
    """Of Chinese text a third of the positions was used, while `aligned` said 1."""
    module = GLDFusionModule(make_model(0, PIVOT_SIZE), {"near": make_model(1, PIVOT_SIZE)}, top_k=4)
    expected = module.losses(make_batch()).sources["near"]
    batch = within_characters(make_batch(), [0, 1])
    assert (batch["response_ends"] >= 0).sum() < 12 < int((batch["labels"] != -100).sum())
    torch.testing.assert_close(module.losses(batch).sources["near"], expected)
    batch["sources"] = {"near": {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}}
    for view in (batch, batch["sources"]["near"]):
        view["layout_id"] = torch.tensor(5)
    torch.testing.assert_close(module.losses(batch).sources["near"], expected)
    assert float(expected.aligned) == 1


def test_aligned_is_a_share_of_all_positions():
    """Those that end within a character count as not aligned, and are there in the graphs."""
    module, batch = make(), make_batch()
    whole = module.losses(batch).sources["far"]
    fewer = module.losses(within_characters(make_batch(), [0])).sources["far"]
    assert float(fewer.aligned) < float(whole.aligned)
    ends, others = (view["response_ends"] for view in (batch, batch["sources"]["far"]))
    keep = [set(row.tolist()) & set(other.tolist()) - {-1} for row, other in zip(ends, others, strict=True)]
    batch = within_characters(make_batch(), [0])
    ends, others = (view["response_ends"] for view in (batch, batch["sources"]["far"]))
    left = [set(row.tolist()) & set(other.tolist()) - {-1} for row, other in zip(ends, others, strict=True)]
    assert float(fewer.aligned) == pytest.approx(sum(map(len, left)) / 17)
    assert float(whole.aligned) == pytest.approx(sum(map(len, keep)) / 17)


def test_bytes_come_before_characters():
    module, batch = make(), make_batch()
    expected = module.losses(batch)
    for view in (batch, batch["sources"]["far"]):
        ends = view["response_ends"]
        view["response_bytes"], view["response_ends"] = torch.where(ends > 0, 3 * ends, ends), ends.clamp(max=0)
    for one, other in zip(expected.sources.values(), module.losses(batch).sources.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_log_probability_of_the_token_that_came():
    source, batch = LogitSource(make_model(2, PIVOT_SIZE)), make_batch()
    logits = source.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = -torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )
    mask = counted_positions(batch)
    for temperature in (1.0, 3.0):
        found = source(batch, 4, temperature)
        torch.testing.assert_close(found.label_log_probs[found.mask], expected[mask[:, :-1]])
        assert (found.label_log_probs[~found.mask] == 0).all()


def test_a_source_that_is_the_pivot_has_nothing_to_teach():
    module = GLDFusionModule(make_model(0, PIVOT_SIZE), {"twin": make_model(0, PIVOT_SIZE)}, top_k=4)
    losses = module.losses(make_batch())
    assert losses.sources["twin"].uld.item() == pytest.approx(0, abs=1e-6)
    assert losses.sources["twin"].gld.item() == pytest.approx(0, abs=1e-5)
    assert float(losses.sources["twin"].aligned) == 1


def test_padded_vocabulary_is_not_another_one():
    """Rows of the output layer beyond the tokens are left out: of the pivot, and of a source of known tokenizer."""
    small, large = make_model(1, PIVOT_SIZE), make_model(3, PIVOT_SIZE + 24)
    with torch.no_grad():
        large.get_input_embeddings().weight[:PIVOT_SIZE] = small.get_input_embeddings().weight
        large.get_input_embeddings().weight[PIVOT_SIZE:] *= 5
        for name, parameter in large.named_parameters():
            if "embed" not in name:
                parameter.copy_(small.get_parameter(name))
    batch = make_batch()
    source, padded = LogitSource(small), LogitSource(large)
    padded.vocab_size = PIVOT_SIZE  # what a tokenizer of so many tokens says
    for one, other in zip(source(batch, 4).top_k, padded(batch, 4).top_k, strict=True):
        torch.testing.assert_close(one, other)
    modules = [
        GLDFusionModule(pivot, {"near": make_model(2, PIVOT_SIZE)}, PIVOT_SIZE, top_k=4) for pivot in (small, large)
    ]
    losses = [module.losses(batch).sources["near"] for module in modules]
    torch.testing.assert_close(*losses)


def test_batches_without_ends_are_one_text_in_one_vocabulary():
    module, batch = GLDFusionModule(make_model(0, 40), {"near": make_model(1, 40)}, top_k=4), make_batch()
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    losses = module.losses(plain)
    assert float(losses.sources["near"].aligned) == 1
    uld = module.losses(batch).sources["near"].uld  # the end token is predicted in both, and nothing follows it
    torch.testing.assert_close(losses.sources["near"].uld, uld)


# ---------------------------------------------------------------------- the same however a batch is cut


def gradients(module, batches):
    module.zero_grad()
    loss = sum(module.training_step(batch, 0) for batch in batches) / len(batches)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in module.parameters())]


@pytest.mark.parametrize("nodes", ["rank", "vocabulary"])
def test_padding_and_split_change_nothing(nodes):
    module = quiet(make(nodes=nodes))
    whole = gradients(module, [make_batch()])
    for batches in (
        [make_batch(extra=5)],
        [make_batch([0, 1]), make_batch([2, 3])],
        [make_batch([r]) for r in range(4)],
    ):
        for one, other in zip(whole, gradients(module, batches), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


class Rows(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index


def fit(tmp_path, batch_size, model=None, **kwargs):
    model = model or make(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    options = {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(**options, enable_progress_bar=False, default_root_dir=tmp_path, **kwargs)
    trainer.fit(model, DataLoader(Rows(), batch_size=batch_size, collate_fn=make_batch))
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), trainer


def test_accumulation_changes_nothing(tmp_path):
    whole, _ = fit(tmp_path, 4, max_epochs=2)
    parts, _ = fit(tmp_path, 1, max_epochs=2, accumulate_grad_batches=4)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    whole, _ = fit(tmp_path, 4, max_epochs=2)
    model = make(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    spawned, _ = fit(tmp_path, 2, model, max_epochs=2, strategy="ddp_fork", devices=2)
    torch.testing.assert_close(whole, spawned, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------- sources stay as they are


def test_sources_are_frozen_and_in_neither_checkpoint_nor_optimizer(tmp_path):
    model = make()
    before = {name: copy.deepcopy(source.model.state_dict()) for name, source in model.sources.items()}
    fit(tmp_path, 2, model)
    assert not [name for name in model.state_dict() if not name.startswith("pivot.")]
    assert {p for p in model.parameters()} == {p for p in model.pivot.parameters()}
    for name, source in model.sources.items():
        assert not source.model.training
        for key, tensor in source.model.state_dict().items():
            assert torch.equal(tensor, before[name][key])


def test_logs_of_several_sources_and_of_one(tmp_path):
    _, trainer = fit(tmp_path, 2)
    names = {f"train/{part}/{name}" for part in ("loss_uld", "loss_gld", "aligned") for name in ("near", "far")}
    assert names | {"train/loss", "train/loss_ce"} == set(trainer.logged_metrics)
    model = GLDFusionModule(make_model(0, PIVOT_SIZE), {"near": make_model(1, PIVOT_SIZE)}, top_k=4)
    _, trainer = fit(tmp_path, 2, model)
    logged = trainer.logged_metrics
    assert set(logged) == {f"train/{part}" for part in ("loss", "loss_ce", "loss_uld", "loss_gld", "aligned")}
    parts = 0.7 * logged["train/loss_ce"] + 0.3 * (logged["train/loss_uld"] + 0.001 * logged["train/loss_gld"])
    assert float(logged["train/loss"]) == pytest.approx(float(parts))


def test_supervised_fine_tuning_runs_no_source():
    model, batch = quiet(make(kd_weight=0.0)), make_batch()
    for source in model.sources.values():
        source.forward = None  # any call would fail
    loss = model.training_step(batch, 0)
    full = make(kd_weight=0.5).losses(batch)
    torch.testing.assert_close(loss, full.ce)


def test_a_source_keeps_its_dtype_under_autocast():
    source, batch = LogitSource(make_model(2, PIVOT_SIZE)), make_batch()
    expected = source(batch, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = source(batch, 4)
    for one, other in zip(expected.top_k, found.top_k, strict=True):
        assert torch.equal(one, other)
    half = LogitSource(make_model(2, PIVOT_SIZE).to(torch.bfloat16))(batch, 4)
    assert half.top_k.log_probs.dtype == torch.float32
    torch.testing.assert_close(half.top_k.log_probs, expected.top_k.log_probs, atol=0.3, rtol=0.1)


def test_a_model_that_changes_its_logits_can_be_a_source():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    capped = new_causal_lm(
        {"model_type": "gemma2", "vocab_size": 40, "final_logit_softcapping": 0.05, "head_dim": 8, **shape}
        | {"num_key_value_heads": 2}
    )
    source, batch = LogitSource(capped), make_batch()
    assert not source.is_plain
    found = source(batch, 3)
    logits = capped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = logits.log_softmax(-1).topk(3).values[counted_positions(batch)]
    torch.testing.assert_close(found.top_k.log_probs[found.mask], expected)


def test_validation_is_over_tokens(tmp_path):
    model = make()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    logged = trainer.validate(model, DataLoader(Rows(), batch_size=3, collate_fn=make_batch), verbose=False)[0]
    batch = make_batch()
    logits, labels = model(batch["input_ids"], batch["attention_mask"])[:, :-1], batch["labels"][:, 1:]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert logged["val/loss"] == pytest.approx(float(nll), rel=1e-5)
    assert logged["val/ppl"] == pytest.approx(float(nll.exp()), rel=1e-5)


def test_saved_as_the_pivots_own_architecture(tmp_path):
    model = make(lora={"r": 2, "target_modules": ["q_proj", "v_proj"]})
    fit(tmp_path, 2, model, max_epochs=1)
    model.save_pretrained(tmp_path / "fused")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    batch = make_batch()
    torch.testing.assert_close(plain(batch["input_ids"]).logits, model.eval()(batch["input_ids"]), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------- bad input


def test_nothing_to_learn_is_a_zero_with_a_graph():
    model, batch = quiet(make()), make_batch()
    for view in (batch, batch["sources"]["far"]):
        view["labels"] = torch.full_like(view["labels"], -100)
    loss = model.training_step(batch, 0)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_a_response_that_a_source_does_not_see_is_left_out():
    model, batch = quiet(make()), make_batch()
    batch["sources"]["far"]["labels"][1] = -100
    losses = model.losses(batch)
    assert all(value.isfinite() for terms in losses.sources.values() for value in terms)
    alone = [model.losses(make_batch([r])).sources["far"].gld for r in (0, 2, 3)]
    torch.testing.assert_close(losses.sources["far"].gld, sum(alone) / 4)


def test_a_source_that_emits_nan_is_named():
    model, batch = make(), make_batch()
    with torch.no_grad():
        model.sources["far"].model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"logits of source 'far' to be finite, but got NaN .* at 13 of 13 positions"):
        model.losses(batch)


def test_tokens_of_another_tokenizer():
    model, batch = make(), make_batch()
    model.sources["near"].tokenizer_id = 7
    model.losses(batch)  # a batch that does not say whose its tokens are
    batch["tokenizer_id"] = torch.tensor(8)
    with pytest.raises(ValueError, match=r"source_tokenizers: \{near: "):
        model.losses(batch)
    del batch["sources"], batch["tokenizer_id"]
    batch["input_ids"][0, 0] = PIVOT_SIZE
    model = GLDFusionModule(make_model(0, OTHER_SIZE), {"near": make_model(1, PIVOT_SIZE)}, top_k=2)
    with pytest.raises(ValueError, match="tokens below 40, the vocabulary of source 'near', but got 40"):
        model.losses(batch)


def test_tokens_that_cannot_be_aligned():
    batch = make_batch()
    del batch["response_ends"]
    with pytest.raises(ValueError, match="`response_ends`, by which the tokens of source 'far' are aligned"):
        make().losses(batch)


def test_ruled_out_tokens_cannot_be_standardised():
    model, batch = make(), make_batch()
    source = model.sources["near"]
    original = source._logits
    ruled_out = torch.tensor([0.0] * (PIVOT_SIZE - 1) + [-1e9])
    source._logits = lambda rows: original(rows) + ruled_out
    with pytest.raises(ValueError, match="source 'near' to be of one scale"):
        model.losses(batch)
    model.criterion.graphs.values = "softmax"
    assert all(terms.gld.isfinite() for terms in model.losses(batch).sources.values())


def test_the_pivot_as_its_own_source():
    pivot = make_model(0, PIVOT_SIZE)
    with pytest.raises(ValueError, match="'twin' is the pivot"):
        GLDFusionModule(pivot, {"twin": pivot})


def test_only_the_right_choices_are_scored():
    model, batch = make(), make_batch()
    batch["correct"] = torch.tensor([1, 0, 0, 1])
    model.test_step(batch, 0)
    model.validation_step(make_batch([0, 3]), 0)
    torch.testing.assert_close(model.means.compute("test"), model.means.compute("val"))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"nodes": "edges"}, "`nodes` of"),
        ({"graph_values": "raw"}, "`graph_values` to be one of"),
        ({"uld_values": "raw"}, "`uld_values` to be one of"),
        ({"top_k": 41}, r"\[1, 40\], the pivot's vocabulary, but got 41"),
        ({"top_k": 0}, "at least 1"),
        ({"temperature": 0.0}, "positive"),
        ({"kd_weight": 1.5}, r"`kd_weight` in \[0, 1\]"),
        ({"gld_weight": -1.0}, "`gld_weight` ≥ 0"),
        ({"sources": {}}, "at least one for λ > 0"),
        ({"sources": {"a.b": None}}, "without '.' and '/'"),
        ({"source_weights": {"near": 1.0}}, r"got none for \['far'\]"),
        ({"source_weights": {"near": 1.0, "far": -1.0}}, "at least 0 and finite"),
        ({"source_kwargs": {"fra": {}}}, r"but got \['fra'\]"),
        (
            {"pivot_kwargs": {"dtype": "bfloat16"}},
            "named by its hub id or path, but got {'dtype': 'bfloat16'} for Llama",
        ),
        ({"sources": {"bad": torch.nn.Linear(2, 2)}, "source_weights": None}, "source 'bad' to be a causal language"),
        ({"sources": {"bad": "/nowhere"}, "source_weights": None}, "'/nowhere'"),
    ],
)
def test_arguments_out_of_range(kwargs, match):
    with pytest.raises(ValueError, match=match):
        make(**kwargs).setup("fit")  # where sources that are named by a path are loaded


def test_settings_of_the_pivot_reach_it_and_are_spelt_right(tmp_path):
    make_model(0, PIVOT_SIZE).save_pretrained(tmp_path)
    sources = {"near": make_model(1, PIVOT_SIZE)}
    settings = {"dtype": "bfloat16", "attn_implementation": "eager"}
    model = GLDFusionModule(str(tmp_path), sources, top_k=4, pivot_kwargs=settings)
    assert model.pivot.dtype == torch.bfloat16
    assert model.pivot.config._attn_implementation == "eager"
    assert model.hparams["pivot_kwargs"] == settings
    with pytest.raises(ValueError, match=r"but got 'atn_implementation'. Did you mean 'attn_implementation'\?"):
        GLDFusionModule(str(tmp_path), sources, top_k=4, pivot_kwargs={"atn_implementation": "eager"})


@pytest.mark.slow
def test_a_pivot_of_4_bits_trains_adapters_goes_on_and_is_saved_dense(tmp_path):
    """bitsandbytes once changed its weights when it was evaluated, and its checkpoints could not be loaded."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    new_causal_lm(config(PIVOT_SIZE, hidden_size=128, intermediate_size=256)).save_pretrained(tmp_path / "pivot")
    sources, batches = {"near": make_model(1, PIVOT_SIZE)}, DataLoader(range(4), batch_size=2, collate_fn=make_batch)
    quantized = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    options = {"pivot_kwargs": quantized, "top_k": 4, "optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}
    with pytest.raises(ValueError, match="Expected `lora` for a pivot with quantised weights"):
        GLDFusionModule(str(tmp_path / "pivot"), sources, **options)
    model = GLDFusionModule(str(tmp_path / "pivot"), sources, lora={"target_modules": ["q_proj", "v_proj"]}, **options)
    rows = torch.arange(8).unsqueeze(0)
    before = model(rows)
    quick = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_steps=4, val_check_interval=1, default_root_dir=tmp_path, **quick)
    trainer.fit(model, batches, batches)
    trained = model.eval()(rows)
    assert not torch.allclose(before, trained, atol=1e-3)
    trainer.save_checkpoint(tmp_path / "fused.ckpt")
    keys = torch.load(tmp_path / "fused.ckpt", weights_only=False)["state_dict"].keys()
    assert not [key for key in keys if "base_layer" in key or "o_proj" in key]
    loaded = GLDFusionModule.load_from_checkpoint(tmp_path / "fused.ckpt", sources=sources)
    torch.testing.assert_close(loaded.eval()(rows), trained)
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not hasattr(saved.config, "quantization_config")
    torch.testing.assert_close(saved(rows).logits, trained, atol=1e-4, rtol=1e-4)


def test_without_a_pivot_there_is_only_predicting():
    model = GLDFusionModule(None, {"near": make_model(1, PIVOT_SIZE)})
    found = model.predict_step(make_batch(), 0)["sources"]["near"]
    assert found.top_k.log_probs.shape == (4, 6, 10)  # without prompts and end tokens
    assert found.mask.sum(-1).tolist() == [5, 4, 6, 2]
    with pytest.raises(ValueError, match="Expected a `pivot`"):
        model.losses(make_batch())
    with pytest.raises(ValueError, match="with `sample_ids`"):
        model.predict_step({"input_ids": torch.zeros(1, 1)}, 0)

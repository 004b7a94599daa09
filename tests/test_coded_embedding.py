"""Input tables read from codes: alone, in models that train, and in folders that are saved.

Letters: B batch, T sequence, d hidden size, V vocabulary.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from lit_logits import VQLogitsLM
from lit_logits.contracts import Calibration, OutputLayer
from lit_logits.functional import decode_rows, decode_token_rows, stage_codes, stage_places
from lit_logits.modules import ResidualVQLogitsHead, VQLogitsHead, describe_model
from lit_logits.modules.vq_logits.coded_rows import CodedRows
from lit_logits.modules.vq_logits.embedding import CodedEmbedding, code_table, coded_table, with_dense_table
from lit_logits.modules.vq_logits.table_metric import TableStatistics, joined_with_table, table_statistics

V, D = 97, 32
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HEAD = partial(ResidualVQLogitsHead, codebook_size=16, num_groups=8, num_stages={20: 2, V: 1})
EXACT = partial(ResidualVQLogitsHead, codebook_size=V, num_groups=8)  # a code for each token: nothing is lost


def make_base(name="llama", tied=True):
    torch.manual_seed(0)
    if name == "gemma":
        base = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=16, tie_word_embeddings=tied))
    else:
        base = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    with torch.no_grad():  # logits that differ
        base.get_input_embeddings().weight.mul_(20)
        base.get_output_embeddings().weight.mul_(1 if tied else 20)
    return base.eval()


def rows(count, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def loader(count=8, seed=0):
    return DataLoader(rows(count, seed=seed), batch_size=2)


def make_model(base=None, head=HEAD, **kwargs):
    options = {"compress": ["head", "embedding"], "calibration_batches": 4, "num_trainable_layers": 1, "kd_weight": 1.0}
    return VQLogitsLM(make_base() if base is None else base, head=head, **{**options, **kwargs})


def make_trainer(folder, **kwargs):
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, **{"max_epochs": 1, "enable_checkpointing": False, **options, **kwargs})


@pytest.fixture(scope="module", params=["llama tied", "llama untied", "gemma tied", "gemma untied"])
def started(request):
    name, tie = request.param.split()
    model = make_model(make_base(name, tie == "tied"))
    model.initialize_head(loader())
    return model.eval()


# ---------------------------------------------------------------------- rows of some tokens


def test_rows_of_tokens_are_those_of_the_dense_layer():
    torch.manual_seed(0)
    stages = torch.randint(1, 4, (V,))
    codebook = torch.randn(3, 4, 16, 8, dtype=torch.float64, requires_grad=True)
    mapping = stage_codes(stages, torch.randint(16, (int(stages.sum()) * 4,)), 4)
    tokens = torch.randint(V, (3, 50))
    pull = torch.randn(3, 50, D, dtype=torch.float64)
    found = decode_token_rows(tokens, codebook, mapping, stage_places(mapping, V))
    expected = decode_rows(codebook, mapping, V)[tokens]
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(values, codebook, pull)[0] for values in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_the_codes_may_change_and_the_rows_follow():
    codes = CodedRows(D, V, 16, num_groups=4, num_stages=2)
    tokens = torch.arange(V)
    for stages in (torch.full((V,), 2), torch.randint(1, 3, (V,))):
        codes.set_codes(torch.randn(2, 4, 16, 8), torch.randint(16, (int(stages.sum()) * 4,)), stages)
        torch.testing.assert_close(codes.rows(tokens), codes.dense_weight())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_is_the_architectures_own(dtype):
    base = make_base("gemma").to(dtype)
    dense = base.get_input_embeddings()
    table = code_table(base.model, EXACT(D, V), tied=True)
    ids = torch.arange(V)
    assert torch.equal(table(ids), dense(ids))
    assert table.scale == pytest.approx(D**0.5, rel=1e-3)


def test_what_is_no_plain_table_is_refused():
    projected = OPTForCausalLM(
        OPTConfig(
            vocab_size=V, hidden_size=D, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(ValueError, match=r"input table of shape \(97, 32\).*got \(97, 16\)"):
        code_table(projected.model, EXACT(D, V), tied=False)
    base = make_base()
    base.get_input_embeddings().register_forward_hook(lambda *given: given[-1] + 1)
    with pytest.raises(ValueError, match="by a factor at most"):
        code_table(base.model, EXACT(D, V), tied=True)
    with pytest.raises(ValueError, match="ResidualVQLogitsHead"):
        make_model(head=partial(VQLogitsHead, codebook_size=16, mapping="fixed"))
    for compress in (["embedding"], ["head", "tail"]):
        with pytest.raises(ValueError, match="Expected `compress`"):
            make_model(compress=compress)


# ---------------------------------------------------------------------- the metric


def test_statistics_of_the_table_are_the_fisher_information_of_its_rows():
    base, head = make_base("gemma", tied=False), EXACT(D, V)
    layer = OutputLayer(base.get_output_embeddings().weight.detach(), None)
    table = code_table(base.model, head, tied=False)
    ids = torch.tensor([[5, 8, 5, 70]])
    # The oracle: every outcome of every position by its probability, through autograd.
    given = (table.dense[ids]).double().requires_grad_()
    model = copy.deepcopy(base).double()
    logits = model(inputs_embeds=given * table.scale).logits[0]
    log_probs = logits.log_softmax(-1)
    exact = torch.zeros(D, D, dtype=torch.float64)
    for position in log_probs:
        for value in position:
            (grad,) = torch.autograd.grad(value, given, retain_graph=True)
            exact += value.detach().exp() * grad[0].T @ grad[0]
    batches = [{"input_ids": ids.expand(1000, -1), "labels": ids.expand(1000, -1)}] * 4
    found = table_statistics(batches, base.model, table, layer, num_batches=4, device=torch.device("cpu"))
    torch.testing.assert_close(found.second_moment.double(), exact / 4, rtol=0.0, atol=0.05 * float(exact.max() / 4))
    expected = torch.zeros(V)
    expected[[5, 8, 70]] = torch.tensor([0.5, 0.25, 0.25])
    torch.testing.assert_close(found.token_shares, expected)


def test_padding_counts_for_nothing(monkeypatch):
    monkeypatch.setattr(torch, "multinomial", lambda probs, *_, **__: probs.argmin(-1, keepdim=True))  # the same draws
    base = make_base()
    layer = OutputLayer(base.get_output_embeddings().weight.detach(), None)
    table = code_table(base.model, EXACT(D, V), tied=True)
    ids = torch.randint(V, (3, 9))
    padded = F.pad(ids, (0, 5), value=1)
    batches = [{"input_ids": ids}], [{"input_ids": padded, "attention_mask": F.pad(torch.ones_like(ids), (0, 5))}]
    options = {"num_batches": 1, "device": torch.device("cpu")}
    one, other = (table_statistics(batch, base.model, table, layer, **options) for batch in batches)
    torch.testing.assert_close(one.token_shares, other.token_shares)
    scale = float(one.second_moment.abs().max())
    assert scale > 0.1
    torch.testing.assert_close(one.second_moment / scale, other.second_moment / scale, rtol=1e-3, atol=1e-4)


def test_joined_statistics_cost_what_both_tables_cost():
    """With the same share of each token in both, the sum is exact."""
    torch.manual_seed(0)
    shares = torch.rand(V)
    shares /= shares.sum()
    first, second = (values @ values.T for values in (torch.randn(D, D), torch.randn(D, D)))
    calibration = Calibration(torch.ones(V), torch.eye(D), 0.4 * shares, first)
    joined = joined_with_table(lambda **_: calibration, TableStatistics(shares, second))()
    error = torch.randn(V, D)
    both = 0.4 * shares @ ((error @ first) * error).sum(1) + shares @ ((error @ second) * error).sum(1)
    found = joined.token_information @ ((error @ joined.informed_second_moment) * error).sum(1)
    torch.testing.assert_close(found, both)


# ---------------------------------------------------------------------- in a model


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("tied", [True, False])
def test_exact_codes_change_nothing(name, tied):
    base = make_base(name, tied)
    ids = torch.randint(V, (2, 12))
    with torch.no_grad():
        expected, hidden = base(input_ids=ids).logits, base.model(input_ids=ids).last_hidden_state
    model = make_model(base, EXACT)
    torch.testing.assert_close(model.hidden_states(ids), hidden, rtol=1e-4, atol=1e-4)  # dense until it starts
    model.initialize_head(loader())
    assert coded_table(model.backbone).dense is None
    torch.testing.assert_close(model(ids), expected, rtol=1e-3, atol=1e-3)
    table = coded_table(model.backbone)
    assert (table.source is model.head) == tied
    assert not any("embed_tokens.weight" in key for key in model.state_dict())


def test_the_original_of_the_divergence_reads_its_dense_table():
    model = make_model(num_trainable_layers=0)
    model.initialize_head(loader())
    batch = next(iter(loader(seed=1)))
    base = make_base()
    losses, mask = model._losses(batch, model.original)
    with torch.no_grad():
        target = base(**batch).logits[:, :-1].log_softmax(-1)
        ours = model(batch["input_ids"])[:, :-1].log_softmax(-1)
    expected = (target.exp() * (target - ours)).sum(-1)
    torch.testing.assert_close(losses.divergence[mask], expected.flatten(), rtol=1e-3, atol=1e-4)
    assert float(expected.mean()) > 0.01


def test_the_gradient_of_shared_codes_is_that_of_both_tables():
    model = make_model(kd_weight=0.0)
    model.initialize_head(loader())
    batch = next(iter(loader(seed=1)))
    model.training_step(batch, 0).backward()
    codebook = model.head.codebook
    # The oracle: a dense tied model, whose one table is decoded in autograd.
    weight = decode_rows(codebook, model.head.stages(), V)
    base = make_base()
    state = {name.removeprefix("backbone."): value for name, value in model.state_dict().items() if "backbone." in name}
    base.model.load_state_dict(state, strict=False)
    tables = {"model.embed_tokens.weight": weight, "lm_head.weight": weight}
    logits = torch.func.functional_call(base.train(), tables, kwargs={"input_ids": batch["input_ids"]}).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    (expected,) = torch.autograd.grad(loss, codebook)
    torch.testing.assert_close(codebook.grad, expected, rtol=1e-3, atol=1e-6)


def test_recovery_lowers_the_divergence_with_both_tables(tmp_path):
    model = make_model(num_trainable_layers=0, optimizer=partial(torch.optim.AdamW, lr=3e-3))
    trainer = make_trainer(tmp_path, max_epochs=6)
    model.initialize_head(loader(32))
    before = trainer.validate(model, loader(32), verbose=False)[0]["val/kl"]
    trainer.fit(model, loader(32))
    assert trainer.validate(model, loader(32), verbose=False)[0]["val/kl"] < 0.8 * before


def test_a_checkpoint_holds_the_table(tmp_path):
    for fitted in (True, False):
        model = make_model(make_base(tied=False))
        trainer = make_trainer(tmp_path, limit_train_batches=2)
        if fitted:
            trainer.fit(model, loader())
        else:
            trainer.strategy.connect(model)
        path = tmp_path / f"{fitted}.ckpt"
        trainer.save_checkpoint(path)
        loaded = VQLogitsLM.load_from_checkpoint(path, backbone=make_base(tied=False))
        assert (coded_table(loaded.backbone).dense is None) == fitted
        ids = torch.randint(V, (2, 9))
        torch.testing.assert_close(loaded.eval()(ids), model.eval()(ids))
        if not fitted:  # and starts
            make_trainer(tmp_path).fit(loaded, loader())
            assert coded_table(loaded.backbone).dense is None
        weights = make_model(make_base(tied=False))
        weights.load_state_dict(model.state_dict())  # without the hooks of Lightning
        assert (coded_table(weights.backbone).dense is None) == fitted


# ---------------------------------------------------------------------- saved


def test_saved_folders_give_the_logits_of_training(started, tmp_path):
    ids = torch.randint(V, (2, 9))
    with torch.no_grad():
        expected = started(ids)
    for form in ("compact", "dense"):
        started.save_pretrained(tmp_path / form, head=form)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / form)
        with torch.no_grad():
            torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        codes = "the same codes" if coded_table(started.backbone).tied else "codes of its own"
        card = (tmp_path / form / "README.md").read_text()
        assert f"Input table: read from {codes}," in card
        assert ("as large as the original's" in card) == (form == "dense")
        assert loaded.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 12)
    assert coded_table(started.backbone) is not None  # and training may go on
    tied = coded_table(started.backbone).tied
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    inner = AutoModel.from_pretrained(tmp_path / "compact")
    with torch.no_grad():
        hidden = inner(input_ids=ids).last_hidden_state
        torch.testing.assert_close(hidden, started.backbone(input_ids=ids).last_hidden_state)


def test_a_loaded_model_is_copied_cast_and_saved(started, tmp_path):
    started.save_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    ids = torch.randint(V, (2, 9))
    with torch.no_grad():
        expected = loaded(input_ids=ids).logits
        other = copy.deepcopy(loaded)
        assert torch.equal(other(input_ids=ids).logits, expected)
        table = coded_table(other.model)
        assert not table.tied or table.source is other.head
        other.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
        assert torch.equal(again(input_ids=ids).logits, expected)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="torch cannot trace transformers' models"
)
def test_an_exported_program_gives_the_logits(started, tmp_path):
    started.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.randint(V, (2, 9))
    with torch.no_grad():
        expected = loaded(input_ids=ids).logits
        program = torch.export.export(loaded, (), {"input_ids": ids, "use_cache": False}).module()
        torch.testing.assert_close(program(input_ids=ids, use_cache=False).logits, expected)


def test_a_dense_copy_shares_all_but_the_table(started):
    dense = with_dense_table(started.backbone)
    own = {parameter.data_ptr() for parameter in started.backbone.parameters()}
    others = [name for name, parameter in dense.named_parameters() if parameter.data_ptr() not in own]
    assert others == ["embed_tokens.weight"]
    assert isinstance(dense.get_input_embeddings(), nn.Embedding)


def test_the_whole_model_is_told(started):
    table = coded_table(started.backbone)
    text = describe_model(started.backbone, started.head, tied=table.tied)
    inner = sum(p.numel() for p in started.backbone.parameters()) - (table.codes.codebook.numel() if table.codes else 0)
    codes = started.head.footprint()
    ours = inner + codes.parameters * (1 if table.tied else 2)
    dense = inner + V * D * (1 if table.tied else 2)
    assert f"{dense:,} parameters" in text
    assert f"{ours:,} parameters" in text
    taken = inner * 4 + codes.bytes + (0 if table.tied else table.codes.footprint().bytes)
    assert f"({taken / (dense * 4):.1%})" in text
    assert "input table read from codes" in text


def test_repr_tells_the_settings():
    assert "97, 32, tied=False, scale=2" in repr(
        CodedEmbedding(CodedRows(D, V, 16, num_groups=4), tied=False, scale=2.0)
    )

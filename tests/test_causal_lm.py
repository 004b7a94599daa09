"""`CausalLM`: the loss from its definition, masked prompts, chunks, evaluation over all tokens, the shipped recipes."""

import copy
import json

import lightning as L
import pytest
import torch
import yaml
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lit_logits import CausalLM
from lit_logits.cli import LitLogitsCLI

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}


def make(**kwargs):
    torch.manual_seed(0)
    return CausalLM(LLAMA, 40, **kwargs)


def make_batch(seed=0, rows=3, length=9, ignored=0.4):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (rows, length), generator=g)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    labels = ids.masked_fill((torch.rand(rows, length, generator=g) < ignored) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def total_by_definition(model, batch):
    """Cross-entropy token by token; −100 and the first token of a text do not count."""
    logits = model(batch["input_ids"], batch["attention_mask"])
    total, count = torch.zeros(()), 0
    for row in range(len(logits)):
        for t in range(1, logits.shape[1]):
            if (label := int(batch["labels"][row, t])) != -100:
                total, count = total - logits[row, t - 1].log_softmax(-1)[label], count + 1
    return total, count


@pytest.mark.parametrize("chunk_size", [4, 4096])
def test_loss_and_gradient_are_the_definition(chunk_size):
    model, batch = make(chunk_size=chunk_size), make_batch()
    other = copy.deepcopy(model)
    total, count = total_by_definition(other, batch)
    (total / count).backward()
    model.log = lambda *args, **kwargs: None
    loss = model.training_step(batch, 0)
    loss.backward()
    torch.testing.assert_close(loss, total / count)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_nothing_to_learn_is_a_zero_with_a_graph():
    model, batch = make(), make_batch(ignored=2.0)
    model.log = lambda *args, **kwargs: None
    loss = model.training_step(batch, 0)
    loss.backward()
    assert loss.item() == 0


def test_perplexity_is_over_tokens_not_batches(tmp_path):
    """Batches of different numbers of tokens, one of them without any."""
    model = make()
    batches = [make_batch(1), make_batch(2, ignored=0.9), make_batch(3, ignored=2.0), make_batch(4, rows=1)]
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    logged = trainer.test(model, DataLoader(batches, batch_size=None), verbose=False)[0]
    sums = [total_by_definition(model.eval(), batch) for batch in batches]
    mean = sum(float(total) for total, _ in sums) / sum(count for _, count in sums)
    assert logged["test/loss"] == pytest.approx(mean, rel=1e-5)
    assert logged["test/ppl"] == pytest.approx(float(torch.tensor(mean).exp()), rel=1e-5)


def test_pretrained_models_keep_their_weights_and_vocabulary(tmp_path):
    saved = make().model
    saved.save_pretrained(tmp_path)
    model = CausalLM(str(tmp_path), 39)
    ids = make_batch()["input_ids"]
    torch.testing.assert_close(model(ids), saved.eval()(ids).logits)
    with pytest.raises(ValueError, match="a backbone of at least 41 tokens, the vocabulary of the tokenizer"):
        CausalLM(str(tmp_path), 41)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`chunk_size` to be at least 1, but got 0"):
        make(chunk_size=0)
    with pytest.raises(ValueError, match="'no/such/model', which could not be loaded"):
        CausalLM("no/such/model")
    with pytest.raises(ValueError, match="key `model_type`"):
        CausalLM({"hidden_size": 8}, 40)
    model, batch = make(), make_batch()
    batch["labels"][0, 0] = 40
    with pytest.raises(ValueError, match=r"`labels` to be in \[0, 40\)"):
        model.on_train_batch_start(batch, 0)


def test_the_recipes_train_a_base_and_an_expert_and_prune(tmp_path, monkeypatch):
    """lm.yaml, then lm_instruct.yaml and lm_prune.yaml on what it saved, all cut to seconds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"{a} plus {b} is {a + b}.\n" for a in range(30) for b in range(30)))
    pairs = [{"prompt": f"{a} + {b}?", "response": f"It is {a + b}."} for a in range(12) for b in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    quick = {"accelerator": "cpu", "max_steps": 4, "val_check_interval": 2, "enable_progress_bar": False}
    shared = {"cache_dir": str(tmp_path / "cache"), "batch_size": 4}
    overlay = {"trainer": quick, "data": {"init_args": {**shared, "source": str(tmp_path / "text.txt")}}}
    overlay["data"]["init_args"] |= {"block_size": 32, "bpe_vocab_size": 300}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(overlay))
    LitLogitsCLI(["fit", "--config", "lm.yaml", "--config", "base.yaml"])
    base = AutoModelForCausalLM.from_pretrained("models/base")
    model = ["--model.init_args.model", "models/base", "--model.init_args.keep_layers", "[0, 3]"]
    tokenizer = ["--data.init_args.tokenizer", "models/base"]
    LitLogitsCLI(["fit", "--config", "lm_prune.yaml", "--config", "base.yaml", *model, *tokenizer])
    pruned = AutoModelForCausalLM.from_pretrained("models/pruned")
    assert pruned.config.num_hidden_layers == 2
    assert torch.equal(pruned.lm_head.weight, base.lm_head.weight)
    assert not torch.equal(pruned.model.layers[1].mlp.up_proj.weight, base.model.layers[3].mlp.up_proj.weight)
    overlay["data"]["init_args"] = {**shared, "source": str(tmp_path / "pairs.jsonl")}
    (tmp_path / "expert.yaml").write_text(yaml.safe_dump(overlay))
    LitLogitsCLI(
        [
            *("fit", "--config", "lm_instruct.yaml", "--config", "expert.yaml"),
            *("--trainer.callbacks.init_args.folder", "models/sums"),
        ]
    )
    expert = AutoModelForCausalLM.from_pretrained("models/sums")
    assert expert.config.vocab_size == base.config.vocab_size
    assert not torch.equal(expert.lm_head.weight, base.lm_head.weight)
    assert expert.generation_config.eos_token_id == 0  # <|endoftext|> of the trained tokenizer

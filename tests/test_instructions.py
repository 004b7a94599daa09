"""Prompts and responses in batches: what is masked, where the prompt ends, what is too long, and what is refused."""

import re

import pytest
import torch
from instruction_pairs import (
    PAIRS,
    QUIET,
    as_rows,
    make_data,  # noqa: F401  # a fixture
    pairs_folder,  # noqa: F401  # a fixture
    ready,
    texts_of,
    write_jsonl,
)
from lightning.pytorch import Trainer

from lit_logits import VQLogitsLM
from lit_logits.datamodules.instructions.batches import Vocabulary, collate_examples
from lit_logits.datamodules.instructions.encoding import encode_rendered
from lit_logits.datamodules.instructions.layouts import TemplateLayout
from lit_logits.datamodules.instructions.sources import PairSource
from lit_logits.datamodules.instructions.splits import Example
from lit_logits.datamodules.instructions.storage import InstructionSize
from lit_logits.datamodules.prepared import read_sizes
from lit_logits.datamodules.tokenization import load_tokenizer, train_bpe
from lit_logits.modules import DenseLogitsHead

PROMPTS = PairSource("prompts.jsonl", response_column=None)


def test_batch_by_hand():
    """Prompt [5, 6] with response [8, 9, 1]; prompt [5] with response [1]; the pad token may be a real one."""
    rows = [
        {"row": 3, "sample_id": 2**62, "prompt": [5, 6], "responses": [[8, 9, 1]], "ends": [[2, 5, -1]]},
        {"row": 0, "sample_id": 17, "prompt": [5], "responses": [[1]], "ends": [[-1]]},
    ]
    rows = [
        {**row, "byte_ends": [[2 * end if end > 0 else end for end in row["ends"][0]]], "correct": 0} for row in rows
    ]
    batch = collate_examples(rows, Vocabulary(pad_token_id=1, tokenizer_id=2**61))
    assert batch["input_ids"].tolist() == [[5, 6, 8, 9, 1], [5, 1, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 8, 9, 1], [-100, 1, -100, -100, -100]]
    assert batch["response_ends"].tolist() == [[-1, 0, 2, 5, -1], [0, -1, -1, -1, -1]]
    assert batch["response_bytes"].tolist() == [[-1, 0, 4, 10, -1], [0, -1, -1, -1, -1]]
    assert batch["rows"].tolist() == [3, 0]
    assert batch["sample_ids"].tolist() == [2**62, 17]
    assert batch["tokenizer_id"].item() == 2**61
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}
    tokens = {"input_ids", "attention_mask", "labels", "response_ends", "response_bytes", "tokenizer_id", "layout_id"}
    assert set(batch) == {*tokens, "rows", "sample_ids"}


def test_every_pair_is_there_once_with_its_response_labelled(make):
    data = ready(make())
    seen = []
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        pairs = texts_of(loader, data.tokenizer)
        assert len(pairs) >= 10
        seen += pairs
    assert len(seen) == len(set(seen)) == 100
    expected = {(f"Question: {prompt}\nAnswer:", f" {response}<|endoftext|>") for prompt, response in PAIRS}
    assert set(seen) == expected


def test_ids_are_the_tokens_of_both_parts(make):
    """Oracle: `tokenizers` on the prompt part and on the response part, joined."""
    data = ready(make())
    encode = data.tokenizer.backend_tokenizer.encode
    for batch in data.val_dataloader():
        for row, ids, mask in zip(batch["rows"], batch["input_ids"], batch["attention_mask"], strict=True):
            prompt, response = data.pairs.splits["val"][row][:2]
            start, end = encode(f"Question: {prompt}\nAnswer:").ids, encode(f" {response}").ids
            assert ids[mask.bool()].tolist() == [*start, *end, data.tokenizer.eos_token_id]


def test_token_that_would_span_the_boundary_is_split():
    class Merging:
        """Knows `ab` as one token, and the letters."""

        eos_token_id = 0

        def __call__(self, texts, **_):
            pieces = [list(re.finditer("ab|.", text)) for text in texts]
            ids = [[{"a": 1, "b": 2, "ab": 3}[piece.group()] for piece in row] for row in pieces]
            return {"input_ids": ids, "offset_mapping": [[piece.span() for piece in row] for row in pieces]}

    layout = object.__new__(TemplateLayout)
    layout.pieces, layout.before, layout.after = ("", "", ""), [9], [0]
    rendered = [layout.render(Example("a", "b"), ["b", "a"], [])]
    ends = [[1, -1], [1, -1]]
    assert encode_rendered(rendered, layout, Merging()) == [([9, 1], [[2, 0], [1, 0]], ends, ends, [])]


def test_begin_token_is_added_where_the_tokenizer_adds_one(folder, make, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(folder / "bpe")
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <|endoftext|>", special_tokens=[("<bos>", bos), ("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(tmp_path / "bos")
    data = ready(make(tokenizer=str(tmp_path / "bos")))
    for batch in data.test_dataloader():
        assert (batch["input_ids"][:, 0] == bos).all()
        assert (batch["input_ids"] == bos).sum() == len(batch["rows"])
        assert ((batch["labels"] == 0).sum(1) == 1).all()
    chat = ready(make(tokenizer=str(tmp_path / "bos"), template="chat"))
    assert all((batch["input_ids"] != bos).all() for batch in chat.test_dataloader())  # the template writes none


def test_too_long_is_cut_or_dropped(make, tmp_path):
    """`x` is a byte a token here: prompts `Q` + x of 5, 9 and 10 tokens under a limit of 10, responses of 6 and eos."""
    rows = as_rows([("Q" + "ü" * n, "z" * 6) for n in (2, 4)] + [("Q" + "ü" * 4 + "?", "zz")])
    source = write_jsonl(tmp_path / "long.jsonl", rows)
    options = {"source": source, "template": "{prompt}{response}", "val_fraction": 0, "test_fraction": 0}
    data = make(max_length=10, batch_size=1, **options)
    tokens = [len(data.tokenizer.encode(row["prompt"])) for row in rows]
    assert tokens == [5, 9, 10]
    ready(data)
    lengths = {}
    for batch in data.train_dataloader():
        assert batch["attention_mask"].sum() == batch["input_ids"].numel() == 10
        lengths[batch["rows"].item()] = (batch["labels"] != -100).sum().item()
    assert lengths == {0: 5, 1: 1}
    size = read_sizes(data._directory, InstructionSize)["train"]
    assert size == (2, 6, 2, 1)
    assert str(size) == "2 examples, 6 response tokens (2 truncated, 1 dropped, see `max_length`)"


def test_prompts_for_evaluation_that_are_too_long_are_left_out(make, tmp_path):
    """One once stopped everything. Rows keep their numbers, and `finished_rows` are numbers of rows."""
    pairs = [*PAIRS, *((f"{'ü' * 50} {i}", "long") for i in range(100))]
    source = write_jsonl(tmp_path / "long.jsonl", as_rows(pairs))
    data = make(source=source, max_length=60, val_fraction=0.2, test_fraction=0.2, batch_size=1)
    with pytest.warns(UserWarning, match=r"Of the 40 examples of the split 'test', \d+ are left out, .* `max_length`"):
        data.prepare_data()
    data.setup()
    examples = data.pairs.splits["test"]
    kept = [row for row, example in enumerate(examples) if example.response != "long"]
    assert 0 < len(kept) < 40
    assert [batch["rows"].item() for batch in data.predict_dataloader()] == kept
    assert [batch["rows"].item() for batch in data.test_dataloader()] == kept
    assert len(data.val_dataloader()) == sum(example.response != "long" for example in data.pairs.splits["val"])
    data.finished_rows |= set(kept[1::2])
    assert [batch["rows"].item() for batch in data.predict_dataloader()] == kept[::2]


def test_a_split_of_prompts_that_are_all_too_long(make, tmp_path):
    source = write_jsonl(tmp_path / "long.jsonl", as_rows([(f"{'ü' * 50} {i}", "long") for i in range(100)]))
    message = r"Expected the prompt of row 0 \(line \d+ of .*long.jsonl\) to have at most 59 tokens, but got 1\d\d. "
    with pytest.raises(
        ValueError, match=message + "Raise `max_length` or shorten it. So it is with all 80 of the split"
    ):
        make(source=source, max_length=60).prepare_data()


def test_a_column_of_teachers_is_in_the_batches(make, tmp_path):
    """One name a sequence, in every loader; the pairs are the same samples as without it."""
    rows = [{**row, "who": f"model {i % 3}"} for i, row in enumerate(as_rows(PAIRS))]
    source = {"path": write_jsonl(tmp_path / "taught.jsonl", rows), "teacher_column": "who"}
    of_prompt = {row["prompt"]: row["who"] for row in rows}
    data, plain = ready(make(source=source)), ready(make())
    assert data.fingerprint != plain.fingerprint
    for name, loader in (("train", data.train_dataloader()), ("test", data.test_dataloader())):
        for batch in loader:
            examples = data.pairs.splits[name]
            assert batch["teachers"] == [of_prompt[examples[row].prompt] for row in batch["rows"].tolist()]
    samples = [{n for batch in one.val_dataloader() for n in batch["sample_ids"].tolist()} for one in (data, plain)]
    assert samples[0] == samples[1]
    assert "teachers" not in next(iter(plain.test_dataloader()))
    rows[7]["who"] = ""
    with pytest.raises(ValueError, match="the column 'who' to hold text, but got an empty teacher in line 8"):
        make(source={**source, "path": write_jsonl(tmp_path / "gap.jsonl", rows)}).prepare_data()
    with pytest.raises(ValueError, match="`teacher_column` to be None for the source 'python-questions'"):
        PairSource("python-questions", teacher_column="who")


def test_prompts_only_are_all_for_predict(make, tmp_path):
    source = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt, _ in PAIRS])
    data = ready(make(source={"path": source, "response_column": None}))
    pairs = texts_of(data.predict_dataloader(), data.tokenizer)
    assert pairs == [(f"Question: {prompt}\nAnswer:", "") for prompt, _ in PAIRS]
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"a source with responses to train on, .* Set `response_column`"):
        data.train_dataloader()
    longest = max(len(data.tokenizer.encode(prompt)) for prompt, _ in pairs)
    for limit, found in ((longest, len(PAIRS)), (longest - 1, None)):  # no room for a response is needed
        data = make(source={"path": source, "response_column": None}, max_length=limit)
        if found is None:
            with pytest.warns(UserWarning, match="are left out"):
                data.prepare_data()
            found = sum(len(data.tokenizer.encode(prompt)) < longest for prompt, _ in pairs)
        assert sum(len(batch["rows"]) for batch in ready(data).predict_dataloader()) == found


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "Expected `batch_size` to be at least 1, but got 0."),
        ({"max_length": 1}, "Expected `max_length` to be at least 2, but got 1."),
        ({"num_shots": -1}, "Expected `num_shots` to be at least 0, but got -1."),
        ({"max_test_rows": 0}, "Expected `max_test_rows` to be at least 1, but got 0."),
        ({"bpe_vocab_size": 256}, "Expected `bpe_vocab_size` to be at least 257, but got 256."),
        ({"test_fraction": 1.0}, r"Expected `test_fraction` to be in \[0, 1\), but got 1.0."),
        ({"system_prompt": "s"}, "Expected `system_prompt` to be None without a `template` of 'chat', but got 's'."),
        (
            {"source": {"path": "x", "choices_column": "c"}},
            "`choices_column` and `answer_column` to be set both or neither, but got 'c' and",
        ),
        (
            {"source": {"path": "python-questions", "choices_column": "c", "answer_column": "a"}},
            "Expected `choices_column` to be None for the source 'python-questions'",
        ),
        ({"source": PROMPTS, "num_shots": 1}, "`num_shots` to be 0 where `response_column` is None"),
        ({"source": PROMPTS, "tokenizer": None}, "Expected `tokenizer` to be set"),
    ],
)
def test_argument_out_of_range(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_trained_tokenizer_has_read_the_training_split_only(make, tmp_path):
    data = make(tokenizer=None, bpe_vocab_size=290)
    train = [f"Question: {prompt}\nAnswer: {response}" for prompt, response, *_ in data.pairs.splits["train"]]
    (tmp_path / "oracle").mkdir()
    train_bpe(train, 290, tmp_path / "oracle")
    assert data.tokenizer.get_vocab() == load_tokenizer(tmp_path / "oracle").get_vocab()
    assert data.vocab_size == 290
    assert data.pad_token_id == data.tokenizer.eos_token_id == 0


def test_tokenizer_without_pad_token_pads_with_eos(folder, make, tmp_path):
    tokenizer = load_tokenizer(folder / "bpe")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "unpadded")
    data = make(tokenizer=str(tmp_path / "unpadded"))
    assert data.tokenizer.pad_token_id is None
    assert data.pad_token_id == data.tokenizer.eos_token_id


def test_tiny_model_is_fitted_and_tested(make):
    """Two steps of a real module on padded batches; its loss is the mean over response tokens alone."""
    data = make(max_test_rows=4)
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = VQLogitsLM({**config, "num_attention_heads": 2}, vocab_size=data.vocab_size, head=DenseLogitsHead)
    trainer = Trainer(**QUIET, max_steps=2, enable_checkpointing=False)
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 2
    loss = trainer.test(model, datamodule=data, verbose=False)[0]["test/loss"]
    [batch] = data.test_dataloader()
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"], batch["attention_mask"])[:, :-1]
    losses = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    assert loss == pytest.approx(losses[labels != -100].mean().item(), rel=1e-4)

"""Log-probabilities that a server gave, imported: as good as our own cache of the same model, and checked."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import Trainer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lit_logits import GLDFusionModule
from lit_logits.callbacks import LogitCacheWriter
from lit_logits.cli import main
from lit_logits.datamodules import InstructionDataModule
from lit_logits.datamodules.tokenization import load_tokenizer, train_bpe
from lit_logits.modules import LogitCache, import_log_probs, load_causal_lm, new_causal_lm
from lit_logits.storage.importing import ServedVocabulary, read_row
from lit_logits.storage.served import ServedAnswer, ServedToken, TokenName, parse_answer

WORDS = ["zero", "one", "two", "three", "four"]
PAIRS = [
    (f"{a} plus {b}", f"{a} and {b} give {i + j} 🙂 日本") for i, a in enumerate(WORDS) for j, b in enumerate(WORDS)
]
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOP_K = 5
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
TERMS = {"kl": {"same": 1.0}, "matched": {"other": 1.0}, "chunk": {"other": 1.0}, "uld": 0.5, "gld": 0.1}


class Served:
    """A folder with pairs, two models with tokenizers of their own, and our own caches of both."""

    def __init__(self, folder):
        self.folder, self.names = folder, {"same": folder / "same", "other": folder / "other"}
        rows = [json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in PAIRS]
        (folder / "pairs.jsonl").write_text("".join(rows))
        texts = [f"Question: {prompt}\nAnswer: {response}" for prompt, response in PAIRS]
        for path, size in zip(self.names.values(), (310, 290), strict=True):
            path.mkdir()
            train_bpe(texts, size, path)
            torch.manual_seed(size)
            model = new_causal_lm({"model_type": "llama", "vocab_size": len(load_tokenizer(path)), **SHAPE})
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(6 if parameter.ndim == 2 else 1)
            model.save_pretrained(path)
        writer = LogitCacheWriter(str(folder / "caches"))
        sources = {name: str(path) for name, path in self.names.items()}
        module = GLDFusionModule(None, sources, top_k=TOP_K)
        Trainer(callbacks=[writer], **QUIET).predict(module, datamodule=self.data(), return_predictions=False)

    def data(self, **kwargs):
        options: dict[str, Any] = {
            "tokenizer": str(self.names["same"]),
            "source_tokenizers": {"other": str(self.names["other"])},
        }
        options |= {"batch_size": 5, "val_fraction": 0.1, "test_fraction": 0.1, "predict_split": "all"}
        return InstructionDataModule(
            str(self.folder / "pairs.jsonl"), cache_dir=str(self.folder / "data"), **{**options, **kwargs}
        )

    def answers(self, name):
        """What a server knows of each sample: ids of the prompt and of the rest, log-probabilities of all tokens."""
        model, data, found = load_causal_lm(str(self.names[name])).eval(), self.data(batch_size=1), []
        data.prepare_data()
        data.setup()
        for batch in data.predict_dataloader():
            view = batch["sources"].get(name, batch)
            with torch.no_grad():
                log_probs = model(view["input_ids"]).logits[0].log_softmax(-1)
            start = int((view["labels"][0] != -100).nonzero()[0])
            found.append((int(batch["sample_ids"]), start, view["input_ids"][0].tolist(), log_probs))
        return found


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return Served(tmp_path_factory.mktemp("served"))


def likeliest(log_probs):
    top = log_probs.topk(TOP_K)
    return [(int(i), round(float(value), 6)) for i, value in zip(top.indices, top.values, strict=True)]


def chat_form(tokenizer, start, ids, log_probs):
    """As of OpenAI's chat completions: text, which may be broken, and bytes."""

    pieces = {number: piece for piece, number in tokenizer.get_vocab().items()}
    table = {character: byte for byte, character in bytes_to_unicode().items()}

    def name(number):
        if number == tokenizer.eos_token_id:
            return {"token": tokenizer.eos_token, "bytes": list(tokenizer.eos_token.encode())}
        raw = bytes(table[character] for character in pieces[number])
        return {"token": raw.decode("utf-8", "replace"), "bytes": list(raw)}

    content = []
    for place in range(start, len(ids)):
        row = log_probs[place - 1]
        top = [{**name(i), "logprob": value} for i, value in likeliest(row)]
        content.append({**name(ids[place]), "logprob": round(float(row[ids[place]]), 6), "top_logprobs": top})
    return {"choices": [{"message": {"content": "…"}, "logprobs": {"content": content}}], "model": "big"}


def completions_form(tokenizer, start, ids, log_probs):
    """As of completions, of vLLM with `return_tokens_as_token_ids`."""
    rows = [log_probs[place - 1] for place in range(start, len(ids))]
    return {
        "choices": [
            {
                "logprobs": {
                    "tokens": [f"token_id:{number}" for number in ids[start:]],
                    "token_logprobs": [round(float(row[i]), 6) for row, i in zip(rows, ids[start:], strict=True)],
                    "top_logprobs": [{f"token_id:{i}": value for i, value in likeliest(row)} for row in rows],
                }
            }
        ]
    }


def prompt_form(tokenizer, start, ids, log_probs):
    """As of vLLM's `prompt_logprobs`: the whole text, the token that came first, with ranks."""
    entries = [None]
    for place in range(1, len(ids)):
        row = log_probs[place - 1]
        rank = int((row > row[ids[place]]).sum()) + 1
        entry = {str(ids[place]): {"logprob": round(float(row[ids[place]]), 6), "rank": rank, "decoded_token": "?"}}
        for number, (i, value) in enumerate(likeliest(row), start=1):
            entry.setdefault(str(i), {"logprob": value, "rank": number, "decoded_token": "?"})
        entries.append(entry)
    return {"choices": [{"text": ""}], "prompt_logprobs": entries}


FORMS = {"chat": chat_form, "completions": completions_form, "prompt": prompt_form}


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def imported(served, tmp_path, name, form, suffix=".jsonl", **kwargs):
    tokenizer = load_tokenizer(served.names[name])
    rows = [{"sample_id": number, **FORMS[form](tokenizer, *rest)} for number, *rest in served.answers(name)]
    if suffix == ".parquet":  # ids as names of columns would make a column of each
        rows = [
            {name: json.dumps(value) if name == "choices" else value for name, value in row.items()} for row in rows
        ]
    file = write(tmp_path / f"{name}{suffix}", rows)
    return import_log_probs(file, tmp_path / "imported" / name, str(served.names[name]), served.data(), **kwargs)


@pytest.mark.parametrize(("form", "suffix"), [("chat", ".jsonl"), ("completions", ".parquet"), ("prompt", ".jsonl")])
def test_an_import_holds_what_our_own_cache_holds(served, tmp_path, form, suffix):
    for name in served.names:
        own, other = LogitCache(served.folder / "caches" / name), imported(served, tmp_path, name, form, suffix)
        assert other.sample_ids.tolist() == own.sample_ids.tolist()
        assert (other.top_k, other.temperature, other.tokenizer_id) == (TOP_K, 1.0, own.tokenizer_id)
        assert (other.has_scale, other.has_label_log_probs, other.tokens) == (False, True, own.tokens)
        one, two = (cache.read(cache.sample_ids) for cache in (own, other))
        if form == "prompt":  # does not tell that white space before the response is not of the prompt
            is_space = (one.ends[:, :-1] == 0) & (one.ends[:, 1:] == 0)
            assert is_space.any() or name == "same"
            one.mask[:, :-1] &= ~is_space
        assert torch.equal(one.ends[one.mask], two.ends[two.mask])
        assert torch.equal(one.top_k.token_ids[one.mask], two.top_k.token_ids[two.mask])
        for mine, theirs in [
            (one.top_k.log_probs, two.top_k.log_probs),
            (one.top_k.tail, two.top_k.tail),
            (one.label_log_probs, two.label_log_probs),
        ]:
            torch.testing.assert_close(mine[one.mask], theirs[two.mask], atol=1e-5, rtol=0)


def fit(served, caches):
    torch.manual_seed(0)
    sources = {name: str(caches / name) for name in served.names}
    options = {"terms": TERMS, "graph_values": "softmax", "top_k": TOP_K, "kd_weight": 0.8, "chunk_temperature": 5.0}
    pivot = {"model_type": "llama", **SHAPE}
    data = served.data()
    data.prepare_data()
    module = GLDFusionModule(pivot, sources, data.vocab_size, **options)
    trainer = Trainer(max_steps=3, limit_val_batches=0, **QUIET)
    trainer.fit(module, datamodule=data)
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]), logged


def test_a_run_from_imported_log_probabilities_is_that_from_our_own_cache(served, tmp_path):
    """Of both tokenizers, by every term; what differs is the six digits of the served values."""
    for name in served.names:
        imported(served, tmp_path, name, "chat")
    (weights, logged), (others, theirs) = (
        fit(served, folder) for folder in (served.folder / "caches", tmp_path / "imported")
    )
    assert {f"train/loss_{term}/{name}" for term, name in [("kl", "same"), ("chunk", "other")]} <= set(logged)
    assert logged == pytest.approx(theirs, abs=2e-5, rel=1e-4)
    torch.testing.assert_close(weights, others, atol=1e-4, rtol=1e-3)


def test_terms_that_need_logits_are_refused_before_the_first_step(served, tmp_path):
    imported(served, tmp_path, "same", "prompt")
    cache = str(tmp_path / "imported" / "same")
    trainer = Trainer(max_steps=1, **QUIET)
    for options in ({}, {"terms": {"uld": 1.0}, "uld_values": "logits"}):
        module = GLDFusionModule({"model_type": "llama", **SHAPE}, {"same": cache}, 380, top_k=TOP_K, **options)
        with pytest.raises(ValueError, match=r"logits of source 'same' to be known, .* Use `graph_values: softmax`"):
            trainer.fit(module, datamodule=served.data())
        assert trainer.global_step == 0


def test_chunks_are_debiased_by_no_server(served, tmp_path):
    """It tells a part of what begins a word. A cache of the pivot's own tokens needs no such value."""
    imported(served, tmp_path, "other", "chat")
    trainer = Trainer(max_steps=1, limit_val_batches=0, **QUIET)

    def train(name, cache):
        options = {"terms": {"chunk": 1.0}, "chunk_debias": 0.1, "top_k": TOP_K}
        module = GLDFusionModule({"model_type": "llama", **SHAPE}, {name: str(cache)}, 380, **options)
        trainer.fit(module, datamodule=served.data())
        return trainer.global_step

    with pytest.raises(ValueError, match=r"log-probabilities of a new word, .* was imported, .* Leave `chunk_debias`"):
        train("other", tmp_path / "imported" / "other")
    assert trainer.global_step == 0
    assert train("same", served.folder / "caches" / "same") == 1


def test_batch_files_and_texts_tell_the_sample(served, tmp_path):
    """`custom_id` of OpenAI's batches; or prompt and response; a cache is replaced as a whole, other files are not."""
    tokenizer, folder = load_tokenizer(served.names["same"]), tmp_path / "cache"
    texts = {number: (prompt, response) for number, prompt, response in served.data().sample_texts()}
    answers = [(number, chat_form(tokenizer, *rest)) for number, *rest in served.answers("same")[:6]]
    batch = [{"custom_id": str(number), "response": {"status_code": 200, "body": body}} for number, body in answers]
    named = [{"prompt": texts[number][0], "response": texts[number][1], **body} for number, body in answers[:4]]
    for rows in (batch, named):
        file = write(tmp_path / "served.jsonl", rows)
        cache = import_log_probs([file], folder, tokenizer, served.data())
        assert len(cache) == len(rows)
        assert cache.settings["model"] == "big"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "served.jsonl"]
    with pytest.raises(ValueError, match="to be new or a cache of served log-probabilities"):
        import_log_probs(file, served.folder / "caches" / "same", tokenizer, served.data())
    before = (folder / "cache.json").read_bytes()
    wrong = {**named[0], "prompt": "six plus six"}
    with pytest.raises(ValueError, match=r"line 2 .* to belong to a sample of the data .* 'six plus six'"):
        import_log_probs(write(tmp_path / "served.jsonl", [named[0], wrong]), folder, tokenizer, served.data())
    with pytest.raises(ValueError, match="`sample_id` 5"):
        import_log_probs(
            write(tmp_path / "served.jsonl", [{**batch[0], "custom_id": "5"}]), folder, tokenizer, served.data()
        )
    with pytest.raises(ValueError, match="at least `top_k`=6 tokens"):
        import_log_probs(write(tmp_path / "served.jsonl", named), folder, tokenizer, served.data(), top_k=6)
    assert (folder / "cache.json").read_bytes() == before
    with pytest.raises(ValueError, match="nothing matches 'nowhere"):
        import_log_probs("nowhere/*.jsonl", folder, tokenizer, served.data())


def test_the_command_line_imports_for_the_data_of_a_recipe(served, tmp_path, capsys):
    """Of which it reads the data alone: neither the pivot nor the sources of this one exist."""
    tokenizer = load_tokenizer(served.names["same"])
    rows = [{"sample_id": number, **chat_form(tokenizer, *rest)} for number, *rest in served.answers("same")]
    file = write(tmp_path / "served.jsonl", rows)
    arguments = ["import", "--config", "gld_fusion.yaml", "--files", file, "--folder", str(tmp_path / "cache")]
    arguments += [f"--tokenizer={served.names['same']}", f"--data.init_args.source={served.folder / 'pairs.jsonl'}"]
    main(arguments)
    cache = LogitCache(tmp_path / "cache")
    assert len(cache) == len(PAIRS)
    assert f"{tmp_path / 'cache'}, 25 samples, {cache.num_tokens} tokens, k = 5." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="lit-logits: Expected `files` to be files or globs"):
        main([*arguments[:4], "nowhere.jsonl", *arguments[5:]])


# ---------------------------------------------------------------------- by hand

TABLE = [None, b"a", b" b", b"c", b" ", b"\xc3", b"\xa9"]


def answer(tokens, has_prompt=False, value=-1.0):
    """Tokens by their ids, of equal log-probability, each with one that is likelier."""
    listed = [ServedToken(TokenName(number=n), value, [(TokenName(number=3), -0.5)]) for n in tokens]
    return ServedAnswer("row 3 of x", 7, None, None, "", listed, has_prompt)


@pytest.mark.parametrize(
    ("tokens", "has_prompt", "response", "ends"),
    [
        ([1, 2, 0], False, "a b", [0, 1, 3]),
        ([2, 3], False, "bc", [0, 1]),  # white space before it
        ([4, 4, 1, 5, 6, 0, 0], False, "aé", [0, 0, 0, 1, 2, 3, -1]),  # within a character, and after the end
        ([3, 0, 1, 2, 0, 4], True, " a b", [0, 2, 4, -1]),  # the prompt, and a template that strips
        ([1, 2, 2, 0], True, "b", [0, 1]),  # the last of those that are alike
        ([1, 4, 0], False, "a ", [0, 1, 2]),
        ([1, 4, 4], False, "a", [0, 1, -1]),
    ],
)
def test_places_by_hand(tokens, has_prompt, response, ends):
    row = read_row(answer(tokens, has_prompt), 7, response, ServedVocabulary(TABLE, {"<end>": 0}))
    assert row.ends == ends
    assert row.label_log_probs == [-1.0] * len(ends)
    assert row.top == [[(3, -0.5)]] * len(ends)


@pytest.mark.parametrize(
    ("given", "response", "message"),
    [
        (answer([1, 3]), "ab", "row 3 of x to spell the response 'ab', but they spell 'ac'"),
        (answer([1, 2, 3]), "a b", "but they spell 'a bc'"),
        (answer([3, 1]), "a", "but they spell 'ca'"),
        (answer([1, 99]), "a", r"to be of the tokenizer that is given, but it has none for .*99"),
        (answer([1], value=0.5), "a", r"log-probabilities of at most 0 .* but got 0\.5"),
        (answer([1], value=None), "a", "a log-probability of each token"),
        (
            answer([1])._replace(
                tokens=[ServedToken(TokenName("a"), -1.0, [(TokenName("a"), 0), (TokenName("c"), -1)])]
            ),
            "a",
            "but got a sum above 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given, response, message):
    with pytest.raises(ValueError, match=message):
        read_row(given, 7, response, ServedVocabulary(TABLE, {"<end>": 0}))


def test_a_token_that_came_is_among_the_likeliest_by_its_rank_only():
    """Of three listed, one came at rank 3 of 3, and one at rank 9."""
    entry = {str(i): {"logprob": -float(i), "rank": i} for i in (1, 2)}
    rows = [{"3": {"logprob": -3.0, "rank": 3}, **entry}, {"3": {"logprob": -9.0, "rank": 9}, **entry}]
    parsed = parse_answer({"sample_id": 1, "outputs": [{"logprobs": rows, "token_ids": [3, 3]}]})
    assert [[name.number for name, _ in one.top] for one in parsed.tokens] == [[3, 1, 2], [1, 2]]
    assert [one.log_prob for one in parsed.tokens] == [-3.0, -9.0]


@pytest.mark.parametrize(
    "row", [{"sample_id": 1}, {"choices": [{"logprobs": None}]}, {"choices": [{}, {}]}, {"choices": [{"logprobs": {}}]}]
)
def test_rows_without_log_probabilities_are_refused(row):
    with pytest.raises(ValueError, match="Expected line 4 to hold one answer with log-probabilities"):
        parse_answer(row, "line 4")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "x.jsonl").write_text("[1]\n")
    data = type("Data", (), {"sample_texts": lambda self: []})()
    vocabulary = load_tokenizer_of(tmp_path)
    with pytest.raises(ValueError, match=r"in files of \['.jsonl', '.parquet'\], but got"):
        import_log_probs(str(tmp_path / "x.csv"), tmp_path / "cache", vocabulary, data)
    with pytest.raises(ValueError, match=r"a JSON object in line 1 of .*x.jsonl, but got list"):
        import_log_probs(str(tmp_path / "x.jsonl"), tmp_path / "cache", vocabulary, data)
    with pytest.raises(ValueError, match="to have `sample_texts`"):
        import_log_probs(str(tmp_path / "x.csv"), tmp_path / "cache", vocabulary, object())


def load_tokenizer_of(tmp_path):
    (tmp_path / "bpe").mkdir()
    train_bpe(["x"], 257, tmp_path / "bpe")
    return load_tokenizer(tmp_path / "bpe")

# %% [markdown]
# # A text coloured by its experts
#
# A large model is to do what small experts have learned, and is not to be trained. At every token the decoder moves the large
# model's logits along the difference between an expert and the base that it came from; how far is found anew at each token.
#
# Here all models are tiny Llamas, trained in this page: a large one and a small base on the Python documentation, and two experts
# from the base, of which one learns to answer questions and the other to go on as code does. It takes about four minutes on two
# cores. What the models say is therefore poor; look at who acts where.

# %%
import os
import tempfile
from io import BytesIO
from pathlib import Path

import lightning as L
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_logits import CausalLM, DynamicFusionDecoder
from lit_logits.callbacks import FusionWeightLogger, SavePretrained
from lit_logits.datamodules import InstructionDataModule, TextDataModule

folder = Path(tempfile.mkdtemp())
steps = int(os.environ.get("EXAMPLE_STEPS", 200))  # the tests run fewer


def train(model, data, name, num_steps):
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_steps=num_steps,
        max_epochs=-1,
        callbacks=[SavePretrained(str(folder / name), monitor=None)],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=8,
    )
    trainer.fit(model, data)
    return str(folder / name)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=2e-3)


def llama(size, layers):
    sizes = {"hidden_size": size, "intermediate_size": 3 * size, "num_hidden_layers": layers}
    return {"model_type": "llama", **sizes, "num_attention_heads": 4, "tie_word_embeddings": True}


# %%
text = TextDataModule("python-docs", bpe_vocab_size=2048, block_size=128, batch_size=8)
text.prepare_data()
text.setup()
large = train(CausalLM(llama(192, 3), vocab_size=text.vocab_size, optimizer=adamw), text, "large", 2 * steps)
base = train(CausalLM(llama(96, 2), vocab_size=text.vocab_size, optimizer=adamw), text, "base", steps)

# %% [markdown]
# Two experts of the base: one on questions about the Python library, one on lines of code.

# %%
questions = InstructionDataModule("python-questions", tokenizer=base, max_length=128, batch_size=8, max_test_rows=8)
asked = train(CausalLM(base, optimizer=adamw), questions, "questions", steps)

code = folder / "code.txt"
code.write_text("\n".join(Path(os.__file__).parent.joinpath(f"{name}.py").read_text() for name in ("argparse", "ast")))
lines = TextDataModule(str(code), tokenizer=base, block_size=128, batch_size=8)
coded = train(CausalLM(base, optimizer=adamw), lines, "code", steps)

# %% [markdown]
# The large model decodes with both. `test` scores the reference answers: its perplexity alone, and fused.

# %%
for name, alpha in {"large model alone": [0.0, 0.0], "fused, weights found": None}.items():
    decoder = DynamicFusionDecoder(large, base, [asked, coded], static_alpha=alpha)
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    print(f"{name:22} perplexity {trainer.test(decoder, questions, verbose=False)[0]['test/ppl']:.1f}")

# %% [markdown]
# ## Who acts where
#
# `FusionWeightLogger` draws each answer: a token lies on the colour of the expert that acts, deeper where its weight is larger, and
# on white where the large model is left alone. Below are the weights along the text, and how far the fused distribution is from the
# large model's.

# %%
decoder = DynamicFusionDecoder(large, base, [asked, coded], generation={"max_new_tokens": 48, "do_sample": False})
trainer = L.Trainer(
    logger=L.pytorch.loggers.TensorBoardLogger(folder),
    callbacks=[FusionWeightLogger()],
    enable_progress_bar=False,
    limit_predict_batches=1,
)
_ = trainer.predict(decoder, questions)
log = EventAccumulator(trainer.logger.log_dir, size_guidance={"images": 0}).Reload()
Image.open(BytesIO(log.Images("fusion/text")[0].encoded_image_string))

# %%
Image.open(BytesIO(log.Images("fusion/alpha_curve")[0].encoded_image_string))

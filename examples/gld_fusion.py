# %% [markdown]
# # The bound beside the distance
#
# Models of different tokenizers share no vocabulary, so their logits cannot be compared token by token. Graph-on-logits
# distillation compares how logits move together: a graph for each model, and the Gromov–Wasserstein distance between both. That
# distance is dear, so what is trained is a bound that sorts: cheap, and never above the distance.
#
# Here a pivot learns from two tiny models of other tokenizers, and `GWApproximationLogger` solves for the distance beside the
# bound. It needs POT (`pip install POT`). It takes about four minutes on two cores.

# %%
import os
import tempfile
from io import BytesIO
from pathlib import Path

import lightning as L
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from lit_logits import CausalLM, GLDFusionModule
from lit_logits.callbacks import GWApproximationLogger, SavePretrained
from lit_logits.datamodules import InstructionDataModule

folder = Path(tempfile.mkdtemp())
steps = int(os.environ.get("EXAMPLE_STEPS", 150))  # the tests run fewer


def fit(model, data, **options):
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=8,
        log_every_n_steps=5,
        **options,
    )
    trainer.fit(model, data)
    return trainer


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=2e-3)


def llama(size, layers):
    sizes = {"hidden_size": size, "intermediate_size": 3 * size, "num_hidden_layers": layers}
    return {"model_type": "llama", **sizes, "num_attention_heads": 4, "tie_word_embeddings": True}


# %% [markdown]
# Two sources, each with a byte-pair encoding of its own, learn to answer questions about the Python library.

# %%
shared = {"max_length": 128, "batch_size": 8}
sources = {}
for name, vocab_size in {"wide": 3072, "narrow": 1024}.items():
    L.seed_everything(0, verbose=False)
    data = InstructionDataModule("python-questions", bpe_vocab_size=vocab_size, **shared)
    data.prepare_data()
    data.setup()
    model = CausalLM(llama(128, 2), vocab_size=data.vocab_size, optimizer=adamw)
    fit(model, data, logger=False, callbacks=[SavePretrained(str(folder / name), monitor=None)])
    sources[name] = str(folder / name)

# %% [markdown]
# The same sentence in the tokens of both, so that you see what is to be aligned:

# %%
pivot_data = InstructionDataModule("python-questions", bpe_vocab_size=2048, source_tokenizers=sources, **shared)
pivot_data.prepare_data()
pivot_data.setup()
sentence = "What does textwrap.dedent do?"
print(f"{'pivot':7}", pivot_data.tokenizer.tokenize(sentence))
for name, source in sources.items():
    print(f"{name:7}", AutoTokenizer.from_pretrained(source).tokenize(sentence))

# %% [markdown]
# The pivot learns from the responses, and from what the logits of both sources have in common with its own.

# %%
L.seed_everything(0, verbose=False)
pivot = GLDFusionModule(llama(96, 2), sources, pivot_data.vocab_size, optimizer=adamw)
logger = L.pytorch.loggers.TensorBoardLogger(folder)
trainer = fit(pivot, pivot_data, logger=logger, callbacks=[GWApproximationLogger(every_n_steps=max(1, steps // 15))])

# %% [markdown]
# ## Never above, and how close
#
# Each point is a pair of graphs: to the right the bound, upwards the distance, as the best matching that was found. On the line the
# bound would be exact. Fainter points are of earlier steps.

# %%
log = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
print(sorted(tag for tag in log.Tags()["images"]))
Image.open(BytesIO(log.Images("gw/scatter")[-1].encoded_image_string))

# %% [markdown]
# What one of these graphs looks like, the pivot's beside a source's: how the logits of two nodes move together over the sequence.

# %%
tag = next(tag for tag in log.Tags()["images"] if tag.startswith("gw/graph"))
Image.open(BytesIO(log.Images(tag)[-1].encoded_image_string))

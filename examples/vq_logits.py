# %% [markdown]
# # Tokens that belong together
#
# The output layer of a language model has a row for each token of the vocabulary. `HierarchicalVQLogitsHead` puts tokens into
# clusters, and lets them share codes within. Which tokens belong together is known before training: they follow the same words.
#
# Here a small Llama is trained from scratch on the Python documentation, which every interpreter brings along. It takes about
# three minutes on two cores.

# %%
import os
import tempfile
from functools import partial
from io import BytesIO
from pathlib import Path

import lightning as L
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_logits import VQLogitsLM
from lit_logits.callbacks import CodebookFit, CodebookMonitor
from lit_logits.datamodules import TextDataModule
from lit_logits.modules import DenseLogitsHead, HierarchicalVQLogitsHead

folder = Path(tempfile.mkdtemp())
steps = int(os.environ.get("EXAMPLE_STEPS", 300))  # the tests run fewer
L.seed_everything(0, verbose=False)

data = TextDataModule("python-docs", bpe_vocab_size=2048, block_size=128, batch_size=8)
data.prepare_data()
data.setup()

# %% [markdown]
# Two models that differ in their output layer alone. With `own_vectors` each token owns a vector in its cluster for most of the
# training, which is what learns best. At nine tenths of it `CodebookFit` turns the vectors into codes.

# %%
BACKBONE = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def train(head, callbacks=()):
    L.seed_everything(0, verbose=False)
    model = VQLogitsLM(
        BACKBONE,
        data.vocab_size,
        head=head,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1),
    )
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=L.pytorch.loggers.TensorBoardLogger(folder) if callbacks else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=max(1, steps // 3),
        check_val_every_n_epoch=None,
        limit_val_batches=8,
    )
    trainer.fit(model, data)
    return model, trainer


dense, trainer = train(DenseLogitsHead)
dense_ppl = trainer.test(dense, data, verbose=False)[0]["test/ppl"]

two_levels = partial(HierarchicalVQLogitsHead, codebook_sizes=(64, 96, 96), num_groups=16, own_vectors=True)
model, trainer = train(two_levels, [CodebookMonitor(every_n_steps=max(1, steps // 30)), CodebookFit()])
ppl = trainer.test(model, data, verbose=False)[0]["test/ppl"]

# %% [markdown]
# How good they are, and what their layers take:

# %%
size = model.head.footprint()
print(f"dense layer:   {size.dense_parameters:9,} parameters, test perplexity {dense_ppl:6.1f}")
print(f"two levels:    {size.parameters:9,} parameters, test perplexity {ppl:6.1f}")

# %% [markdown]
# ## What stands in the clusters
#
# `CodebookMonitor` draws this picture into TensorBoard; here it is read back from the file. Each line is a cluster: how often its
# tokens come, how many there are, and the most frequent of them. Look for lines of one kind: endings, verbs, brackets, names of
# types.

# %%
log = EventAccumulator(trainer.logger.log_dir, size_guidance={"images": 0}).Reload()
Image.open(BytesIO(log.Images("vq/tokens")[-1].encoded_image_string))

# %% [markdown]
# ## Which tokens came nearest
#
# Tokens of one cluster still differ: each has a vector of its own. What the model believes after a prompt:

# %%
prompt = data.tokenizer("The function returns a", return_tensors="pt").input_ids
with torch.no_grad():
    best = model.head.top_k(model.hidden_states(prompt)[:, -1], 8)
for log_prob, token in zip(best.log_probs[0], best.token_ids[0], strict=True):
    cluster = int(model.head.token_to_cluster[token])
    print(f"{log_prob.exp():6.1%}  cluster {cluster:3}  {data.tokenizer.decode([int(token)])!r}")

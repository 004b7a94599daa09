"""What a new classifier of texts needs to know of the tokenizer: links cannot reach into a recipe's mapping."""

import pkgutil

from jsonargparse import ArgumentParser, Namespace
from lightning import LightningDataModule

__all__ = ["fill_vocabulary"]


def fill_vocabulary(model: Namespace, data: Namespace | None) -> None:
    """Set `vocab_size` and `pad_token_id` of new models in the parsed arguments of a model, where they are not given.

    New models are arguments that are mappings with `model_type`. Nothing is done unless the data has both tokens and
    classes; it is made for this, as the tokenizer may be one that it trains.

    Args:
        model: parsed `class_path` and `init_args`; changed in place.
        data: the same of the data module.

    Raises:
        ValueError: If a given `vocab_size` is less than the number of the tokenizer's tokens.
    """
    arguments = vars(model.get("init_args", Namespace()))
    new = {name: value for name, value in arguments.items() if isinstance(value, dict) and "model_type" in value}
    if data is None or not new or not {"vocab_size", "num_classes"} <= set(dir(pkgutil.resolve_name(data.class_path))):
        return
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    made = parser.instantiate(Namespace(data=data)).data
    for name, settings in new.items():
        settings.setdefault("vocab_size", made.vocab_size)
        settings.setdefault("pad_token_id", made.pad_token_id)
        if settings["vocab_size"] < made.vocab_size:
            raise ValueError(
                f"Expected `vocab_size` of the new `{name}` to be at least the {made.vocab_size} tokens of the data's"
                f" tokenizer, but got {settings['vocab_size']}. Leave it out to take theirs."
            )

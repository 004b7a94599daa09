"""The parser of recipes and command lines: shipped recipes, texts with colons, errors that say what has moved."""

import inspect
import re
import sys
from collections.abc import Callable
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.cli import LightningArgumentParser

__all__ = ["RecipeFile", "RecipeParser", "forget_classes", "schedule_warning"]


class _ClassSearch:
    """A search for the subclasses of a type that is made again only where modules were imported meanwhile.

    jsonargparse looks for a string such as a model's path among all subclasses of `nn.Module`, a thousand with
    transformers, each time that it looks at the value: seconds before a run starts.
    """

    def __init__(self, search: Callable[..., list[str]]) -> None:
        self.search = search
        self.found: dict[Any, list[str]] = {}

    def __call__(self, typehint: Any, *args: Any, **kwargs: Any) -> list[str]:
        if not inspect.isclass(typehint):
            return self.search(typehint, *args, **kwargs)
        key = (typehint, args, tuple(kwargs.items()), len(sys.modules))
        if key not in self.found:
            self.found[key] = self.search(typehint, *args, **kwargs)
        return self.found[key]


# Private names of jsonargparse. Where a version has them no longer, a start only takes longer.
_typehints: Any = getattr(jsonargparse, "_typehints", None)
_class_search = _ClassSearch(getattr(_typehints, "get_all_subclass_paths", lambda *_, **__: []))
if hasattr(_typehints, "get_all_subclass_paths"):
    _typehints.get_all_subclass_paths = _class_search


def forget_classes() -> None:
    """Let the next parser find classes that were defined since the last one, as in a notebook."""
    _class_search.found.clear()


class RecipeFile(ActionConfigFile):
    """`--config`, which also finds the shipped recipes by their file names."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read the file, or the shipped recipe of this name."""
        if str(values).endswith(".yaml") and not Path(values).is_file():
            shipped = {path.name: str(path) for path in Path(str(files("lit_logits.configs"))).glob("*.yaml")}
            if values not in shipped:
                parser.error(f"Expected a file or one of the shipped recipes {sorted(shipped)}, but got {values!r}.")
            values = shipped[values]
        super().__call__(parser, cfg, values, option_string)


_RESIDUAL = ("num_groups", "num_stages", "byte_budget", "metric", "token_weights", "smoothing")
_HEAD_ARGUMENTS = (
    *(*_RESIDUAL, "codebook_size", "bias", "init", "count_power", "mapping", "codebook_update"),
    *("commitment_weight", "decay", "reassign_every_n_steps"),
)


_SOURCE_ARGUMENTS = {
    "TextDataModule": ("subset", "text_column"),
    "ImageDataModule": ("subset", "image_column", "label_column"),
    "InstructionDataModule": ("subset", "prompt_column", "response_column", "choices_column", "answer_column"),
}


class _Text(str):
    """An argument that is a text as it stands."""

    __slots__ = ()


def _as_text(name: str, value: str) -> str:
    """Mark the value of an option such as `--data.template` that is a text with a colon, and no YAML.

    jsonargparse reads `Q: {prompt}` as a mapping before it looks at the type. Mappings on a command line have braces.
    """
    is_of_class = re.fullmatch(r"--\w+(\.\w+)+", name) and not re.search(r"\.dict_kwargs\b|\.init_args$", name)
    is_text = re.search(r":(\s|$)", value) and not value.lstrip().startswith(("{", "["))
    return _Text(value) if is_of_class and is_text else value


def _plain(value: Any) -> Any:
    """Return a parsed config with strings in place of their subclasses: files and checkpoints hold no others."""
    if isinstance(value, Namespace | dict):
        entries = vars(value) if isinstance(value, Namespace) else value
        entries.update({key: _plain(entry) for key, entry in entries.items()})
    elif isinstance(value, list):
        value[:] = map(_plain, value)
    elif isinstance(value, str) and isinstance(value, Enum):  # such as defaults of Lightning's `Timer`
        return value.value
    return str(value) if isinstance(value, _Text) else value


class RecipeParser(LightningArgumentParser):
    """A parser whose errors explain arguments that have moved or changed their names since version 0.1.

    It takes texts with colons from the command line, and says what a printed config lacks.
    """

    _printed: "tuple[RecipeParser, str] | None" = None

    def parse_args(self, args: Any = None, *more: Any, **kwargs: Any) -> Any:
        """Parse, with texts as they stand."""
        given = list(sys.argv[1:] if args is None else args)
        for at, name in enumerate(given):
            option, has_value, value = name.partition("=")
            if has_value and isinstance(text := _as_text(option, value), _Text):
                given[at : at + 1] = [option, text]
            elif not has_value and at + 1 < len(given):
                given[at + 1] = _as_text(name, given[at + 1])
        return _plain(super().parse_args(given, *more, **kwargs))

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        """Return the config as a file."""
        text: str = super().dump(_plain(namespace.clone()), *args, **kwargs)
        getattr(self, "parent_parser", self)._printed = self, text
        return text

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Say on the way what a config lacks that `--print_config` printed."""
        if status == 0 and self._printed is not None:
            parser, text = self._printed
            parser.exit_on_error = False
            try:
                parser.parse_string(text)
            except Exception as error:  # of all kinds, as values of all kinds may be missing
                found = re.search(r'the following arguments are required: [^\n]*|Key "[^\n]*', str(error))
                lacks = found.group() if found else str(error)
                message = f"{message or ''}lit-logits: This file cannot be run before it is filled in: {lacks}\n"
        super().exit(status, message)
        raise AssertionError  # which is never reached

    def print_usage(self, file: Any = None) -> None:
        """Leave it out: it is hundreds of lines above the one that helps."""

    def error(self, message: str, *args: Any, **kwargs: Any) -> Any:
        """Add what has become of an argument to what is wrong with it."""
        old = next((name for name in _HEAD_ARGUMENTS if f"'{name}'" in message and "VQLogitsLM" in message), None)
        if old is not None:
            head = "ResidualVQLogitsHead" if old in _RESIDUAL else "VQLogitsHead"
            message += (
                f"\nSince version 0.2 `{old}` is an argument of the head. Write it in a recipe as `head: {{class_path:"
                f" {head}, init_args: {{{old}: ...}}}}`, on the command line as `--model.head {head}"
                f" --model.head.{old} ...`."
            )
        if 'key "head"' in message and re.search(r"string: (dense|vq)\b", message):
            message += (
                "\nSince version 0.2 `head` is a class: `DenseLogitsHead`, `VQLogitsHead`, `HierarchicalVQLogitsHead`,"
                " `ResidualVQLogitsHead`."
            )
        if "'kd_weight'" in message and "DualHeadKD" in message:
            message += "\nSince version 0.2 it is `kd_factor`: `kd_weight` is a share in [0, 1] everywhere."
        if "'chunk_size'" in message and ("GLDFusionModule" in message or "DynamicFusionDecoder" in message):
            message += "\nSince version 0.2 chunks go by the memory that their logits take: leave `chunk_size` out."
        message += _unquoted_pattern(message)
        return super().error(message + _new_form_of_data(message), *args, **kwargs)


def _unquoted_pattern(message: str) -> str:
    """Return what an error adds if the shell has made several files of a pattern, of which an option took the first."""
    found = re.search(r"unrecognized arguments?: (\S+)", message, re.IGNORECASE)
    if found is None or not Path(found.group(1)).exists():
        return ""
    return "\nA pattern of several files goes in quotes, as in --data.init_args.source 'my/*.txt'."


def schedule_warning(model: Namespace, max_steps: int) -> str | None:
    """Return a warning if a `WarmupStableDecayLR` ends at a rate of 0 before the training does, else None.

    Args:
        model: parsed config of the model.
        max_steps: optimizer steps of the training; below 1 if it has no such end.
    """
    schedule = model.get("init_args.lr_scheduler")
    if not isinstance(schedule, Namespace) or not schedule.class_path.endswith("WarmupStableDecayLR"):
        return None
    settings = schedule.init_args
    steps = [settings.get(f"num_{part}_steps") for part in ("warmup", "stable", "decay")]
    if any(not isinstance(count, int) for count in steps) or settings.get("min_lr_ratio"):
        return None
    end = sum(steps)
    if max_steps <= end:
        return None
    return (
        f"The learning rate is 0 from step {end} on, but training has {max_steps} steps. Set"
        f" --model.init_args.lr_scheduler.init_args.num_decay_steps {max_steps - end + steps[2]}."
    )


def _new_form_of_data(message: str) -> str:
    """Return what an error adds that refuses an argument which a data module had in version 0.1."""
    data = next((data for data in _SOURCE_ARGUMENTS if f"{data}':" in message), "")
    refused = re.findall(r"Option '(\w+)' is not accepted", message)
    old = refused[0] if data and refused else ""
    if old in _SOURCE_ARGUMENTS.get(data, ()):
        return (
            f"\nSince version 0.2 `{old}` is an argument of the source. Write it in a recipe as `source: {{path: ...,"
            f" {old}: ...}}`, on the command line as `--data.source.path ... --data.source.{old} ...`."
        )
    if old == "chat_template":
        return "\nSince version 0.2 it is a `template`: write `template: chat`."
    if old == "chat_sources":
        return (
            "\nSince version 0.2 every one of `source_tokenizers` has a template of its own: write"
            " `source_tokenizers: {NAME: {tokenizer: ..., template: chat}}`."
        )
    return ""

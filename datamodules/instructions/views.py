"""The same pairs as several tokenizers see them: each with its own layout, all with the same shots and sample ids."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from lit_logits.datamodules.caching import digest
from lit_logits.datamodules.instructions.batches import Vocabulary
from lit_logits.datamodules.instructions.encoding import Encoded, Encoder
from lit_logits.datamodules.instructions.layouts import ChatLayout, Layout, TemplateLayout, chat_template_of
from lit_logits.datamodules.instructions.splits import Example, sample_id, shots_before
from lit_logits.datamodules.tokenization import load_tokenizer, tokenizer_id

__all__ = [
    "EncodedExample",
    "InstructionEncoder",
    "InstructionView",
    "chat_source_names",
    "load_sources",
    "source_argument",
]


class EncodedExample(NamedTuple):
    """An example in the tokens of all tokenizers.

    Attributes:
        sample_id: number of its content.
        own: in the tokens of the data module's tokenizer.
        sources: name → in the tokens of another one.
    """

    sample_id: int
    own: Encoded
    sources: dict[str, Encoded]


class InstructionView:
    """A tokenizer and how texts are laid out for it.

    Args:
        tokenizer: makes the ids.
        template: holds `{prompt}` and, after it, `{response}`.
        chat: use the tokenizer's chat template instead.
        system_prompt: text of a chat's system turn.
        max_length: tokens that a sequence may have.
        name: key in `source_tokenizers`; None is the data module's own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: str,
        *,
        chat: bool,
        system_prompt: str | None = None,
        max_length: int = 512,
        name: str | None = None,
    ) -> None:
        self.tokenizer, self.template, self.chat, self.system_prompt = tokenizer, template, chat, system_prompt
        self.max_length = max_length
        self.argument, setting = "`tokenizer`", "Set `chat_template=False`"
        if name is not None:
            self.argument, setting = source_argument(name), f"Leave {name!r} out of `chat_sources`"
        self.advice = f"{setting} to use `template`."

    @property
    def layout(self) -> Layout:
        """Makes the texts.

        Raises:
            ValueError: If a chat template is asked for and there is none.
        """
        if not self.chat:
            return TemplateLayout(self.template, self.tokenizer)
        chat_template_of(self.tokenizer, self.argument, self.advice)
        return ChatLayout(self.tokenizer, self.system_prompt, self.advice)

    @property
    def key(self) -> tuple[object, ...]:
        """All that decides the token ids of a pair; for `digest`.

        Raises:
            ValueError: If a chat template is asked for and there is none.
        """
        tokenizer = self.tokenizer.backend_tokenizer.to_str(), sorted(self.tokenizer.special_tokens_map.items())
        if not self.chat:
            return tokenizer, self.template
        return tokenizer, (chat_template_of(self.tokenizer, self.argument, self.advice), self.system_prompt)

    @property
    def pad_token_id(self) -> int:
        """The token that fills up sequences: the tokenizer's, or else its eos token."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What batches need to know of the tokenizer."""
        layout_id = int(digest(self.key, self.max_length)[:16], 16) >> 1
        return Vocabulary(self.pad_token_id, tokenizer_id(self.tokenizer), layout_id)


class InstructionEncoder:
    """Makes sample ids of examples, and token ids in each tokenizer.

    Args:
        own: the data module's tokenizer and layout.
        sources: those of the other tokenizers.
        shots: what `draw_shots` drew.
    """

    def __init__(
        self, own: InstructionView, sources: Mapping[str, InstructionView] | None = None, shots: Sequence[Example] = ()
    ) -> None:
        views = [own, *(sources or {}).values()]
        self.encoders = [Encoder(view.layout, view.tokenizer, view.argument) for view in views]
        self.names = list(sources or {})
        self.system_prompt, self.shots = own.system_prompt, shots

    def __call__(self, examples: Sequence[Example], *, all_choices: bool = False) -> list[EncodedExample]:
        """Encode each example with its response, or with each of its choices.

        Raises:
            ValueError: If there is no token in a response, or a layout cannot render an example; it names the row.
        """
        shots = [shots_before(example, self.shots) for example in examples]
        numbers = [sample_id(*pair, self.system_prompt) for pair in zip(examples, shots, strict=True)]
        encoded = [encoder(examples, shots, all_choices=all_choices) for encoder in self.encoders]
        return [
            EncodedExample(number, own, dict(zip(self.names, others, strict=True)))
            for number, own, *others in zip(numbers, *encoded, strict=True)
        ]


def chat_source_names(
    source_tokenizers: Mapping[str, str], chat_sources: Sequence[str] | None, chat_template: bool
) -> list[str]:
    """Return which of the other tokenizers use their own chat template; None: all of them, or none, as the first does.

    Raises:
        ValueError: If a name is unknown.
    """
    if chat_sources is None:
        return list(source_tokenizers) if chat_template else []
    for name in chat_sources:
        if name not in source_tokenizers:
            raise ValueError(
                f"Expected `chat_sources` to hold keys of `source_tokenizers`, {list(source_tokenizers)}, but got "
                f"{name!r}."
            )
    return list(chat_sources)


def load_sources(
    source_tokenizers: Mapping[str, str],
    chat_names: Sequence[str],
    template: str,
    system_prompt: str | None,
    max_length: int,
) -> dict[str, InstructionView]:
    """Load the other tokenizers, each with its layout.

    Raises:
        ValueError: If one cannot be loaded or is a slow one; it names the key.
    """
    return {
        name: InstructionView(
            load_tokenizer(path, source_argument(name)),
            template,
            chat=name in chat_names,
            system_prompt=system_prompt,
            max_length=max_length,
            name=name,
        )
        for name, path in source_tokenizers.items()
    }


def source_argument(name: str) -> str:
    """Return what error messages call one of the other tokenizers."""
    return f"`source_tokenizers[{name!r}]`"

"""The same pairs as several tokenizers see them: each with its own layout, all with the same shots and sample ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from lit_logits.datamodules.caching import digest
from lit_logits.datamodules.checks import as_part
from lit_logits.datamodules.instructions.batches import Vocabulary
from lit_logits.datamodules.instructions.encoding import Encoded, Encoder
from lit_logits.datamodules.instructions.layouts import (
    CHAT,
    ChatLayout,
    Layout,
    TemplateLayout,
    chat_template_of,
    check_template,
)
from lit_logits.datamodules.instructions.splits import Example, sample_id, shots_before
from lit_logits.datamodules.tokenization import load_tokenizer, tokenizer_id

__all__ = [
    "EncodedExample",
    "InstructionEncoder",
    "InstructionView",
    "SourceTokenizer",
    "complete_sources",
    "load_sources",
    "source_argument",
]


@dataclass(frozen=True)
class SourceTokenizer:
    """Another tokenizer that batches are given in, and how texts are laid out for it.

    Args:
        tokenizer: hub id, local folder or `.gguf` file.
        template: a text with `{prompt}` and, after it, `{response}`, or `"chat"`, its own chat template; None is the
            data module's `template`.
        system_prompt: a system turn before all others, in the chat template only; None is the data module's.
    """

    tokenizer: str
    template: str | None = None
    system_prompt: str | None = None


class EncodedExample(NamedTuple):
    """An example in the tokens of all tokenizers.

    Attributes:
        sample_id: number of its content.
        own: in the tokens of the data module's tokenizer.
        sources: name → in the tokens of that other tokenizer.
    """

    sample_id: int
    own: Encoded
    sources: dict[str, Encoded]


class InstructionView:
    """A tokenizer and how texts are laid out for it.

    Args:
        tokenizer: makes the ids.
        template: holds `{prompt}` and, after it, `{response}`; `"chat"` is the tokenizer's chat template.
        system_prompt: text of a chat's system turn.
        name: key in `source_tokenizers`; None is the data module's own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: str,
        *,
        system_prompt: str | None = None,
        name: str | None = None,
    ) -> None:
        self.tokenizer, self.template, self.system_prompt = tokenizer, template, system_prompt
        self.chat = template == CHAT
        self.argument = "`tokenizer`" if name is None else source_argument(name)
        self.advice = f"Set {'' if name is None else 'its '}`template` to a text with {{prompt}} and {{response}}."

    @property
    def layout(self) -> Layout:
        """Makes the texts.

        Raises:
            ValueError: If the template is `"chat"` and the tokenizer lacks one.
        """
        if not self.chat:
            return TemplateLayout(self.template, self.tokenizer)
        chat_template_of(self.tokenizer, self.argument, self.advice)
        return ChatLayout(self.tokenizer, self.system_prompt, self.advice)

    @property
    def key(self) -> tuple[object, ...]:
        """Everything that decides the token ids of a pair; for `digest`.

        Raises:
            ValueError: If the template is `"chat"` and the tokenizer lacks one.
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
        """The numbers of the tokenizer that batches hold."""
        layout_id = int(digest(self.key)[:16], 16) >> 1
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
            ValueError: If a response has no tokens, or a layout cannot render an example; it names the row.
        """
        shots = [shots_before(example, self.shots) for example in examples]
        numbers = [sample_id(*pair, self.system_prompt) for pair in zip(examples, shots, strict=True)]
        encoded = [encoder(examples, shots, all_choices=all_choices) for encoder in self.encoders]
        return [
            EncodedExample(number, own, dict(zip(self.names, others, strict=True)))
            for number, own, *others in zip(numbers, *encoded, strict=True)
        ]


def complete_sources(
    source_tokenizers: Mapping[str, str | SourceTokenizer], template: str, system_prompt: str | None
) -> dict[str, SourceTokenizer]:
    """Return the settings of each other tokenizer, with the data module's in place of what is not given.

    Args:
        source_tokenizers: name → `SourceTokenizer`, a mapping of its fields, or the tokenizer alone.
        template: the data module's.
        system_prompt: the data module's; without effect where the template is not `"chat"`.

    Raises:
        ValueError: If a template cannot be filled, or there is a system prompt without a chat template.
    """
    complete = {}
    for name, value in source_tokenizers.items():
        given = as_part(f"source_tokenizers[{name!r}]", value, SourceTokenizer)
        own = template if given.template is None else given.template
        check_template(own)
        if own != CHAT and given.system_prompt is not None:
            raise ValueError(
                f"Expected the `system_prompt` of {source_argument(name)} to be None where its `template` is not "
                f"'chat', but got {given.system_prompt!r}."
            )
        prompt = system_prompt if given.system_prompt is None else given.system_prompt
        complete[name] = SourceTokenizer(given.tokenizer, own, prompt)
    return complete


def load_sources(source_tokenizers: Mapping[str, SourceTokenizer]) -> dict[str, InstructionView]:
    """Load the other tokenizers, each with its layout.

    Args:
        source_tokenizers: name → settings, as `complete_sources` returns them.

    Raises:
        ValueError: If one cannot be loaded or is a slow one; it names the key.
    """
    return {
        name: InstructionView(
            load_tokenizer(given.tokenizer, source_argument(name)),
            str(given.template),  # given by now, see `complete_sources`
            system_prompt=given.system_prompt,
            name=name,
        )
        for name, given in source_tokenizers.items()
    }


def source_argument(name: str) -> str:
    """Return what error messages call one of the other tokenizers."""
    return f"`source_tokenizers[{name!r}]`"

"""What pages hold: blocks of code with what is said above them, commands, links and headings."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["PAGES", "ROOT", "Block", "anchors", "blocks", "commands", "links", "page_name"]

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if "generated" not in page.parts),
]
_FENCE = re.compile(r"^( *)(`{3,})(\S*).*$")
_NOT_RUN = re.compile(r"^ *<!-- not run: (.+) -->$")
_COMMAND = re.compile(
    r"^(?:\S*/)?(?:lit-logits|make|(?:python3? )(?:train\.py|-m benchmarks\.\w+|-m lit_logits))(?= |$)"
)


class Block(NamedTuple):
    """A fenced block: its first line in the page from 1, its language, its text, and why it is not run, or None."""

    line: int
    language: str
    text: str
    reason: str | None


def page_name(page: Path) -> str:
    """Return the path of a page in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found: list[Block] = []
    above, start, fence, indent, language, reason = "", 0, "", "", "", None
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        match = _FENCE.match(line)
        if fence and match and match[2] == fence and not match[3]:
            inside = [inner.removeprefix(indent) for inner in lines[start : number - 1]]
            found.append(Block(start + 1, language, "\n".join(inside), reason))
            fence = ""
        elif not fence and match:
            told = _NOT_RUN.match(above)
            start, indent, fence, language = number, match[1], match[2], match[3]
            reason = told[1] if told else None
        above = line or above
    assert not fence, f"Expected the block of line {start} to end."
    return found


def commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield line and words of the commands of a page that are ours, from blocks for a shell and from indented ones."""
    for block in blocks(text):
        if block.language in ("", "bash", "sh", "console", "shell"):
            yield from _commands_of(block.text, block.line)
    outside = _without_fences(text).splitlines()
    indented = [line[4:] if line.startswith("    ") and not line.startswith("    make") else "" for line in outside]
    yield from _commands_of("\n".join(indented), 1)


def _commands_of(text: str, first: int) -> Iterator[tuple[int, list[str]]]:
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        start, line = number, lines[number].strip().removeprefix("$ ")
        while line.endswith("\\") and number + 1 < len(lines):
            number += 1
            line = f"{line[:-1]} {lines[number].strip()}"
        number += 1
        if _COMMAND.match(re.sub(r"^(\w+=\S+ )+", "", line)):
            own = re.split(r" (?:>|\||&&|2>|&$)|; ", re.sub(r"^(\w+=\S+ )+", "", line))[0]
            words = shlex.split(re.sub(r"\$\{?\w+\}?", "1", own), comments=True)  # a variable of the shell
            yield first + start, words


def links(text: str) -> Iterator[tuple[str, str]]:
    """Yield path and anchor of the links of a page that lead to files, or to a heading of the page itself."""
    prose = re.sub(r"`[^`\n]*`", "", _without_fences(text))
    for target in re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", prose):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(text: str) -> set[str]:
    """Return the names that links give to the headings of a page, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", _without_fences(text), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def _without_fences(text: str) -> str:
    """Return a page with the lines of its blocks left empty."""
    lines = text.splitlines()
    for block in blocks(text):
        last = block.line - 1 + len(block.text.split("\n"))
        lines[block.line - 2 : last + 1] = [""] * (last + 3 - block.line)
    return "\n".join(lines)

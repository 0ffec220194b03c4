"""Docstrings with mathematics in plain text, such as log |K + D|, K*ₓ or (*batch, n, C), as RST that reads the same.

RST takes |K + D| for a substitution, *batch for emphasis that never ends and w_ for a link. This package's docstrings
mean none of these; literals, roles, directives, examples, tables and *emphasis* are left as they are.
"""

import re
from collections.abc import Iterable

_ROLE_OR_LITERAL = r"``.+?``|(?::[\w:+-]+:)?`[^`]+`_{0,2}"
# Where RST lets emphasis end: not before 2*|x|'s bar, although the backslash that is put there would let it.
_END = r"(?=[\s'\")\]}>/:.,;!?-]|$)"
_EMPHASIS = rf"(?<![\w*\\])(?P<stars>\*{{1,2}})(?=[^\s*])[^*,()`|]*[^\s*,()`|\\](?P=stars){_END}"
_LEFT_ALONE = re.compile("|".join((_ROLE_OR_LITERAL, _EMPHASIS, r"\\.")), re.DOTALL)
_MARKUP = re.compile(r"(?<!^)[|]|^[|](?!\s)|(?<!^)[*]|^[*](?!\s)|(?<=[^\W_])_(?=_*(?!\w))", re.MULTILINE)
_TABLE_OR_LINE_BLOCK = re.compile(r"\s*(?:\|\s|\+[-=]|={2,}\s)")


def escaped(lines: Iterable[str]) -> list[str]:
    """The lines of a docstring, with a backslash before what RST would misread."""
    result: list[str] = []
    text: list[str] = []
    for line, is_text in _classified(lines):
        if is_text:
            text.append(line)
        else:
            result += [*_escaped_text(text), line]
            text = []
    return result + _escaped_text(text)


def _escaped_text(lines: list[str]) -> list[str]:
    """Lines that belong together, since literals and emphasis go on over their ends."""
    indents = [line[: len(line) - len(line.lstrip())] for line in lines]
    text, pieces, end = "\n".join(line.lstrip() for line in lines), [], 0
    for kept in _LEFT_ALONE.finditer(text):
        pieces += [_MARKUP.sub(r"\\\g<0>", text[end : kept.start()]), kept.group()]
        end = kept.end()
    escaped_text = "".join([*pieces, _MARKUP.sub(r"\\\g<0>", text[end:])])
    return [indent + line for indent, line in zip(indents, escaped_text.split("\n"), strict=False)]


def _classified(lines: Iterable[str]) -> Iterable[tuple[str, bool]]:
    """Each line, and whether it is text: not blank, no table, and outside of blocks and examples."""
    in_example = False
    block_indent: int | None = None
    for line in lines:
        bare = line.strip()
        indent = len(line) - len(line.lstrip())
        in_example = bare != "" and (in_example or bare.startswith(">>>"))
        if bare and block_indent is not None and indent <= block_indent:
            block_indent = None
        in_block = block_indent is not None or bare.startswith(".. ")
        yield line, bool(bare) and not (in_example or in_block or _TABLE_OR_LINE_BLOCK.match(line))
        if bare and block_indent is None and (bare.startswith(".. ") or bare.endswith("::")):
            block_indent = indent

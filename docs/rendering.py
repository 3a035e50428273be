"""How the site renders what Markdown does not know: formulas as MathML, and the roles and literal blocks of docstrings."""

import html
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import griffe
from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ROLE = re.compile(r":(?:func|class|meth|attr|mod):`([\w.]+)`")
LITERAL_BLOCK = re.compile(r"::\n\n((?: {4}.*\n?|\n)+)")


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw themselves: no script, nothing to fetch."""
    return FORMULA.sub(_as_mathml, content)


def _as_mathml(formula: re.Match[str]) -> str:
    return convert(html.unescape(formula[2]), display="block" if formula[1] == "div" else "inline")


class Docstrings(griffe.Extension):
    """Docstrings as Markdown: roles become links, literal blocks become Python code."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for obj in _objects(pkg):
            if obj.docstring:
                text = LITERAL_BLOCK.sub(_as_fence, obj.docstring.value)
                obj.docstring.value = ROLE.sub(lambda role, obj=obj: _as_link(obj, role[1]), text)


def _objects(obj: griffe.Object) -> Iterator[griffe.Object]:
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _as_fence(block: re.Match[str]) -> str:
    return f":\n\n```python\n{textwrap.dedent(block[1]).strip()}\n```\n\n"


def _as_link(obj: griffe.Object, name: str) -> str:
    """A link, or the bare name where it is not ours, as a method inherited from torch."""
    target = name if name.startswith("fm_fast.") else _full_name(obj, name)
    text = f"`{name.rsplit('.', 1)[-1]}`"
    return text if target is None else f"[{text}][{target}]"


def _full_name(obj: griffe.Object, name: str) -> str | None:
    """The path of a name as the docstring's class or module sees it."""
    for scope in (obj, obj.parent, obj.module):
        member = scope.members.get(name) if scope is not None and (scope.is_class or scope.is_module) else None
        if member is not None:
            return member.target_path if member.is_alias else member.path
    return None

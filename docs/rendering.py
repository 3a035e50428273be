"""How the site renders what Markdown does not know: formulas as MathML, and the roles and literal blocks of docstrings."""

import html
import re
import textwrap
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

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = LITERAL_BLOCK.sub(_as_fence, obj.docstring.value)
            obj.docstring.value = ROLE.sub(lambda role: _as_link(obj, role[1]), text)


def _as_fence(block: re.Match[str]) -> str:
    return f":\n\n```python\n{textwrap.dedent(block[1]).strip()}\n```\n\n"


def _as_link(obj: griffe.Object, name: str) -> str:
    return f"[`{name.rsplit('.', 1)[-1]}`][{name if name.startswith('fm_fast.') else _full_name(obj, name)}]"


def _full_name(obj: griffe.Object, name: str) -> str:
    """The path of a name as the docstring's module or class sees it."""
    if obj.is_class and name in obj.members:
        return f"{obj.path}.{name}"
    return f"{obj.module.path}.{name}"

"""The parser of a command, whose errors name the option that was probably meant."""

import argparse
import difflib
import itertools
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Options have no abbreviations. An error is two lines, since the usage of `train` fills a screen."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """The arguments; those of no meaning are an error here, in the command that knows what there is instead."""
        if self._subparsers is None:  # before the value of a mistyped option is taken for something else
            self._refuse([word for word in itertools.takewhile(lambda word: word != "--", args or ()) if self._is_unknown(word)])
        options, unknown = super().parse_known_args(args, namespace)
        self._refuse(unknown)
        return options, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\ntry {self.prog} --help\n")

    def _is_unknown(self, word: str) -> bool:
        return word.startswith("--") and word.partition("=")[0] not in self._option_string_actions

    def _refuse(self, unknown: Sequence[str]) -> None:
        wrong = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        near = [name for word in wrong for name in difflib.get_close_matches(word, self._option_string_actions, n=1)]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f" (did you mean {' and '.join(near)}?)" if near else ""))

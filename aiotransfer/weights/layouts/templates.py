"""Templates of names: `layers.{i}.wq` matches `layers.7.wq` with i = "7". Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from aiotransfer.quote import quote

_HOLE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Template:
    """A name with holes `{x}`, each for a part of a name without dots. Raises `ValueError` for braces that
    are no hole."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or not text:
            raise TypeError(f"a template of names must be a text, not {quote(text)}")
        self.text = text
        self.holes = tuple(dict.fromkeys(_HOLE.findall(text)))
        plain = _HOLE.sub("", text)
        if "{" in plain or "}" in plain:
            raise ValueError(f"{quote(text)}: braces in a template hold one word, as in {{i}}")
        pattern, at, seen = [], 0, set()
        for hole in _HOLE.finditer(text):
            pattern.append(re.escape(text[at : hole.start()]))
            name = hole.group(1)
            pattern.append(f"(?P={name})" if name in seen else f"(?P<{name}>[^.]+)")
            seen.add(name)
            at = hole.end()
        pattern.append(re.escape(text[at:]))
        self._pattern = re.compile("".join(pattern))

    def match(self, name: str) -> dict[str, str] | None:
        """What stands in the holes, or None if `name` is not of this form."""
        found = self._pattern.fullmatch(name)
        return None if found is None else found.groupdict()

    def fill(self, values: Mapping[str, str]) -> str:
        """The name with `values` in its holes. Raises `ValueError` where one is missing."""
        missing = [hole for hole in self.holes if hole not in values]
        if missing:
            raise ValueError(f"{self.text!r}: nothing says what {{{missing[0]}}} is")
        return _HOLE.sub(lambda hole: values[hole.group(1)], self.text)

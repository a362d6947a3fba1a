"""The folders of the sources in their own words, and their files.

    python -m tests.docs.folders                        writes the folders into docs/design/architecture.md
    python -m tests.docs.folders aiotransfer/engine     prints the files of a folder, each with its first sentence

A folder of Python says in its `__init__.py` what it is, one of C in its `decls.h` (the lane in its
`lane.h`).
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "design" / "architecture.md"
BEGIN, END = "<!-- made by python -m tests.docs.folders -->", "<!-- end -->"


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence, on one line."""
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    found = re.match(r"(.+?\.)(?= [A-Z]|$)", paragraph)
    return found[1] if found else paragraph


def says(file: Path) -> str:
    """The first sentence of a file of Python or C."""
    if file.suffix == ".py":
        return first_sentence(ast.get_docstring(ast.parse(file.read_text())) or "")
    comment = re.match(r"/\*(.*?)\*/", file.read_text(), re.DOTALL)
    text = "" if comment is None else re.sub(r"^ ?\*? ?", "", comment[1], flags=re.MULTILINE)
    return first_sentence(text)


def folders() -> dict[str, str]:
    """Every folder of sources with its sentence, C first."""
    native = [file.with_name("lane.h") if file.parent.name == "lane" else file for file in sorted(ROOT.glob("ffi/*/decls.h"))]
    speakers = [*native, *sorted((ROOT / "aiotransfer").rglob("*/__init__.py"))]
    return {str(file.parent.relative_to(ROOT)): says(file) for file in speakers}


def table() -> str:
    """The list as the page has it."""
    return "\n".join(f"- `{folder}/`: {sentence}" for folder, sentence in folders().items())


def written() -> str:
    """What the page has now."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    if sys.argv[1:]:
        for name in sys.argv[1:]:
            for file in sorted((ROOT / name).iterdir()):
                if file.suffix in (".py", ".c", ".h"):
                    print(f"{file.relative_to(ROOT)}: {says(file)}")
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()

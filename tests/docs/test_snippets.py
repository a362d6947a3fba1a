"""What the documentation shows is run as it stands."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import aiotransfer
from aiotransfer.config import Config
from tests.docs.complaints import complaints

ROOT = Path(__file__).parent.parent.parent
SNIPPETS = ROOT / "docs" / "snippets"
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=100, check=False)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_the_five_minute_example_of_the_readme(tmp_path: Path) -> None:
    receiver, sender = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[:2]
    port = str(free_port())
    for name, text in (("receiver.py", receiver), ("sender.py", sender)):
        (tmp_path / name).write_text(text.replace("7070", port))
    owner = subprocess.Popen([sys.executable, str(tmp_path / "receiver.py")], stdout=subprocess.PIPE, text=True)
    try:
        done = python(str(tmp_path / "sender.py"))
        assert (done.returncode, complaints(done.stderr)) == (0, "")
        assert owner.communicate(timeout=30)[0] == "[0 1 2 3]\n"
        assert owner.returncode == 0
    finally:
        owner.kill()
        owner.wait()


def test_the_script() -> None:
    done = python("-X", "dev", str(SNIPPETS / "script.py"))
    assert (done.returncode, done.stdout, complaints(done.stderr)) == (0, "shm: 4096 bytes have landed\n", "")


def test_the_test() -> None:
    options = ("-q", "-p", "no:cacheprovider", "-W", "error", "-o", "asyncio_mode=strict")
    done = python("-m", "pytest", *options, str(SNIPPETS / "example_test.py"))
    assert done.returncode == 0, done.stdout


def test_the_notebook_cell(tmp_path: Path) -> None:
    pytest.importorskip("ipykernel", reason="the test extra brings it")
    code = (
        "import sys, nbformat\nfrom nbclient import NotebookClient\n"
        "book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(open(sys.argv[1]).read())])\n"
        "NotebookClient(book, timeout=60, kernel_name='python3').execute()\n"
        "print([o for cell in book.cells for o in cell.outputs])\n"
    )
    done = python("-c", code, str(SNIPPETS / "notebook_cell.py"))
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_the_web_application() -> None:
    pytest.importorskip("fastapi", reason="the test extra brings it")
    code = (
        "import asyncio, sys\nsys.path.insert(0, sys.argv[1])\nfrom app import app\nimport httpx\n"
        "async def main():\n"
        "    async with app.router.lifespan_context(app):\n"
        "        transport = httpx.ASGITransport(app=app)\n"
        "        async with httpx.AsyncClient(transport=transport, base_url='http://x') as client:\n"
        "            print((await client.get('/address')).json())\n"
        "asyncio.run(main())\n"
    )
    done = python("-c", code, str(SNIPPETS))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("127.0.0.1:")


@pytest.mark.parametrize("name", ["script.py", "notebook_cell.py", "example_test.py", "app.py"])
def test_each_snippet_is_shown_in_the_guide(name: str) -> None:
    assert (SNIPPETS / name).read_text().strip() in (ROOT / "docs" / "guide" / "snippets.md").read_text()


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_public_name_and_setting_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    for name in [*aiotransfer.__all__, *Config.__dataclass_fields__]:
        assert f"`{name}`" in text, name



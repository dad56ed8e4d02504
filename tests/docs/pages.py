"""What the pages of documentation name: code blocks, commands, paths, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/ARCHITECTURE.md",
    "docs/CLOSED_SETS.md",
    "docs/GPU.md",
    "docs/GENERATION.md",
    "docs/MODALITIES.md",
    "docs/PATCH.md",
    "docs/SERVING.md",
    "benchmarks/results/README.md",
    *sorted(
        str(page.relative_to(ROOT)) for half in ("csrc", "ofakern") for page in ROOT.glob(f"{half}/ops/*/README.md")
    ),
)

_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_COMMAND = re.compile(r"(?:^    |`)(ofakern [a-z]+(?: [^`\n#]+)?)", re.MULTILINE)
_MAKE = re.compile(r"(?:^    |`)make ([a-z-]+)", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#:\s]+)\)")
_TOPS = ("benchmarks", "csrc", "docs", "examples", "ofakern", "python_bindings", "tests")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def python_blocks(page: str) -> list[str]:
    return _BLOCK.findall(text_of(page))


def commands(page: str) -> list[list[str]]:
    """Every `ofakern ...` as the words after `ofakern`, each once."""
    return [shlex.split(found)[1:] for found in dict.fromkeys(map(str.rstrip, _COMMAND.findall(text_of(page))))]


def make_targets(page: str) -> set[str]:
    return set(_MAKE.findall(text_of(page)))


def links(page: str) -> list[str]:
    return _LINK.findall(text_of(page))


def paths(page: str) -> list[str]:
    """Whatever stands in backticks and looks like a file or folder of the repository."""
    return [one for one in _CODE.findall(text_of(page)) if re.fullmatch(rf"(?:{'|'.join(_TOPS)})/[\w./<>-]*", one)]

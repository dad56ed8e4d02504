"""Nothing that the pages name is missing: files, links, make targets, commands and their options."""

from __future__ import annotations

import re

import pytest
from pages import PAGES, ROOT, commands, links, make_targets, paths

from ofakern.cli import main as cli


def exists(path: str) -> bool:
    """`<op>` and `<name>` stand for any room."""
    pattern = re.sub(r"<\w+>", "*", path).rstrip("/")
    return any(True for _ in ROOT.glob(pattern))


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page: str) -> None:
    assert not [path for path in paths(page) if not exists(path)]


def test_the_guides_name_real_paths() -> None:
    assert len(set(paths("CONTRIBUTING.md"))) > 30
    assert not exists("ofakern/modality/<name>/missing.py")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    assert not [link for link in links(page) if not (ROOT / page).parent.joinpath(link).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_exists(page: str) -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert make_targets(page) <= known


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(page):
        words = [re.sub(r"<op>", "attention", word) for word in words]
        if "--help" in words:
            words = words[: words.index("--help")]
            assert words[0] in cli.COMMANDS
            continue
        if len(words) > 1 or words[0] == "info":
            assert cli.build_parser(words[0]).parse_args(words).command == words[0]
        else:
            assert words[0] in cli.COMMANDS


def test_readme_names_every_command() -> None:
    named = {words[0] for words in commands("README.md")}
    assert named == set(cli.COMMANDS)

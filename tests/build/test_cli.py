"""The `ofakern` command: help with an example everywhere, and a user's mistake is one clear message and exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ofakern
from ofakern.cli import info
from ofakern.cli import main as cli
from ofakern.errors import OfakernError, OfakernValueError

BIN = Path(sys.executable).parent


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["ofakern"] == ofakern.__version__
    assert found["versions"]["torch"]
    assert found["cpu"]["isa"] in found["cpu"]["compiled"]
    assert found["cpu"]["threads"] >= 1
    assert found["gpu"]["devices"] or found["gpu"]["reason"]
    attention = found["ops"]["attention"]
    assert attention["reference"] is None
    assert attention["cpu"] is None
    assert set(attention) == {"reference", "cpu", "cuda", "triton", "flash"}


def test_info_says_available_or_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(maxsplit=1) for line in lines[lines.index("attention") + 1 :] if line.startswith("  ")]
    assert {name for name, _ in rows} == {"reference", "cpu", "cuda", "triton", "flash"}
    assert dict(rows)["reference"] == "available"


def test_a_bad_isa_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {**os.environ, "OFAKERN_CPU_ISA": "mmx"}
    result = subprocess.run(
        [sys.executable, "-m", "ofakern", "info", "--json"], env=env, capture_output=True, text=True, check=True
    )
    assert "must be one of scalar" in json.loads(result.stdout)["cpu"]["reason"]


def test_a_build_without_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ofakern._cpu", None)
    monkeypatch.setitem(sys.modules, "ofakern._cuda", None)
    found = info.collect()
    assert found["cpu"]["isa"] is None
    assert found["cpu"]["reason"]
    assert found["gpu"]["reason"] == "ofakern._cuda is not built (no CUDA toolkit at build time)"
    assert "ofakern._cuda is not built" in info.render(found)


def test_the_console_script() -> None:
    result = subprocess.run([BIN / "ofakern", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"ofakern {ofakern.__version__}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"ofakern {command}" in capsys.readouterr().out.split("example", 1)[1]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in cli.COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["dance"], ["info", "--yaml"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: ofakern" in capsys.readouterr().err


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(info, "run", run)


def test_a_users_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, OfakernValueError("x must be y, got z"))
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "ofakern info: x must be y, got z\n"


def test_a_missing_file_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, FileNotFoundError(2, "No such file or directory", "model.safetensors"))
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "ofakern info: [Errno 2] No such file or directory: 'model.safetensors'\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, OfakernError("x"))
    monkeypatch.setenv("OFAKERN_DEBUG", "1")
    with pytest.raises(OfakernError):
        cli.main(["info"])


def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyError("x"))
    with pytest.raises(KeyError):
        cli.main(["info"])


def test_a_reader_that_has_gone_is_no_error() -> None:
    pipe = f"{sys.executable} -m ofakern info --json | head -n 1 >/dev/null; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stderr == ""

"""Every command in the README exists and takes the options that it is shown with; its recipes and overrides are valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from x2l.cli import app
from x2l.config import load_chain_config, load_train_config

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted({line.split(" #")[0].strip() for line in re.findall(r"^    (x2l .*)$", README, re.M)})


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str) -> None:
    words = shlex.split(command)[1:]
    node = get_command(app)
    context = node.make_context("x2l", [], resilient_parsing=True)
    while hasattr(node, "commands"):
        assert words, command
        assert words[0] in node.commands, f"{command}: no such command"
        node = node.commands[words.pop(0)]
    if node.name == "train" and load_chain_config(words[0], words[1:]) is None:
        load_train_config(words[0], words[1:])
    node.make_context(node.name, list(words), parent=context)

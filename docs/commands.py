"""Writes docs/reference/commands.md from the parser of the `etmamba` command.

python docs/commands.py
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from etmamba_timm.cli import parser
from etmamba_timm.training.recipe import describe_settings

PAGE = Path(__file__).parent / "reference" / "commands.md"
HEAD = """# Commands

`etmamba --version` shows the versions of this package and of PyTorch, `etmamba COMMAND --help` what is on this page.

The exit status is 0, or 1 if some videos failed, 2 if the command failed, 130 if it was interrupted. MODEL is a
model's name (`etmamba_ti`), a name with a tag (`videomamba_m.k400_f8`), `hf-hub:ORG/NAME` or `local-dir:FOLDER`.

<!-- Written by docs/commands.py. -->
"""
SETTINGS = "Settings for `--set`, as in the recipe `finetune`; `auto`: the model or the data decide.\n"


def commands(found: argparse.ArgumentParser, about: str = "") -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """All parsers that run something, with one line on each, in the order of `--help`."""
    below = [action for action in found._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield found, about
    for action in below:
        helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, child in action.choices.items():
            yield from commands(child, helps.get(name, ""))


def argument(action: argparse.Action) -> str:
    """How an argument is written: its option strings and what follows them."""
    name = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    value = "" if action.nargs == 0 else "{" + ",".join(map(str, action.choices)) + "}" if action.choices else str(name)
    value += {"*": " ...", "+": " ...", "?": ""}.get(str(action.nargs), "")
    if not action.option_strings:
        return f"`{value}`"
    return f"`{', '.join(action.option_strings)}{' ' + value if value else ''}`" + " (required)" * action.required


def page() -> str:
    """The page's text."""
    parts = [HEAD]
    for command, about in commands(parser()):
        actions = [action for action in command._actions if not isinstance(action, argparse._HelpAction)]
        expand = command._get_formatter()._expand_help
        rows = [f"| {argument(action)} | {expand(action).replace('|', chr(92) + '|')} |" for action in actions]
        text = about[:1].upper() + about[1:].rstrip(".") + "."
        parts.append("\n".join([f"\n## {command.prog}\n", f"{text}\n", "| argument | |", "|---|---|", *rows, ""]))
        if command.prog.endswith("train"):
            rows = [f"| `{names}` | {text} |" for names, text in describe_settings()]
            parts.append("\n".join(["", SETTINGS, "| setting | |", "|---|---|", *rows, ""]))
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

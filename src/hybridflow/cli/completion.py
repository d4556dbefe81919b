"""The script that completes commands in a shell: `hybridflow completion bash`. All words are in it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from hybridflow.config.keys import keys_of
from hybridflow.config.kinds.registry import KINDS

SHELLS = ("bash", "zsh", "fish")


def completion(shell: str, commands: Mapping[str, argparse.ArgumentParser]) -> str:
    """Returns the text of a script for the shell to source.

    Args:
        shell: one of `SHELLS`.
        commands: the arguments of every command, by its name.
    """
    words = {name: _words(name, parser) for name, parser in commands.items()}
    if shell == "fish":
        lines = [f"complete -c hybridflow -n __fish_use_subcommand -f -a '{' '.join(words)}'"]
        lines += [
            f"complete -c hybridflow -n '__fish_seen_subcommand_from {name}' -a '{' '.join(found)}'"
            for name, found in words.items()
        ]
        return "\n".join(lines) + "\n"
    cases = "\n".join(f"    {name}) words='{' '.join(found)}' ;;" for name, found in words.items())
    head = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return head + _BASH.replace("COMMANDS", " ".join(words)).replace("CASES", cases)


_BASH = """\
_hybridflow() {
  local words=''
  case "${COMP_WORDS[1]}" in
CASES
  esac
  [ "$COMP_CWORD" = 1 ] && words='COMMANDS'
  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
  case "${COMPREPLY[*]}" in *=) compopt -o nospace 2> /dev/null ;; esac
}
complete -o default -F _hybridflow hybridflow
"""


def _words(name: str, parser: argparse.ArgumentParser) -> list[str]:
    """Returns options, choices, and the keys of configurations where the command takes overrides."""
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    choices = [str(choice) for action in parser._actions for choice in action.choices or ()]
    found = [*options, *choices]
    if any(action.dest == "overrides" for action in parser._actions):
        kinds = [KINDS[name]] if name in KINDS else [*KINDS.values()]
        found += sorted({f"{key.name}=" for kind in kinds for key in keys_of(kind.config) if key.type != "section"})
    return found

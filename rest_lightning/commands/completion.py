"""Print a script that lets the shell complete commands, options and files.

bash: rest completion bash > ~/.local/share/bash-completion/completions/rest
zsh: rest completion zsh > a folder of $fpath, as _rest
fish: rest completion fish > ~/.config/fish/completions/rest.fish
Needs the extra `completion`; rest doctor says how to install it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from rest_lightning.extras import missing

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("shell", choices=SHELLS, help="bash, zsh or fish")


def run(
    args: argparse.Namespace,
    commands: Mapping[str, tuple[str, Callable[[argparse.ArgumentParser], None]]],
    stages: Mapping[str, str],
) -> int:
    """Print the script.

    Args:
        args: the shell.
        commands: name -> one line about it, and what adds its arguments to a parser.
        stages: name -> one line, of the commands of LightningCLI.
    """
    try:
        import shtab
    except ModuleNotFoundError:
        raise missing("shtab", "completion", "rest completion") from None
    from rest_lightning.options import CommandParser

    parser = argparse.ArgumentParser(prog="rest")
    parser.add_argument("--version", action="store_true", help="print the version")
    subparsers = parser.add_subparsers()
    for name, (line, add) in commands.items():
        full = CommandParser(name, None)
        add(full)
        command = subparsers.add_parser(name, help=line)
        for action in full._actions:
            _copy(action, command)
        if "--config" not in command._option_string_actions:  # a command may have its own
            _mark_file(command.add_argument("--config", help="options from a YAML file"))
    for name, line in stages.items():
        stage = subparsers.add_parser(name, help=line)
        for option, text in _stage_options().items():
            action = stage.add_argument(option, help=text)
            if option in ("--config", "--ckpt_path", "--data.data_dir"):
                _mark_file(action)
    print(shtab.complete(parser, args.shell))
    return 0


def _stage_options() -> dict[str, str]:
    """Options of a stage that do not depend on its class, without loading any of them."""
    import inspect

    from rest_lightning.torchvision_compat import ensure_torchvision

    ensure_torchvision()
    from lightning.pytorch import Trainer

    from rest_lightning.data.module import TalkingHeadDataModule

    found = {
        "--config": "shipped name, such as embedded/student, or a path; repeatable",
        "--ckpt_path": "checkpoint to go on from",
        "--print_config": "print the configuration and exit",
        "--model": "class of the stage",
        "--seed_everything": "seed of all random numbers",
        "--final_checkpoint": "after fit, validate and write final.ckpt",
    }
    for group, cls in (("trainer", Trainer), ("data", TalkingHeadDataModule)):
        for name in inspect.signature(cls).parameters:
            found[f"--{group}.{name}"] = f"{name} of {cls.__name__}"
    return found


def _copy(action: argparse.Action, parser: argparse.ArgumentParser) -> None:
    """Adds an option of another kind of parser as one that shtab knows."""
    if action.dest == "help":
        return
    names = action.option_strings or [action.dest]
    if isinstance(action, argparse._StoreTrueAction):
        parser.add_argument(*names, action="store_true", help=action.help)
        return
    nargs = action.nargs if isinstance(action.nargs, str) else None
    copy = parser.add_argument(*names, nargs=nargs, choices=action.choices, help=action.help)
    is_path = Path in (action.type, getattr(action, "_typehint", None))
    if is_path or (not action.option_strings and action.choices is None):
        _mark_file(copy)


def _mark_file(action: argparse.Action) -> None:
    """Lets the shell offer files as the value of an option."""
    import shtab

    action.complete = shtab.FILE  # type: ignore[attr-defined]  # read by shtab

"""``rest``: one function, :func:`main`, for the shell, for tests and for notebooks."""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
import os
import signal
import sys
from collections.abc import Callable

from rest_lightning.constants import VERSION
from rest_lightning.errors import Terminated, UserError

# Modules are imported when their command is called: `rest --help` and a wrong file name do not wait
# for torch. A module of `rest_lightning.commands` has `add_arguments(parser)` and `run(args) ->
# exit code`. Where it has several commands, the others are named in SECOND_COMMANDS: "demo" is
# `add_demo_arguments` and `run_demo` of talk.py.
COMMANDS = {
    "talk": "a portrait and speech become a talking video",
    "demo": "the bundled portrait and speech become outputs/demo.mp4, with a report",
    "verify": "what a video says about its origin, and whether its signature holds",
    "serve": "a page in the browser: speak, and the portrait speaks",
    "app": "a page with upload, for a portrait and a sound file (Gradio)",
    "converse": "a conversation in the browser: it listens, answers, and can be interrupted",
    "synthesize": "render synthetic talkers to train on",
    "prepare": "raw videos become prepared clips, with a reason for each that does not",
    "animate": "photographs and a speaking driver become training talkers",
    "encode": "latents of all clips, once, for the stages that need them",
    "encode-prompt": "the text embedding of the fixed prompt, once, for models that read text",
    "export": "a checkpoint becomes a model folder for talk --model",
    "score": "any folder of videos becomes a result row",
    "leaderboard": "result rows become Markdown, a self-contained HTML page and JSON",
    "ablate": "train and score a base and its ablations within the same budget",
    "train-embedded": "all stages of the embedded model within a time budget",
}
SECOND_COMMANDS = {
    "demo": ("talk", "demo"),
    "encode-prompt": ("encode", "prompt"),
    "synthesize": ("prepare", "synthesize"),
}
STAGE_COMMANDS = {
    "fit": "train a stage: --config FILE, any number of times, later ones win",
    "validate": "run the validation of a stage",
    "test": "run the test of a stage",
    "predict": "run the prediction of a stage",
}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(args: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 done, 2 a user's mistake (one line on stderr),
    130 interrupted by Ctrl-C, 143 by SIGTERM and 129 by SIGHUP where a command keeps what it has.

    Args:
        args: the command and its arguments; None takes those of the process.
    """
    words = list(sys.argv[1:] if args is None else args)
    for stream in (sys.stdout, sys.stderr):
        # A terminal of another encoding shows "?" in place of a character that it does not have.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return _run(words)
    except UserError as error:
        _say(f"error: {' '.join(str(error).split())}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt as interrupt:
        _say(str(interrupt) or "interrupted: nothing was written")
        cause = interrupt if isinstance(interrupt, Terminated) else interrupt.__cause__
        return 128 + cause.number if isinstance(cause, Terminated) else EXIT_INTERRUPTED
    except BrokenPipeError:  # `rest ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except SystemExit as exit_request:
        # argparse after --help, jsonargparse after a mistake that it has told already
        code = exit_request.code
        if isinstance(code, str):
            _say(code)
        return code if isinstance(code, int) else int(code is not None)


def _run(words: list[str]) -> int:
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version", "version"):
        print(f"rest_lightning {VERSION}")
        return 0
    if name in STAGE_COMMANDS:
        from rest_lightning.lightning_cli import run

        run(words)
        return 0
    name = name.replace("_", "-")
    if name not in COMMANDS:
        known = ", ".join([*COMMANDS, *STAGE_COMMANDS])
        raise UserError(f"expected a command ({known}), got {words[0]!r}: see rest --help")
    home, variant = SECOND_COMMANDS.get(name, (name.replace("-", "_"), ""))
    module = importlib.import_module(f"rest_lightning.commands.{home}")
    add_arguments = getattr(module, f"add_{variant}_arguments" if variant else "add_arguments")
    command: Callable[[argparse.Namespace], int] = getattr(
        module, f"run_{variant}" if variant else "run"
    )
    from rest_lightning.options import CommandParser

    parser = CommandParser(name, inspect.getdoc(command if variant else module))
    add_arguments(parser)
    return command(parser.parse(words[1:]))


def usage() -> str:
    """What ``rest --help`` prints."""
    rows = [f"  {name:<16}{text}" for name, text in (COMMANDS | STAGE_COMMANDS).items()]
    return "\n".join(
        [
            "usage: rest COMMAND [arguments]     rest COMMAND --help tells more",
            "",
            *rows,
            "",
            "example: rest talk portrait.png speech.wav -o out.mp4",
        ]
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

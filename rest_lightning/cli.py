"""``rest``: one function, :func:`main`, for the shell, for tests and for notebooks."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress

from rest_lightning.constants import VERSION
from rest_lightning.errors import Terminated, UserError, ends_as_by_ctrl_c
from rest_lightning.processes import end_with_parent
from rest_lightning.terminal import accept_encoding, take_streams

# Modules are imported when their command is called: `rest --help` and a wrong file name do not wait
# for torch. A module of `rest_lightning.commands` has `add_arguments(parser)` and `run(args) ->
# exit code`; NEEDS has the extra without which it cannot run. Where it has several commands, the
# others are named in SECOND_COMMANDS: "demo" is `add_demo_arguments` and `run_demo` of talk.py.
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
    "bench": "how fast this machine streams, and how many streams at once",
    "doctor": "what this installation can do, and which extra is missing for what",
    "completion": "a script that lets the shell complete commands and options",
}
SECOND_COMMANDS = {
    "demo": ("talk", "demo"),
    "encode-prompt": ("encode", "prompt"),
    "synthesize": ("prepare", "synthesize"),
}
NEEDS = {"animate": "prepare", "converse": "converse", "serve": "serve", "synthesize": "synthetic"}
STAGE_COMMANDS = {
    "fit": "train a stage: --config FILE, any number of times, later ones win",
    "validate": "run the validation of a stage",
    "test": "run the test of a stage",
    "predict": "run the prediction of a stage",
}
Command = Callable[..., int]
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
_TRUST_OPTION = "--trust-checkpoint"


def main(args: list[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0 done, 2 a user's mistake, a full disk or a file
    that is refused (one line on stderr), 130 interrupted by Ctrl-C, 143 by SIGTERM and 129 by
    SIGHUP.

    Args:
        args: the command and its arguments; None takes those of the process.
    """
    if args is None:
        take_streams()
        end_with_parent()
    else:
        accept_encoding()
    try:
        return _main(list(sys.argv[1:] if args is None else args))
    finally:
        if (files := sys.modules.get("rest_lightning.media.files")) is not None:
            files.remove_own_leftovers()


def _main(words: list[str]) -> int:
    # SLURM's signals are Lightning's: it queues the job again.
    by_slurm = words[:1] == ["fit"] and "SLURM_JOB_ID" in os.environ
    try:
        with nullcontext() if by_slurm else ends_as_by_ctrl_c():
            code = _run(words)
            sys.stdout.flush()  # a full disk may tell only now
        return code
    except UserError as error:
        _say(f"error: {' '.join(str(error).split())}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt as interrupt:
        _say(str(interrupt) or "interrupted: nothing was written")
        return _interrupted(interrupt)
    except BrokenPipeError:  # `rest ... | head` has seen enough
        _drop_stdout()
        return 128 + signal.SIGPIPE
    except SystemExit as exit_request:
        # argparse after --help, jsonargparse after a mistake that it has told already
        return _exit_code(exit_request)
    except ModuleNotFoundError as error:
        from rest_lightning.extras import extra_of, missing

        if (extra := extra_of(error.name)) is None:
            raise
        what = " ".join(["rest", *words[:1]])
        _say(f"error: {missing(str(error.name), extra, what)}")
        return EXIT_USER_ERROR
    except OSError as error:
        from rest_lightning.media.files import explain_error

        if (line := explain_error(error)) is None:
            raise
        _say(f"error: {line}")
        _drop_stdout()
        return EXIT_USER_ERROR


def _interrupted(interrupt: BaseException) -> int:
    cause = interrupt if isinstance(interrupt, Terminated) else interrupt.__cause__
    return 128 + cause.number if isinstance(cause, Terminated) else EXIT_INTERRUPTED


def _exit_code(exit_request: SystemExit) -> int:
    # Lightning ends a run that was interrupted with 1, or with an exception of its own.
    if isinstance(exit_request.__context__, KeyboardInterrupt):
        return _interrupted(exit_request.__context__)
    if type(exit_request).__name__ == "SIGTERMException":
        return 128 + signal.SIGTERM
    code = exit_request.code
    if isinstance(code, str):
        _say(code)
    return code if isinstance(code, int) else int(code is not None)


def _drop_stdout() -> None:
    """What stdout still holds would raise once more at the end of the process."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(words: list[str]) -> int:
    while words and words[0].partition("=")[0] == "--import":
        words = _import(words)
    if _TRUST_OPTION in words:
        words = [word for word in words if word != _TRUST_OPTION]
        from rest_lightning.media.files import trusting

        with trusting():
            return _run(words)
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
    about, add_arguments, command = _find(name)
    from rest_lightning.extras import require
    from rest_lightning.options import CommandParser

    parser = CommandParser(name, about)
    add_arguments(parser)
    args = parser.parse(words[1:])
    if name in NEEDS:
        require(NEEDS[name], f"rest {name}")
    if getattr(args, "engine", None) == "ray":
        require("ray", "--engine ray")
    with parser.silence():
        if name == "completion":  # it has to know all others
            all_arguments = {each: (COMMANDS[each], _find(each)[1]) for each in COMMANDS}
            return command(args, all_arguments, STAGE_COMMANDS)
        return command(args)


def _find(name: str) -> tuple[str | None, Callable[[argparse.ArgumentParser], None], Command]:
    """Returns a command's text of help, what adds its arguments to a parser, and what runs it."""
    home, variant = SECOND_COMMANDS.get(name, (name.replace("-", "_"), ""))
    module = importlib.import_module(f"rest_lightning.commands.{home}")
    add_arguments = getattr(module, f"add_{variant}_arguments" if variant else "add_arguments")
    command: Command = getattr(module, f"run_{variant}" if variant else "run")
    return inspect.getdoc(command if variant else module), add_arguments, command


def _import(words: list[str]) -> list[str]:
    """Imports the package of a leading ``--import``; returns the words behind it."""
    from rest_lightning.names import add_imported

    _, equals, name = words[0].partition("=")
    name = name if equals else "".join(words[1:2])
    if not name or name.startswith("-"):
        raise UserError(
            "expected a package behind --import, got none: rest --import my_package fit"
        )
    add_imported(name)
    return words[1:] if equals else words[2:]


def usage() -> str:
    """What ``rest --help`` prints."""
    rows = [f"  {name:<16}{text}" for name, text in (COMMANDS | STAGE_COMMANDS).items()]
    return "\n".join(
        [
            "usage: rest [--import PACKAGE] COMMAND [arguments]     rest COMMAND --help tells more",
            "",
            *rows,
            "",
            "--import loads a package of yours, for classes that a model or a configuration names",
            "--trust-checkpoint reads files that may run code: old checkpoints, TorchScript",
            "example: rest talk portrait.png speech.wav -o out.mp4",
        ]
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

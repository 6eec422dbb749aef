"""Options of the command line: one syntax for every command, mistakes in one line. Needs no torch.

``--num-clips 5``, ``--num_clips 5`` and ``--num_clips=5`` are the same option. Abbreviations are
refused. ``--config FILE`` reads options from YAML, see :mod:`rest_lightning.config`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from rest_lightning.config import (
    Config,
    Tree,
    check_keys,
    hint_inside,
    is_not_finite,
    nearest,
    place_data,
    place_networks,
    read_config,
    reason_of,
)
from rest_lightning.errors import UserError, causes

CONFIG, QUIET = "config", "quiet"
_OWN = ("help", CONFIG, "print_config")
_UNKNOWN = re.compile(r"(?:does not accept option|[Uu]nrecognized arguments?:?) '?([^\s']+)")


class TellsMistakes(ArgumentParser):
    """A parser whose errors are one line: the file or the option, and the nearest right name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)
        self.stage: str | None = None  # class path that the files named so far
        self.reading: Config | None = None  # the file that is being read
        self.active: TellsMistakes | None = None  # the parser of the subcommand that runs
        self.data_class: str | None = None  # of a data module of the user's own

    def known_options(self) -> dict[str, Any]:
        """Returns the dotted name of every option with its type, where it has one."""
        options = {
            action.dest: getattr(action, "_typehint", None)
            for action in self._actions
            if action.dest not in _OWN
        }
        groups = {name.partition(".")[0] for name in options if "." in name}
        groups -= {name for name, kind in options.items() if kind is not None}
        return {name: kind for name, kind in options.items() if name not in groups}

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """As jsonargparse's; numbers must be finite.

        Raises:
            UserError: a mistake.
        """
        found = super().parse_args(*args, **kwargs)
        if not self.exit_on_error:  # a parser that jsonargparse made for a class inside
            return found
        for name, value in found.items():
            if isinstance(value, float) and is_not_finite(value):
                raise UserError(f"{self._shown(name)}: expected a finite number, got {value}")
        return found

    def read(self, name: str, earlier: Tree) -> Tree:
        """Returns a configuration file with all that it builds on, checked key by key.

        Raises:
            UserError: what :func:`~rest_lightning.config.read_config` and
                :func:`~rest_lightning.config.check_keys` find.
        """
        self.reading = config = read_config(name)
        content = place_networks(config, self.stage)
        if self.data_class is not None:
            content = place_data(config, content, self.data_class)
        check_keys(config, content, self.known_options(), earlier)
        model = content.get("model")
        self.stage = (model if isinstance(model, dict) else {}).get("class_path", self.stage)
        return content

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises the mistake as a UserError of one line."""
        if not self.exit_on_error:  # a parser that jsonargparse made for a class inside
            super().error(message, ex)
        mistake = find_user_error(ex)
        if mistake is not None:
            raise mistake from None
        parser = getattr(ex, "subcommand_parser", None) or self.active or self
        raise UserError(parser.explain(message)) from None

    def explain(self, message: str) -> str:
        """Returns one line for what jsonargparse says in many."""
        see = f"see {self.prog.replace(' [options]', '')} --help"
        text = " ".join(message.split())
        if unknown := _UNKNOWN.search(text):
            word = unknown[1].partition("=")[0]
            options = [each[2:] for each in self._option_string_actions if each.startswith("--")]
            near = nearest(word[2:], options) if word.startswith("--") else None
            hint = f"did you mean --{near}?" if near else see
            return f"expected a known option, got {word}: {hint}"
        if re.search(r"required: (\w+\.)?model$", text):
            return "expected a stage, got none: name one, such as --config embedded/student"
        if missing := re.search(r"arguments are required: (.+)$", text):
            return f"expected {', '.join(map(self._shown, missing[1].split(', ')))}: {see}"
        if text.startswith("argument "):
            return f"{text.removeprefix('argument ')}: {see}"
        key, reason = reason_of(message)
        inside = max(re.findall(r"NestedArg\(key='([\w.]+)'", message), key=len, default="")
        if inside and "is not accepted" in reason:
            way_out = hint_inside(self.stage, inside.split(".")) if self.stage else ""
            return f"expected a known option, got --model.{inside}: {way_out or see}"
        if inside.startswith(f"{key}."):
            key = f"model.{inside}"
        if self.reading is None:
            return f"{self._shown(key)}: {reason}" if key else reason
        path = self.reading.source_of(key.split(".")) or self.reading.path
        return f"{path}: {key}: {reason}" if key else f"{path}: {reason}"

    def _shown(self, dest: str) -> str:
        """How an option is written on the command line."""
        for action in self._actions:
            if action.dest == dest:
                names = [name for name in action.option_strings if name.startswith("--")]
                return names[0] if names else dest.upper()
        return f"--{dest}"


class ConfigFile(ActionConfigFile):
    """``--config``: a shipped name or a path, with the files that it builds on."""

    def __call__(  # type: ignore[override]  # jsonargparse gives its own parser and namespace
        self, parser: TellsMistakes, cfg: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Reads the file into the options."""
        content = parser.read(str(values), cfg.clone().as_dict())
        self.apply_config(parser, cfg, self.dest, json.dumps(content))
        parser.reading = None


class CommandParser(TellsMistakes):
    """The parser of a command; :meth:`parse` returns a plain namespace of its options."""

    def __init__(self, name: str, description: str | None) -> None:
        super().__init__(
            prog=f"rest {name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            print_config=None,
        )
        self.is_quiet = False

    def add_argument(self, *names: Any, **how: Any) -> argparse.Action:  # type: ignore[override]
        """As argparse's; ``action="append"`` goes with any ``type``."""
        if how.get("action") == "append" and (kind := how.get("type")) is not None:
            how["type"] = lambda given: given if isinstance(given, list) else kind(given)
        return super().add_argument(*names, **how)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Returns the options of a command line.

        Raises:
            UserError: a mistake.
            SystemExit: after ``--help``.
        """
        own = any(action.dest == CONFIG for action in self._actions)
        if not own:
            what = "options from a YAML file; those on the command line win"
            self.add_argument("--config", action=ConfigFile, metavar="FILE", help=what)
        has_quiet = any(action.dest == QUIET for action in self._actions)
        if not has_quiet:
            self.add_argument("--quiet", action="store_true", help="no bars and no reports")
        self.usage = self._short_usage()
        values = vars(self.parse_args([self._as_known(word) for word in self._without_set(words)]))
        if not own:
            del values[CONFIG]
        if not has_quiet:
            self.is_quiet = values.pop(QUIET)
        return argparse.Namespace(**values)

    @contextmanager
    def silence(self) -> Iterator[None]:
        """With ``--quiet``, while a command without one of its own runs: nothing on stdout and no
        progress bars, in child processes neither. Errors stay.
        """
        if not self.is_quiet:
            yield
            return
        before = os.environ.get("TQDM_DISABLE")
        os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            sys.stdout.flush()
            kept = os.dup(1)
            os.dup2(nowhere.fileno(), 1)
            try:
                yield
            finally:
                os.dup2(kept, 1)
                os.close(kept)
                if before is None:
                    os.environ.pop("TQDM_DISABLE", None)
                else:
                    os.environ["TQDM_DISABLE"] = before

    def _short_usage(self) -> str:
        """What has to be given; the options are listed below it."""
        words = [self.prog, "[options]"]
        for action in self._actions:
            name = str(action.metavar or action.dest.upper())
            if not action.option_strings:
                words.append(f"[{name}]" if action.nargs == "?" else name)
            elif action.required:
                words.append(f"{action.option_strings[-1]} {name}")
        return " ".join(words)

    def _without_set(self, words: Sequence[str]) -> Iterator[str]:
        """``--set min_frames=20``, which `rest prepare` of 0.1 had, as ``--min_frames=20``."""
        rest = iter(words)
        for word in rest:
            if word == "--set" and word not in self._option_string_actions:
                word = f"--{next(rest, '')}"
            yield word

    def _as_known(self, word: str) -> str:
        """``--num_clips=5`` as ``--num-clips=5`` where that is the option's spelling, or the other
        way round.
        """
        option, equals, value = word.partition("=")
        if not option.startswith("--") or option in self._option_string_actions:
            return word
        name = option[2:]
        for spelling in (f"--{name.replace('_', '-')}", f"--{name.replace('-', '_')}"):
            if spelling in self._option_string_actions:
                return spelling + equals + value
        return word


def find_user_error(error: BaseException | None) -> UserError | None:
    """Returns the user's mistake behind an exception: jsonargparse wraps what a constructor raises
    into errors of its own.
    """
    return next((cause for cause in causes(error) if isinstance(cause, UserError)), None)

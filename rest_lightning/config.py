"""Configuration files: shipped names and paths, files that build on others, mistakes in one line.

A configuration is a YAML file. Two keys are read here and never reach a class:

``base``
    one file or a list of files that are read first; later ones win, and the file itself wins over
    all of them. Each is a shipped name, such as ``embedded/student``, or a path beside the file.
``networks``
    the networks of a model, part -> class. A stage takes those that its constructor has, beneath
    what it says about them itself. So a network is written once, in ``configs/model``.

Mappings are merged key by key. A list replaces a list; ``callbacks+`` adds to it. Another
``class_path`` starts with ``init_args`` of its own.

Needs no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import math
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rest_lightning.errors import UserError
from rest_lightning.names import look_in_current_folder

BASE, NETWORKS = "base", "networks"
PARTS = ("vae", "speech_encoder", "speech_ae", "transformer", "detail")
CLASS, ARGUMENTS = "class_path", "init_args"
EXPORTING_PACKAGES = tuple(
    f"rest_lightning.{name}" for name in ("tasks", "models", "callbacks", "data")
)
Tree = dict[str, Any]
T = typing.TypeVar("T")


def configs_root() -> Path:
    """Returns the folder of the shipped configurations: inside the package, or in its checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    # In a checkout a link leads to the folder at the top level.
    return inside.resolve() if inside.is_dir() else package.parent / "configs"


def shipped_names(folder: str = "") -> list[str]:
    """Returns the names of the shipped configurations, such as ``embedded/asd``.

    Args:
        folder: only those below it, named from there on.
    """
    root = configs_root() / folder
    files = (path.relative_to(root).with_suffix("") for path in root.rglob("*.yaml"))
    return sorted(path.as_posix() for path in files)


def find_config(
    name: str | os.PathLike[str],
    folder: str = "",
    beside: Path | None = None,
    what: str = "a configuration",
) -> Path:
    """Returns the file that a name or a path means; an existing file wins over a shipped name.

    Args:
        name: a path, or a shipped name with or without ``.yaml``.
        folder: of ``configs/`` that the name is looked up in.
        beside: folder that paths start from; None takes the current one.
        what: is looked for, in the error.

    Raises:
        UserError: neither a file nor a shipped name; names the nearest one and what there is.
    """
    text = os.fspath(name)
    path = (beside or Path()) / text
    known = shipped_names(folder)
    stem = text.removesuffix(".yaml")
    if path.is_file():
        if stem in known:
            print(f"note: took the file {path}, not the shipped one of this name", file=sys.stderr)
        return path
    if stem in known:
        return configs_root() / folder / f"{stem}.yaml"
    if text.endswith((".yaml", ".yml", ".json")):
        raise UserError(
            f"expected {what}, but the file {text} does not exist: check the path"
            f"{_or_nearest(stem, known)}"
        )
    above = stem.rpartition("/")[0]
    siblings = [each for each in known if each.startswith(f"{above}/")] if above else []
    folders = sorted({each.split("/")[0] + ("/..." if "/" in each else "") for each in known})
    shown = ", ".join(siblings or (known if folder else folders))
    raise UserError(
        f"expected {what} (a file, or one of {shown}), got {text!r}: "
        f"{did_you_mean(stem, known) or 'check the name'}"
    )


@dataclasses.dataclass
class Config:
    """A configuration with all that it builds on.

    Attributes:
        path: the file itself.
        content: what the files say together, without ``base``.
        sources: the files with what each says alone, in the order in which they were read.
    """

    path: Path
    content: Tree
    sources: list[tuple[Path, Tree]]

    def source_of(self, key: Iterable[str]) -> Path | None:
        """Returns the last file that sets a key, or the nearest key above it."""
        keys = tuple(key)
        depths = [_depth(content, keys) for _, content in self.sources]
        if not any(depths):
            return None
        return [
            path
            for (path, _), depth in zip(self.sources, depths, strict=True)
            if depth == max(depths)
        ][-1]


def read_config(
    name: str | os.PathLike[str], folder: str = "", what: str = "a configuration"
) -> Config:
    """Reads a configuration and the files that it builds on.

    Args:
        name, folder, what: see :func:`find_config`.

    Raises:
        UserError: a file that is not there, is no YAML mapping, or builds on itself.
    """
    path = find_config(name, folder, what=what)
    sources = list(_read_chain(path, ()))
    content: Tree = {}
    for _, each in sources:
        merge(content, each)
    return Config(path, content, sources)


def network_of(content: Tree, part: str) -> Tree:
    """Returns class and arguments of a part, as a stage of this content would build it.

    Empty where the configuration has no such part.
    """
    found: Tree = {}
    for of in (_get(content, NETWORKS, part), _get(content, "model", ARGUMENTS, part)):
        merge(found, of or {})
    return found


def read_yaml(path: Path) -> Tree:
    """Returns the mapping of a YAML file.

    Raises:
        UserError: not readable, no YAML, no mapping, or a number that is not finite.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"expected a configuration in {path}, got {error}: check the file"
        ) from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"expected YAML in {path}, got {reason}: correct it") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(
            f"expected names and values in {path}, got {type(content).__name__}: write `name: "
            "value` lines"
        )
    _check_finite(path, content, ())
    return content


def _check_finite(path: Path, value: Any, keys: tuple[str, ...]) -> None:
    if isinstance(value, Mapping):
        for key, each in value.items():
            _check_finite(path, each, (*keys, str(key)))
    elif isinstance(value, list):
        for each in value:
            _check_finite(path, each, keys)
    elif is_not_finite(value):
        raise UserError(f"{path}: {'.'.join(keys)}: expected a finite number, got {value}")


def is_not_finite(value: Any) -> bool:
    """Whether a value is NaN or infinite, as a number or as a word that Python takes for one."""
    if isinstance(value, str):
        return re.fullmatch(r"[+-]?\.?(nan|inf(inity)?)", value.strip(), re.IGNORECASE) is not None
    return isinstance(value, float) and not math.isfinite(value)


def read_dataclass(cls: type[T], content: Mapping[str, Any], where: str) -> T:
    """Returns the dataclass that a mapping describes, its values checked by jsonargparse.

    Args:
        cls: a dataclass.
        content: names and values.
        where: they come from, in the errors.

    Raises:
        UserError: an unknown or missing key, a value of another kind.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if unknown := [name for name in content if name not in names]:
        hint = did_you_mean(unknown[0], names) or f"known are {', '.join(names)}"
        raise UserError(f"{where}: expected a known key, got {unknown[0]}: {hint}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls)
    try:
        values = parser.parse_object(dict(content))
    except ArgumentError as error:
        key, reason = reason_of(str(error))
        raise UserError(f"{where}: {key + ': ' if key else ''}{reason}") from None
    return cls(**values.as_dict())


def reason_of(message: str) -> tuple[str, str]:
    """Returns the option that a message of jsonargparse is about, and its reason in one line."""
    keys = re.findall(r'[Kk]ey "([^"]+)"', message)
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    # The last of the alternatives that were tried for a class tells what is wrong inside.
    telling = [line for line in lines if re.search("Expected|not accepted|required", line)]
    telling = [line for line in telling if "NoneType" not in line] or telling
    reason = (telling or lines)[-1]
    reason = re.sub(r'^.*Parser key "[^"]+":\s*', "", reason)
    reason = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", reason)
    reason = re.sub(r"^Expected an? ", "expected ", reason).replace(". Got value: ", ", got ")
    reason = re.sub(r"^expected int\b", "expected a whole number", reason)
    reason = re.sub(r"^expected float\b", "expected a number", reason)
    return max(keys, key=len, default="").rstrip("+"), " ".join(reason.split()).rstrip(".")


def merge(into: Tree, content: Mapping[str, Any]) -> Tree:
    """Merges ``content`` into ``into`` by the rules of this module; returns ``into``."""
    if CLASS in content and _short(into.get(CLASS, content[CLASS])) != _short(content[CLASS]):
        into.pop(ARGUMENTS, None)
    for key, value in content.items():
        name = key.removesuffix("+")
        if key.endswith("+") and isinstance(into.get(name), list):
            into[name] = [*into[name], *_as_list(value)]
        elif key.endswith("+") and key in into:
            into[key] = [*_as_list(into[key]), *_as_list(value)]
        elif isinstance(value, Mapping):
            mine = into.get(key)
            into[key] = merge(mine if isinstance(mine, dict) else {}, value)
        else:
            into[key] = value
    return into


def place_networks(config: Config, stage: str | None = None) -> Tree:
    """Returns the content with ``networks`` moved to where the stage takes them.

    Args:
        config: with or without ``networks``.
        stage: class path of the stage, where the content itself names none.

    Raises:
        UserError: networks without a stage, or of an unknown part.
    """
    content = merge({}, config.content)
    networks = content.pop(NETWORKS, None)
    if networks is None:
        return content
    stage = _get(content, "model", CLASS) or stage
    if stage is None:
        raise UserError(
            f"expected a stage that takes the networks of {config.path}, got none: put it behind a "
            "stage, as in --config embedded/student --config model/tiny"
        )
    if wrong := [name for name in networks if name not in PARTS]:
        raise _unknown(config, (NETWORKS, wrong[0]), PARTS)
    taken = parameters_of(find_class(stage, "model.class_path", config.path))
    parts = {name: part for name, part in networks.items() if name in taken}
    model = {"model": {CLASS: stage, ARGUMENTS: parts}}
    return merge(model, content)


def place_data(config: Config, content: Tree, class_path: str) -> Tree:
    """Returns the content with ``data`` as a class and its arguments.

    What files say of another data module, those that do not name this class, goes where this one
    has no such argument.

    Args:
        config: where the content comes from.
        content: the configuration; arguments of ``data`` may stand in it without ``init_args``.
        class_path: of the data module that is run.

    Raises:
        UserError: no such class.
    """
    data = content.get("data")
    if not isinstance(data, Mapping):
        return content
    plain = {name: value for name, value in data.items() if name not in (CLASS, ARGUMENTS)}
    arguments = {**plain, **(data.get(ARGUMENTS) or {})}
    known = parameters_of(find_class(class_path, "data.class_path", config.path))
    if "**" not in known:
        said = {
            name
            for _, source in config.sources
            if isinstance(own := source.get("data"), Mapping) and own.get(CLASS) is not None
            for name in (*own, *(own.get(ARGUMENTS) or {}))
        }
        arguments = {
            name: value for name, value in arguments.items() if name in known or name in said
        }
    return {**content, "data": {CLASS: class_path, ARGUMENTS: arguments}}


# -- mistakes --------------------------------------------------------------------------------------


def check_keys(config: Config, content: Tree, known: Mapping[str, Any], earlier: Tree) -> None:
    """Checks that every key is known, before the classes' own checks of values.

    Args:
        config: where the content comes from.
        content: the configuration, networks in place.
        known: dotted name of every option -> its type, or None.
        earlier: what was read before, where the content names no class of its own.

    Raises:
        UserError: the first unknown key, with its file and the nearest known one.
    """
    for key, value in content.items():
        _check(config, (key,), value, known, earlier.get(key.removesuffix("+")))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that a mistyped one most likely means, or None."""
    names = list(known)
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not found:  # embedded/ads of asd; a name without its folder
        found = [each for each in names if each.rpartition("/")[2] == name.rpartition("/")[2]][:1]
    return found[0] if found else None


def hint_inside(stage: str, keys: Sequence[str]) -> str:
    """Returns the way out of a mistyped argument of a stage, or of a dataclass inside it.

    Args:
        stage: class path.
        keys: names, one inside the other, the mistyped one last.
    """
    names: Mapping[str, Any] = parameters_of(find_class(stage, "model.class_path", None))
    for key in keys[:-1]:
        inner = _dataclass_of(names.get(key))
        if inner is None:
            return ""
        names = _hints(inner)
    return did_you_mean(keys[-1], names) or f"known are {', '.join(names)}"


def find_class(class_path: str, key: str, path: Path | None) -> type:
    """Returns the class of an import path, or of a name that a package exports.

    Raises:
        UserError: there is none; names the nearest exported one.
    """
    module, _, name = class_path.rpartition(".")
    exported = dict(_exported())
    look_in_current_folder()
    try:
        if not module:
            return getattr(importlib.import_module(exported[name]), name)
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, KeyError, ValueError):
        where = f"{path}: " if path is not None else ""
        raise UserError(
            f"{where}expected a class at {key}, got {class_path!r}: "
            f"{did_you_mean(name, exported) or 'give its import path'}"
        ) from None


def _check(config: Config, keys: tuple[str, ...], value: Any, known: Mapping[str, Any],
           earlier: Any) -> None:  # fmt: skip
    dotted = ".".join(keys).removesuffix("+")
    if dotted in known:
        _check_value(config, keys, value, known[dotted], earlier)
        return
    below = {
        name[len(dotted) + 1 :].split(".")[0] for name in known if name.startswith(dotted + ".")
    }
    if not below:
        above = ".".join(keys[:-1])
        prefix = f"{above}." if above else ""
        names = {name[len(prefix) :].split(".")[0] for name in known if name.startswith(prefix)}
        raise _unknown(config, keys, names)
    if isinstance(value, Mapping):
        for key, each in value.items():
            before = earlier.get(key.removesuffix("+")) if isinstance(earlier, Mapping) else None
            _check(config, (*keys, key), each, known, before)


def _check_value(
    config: Config, keys: tuple[str, ...], value: Any, kind: Any, earlier: Any
) -> None:
    """Looks into classes with their arguments, dataclasses, and lists of these."""
    if isinstance(value, list):
        for each in value:
            if isinstance(each, Mapping):
                _check_value(config, keys, each, kind, None)
        return
    if not isinstance(value, Mapping):
        return
    if CLASS in value or ARGUMENTS in value:
        if unknown := [key for key in value if key not in (CLASS, ARGUMENTS, "dict_kwargs")]:
            raise _unknown(config, (*keys, unknown[0]), (CLASS, ARGUMENTS))
        before = earlier if isinstance(earlier, Mapping) else {}
        class_path = value.get(CLASS) or before.get(CLASS)
        if not isinstance(class_path, str):
            return
        path = config.source_of((*keys, CLASS))
        if "." not in class_path and nearest(class_path, dict(_exported())) is None:
            return  # of another package: jsonargparse knows it once it is loaded
        cls = find_class(class_path, ".".join((*keys, CLASS)), path)
        names, arguments = parameters_of(cls), value.get(ARGUMENTS) or {}
        before = before.get(ARGUMENTS) or {}
        keys = (*keys, ARGUMENTS)
    elif (inner := _dataclass_of(kind)) is not None:
        names = _hints(inner)
        arguments, before = value, earlier if isinstance(earlier, Mapping) else {}
    else:
        return
    if any(name == "**" for name in names) or not isinstance(arguments, Mapping):
        return
    for name, each in arguments.items():
        plain = name.removesuffix("+")
        if plain not in names:
            raise _unknown(config, (*keys, name), names)
        _check_value(config, (*keys, name), each, names[plain], before.get(plain))


def _unknown(config: Config, keys: tuple[str, ...], names: Iterable[str]) -> UserError:
    name, where = keys[-1], ".".join(keys)
    path = config.source_of(keys) or config.path
    known = sorted(names)
    hint = did_you_mean(name, known) or f"known are {', '.join(known)}"
    return UserError(f"{path}: expected a known key, got {where}: {hint}")


def parameters_of(cls: type) -> dict[str, Any]:
    """Returns the parameters of a constructor with their types; ``**`` where it takes any name."""
    if not isinstance(cls, type):  # a function that makes one
        return {"**": None}
    found: dict[str, Any] = {}
    for each in cls.__mro__:  # a constructor of *args and **kwargs hands them to its parent's
        constructor = vars(each).get("__init__")
        if constructor is None:
            continue
        hints = _hints(constructor)
        parameters = list(inspect.signature(constructor).parameters.values())[1:]
        named = [one for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
        found |= {one.name: hints.get(one.name) for one in named if one.name not in found}
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            return found
        if not each.__module__.startswith("rest_lightning."):
            break  # a foreign one may hand them to any other: DDPStrategy's are torch's
    return {**found, "**": None}


def _hints(of: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(of)
    except (NameError, TypeError):
        return {}


def _dataclass_of(kind: Any) -> type | None:
    """The dataclass of a type or of one of its alternatives."""
    for each in (kind, *typing.get_args(kind)):
        if isinstance(each, type) and dataclasses.is_dataclass(each):
            return each
    return None


def _exported() -> Iterator[tuple[str, str]]:
    for package in EXPORTING_PACKAGES:
        for name in importlib.import_module(package).__all__:
            yield name, package


# -- reading ---------------------------------------------------------------------------------------


def _read_chain(path: Path, above: tuple[Path, ...]) -> Iterator[tuple[Path, Tree]]:
    """The files that a file builds on, and itself last."""
    if path.resolve() in above:
        raise UserError(f"expected files that build on others, but {path} builds on itself")
    content = read_yaml(path)
    bases = content.pop(BASE, [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(each, str) for each in bases):
        raise UserError(f"{path}: expected names of configurations as base, got {bases!r}")
    for base in bases:
        found = find_config(base, beside=path.parent, what=f"a base of {path}")
        yield from _read_chain(found, (*above, path.resolve()))
    yield path, content


def _depth(content: Any, keys: tuple[str, ...]) -> int:
    """How many of the keys, one inside the other, a file has; its networks are the model's."""
    found = _nested(content, keys)
    if keys[:2] == ("model", ARGUMENTS) and NETWORKS in content:
        found = max(found, 2 + _nested(content[NETWORKS], keys[2:]))
    return found


def _nested(content: Any, keys: tuple[str, ...]) -> int:
    if isinstance(content, list):
        return max((_nested(each, keys) for each in content), default=0)
    if not keys or not isinstance(content, Mapping):
        return 0
    name = keys[0] if keys[0] in content else f"{keys[0]}+"
    return 1 + _nested(content[name], keys[1:]) if name in content else 0


def _get(content: Mapping[str, Any], *keys: str) -> Any:
    value: Any = content
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _short(class_path: Any) -> str:
    return str(class_path).rpartition(".")[2]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the way out of a mistyped name; empty where nothing is near."""
    found = nearest(name, known)
    return f"did you mean {found}?" if found else ""


def _or_nearest(name: str, known: Iterable[str]) -> str:
    found = nearest(name, known)
    return f", or take the shipped {found}" if found else ""

"""Say what this installation can do: versions, devices, codecs, threads, speed, and which extra is
missing for which command.

The exit code is 1 when something is wrong with what `rest talk` needs. --json prints the same for
programs and for reports of errors; it names no file, user or address.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from importlib import metadata
from typing import TYPE_CHECKING, Any

from rest_lightning.constants import VERSION
from rest_lightning.errors import UserError
from rest_lightning.extras import DISTRIBUTION, applies, install_command, requirements

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# What an extra is for. Extras that are not named here are for developers.
EXTRA_USES = {
    "app": "rest app",
    "completion": "rest completion",
    "converse": "rest converse",
    "livekit": "rest_lightning.integrations.livekit",
    "metrics": "rest score with FID of the published network, and Parquet",
    "pipecat": "rest_lightning.integrations.pipecat",
    "prepare": "rest prepare, rest animate",
    "provenance": "signing of videos",
    "ray": "--engine ray of rest prepare and rest serve",
    "serve": "rest serve",
    "synthetic": "rest synthesize",
}
ENCODERS = ("libx264", "aac")  # what `rest talk` writes
DECODERS = ("h264", "hevc", "vp9", "av1", "aac", "mp3", "opus", "flac", "pcm_s16le")
NEEDED = ("torch", "av", "numpy", "PIL", "safetensors", "jsonargparse", "rich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="of the speed test (default 5; 0 leaves it out)",
    )


def run(args: argparse.Namespace) -> int:
    """Look, and print."""
    found = examine(args.seconds)
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        show(found)
    return 1 if found["problems"] else 0


def examine(seconds: float) -> dict[str, Any]:
    """Returns everything that the command prints.

    Args:
        seconds: of the speed test; 0 leaves it out.

    Returns:
        ``versions``, ``hardware``, ``devices``, ``threads``, ``codecs``, ``extras``, ``speed``, and
        ``problems``: what is wrong with what ``rest talk`` needs, a line each.
    """
    if not 0 <= seconds <= 600:
        raise UserError(f"expected --seconds from 0 to 600, got {seconds:g}: 5 is the default")
    problems = _other_versions()
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: a shared library that is not there
            problems.append(f"{name} cannot be imported: {_one_line(error)}")
    from rest_lightning.machine import hardware, versions

    has_torch = not any(line.startswith("torch ") for line in problems)
    codecs = _codecs()
    problems += [f"no encoder {name}" for name in ENCODERS if not codecs.get(f"encode {name}")]
    found: dict[str, Any] = {
        "versions": versions(),
        "hardware": hardware(),
        "devices": _devices() if has_torch else {},
        "threads": _threads() if has_torch else {},
        "codecs": codecs,
        "extras": extras(),
        "speed": {},
    }
    if seconds and not problems:
        try:
            found["speed"] = _speed(seconds)
        except (UserError, RuntimeError, OSError) as error:
            problems.append(f"the bundled model does not stream: {_one_line(error)}")
    return found | {"problems": problems}


def extras(distribution: str = DISTRIBUTION) -> dict[str, dict[str, Any]]:
    """Returns, for every extra that a command needs, what it is for (``for``) and which of its
    packages are ``missing`` or too old; those that this Python cannot have are ``not_here``.
    """
    try:
        names = metadata.metadata(distribution).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(set(names) & set(EXTRA_USES)):
        wanted = requirements(name, distribution)
        problems = [_problem_of(each) for each in wanted if applies(each)]
        found[name] = {
            "for": EXTRA_USES[name],
            "missing": [problem for problem in problems if problem],
            "not_here": [each.name for each in wanted if not applies(each)],
        }
    return found


def _other_versions() -> list[str]:
    """What an older or newer installation left beside this one."""
    found = {each.version for each in metadata.distributions(name=DISTRIBUTION)}
    return [
        f"rest_lightning {VERSION} runs, but {other} is installed, too: pip uninstall "
        "rest_lightning until none is left, and install it again"
        for other in sorted(found - {VERSION})
    ]


def _problem_of(requirement: Requirement) -> str | None:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return str(requirement.name)
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} {requirement.specifier} (here {version})"


def _devices() -> dict[str, Any]:
    import torch

    from rest_lightning.parts import natural_dtype

    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    found: dict[str, Any] = {"cpu": {"dtype": natural_dtype(capabilities)}}
    if not torch.cuda.is_available():
        built_for = torch.version.cuda
        reason = "torch is a CPU build" if built_for is None else "torch finds no NVIDIA GPU"
        return found | {"cuda": {"reason": reason}}
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        found[f"cuda:{number}"] = {
            "name": about.name,
            "memory_gb": round(about.total_memory / 1e9, 1),
            "capability": f"{about.major}.{about.minor}",
            "cuda": torch.version.cuda,
            "dtype": "bfloat16" if bfloat16 else "float32",
        }
    return found


def _threads() -> dict[str, Any]:
    import torch

    from rest_lightning.machine import num_usable_cores

    variables = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    return {
        "torch": torch.get_num_threads(),
        "usable_cores": num_usable_cores(),
        "environment": {name: os.environ[name] for name in variables if name in os.environ},
    }


def _codecs() -> dict[str, bool]:
    try:
        from av.codec import Codec
    except (ImportError, OSError):
        return {}

    def has(name: str, mode: Any) -> bool:
        try:
            Codec(name, mode)
        except ValueError:  # av's UnknownCodecError
            return False
        return True

    from rest_lightning.media.video import has_decord

    found = {f"encode {name}": has(name, "w") for name in ENCODERS}
    found |= {f"decode {name}": has(name, "r") for name in DECODERS}
    return found | {"decord": has_decord()}


def _speed(seconds: float) -> dict[str, Any]:
    from rest_lightning.commands.bench import stream_for
    from rest_lightning.talking_head import ModelOptions

    head = ModelOptions().load()
    report = stream_for(head, seconds)
    return {
        "device": str(head.device),
        "dtype": str(head.dtype).removeprefix("torch."),
        "size_px": head.size_px,
        "frames_per_second": round(report.frames_per_second, 1),
        "real_time_factor": round(report.real_time_factor, 2),
        "chunk_ms": report.chunk_ms["p50"],
    }


def show(found: dict[str, Any]) -> None:
    """Prints what :func:`examine` found, for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    table.add_row("versions", versions)
    machine = found["hardware"]
    memory = f", {machine['memory_gb']} GB" if "memory_gb" in machine else ""
    table.add_row("machine", f"{machine['processor']}{memory}, {machine['system']}")
    for name, about in found["devices"].items():
        table.add_row(name, ", ".join(f"{key} {value}" for key, value in about.items()))
    if threads := found["threads"]:
        variables = "".join(f", {name}={v}" for name, v in threads["environment"].items())
        text = f"torch takes {threads['torch']} of {threads['usable_cores']} cores{variables}"
        table.add_row("threads", text)
    absent = [name for name, there in found["codecs"].items() if not there]
    table.add_row("codecs", f"without {', '.join(absent)}" if absent else "all that are used")
    if speed := found["speed"]:
        table.add_row(
            "speed",
            f"{speed['frames_per_second']} fps at {speed['size_px']} px on {speed['device']} "
            f"({speed['dtype']}), {speed['real_time_factor']} x real time",
        )
    for name, extra in found["extras"].items():
        table.add_row(f"[{name}]".replace("[", r"\["), _extra_line(name, extra))
    for line in found["problems"]:
        table.add_row("problem", line)
    Console().print(table, highlight=False)


def _extra_line(name: str, extra: dict[str, Any]) -> str:
    if missing := extra["missing"]:
        way_out = install_command(name).replace("[", r"\[")
        return f"{extra['for']}: needs {', '.join(missing)}: {way_out}"
    if not_here := extra["not_here"]:
        return f"{extra['for']}: {', '.join(not_here)} cannot be had for this Python"
    return f"{extra['for']}: complete"


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]

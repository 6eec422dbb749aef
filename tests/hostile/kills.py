"""Commands that are killed, interrupted, or meet a full disk, at moments drawn from a seed.

The same command, given once more, must end with what an undisturbed run gives, and leave nothing
beside it.

Each run is a fork of this process, which has imported what takes long. Workers of `multiprocessing`
import this file anew: it is light.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from processes import alive, descendants
from tries import loop

from rest_lightning.cli import main

ENDING_S = 15.0  # for the children of a killed process
TEMPORARY = re.compile(r"/\.[^/]*\.part\b")
SPEC: dict[str, Any] = json.loads(sys.argv[4]) if __name__ == "__main__" else {}


def begin(out: Path, file_bytes: int | None = None) -> int:
    """A fork that runs the command into ``out``; its number.

    A limit on the size of files stands for the disk's: the system refuses in the same way.
    """
    words = [word.replace("OUT", str(out)) for word in SPEC["words"]]
    if SPEC.get("resumes") and (saved := list(out.rglob("last.ckpt"))):
        words += ["--ckpt_path", str(max(saved, key=lambda path: path.stat().st_mtime))]
    child = os.fork()
    if child == 0:
        code = 70
        try:
            if file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
            with out.with_suffix(".log").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            code = main(words)
        except KeyboardInterrupt:  # before the command has begun
            code = 130
        finally:
            os._exit(code)
    return child


def finish(out: Path) -> None:
    """Runs the command to its end."""
    code = os.waitstatus_to_exitcode(os.waitpid(begin(out), 0)[1])
    log = out.with_suffix(".log").read_text(errors="replace")
    assert code == 0, f"exit code {code}: {log[-300:]}"
    assert "Traceback" not in log, log[-300:]


def kill(out: Path, delay_s: float) -> None:
    """Begins the command and ends it without a word."""
    pid = begin(out)
    end_s = time.monotonic() + delay_s
    below: set[int] = set()
    while time.monotonic() < end_s:
        below |= descendants(pid)
        time.sleep(min(0.05, max(0.0, end_s - time.monotonic())))
    below |= descendants(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    check_ended(below)
    for path in files(out):
        check_whole(path)


def check_ended(below: set[int]) -> None:
    """What a command has started ends with it."""
    end_s = time.monotonic() + ENDING_S
    while alive(below) and time.monotonic() < end_s:
        time.sleep(0.05)
    names = [Path(f"/proc/{pid}/cmdline").read_bytes()[-200:] for pid in alive(below)]
    assert not names, f"outlive the command: {names}"


def disturb(out: Path, rng: random.Random, length_s: float) -> None:
    """A kill; or Ctrl-C, SIGTERM or a full disk, after which the command must tidy up itself."""
    kind = rng.choice(("kill", "kill", "kill", "int", "term", "full"))
    delay_s = rng.random() * length_s
    if kind == "kill":
        kill(out, delay_s)
        return
    pid = begin(out, int(10 ** rng.uniform(3, 6)) if kind == "full" else None)
    if kind != "full":
        time.sleep(delay_s)
        os.kill(pid, signal.SIGINT if kind == "int" else signal.SIGTERM)
    below = descendants(pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    log = out.with_suffix(".log").read_text(errors="replace")
    # a command of several runs says with 1 that one of them failed
    expected = {"int": (0, 130, -2), "term": (0, 143, -15), "full": (0, 1, 2)}[kind]
    assert code in expected, f"{kind}: exit code {code}: {log[-300:]}"
    assert "Traceback" not in log, f"{kind}: {log[-500:]}"
    check_ended(below)
    # A temporary file, or one in a temporary folder; `rest predict` keeps 1.partial.mp4 on purpose.
    left = [path.name for path in files(out) if TEMPORARY.search(f"/{path}")]
    assert not left or code < 0, f"{kind}: {left} is left"
    for path in files(out):
        check_whole(path)


def files(out: Path) -> list[Path]:
    """Files of a run under their final names, and whatever else lies beside them."""
    root = out.parent
    found = [path for path in root.rglob("*") if path.is_file() and path.suffix != ".log"]
    ignored = (*SPEC.get("ignored", ()), ".rest.lock")
    return sorted(
        path for path in found if not any(fnmatch.fnmatch(path.name, each) for each in ignored)
    )


def check_whole(path: Path) -> None:
    """A file under a final name can be read to its end."""
    if path.name.startswith("."):
        return
    if path.suffix == ".mp4":
        import av

        with av.open(str(path)) as container:
            assert sum(1 for _ in container.decode(video=0)) > 0
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".jsonl":
        for line in path.read_text().splitlines():
            json.loads(line)
    elif path.suffix == ".ckpt":
        load(path)


def content(out: Path) -> dict[str, str]:
    """What a run has left: name -> hash; of checkpoints their weights, of reports what does not
    depend on the time, of several attempts of Lightning's the last.
    """
    found = {}
    for path in files(out):
        if path.suffix == ".ckpt":
            state = load(path)["state_dict"]
            data = b"".join(
                name.encode() + value.numpy().tobytes() for name, value in state.items()
            )
        else:
            data = path.read_bytes()
            for pattern, keys in SPEC.get("compared", {}).items():
                if fnmatch.fnmatch(path.name, pattern):
                    report = json.loads(data)
                    data = json.dumps([report[key] for key in keys]).encode()
            data = data.replace(os.fsencode(out.parent.name), b"FOLDER")
        name = re.sub(r"version_\d+", "version", path.relative_to(out.parent).as_posix())
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def load(path: Path) -> Any:
    """A checkpoint."""
    import torch

    return torch.load(path, weights_only=True)


def target(folder: str) -> Path:
    """Where a run writes, in a folder of its own; what a run before it has left may lie there."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).mkdir()
    out = (Path(folder) / SPEC["out"]).resolve()
    if "begun" in SPEC:
        shutil.copytree(SPEC["begun"], out)
    return out


def run_all() -> None:
    """A run that is left alone, then the tries."""
    for module in SPEC.get("imports", ()):
        __import__(module)
    if not SPEC.get("children"):
        finish(target("alone"))  # reads files of packages for the first time: not what it takes
    wanted = target("alone")
    start_s = time.monotonic()
    finish(wanted)
    length_s = time.monotonic() - start_s
    reference = content(wanted)
    assert reference

    def one(seed: int) -> None:
        rng = random.Random(seed)
        out = target(f"run{seed % 2}s")
        for _ in range(SPEC["disturbances"]):
            disturb(out, rng, length_s)
        finish(out)
        left = content(out)
        more, less = left.keys() - reference.keys(), reference.keys() - left.keys()
        assert not more and not less, f"left over: {sorted(more)}, missing: {sorted(less)}"
        other = [name for name, value in reference.items() if left[name] != value]
        assert not other, f"another content: {other}"

    loop(one)


if __name__ == "__main__":
    run_all()

"""The loop of an attack's process; see ``attack`` in conftest.py."""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable

from rest_lightning.errors import UserError
from rest_lightning.machine import peak_memory_mb


def loop(one: Callable[[int], object]) -> None:
    """Calls ``one(seed)`` for the seeds of the command line, as long as there is time.

    A fault is an exception that is no UserError, or a UserError of more than one line.
    """
    warnings.simplefilter("ignore")
    first, last, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    end_s = time.monotonic() + seconds
    for seed in range(first, last):
        if time.monotonic() > end_s:
            break
        fault, refused = "", False
        try:
            one(seed)
        except UserError as error:
            refused = True
            if len(str(error).splitlines()) != 1:
                fault = f"a message of several lines: {error}"
        except Exception:
            fault = traceback.format_exc(limit=-2).strip().replace("\n", " / ")
        said = {
            "try": seed,
            "fault": fault,
            "refused": refused,
            "peak_mb": round(peak_memory_mb()),
        }
        print(json.dumps(said), flush=True)

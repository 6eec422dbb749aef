"""`rest app` as a Space: a portrait and speech become a video that plays while it is made.

The variable REST_MODEL of the Space names a model folder; without it the bundled model speaks.
"""

from __future__ import annotations

import os
from pathlib import Path

from rest_lightning.integrations.gradio import build, listen, serve
from rest_lightning.talking_head import ModelOptions

host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
port = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
folder = os.environ.get("REST_MODEL")

if __name__ == "__main__":
    model = ModelOptions(Path(folder) if folder else None).load()
    with listen(host, port) as listening:
        print(f"open http://{host}:{port}", flush=True)
        serve(build(model, max_s=60), listening)

"""The model of drawn faces, 128x128: small, quick, and its training is known exactly.

Tests that need trained weights take it; the bundled model costs six times as much a frame, and its
weights change. The package had it until 0.1.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "drawn"
PORTRAITS = sorted((FOLDER / "portraits").glob("*.png"))  # of drawn faces, 192 to 512 px

"""Each case runs in a fresh interpreter: an import can be tried only once per process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason=("torchvision is not installed")
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_lpips_imports_after_ensure() -> None:
    """And a failed import before does not matter; without one: below."""
    out = run(
        "try:\n    import torchvision\nexcept RuntimeError:\n    pass\n"
        "from rest_lightning.torchvision_compat import ensure_torchvision as e\n"
        "assert e() and e()\n"
        "import lpips, torchvision.ops, torchvision.transforms.v2, torchvision.models\n"
        "print('imported')"
    )
    assert out.endswith("imported")


def test_nothing_is_declared_where_the_plain_import_works() -> None:
    run(
        "from rest_lightning import torchvision_compat\n"
        "torchvision_compat._declare_missing_operators()\n"  # as if torch and torchvision fitted
        "declared = torchvision_compat._library\n"
        "assert torchvision_compat.ensure_torchvision()\n"
        "assert torchvision_compat._library is declared"
    )


def test_another_failure_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('something else is broken')\n"
    )
    run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from rest_lightning.torchvision_compat import ensure_torchvision\n"
        "try:\n    ensure_torchvision()\n"
        "except RuntimeError as error:\n    assert 'something else' in str(error)\n"
        "else:\n    raise SystemExit('no error was raised')"
    )

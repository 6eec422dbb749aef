"""Lightning callbacks, imported as ``rest_lightning.callbacks``: evaluation, previews, sinks.

The folder lies at the top level of the repository; setuptools' ``package-dir`` maps it into the package. Modules in
here import the rest of the package relatively (``from ..streaming.writer import Mp4Writer``), so that a stray
``import callbacks`` from the repository's root fails loudly instead of making every class a second time.
"""

from ..torchvision_compat import ensure_torchvision

# Before anything in here imports lightning: its torchmetrics imports torchvision.
ensure_torchvision()

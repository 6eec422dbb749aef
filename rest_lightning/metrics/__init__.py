"""torchmetrics classes over pure functions."""

from rest_lightning.torchvision_compat import ensure_torchvision

# Before anything imports lightning or torchmetrics: both import torchvision.
ensure_torchvision()

"""LPIPS: loads from the hub folder without a download, and says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rest_lightning.metrics.reconstruction import BACKBONE_FILES, load_lpips


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        ValueError,
        match=(
            r"backbone at .*vgg16-397923af.pth, got no such file: "
            r"fetch .* that folder"
        ),
    ):
        load_lpips()
    with pytest.raises(ValueError, match="backbone of vgg, alex, squeeze, got 'resnet'"):
        load_lpips("resnet")


def test_present_weights_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    backbone = squeezenet1_1(weights=None)
    (tmp_path / "checkpoints").mkdir()
    torch.save(backbone.state_dict(), tmp_path / "checkpoints" / BACKBONE_FILES["squeeze"])
    metric = load_lpips("squeeze")
    weights = backbone.state_dict()["features.0.weight"]
    assert any(torch.equal(weights, p) for p in metric.parameters() if p.shape == weights.shape)
    a, b = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    assert metric(a, a).abs().max() < 1e-6
    assert (metric(a, b) > 0).all()
    assert not any(p.requires_grad for p in metric.parameters())

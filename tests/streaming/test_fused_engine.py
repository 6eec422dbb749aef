"""The switches fuse, float8 and attention of a session, in Triton's interpreter or on CUDA."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny_ltx import make_vae

from rest_lightning.streaming.engine import EngineOptions
from rest_lightning.talking_head import TalkingHead

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def portrait() -> torch.Tensor:
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def speech(num_frames: float) -> np.ndarray:
    return np.random.default_rng(1).normal(scale=0.2, size=int(num_frames * 640)).astype(np.float32)


def video(head: TalkingHead, options: EngineOptions) -> np.ndarray:
    with head.open(portrait(), options=options) as session:
        return np.concatenate([session.push(speech(30)), session.flush()]).astype(int)


@needs_triton
@pytest.mark.parametrize("version", [None, "0.9.0"])
def test_fused_sessions_show_what_eager_ones_do(
    make: Callable[..., TalkingHead], version: str | None
) -> None:
    head = make(chunk_length=1)
    if version is not None:
        parts = head.speech_encoder, head.speech_ae, head.transformer, head.sampling
        head = TalkingHead(make_vae(version), *parts, size_px=64)
    head = head.to(DEVICE)
    eager, found = (
        video(head, EngineOptions(fuse=fuse, pack=None if fuse else False))
        for fuse in (True, False)
    )
    assert (
        eager.std() > 1 and np.abs(found - eager).max() <= 1
    )  # a value at the edge of two grey levels
    with head.open(portrait(), options=EngineOptions(fuse=True)) as session:
        told = session.report().configuration
        assert (
            told["fused"]
            and not told["packed"]
            and not told["float8"]
            and told["attention"] == "auto"
        )
        with head.open(
            portrait(), options=EngineOptions(fuse=True)
        ) as other:  # one copy of the weights serves both
            assert other.engine.tables.transformer is session.engine.tables.transformer
            assert other.engine.tables.vae is session.engine.tables.vae
    before = session.engine.tables.transformer
    with torch.no_grad():
        next(head.transformer.parameters()).mul_(2)
    assert (
        head.open(portrait(), options=EngineOptions(fuse=True)).engine.tables.transformer
        is not before
    )


@needs_triton
def test_the_copy_goes_with_its_model(make: Callable[..., TalkingHead]) -> None:
    head = make(chunk_length=1).to(DEVICE)
    twin = weakref.ref(
        head.open(portrait(), options=EngineOptions(fuse=True)).engine.tables.transformer
    )
    assert twin() is not None
    del head
    gc.collect()
    assert twin() is None


def test_switches_that_do_not_fit(
    make: Callable[..., TalkingHead], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = make()
    for switches, reason in (
        ({"float8": True}, "for float8, got fuse=False and torch.float32: set both"),
        ({"float8": True, "fuse": True}, "for float8, got fuse=True and torch.float32: set both"),
        ({"fuse": True, "compile": True}, "expected fuse without compile and pack, got both"),
        ({"attention": "fast"}, "expected attention to be one of auto, flash, cudnn, efficient, "),
    ):
        with pytest.raises(ValueError, match=reason):
            head.open(portrait(), options=EngineOptions(**switches))  # type: ignore[arg-type]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if importlib.util.find_spec("triton") is not None:
        with pytest.raises(
            ValueError, match="expected a model on a CUDA device for fuse, got cpu: leave fuse out"
        ):
            head.open(portrait(), options=EngineOptions(fuse=True))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="expected Triton for fuse, got none: install it"):
        head.open(portrait(), options=EngineOptions(fuse=True))


def test_the_chosen_back_end_comes_first_and_the_others_follow() -> None:
    from torch._C import _get_sdp_priority_order

    before = _get_sdp_priority_order()
    for name in ("flash", "cudnn", "efficient", "math"):
        with EngineOptions(attention=name).attention_order(torch.device("cuda")):  # type: ignore[arg-type]
            order = _get_sdp_priority_order()
        kind = "MATH" if name == "math" else f"{name.upper()}_ATTENTION"
        assert order[0] == int(getattr(torch.nn.attention.SDPBackend, kind)) and set(before) == set(
            order
        )
        assert _get_sdp_priority_order() == before
    with EngineOptions().attention_order(torch.device("cuda")):
        assert _get_sdp_priority_order() == before

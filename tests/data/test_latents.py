from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rest_lightning.data.dataset import PreparedClips, WindowKey
from rest_lightning.data.layout import clip_path, finish_dataset
from rest_lightning.data.window_cache import LatentsCache, encode_dataset
from rest_lightning.errors import UserError
from rest_lightning.media.video import read_frames


class TinyVAE(nn.Module):
    """Causal like the real one: slot 0 is the first frame's mean, slot i that of its 8 frames; 8x8
    pixel patches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def encode(self, frames: Tensor) -> Tensor:
        self.num_calls += 1
        assert frames.min() >= -1
        assert frames.max() <= 1
        patches = nn.functional.avg_pool3d(frames, (1, 8, 8))
        rest = (
            patches[:, :, 1:].unflatten(2, (-1, 8)).mean(3)
            if frames.shape[2] > 1
            else patches[:, :, :0]
        )
        return torch.cat([patches[:, :, :1], rest], 2)


def direct(path: Path, start: int, num_frames: int) -> Tensor:
    frames = torch.from_numpy(read_frames(path, start, num_frames)).permute(3, 0, 1, 2)[None]
    return TinyVAE().encode(frames / 127.5 - 1)[0]


@pytest.mark.parametrize("num_frames", [1, 9, 33])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_cache_equals_direct_encoding(
    dataset_dir: Path, tmp_path: Path, num_frames: int, dtype: Any, in_memory: bool
) -> None:
    made = encode_dataset(
        TinyVAE(),
        dataset_dir,
        tmp_path,
        fingerprint="v1",
        num_frames=num_frames,
        windows_per_clip=3,
        references_per_clip=2,
        dtype=dtype,
        clips_per_shard=4,
        progress=False,
    )
    cache = LatentsCache(tmp_path, num_frames, "v1", in_memory)
    slack = 41 - num_frames
    for clip_id in ("clip-000", "clip-003", "clip-005"):
        path = clip_path(dataset_dir, clip_id)
        assert cache.starts(clip_id) == made.starts(clip_id) == [0, slack // 2, slack]
        for number, start in enumerate(cache.starts(clip_id)):
            expected = direct(path, start, num_frames).to(getattr(torch, dtype)).float()
            torch.testing.assert_close(cache.window(clip_id, number), expected, atol=1e-6, rtol=0)
        expected = direct(path, 40, 1).to(getattr(torch, dtype)).float()
        torch.testing.assert_close(cache.reference(clip_id, 1), expected, atol=1e-6, rtol=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "index.json",
        "latents-00000.safetensors",
        "latents-00001.safetensors",
    ]


def test_samples_have_latents_and_the_audio_of_their_window(
    dataset_dir: Path, tmp_path: Path
) -> None:
    encode_dataset(
        TinyVAE(),
        dataset_dir,
        tmp_path,
        fingerprint="v1",
        num_frames=17,
        windows_per_clip=5,
        dtype="float32",
        progress=False,
    )
    clips = PreparedClips(
        dataset_dir, "train", 17, random_window=True, latents=LatentsCache(tmp_path, 17)
    )
    plain = PreparedClips(dataset_dir, "train", 17, with_frames=False)
    starts = set()
    for draw in range(12):
        sample = clips[WindowKey(2, draw)]
        assert sample.keys() == {
            "latents",
            "audio",
            "mouth_opening",
            "landmarks",
            "clip_id",
            "start",
        }
        torch.testing.assert_close(
            sample["latents"], direct(clip_path(dataset_dir, "clip-002"), sample["start"], 17)
        )
        np.testing.assert_allclose(
            sample["mouth_opening"], np.arange(sample["start"], sample["start"] + 17) / 1000 + 0.2
        )
        starts.add(sample["start"])
    assert starts == {0, 6, 12, 18, 24}
    middle = PreparedClips(dataset_dir, "train", 17, latents=LatentsCache(tmp_path))[2]
    assert middle["start"] == 12
    assert torch.equal(middle["audio"], plain[2]["audio"])


def test_random_reference_is_in_slot_0(dataset_dir: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "fingerprint": "v1",
        "num_frames": 17,
        "dtype": "float32",
        "progress": False,
    }
    encode_dataset(TinyVAE(), dataset_dir, tmp_path / "with", references_per_clip=4, **settings)
    clips = PreparedClips(
        dataset_dir,
        "train",
        17,
        random_window=True,
        reference="random_frame",
        latents=LatentsCache(tmp_path / "with"),
    )
    path = clip_path(dataset_dir, "clip-000")
    for draw in range(4):
        latents = clips[WindowKey(0, draw)]["latents"]
        torch.testing.assert_close(latents[:, 1:], direct(path, 12, 17)[:, 1:])
        assert any(
            torch.allclose(latents[:, :1], direct(path, frame, 1)) for frame in (0, 13, 27, 40)
        )
    encode_dataset(TinyVAE(), dataset_dir, tmp_path / "without", **settings)
    clips = PreparedClips(
        dataset_dir,
        "train",
        17,
        reference="random_frame",
        latents=LatentsCache(tmp_path / "without"),
    )
    with pytest.raises(UserError, match="expected latents of reference frames"):
        clips[0]


def test_an_interrupted_run_continues(dataset_dir: Path, tmp_path: Path) -> None:
    class Interrupted(TinyVAE):
        def encode(self, frames: Tensor) -> Tensor:
            if self.num_calls == 3:
                raise KeyboardInterrupt
            return super().encode(frames)

    def run(vae: TinyVAE, folder: Path) -> None:
        encode_dataset(
            vae,
            dataset_dir,
            folder,
            fingerprint="v1",
            num_frames=9,
            batch_size=1,
            clips_per_shard=2,
            progress=False,
        )

    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(), tmp_path / "a")
    assert len(json.loads((tmp_path / "a" / "index.json").read_text())["clips"]) == 2
    vae = TinyVAE()
    run(vae, tmp_path / "a")
    assert vae.num_calls == 4
    run(vae, tmp_path / "a")
    assert vae.num_calls == 4
    run(TinyVAE(), tmp_path / "b")
    one, other = LatentsCache(tmp_path / "a"), LatentsCache(tmp_path / "b")
    for i in range(6):
        assert torch.equal(one.window(f"clip-{i:03d}", 0), other.window(f"clip-{i:03d}", 0))


def test_stale_caches_are_errors(make: Any, tmp_path: Path) -> None:
    root, folder = make.dataset(tmp_path / "talkers"), tmp_path / "latents"
    with pytest.raises(
        UserError,
        match=(
            r"expected a latents cache .*latents, got none: make it "
            r"with `rest encode`"
        ),
    ):
        LatentsCache(folder)
    settings: dict[str, Any] = {"fingerprint": "v1", "num_frames": 9, "progress": False}
    encode_dataset(TinyVAE(), root, folder, **settings)
    with pytest.raises(
        UserError, match=("expected latents of the VAE v2, got those of v1: make them again")
    ):
        LatentsCache(folder, fingerprint="v2")
    with pytest.raises(UserError, match="expected latents of 17 frames, got 9"):
        PreparedClips(root, "train", 17, latents=LatentsCache(folder, 17))
    with pytest.raises(
        UserError,
        match=("expected a latents cache with fingerprint v2, got one with v1: give another"),
    ):
        encode_dataset(TinyVAE(), root, folder, **settings | {"fingerprint": "v2"})
    cache = encode_dataset(
        TinyVAE(), root, folder, **settings | {"fingerprint": "v2"}, overwrite=True
    )
    assert cache.fingerprint == "v2"
    make.mp4(clip_path(root, "clip-000"), make.frames(41, 32, seed=9), make.speech(41 * 640))
    make.dataset(root, num_frames=(33, 41), splits=("train", "train"))
    with pytest.raises(
        UserError,
        match=("expected latents of the present clip clip-000, got those of an older version"),
    ):
        PreparedClips(root, "train", 9, latents=cache)
    with pytest.raises(UserError, match="expected latents of the present clip clip-000"):
        encode_dataset(TinyVAE(), root, folder, **settings | {"fingerprint": "v2"})
    (folder / "index.json").write_text("{}")
    with pytest.raises(UserError, match="expected cache version 1, got None"):
        LatentsCache(folder)


def test_unreadable_clips_are_left_out(make: Any, tmp_path: Path) -> None:
    root = make.dataset(tmp_path / "talkers")
    clip_path(root, "clip-001").write_bytes(b"nothing")
    settings: dict[str, Any] = {"fingerprint": "v1", "num_frames": 9, "progress": False}
    with pytest.raises(UserError, match=r"expected at most 0 unreadable clips, got 1 \(clip-001"):
        encode_dataset(TinyVAE(), root, tmp_path / "strict", **settings)
    cache = encode_dataset(TinyVAE(), root, tmp_path / "latents", max_corrupt=1, **settings)
    assert list(cache.index["corrupt"]) == ["clip-001"]
    clips = PreparedClips(root, "train", 9, latents=cache)
    assert len(clips) == 3
    assert clips.skipped == {"not in the latents cache": 1}


def test_clips_that_the_cache_has_not_seen_are_an_error(make: Any, tmp_path: Path) -> None:
    """Videos were added after `rest encode`: training on the old ones alone would be a silent
    mismatch.
    """
    root, folder = (
        make.dataset(tmp_path / "talkers", num_frames=(41, 41, 41, 20), splits=("train",) * 4),
        tmp_path / "l",
    )
    finish_dataset(root, {}, ["clip-000", "clip-001"])
    settings: dict[str, Any] = {"fingerprint": "v1", "num_frames": 9, "progress": False}
    encode_dataset(TinyVAE(), root, folder, **settings)
    finish_dataset(root, {})
    message = (
        r"expected latents of all 4 clips, got none of 2 \(first: clip-002\): run the same "
        r"`rest encode` again"
    )
    with pytest.raises(UserError, match=message):
        PreparedClips(root, "train", 9, latents=LatentsCache(folder))
    vae = TinyVAE()
    encode_dataset(vae, root, folder, **settings)
    assert vae.num_calls == 2, "a window of each new clip, and of no other"
    assert len(PreparedClips(root, "train", 9, latents=LatentsCache(folder))) == 4


def test_a_damaged_clip_is_not_encoded(make: Any, tmp_path: Path) -> None:
    """One that still decodes: only its checksum tells. Mended, it is encoded by the next run."""
    root, folder = make.dataset(tmp_path / "talkers"), tmp_path / "latents"
    path = clip_path(root, "clip-001")
    good = path.read_bytes()
    damaged = bytearray(good)
    damaged[damaged.index(b"mdat") + 600] ^= 0xFF
    path.write_bytes(damaged)
    settings: dict[str, Any] = {
        "fingerprint": "v1",
        "num_frames": 9,
        "progress": False,
        "max_corrupt": 1,
    }
    cache = encode_dataset(TinyVAE(), root, folder, **settings)
    assert list(cache.index["corrupt"]) == ["clip-001"]
    assert "expected the checksum of the manifest" in cache.index["corrupt"]["clip-001"]
    path.write_bytes(good)
    cache = encode_dataset(TinyVAE(), root, folder, **settings)
    assert not cache.index["corrupt"]
    torch.testing.assert_close(cache.window("clip-001", 0), direct(path, 16, 9).bfloat16().float())

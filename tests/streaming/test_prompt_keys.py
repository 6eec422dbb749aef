"""What a stream attends to of its prompt: real tokens alone, without a mask, in memory that
flash attention takes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rest_lightning.streaming.engine import ChunkEngine
from rest_lightning.talking_head import TalkingHead


def test_a_stream_reads_real_tokens_without_a_mask(make: Callable[..., TalkingHead]) -> None:
    head = make(caption_channels=12)
    wide = ChunkEngine(head, 3, head.sampling)
    for engine, batch in ((wide, 3), (wide.narrow(2), 2)):
        text = engine.state.text
        assert text is not None and text.mask is None and engine._text is text
        for key, value in text.blocks:
            for tensor in (key, value):
                assert tensor.shape == (
                    2 * batch,
                    2,
                    5,
                    16,
                )  # both branches of the guidance; 5 of 9 tokens are real
                assert 0 not in tensor.stride() and tensor.stride(-1) == 1
    narrow, whole = wide.narrow(2).state.text, wide.state.text
    assert narrow is not None and whole is not None
    assert narrow.blocks[0][0].data_ptr() == whole.blocks[0][0].data_ptr()


@pytest.mark.parametrize("real", [9, 5, 0])
def test_padding_left_out_is_padding_masked(make: Callable[..., TalkingHead], real: int) -> None:
    model = make(caption_channels=12).transformer
    assert model.prompt_mask is not None
    model.prompt_mask[:] = 0
    model.prompt_mask[:real] = 1
    latents = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    found = []
    for padded in (True, False):
        cache = model.new_cache(2, 2, 2)
        text = model.project_prompt(2, padded)
        assert text is not None and (text.mask is None) == (not padded and real > 0)
        with torch.no_grad():
            model.prefill(latents[:, :, :1], cache, text_embeds=text)
            found.append(model(latents, torch.full((2, 3), 0.5), None, text, cache=cache))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)

"""The fixed prompt: LTX-Video's own embedding of it, kept with the weights, read where no text is
passed.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rest_lightning.cli import main
from rest_lightning.models.ltx import PROMPT, encode_prompt
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.torchvision_compat import ensure_torchvision

TEXT_DIM = 12


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 with random weights and a tokenizer of whole words, in LTX-Video's layout."""
    ensure_torchvision()
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("ltx")
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys(PROMPT.replace(",", " ,").split())]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(
        folder / "tokenizer"
    )
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(words), d_model=TEXT_DIM, d_kv=4, d_ff=16, num_layers=2, num_heads=3
    )
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


def prompt_file(
    path: Path, length: int = 5, channels: int = TEXT_DIM
) -> tuple[str, dict[str, Any]]:
    mask = (torch.arange(length) < length - 2).float()
    state = {"prompt_embeds": torch.randn(length, channels), "prompt_mask": mask}
    save_file(state, path)
    return str(path), {"text_embeds": state["prompt_embeds"][None], "text_mask": mask[None]}


@pytest.mark.parametrize("length", [32, 128])
def test_encodes_as_the_pipeline_of_ltx(pipeline_folder: Path, tmp_path: Path, length: int) -> None:
    from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline
    from transformers import AutoTokenizer, T5EncoderModel

    out = tmp_path / "new/prompt.safetensors"
    assert (
        main(
            [
                "encode-prompt",
                "--ltx",
                str(pipeline_folder),
                "--out",
                str(out),
                "--length",
                str(length),
                "--unmasked",
            ]
        )
        == 0
    )
    pipeline = LTXPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=T5EncoderModel.from_pretrained(pipeline_folder / "text_encoder").eval(),
        tokenizer=AutoTokenizer.from_pretrained(pipeline_folder / "tokenizer"),
    )
    with torch.no_grad():
        embeds, mask, _, _ = pipeline.encode_prompt(
            PROMPT,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
            device=torch.device("cpu"),
        )
    state = load_file(out)
    assert torch.equal(state["prompt_mask"].bool(), mask[0].bool())
    assert 0 < state["prompt_mask"].sum() < length
    assert torch.allclose(state["prompt_embeds"], embeds[0], atol=1e-6)


def test_padding_does_not_reach_the_tokens_of_the_prompt(pipeline_folder: Path) -> None:
    """REST's form: the embedding of the tokens is that of the text alone, however long the
    padding.
    """
    with_mask = [encode_prompt(pipeline_folder, length=length) for length in (32, 64)]
    without = [encode_prompt(pipeline_folder, length=n, masked=False) for n in (32, 64)]
    num_tokens = int(with_mask[0][1].sum())
    assert num_tokens == int(with_mask[1][1].sum()) < 32
    first, second = (embeds[:num_tokens] for embeds, _ in with_mask)
    assert torch.allclose(first, second, atol=1e-5)
    first, second = (embeds[:num_tokens] for embeds, _ in without)
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("attention", ["full", "chunked"])
def test_own_prompt_is_the_same_as_text_that_is_passed(
    tmp_path: Path, lab: SimpleNamespace, attention: str
) -> None:
    file, text = prompt_file(tmp_path / "prompt.safetensors")
    plain = A2VDiT.from_config({**lab.make_student(text=True).config, "attention": attention})
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    own = A2VDiT.from_config({**plain.config, "prompt": file})
    own.load_state_dict(plain.state_dict(), strict=False)
    clip = {**lab.make_clip(plain, 2), "text_embeds": None, "text_mask": None}
    twice = {name: value.expand(2, *value.shape[1:]) for name, value in text.items()}
    with torch.no_grad():
        lab.assert_close(own(**clip), plain(**{**clip, **twice}))
        if attention == "chunked":
            caches = [model.new_cache(2, 2, 3) for model in (own, plain)]
            lab.assert_close(
                lab.sequential(own, clip, caches[0]),
                lab.sequential(plain, {**clip, **twice}, caches[1]),
            )


def test_the_prompt_travels_with_the_weights(tmp_path: Path, lab: SimpleNamespace) -> None:
    file, _ = prompt_file(tmp_path / "prompt.safetensors")
    teacher = A2VDiT.from_config(
        {**lab.make_student(text=True).config, "prompt": file, "attention": "full"}
    )
    (tmp_path / "prompt.safetensors").unlink()
    config = json.loads(json.dumps(teacher.config))
    assert (config["prompt"], config["prompt_length"]) == (None, 5)
    again = A2VDiT.from_config(config)
    again.load_state_dict(teacher.state_dict())
    for model in (again, teacher.to_student()):
        assert model.prompt_embeds is not None
        assert torch.equal(model.prompt_embeds, teacher.prompt_embeds)
        assert torch.equal(model.prompt_mask, teacher.prompt_mask)


def test_bad_prompts(tmp_path: Path, pipeline_folder: Path, lab: SimpleNamespace) -> None:
    config = lab.make_student(text=True).config
    file, _ = prompt_file(tmp_path / "wide.safetensors", channels=7)
    short, _ = prompt_file(tmp_path / "short.safetensors", length=4)
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("not a tensor")
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"prompt": str(tmp_path / "absent.safetensors")},
            ("expected the text embedding .* `rest encode-prompt --ltx"),
        ),
        (
            {"prompt": str(tmp_path / "other.safetensors")},
            ("expected prompt_embeds and prompt_mask in .*other"),
        ),
        (
            {"prompt": str(tmp_path / "text.safetensors")},
            ("expected prompt_embeds and prompt_mask in .*text"),
        ),
        ({"prompt": file}, r"expected a prompt of shape \(L, 12\), got \(5, 7\)"),
        (
            {"prompt": short, "prompt_length": 5},
            (
                r"expected a prompt of shape \(5, 12\), got \(4, "
                r"12\)"
            ),
        ),
        ({"prompt_length": 0}, "expected a prompt_length of at least 1, got 0"),
        (
            {"prompt": short, "caption_channels": None},
            ("expected no prompt with caption_channels=None"),
        ),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            A2VDiT.from_config({**config, **changes})
        assert "\n" not in str(caught.value)
    with pytest.raises(
        ValueError,
        match=(
            r"expected LTX-Video's T5 with text_encoder/, looked in "
            r".*hf download"
        ),
    ):
        encode_prompt(tmp_path)
    with pytest.raises(ValueError, match="expected a prompt of at most 4 tokens, got"):
        encode_prompt(pipeline_folder, length=4)

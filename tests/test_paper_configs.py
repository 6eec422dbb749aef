"""configs/paper: every part at full size on the meta device, counted against independent counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from rest_lightning.config import place_networks, read_config
from rest_lightning.lightning_cli import RestCLI
from rest_lightning.models.ltx import load_ltx
from rest_lightning.models.ltx_vae import VERSIONS, check_compression

STAGES = ("vae", "speech_ae", "teacher", "student", "asd")


def count(module: nn.Module, *without: str) -> int:
    return sum(
        p.numel()
        for name, p in module.named_parameters()
        if not any(part in name for part in without)
    )


class MetaChain:
    """The five stages one after the other, each from the checkpoints of those before; not a number
    is computed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prompt = folder / "prompt.safetensors"
        save_file(
            {"prompt_embeds": torch.zeros(128, 4096), "prompt_mask": torch.ones(128)}, self.prompt
        )
        self.clis = {stage: self.run(stage) for stage in STAGES}

    def run(self, stage: str) -> Any:
        """Instantiate a stage as `rest fit` would, without published weights, and write its
        checkpoint.
        """
        model: dict[str, Any] = {}
        if stage == "vae":
            model = {"vae": {"init_args": {"weights": None}}, "loss_weights": {"lpips": 0.0}}
        else:
            model["speech_encoder"] = {"init_args": {"weights": None}}
        before = {"teacher": "speech_ae", "student": "teacher", "asd": "student"}.get(stage)
        if before is not None:
            model["transformer"] = {"init_args": {"prompt": str(self.prompt)}}
            model["initial"] = {"vae": self.final("vae"), "speech_ae": self.final(before)}
            # the teacher starts from LTX-Video, which has a test of its own
            if before != "speech_ae":
                model["initial"]["transformer"] = self.final(before)
        if stage == "asd":
            model["asd"] = {"teacher": self.final("teacher")}
        overlay = self.folder / f"{stage}.yaml"
        trainer = {"accelerator": "cpu", "default_root_dir": str(self.folder / stage)}
        overlay.write_text(yaml.safe_dump({"model": {"init_args": model}, "trainer": trainer}))
        files = (f"paper/{stage}", overlay)
        with torch.device("meta"):
            words = [word for file in files for word in ("--config", str(file))]
            cli = RestCLI(words, run=False)
        checkpoint = {"state_dict": cli.model.state_dict()}
        cli.model.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, self.final(stage))
        return cli

    def final(self, stage: str) -> str:
        return str(self.folder / f"{stage}.ckpt")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> MetaChain:
    return MetaChain(tmp_path_factory.mktemp("meta"))


@pytest.mark.parametrize("stage", STAGES)
def test_every_part_stands_on_the_meta_device(chain: MetaChain, stage: str) -> None:
    module = chain.clis[stage].model
    teachers = {"teacher", "teacher_speech_ae"}
    parts = {"vae", "speech_ae", "speech_encoder", "transformer", *teachers}
    expected = {
        "vae": {"vae"},
        "speech_ae": {"speech_ae", "speech_encoder"},
        "asd": parts,
    }.get(stage, parts - teachers)
    assert {name for name, _ in module.named_children()} == expected
    tensors = [*module.named_parameters(), *module.named_buffers()]
    assert {name.rsplit(".", 1)[-1] for name, tensor in tensors if not tensor.is_meta} <= {
        "prompt_embeds",  # read from their file
        "prompt_mask",
    }
    assert Path(chain.final(stage)).stat().st_size < 8e6  # checkpoints of nothing but shapes


def test_transformer_holds_ltx_and_the_speech_attention(chain: MetaChain) -> None:
    from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel

    with torch.device("meta"):
        ltx = LTXVideoTransformer3DModel()  # diffusers' defaults are LTX-Video 0.9
    for stage in ("teacher", "student", "asd"):
        model = chain.clis[stage].model.transformer
        shared = {
            name: value.shape for name, value in model.named_parameters() if "speech" not in name
        }
        assert shared == {name: value.shape for name, value in ltx.named_parameters()}
        # Queries and output 2048 x 2048, keys and values 2048 (speech) x 2048, their biases, two
        # RMS norms.
        assert count(model) - count(ltx) == 28 * (4 * (2048 * 2048 + 2048) + 2 * 2048)
    load_ltx(chain.clis["teacher"].model.transformer, ltx)  # every tensor finds its place
    with torch.device("meta"):
        narrow = LTXVideoTransformer3DModel(num_layers=27)
    with pytest.raises(
        ValueError,
        match=(
            r"^expected LTX weights for num_layers 28, got 27: set "
            r"num_layers.*$"
        ),
    ):
        load_ltx(chain.clis["teacher"].model.transformer, narrow)


def test_other_parts_have_the_published_sizes(chain: MetaChain) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
    from transformers import WhisperConfig, WhisperModel

    with torch.device("meta"):
        ltx_vae = AutoencoderKLLTXVideo(**VERSIONS["0.9.1"])
        whisper = WhisperModel(
            WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6)
        )
    module = chain.clis["teacher"].model
    assert count(module.vae) == count(ltx_vae)
    assert count(module.speech_encoder) == count(whisper.encoder)
    assert module.speech_encoder.feature_dim == 5 * 384


def test_vae_is_the_one_that_the_paper_describes(chain: MetaChain) -> None:
    """REST sec. 3.1: 32x32x8, 128 channels, causal encoder, decoder with timestep and noise."""
    for stage in ("vae", "teacher", "student", "asd"):
        vae = chain.clis[stage].model.vae
        config = vae.ltx.config
        assert vae.latent_channels == 128
        check_compression(vae.ltx)
        assert config.encoder_causal
        assert config.timestep_conditioning
        assert sum(config.decoder_inject_noise) >= 2  # multi-layer noise
        assert dict(config) == dict(chain.clis["vae"].model.vae.ltx.config)
    vae_stage = chain.clis["vae"].model
    trained = {name for name, weight in vae_stage.named_parameters() if weight.requires_grad}
    assert trained
    assert not any("encoder" in name for name in trained)  # statistics stay LTX's


def test_speech_ae_has_the_parameters_of_its_layers(chain: MetaChain) -> None:
    width, features, latent, tokens = 1024, 1920, 2048, 2

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    # two causal convolutions of kernel 3, each with a norm
    block = 2 * (linear(3 * width, width) + width)
    halving = linear(2 * width, width)
    doubling = linear(width, 2 * width)
    window = linear(5 * width, width)
    encoder = linear(features, width) + window + 4 * block + 3 * halving + linear(width, latent)
    decoder = linear(latent, width) + 4 * block + 3 * doubling + window + linear(width, features)
    places_and_norms = (tokens + 10) * width + 2 * width
    assert count(chain.clis["teacher"].model.speech_ae) == encoder + decoder + places_and_norms


def test_values_of_the_paper(chain: MetaChain) -> None:
    rates = {"speech_ae": 1e-4, "teacher": 1e-5, "student": 1e-5, "asd": 1e-5}
    for stage, rate in rates.items():
        module = chain.clis[stage].model
        optimizer = module.configure_optimizers()["optimizer"]
        assert {group["initial_lr"] for group in optimizer.param_groups} == {rate}
        trained = {"speech_ae"} if stage == "speech_ae" else {"speech_ae", "transformer"}
        assert {group["name"].split("/")[0] for group in optimizer.param_groups} == trained
    for stage in ("teacher", "student", "asd"):
        cli = chain.clis[stage]
        module, data, trainer = cli.model, cli.datamodule, cli.trainer
        assert (trainer.accumulate_grad_batches, trainer.gradient_clip_val, trainer.precision) == (
            4,
            1.0,
            "bf16-mixed",
        )
        assert (data.size_px, data.num_frames, data.batch_size) == (512, 97, 1)
        assert data.audio_left_frames >= module.speech_encoder.left_context_frames
        assert data.audio_right_frames >= module.speech_encoder.lookahead_frames == 2
        noise = dataclasses.asdict(module.noise)
        assert noise == {
            "schedule": "cans",
            "chunk_length": 3,
            "chunk_lengths": (),
            "mean": 2.05,
            "std": 1.0,
            "num_levels": 1000,
            "motion_dropout": 0.5,
            "identity_dropout": 0.1,
            "audio_dropout": 0.1,
            "joint_dropout": 0.0,
            "uniform_share": 0.0,
        }
        model = module.transformer
        assert (model.num_layers, model.num_heads, model.dim, model.in_channels) == (
            28,
            32,
            2048,
            128,
        )
        assert model.gradient_checkpointing
        assert model.attention == ("full" if stage == "teacher" else "chunked")
        assert (model.rope.frame_s, model.rope.cell_px) == (8 / 25, 32)
        assert model.prompt_embeds.shape == (128, 4096)
        assert (module.speech_ae.num_tokens, module.speech_ae.latent_dim) == (2, 2048)
        assert module.vae.decoder_causal
        (samples,) = [c for c in trainer.callbacks if type(c).__name__ == "SampleVideos"]
        assert (samples.sampling.num_steps, samples.sampling.guidance, samples.sampling.shift) == (
            8,
            6.0,
            None,
        )
        assert {type(c).__name__ for c in trainer.callbacks} >= {
            "MovingAverage",
            "ModelCheckpoint",
        }
    asd = chain.clis["asd"].model
    assert (asd.asd.alpha, asd.asd.beta, asd.asd.temperature) == (0.2, 0.2, 0.1)
    assert asd.teacher.attention == "full"
    assert not any(parameter.requires_grad for parameter in asd.teacher.parameters())


def test_files_of_the_stages_agree() -> None:
    files = {stage: place_networks(read_config(f"paper/{stage}")) for stage in STAGES}
    parts = {stage: file["model"]["init_args"] for stage, file in files.items()}
    for name in ("speech_encoder", "speech_ae", "noise", "vae"):
        given = [parts[stage][name] for stage in ("teacher", "student", "asd")]
        assert all(each == given[0] for each in given)
    for name in ("speech_encoder", "speech_ae"):
        assert parts["speech_ae"][name] == parts["teacher"][name]
    for name in ("ltx_config", "version"):
        assert parts["vae"]["vae"]["init_args"][name] == parts["teacher"]["vae"]["init_args"][name]
    finals = {f"{file['trainer']['default_root_dir']}/final.ckpt" for file in files.values()}
    sources = [source for each in parts.values() for source in (each.get("initial") or {}).values()]
    sources.append(parts["asd"]["asd"]["teacher"])
    assert {source for source in sources if source.endswith(".ckpt")} <= finals

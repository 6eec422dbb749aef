"""configs/paper from published formats to a streaming student, every stage for one step, with tiny
networks.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_ltx import CONFIGS as LTX_CONFIGS
from tiny_ltx import make_ltx

from rest_lightning import lightning_cli
from rest_lightning.diffusion.sampling import Sampling
from rest_lightning.errors import UserError
from rest_lightning.torchvision_compat import ensure_torchvision

STAGES = ("vae", "speech_ae", "teacher", "student", "asd")
VAE_CHANGES: dict[str, Any] = {
    "latent_channels": 4,
    "decoder_inject_noise": [True, True, True, False],
}
TINY_TRAINER = {
    "accelerator": "cpu",
    "max_steps": 1,
    "val_check_interval": 4,  # forwards: once per optimiser step
    "limit_val_batches": 1,
    "enable_progress_bar": False,
    "log_every_n_steps": 1,
}


class TinyPaper:
    """Weights of tiny networks in the published formats, and the paper's stages on them."""

    def __init__(self, root: Path, data: Path) -> None:
        ensure_torchvision()
        from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
        from transformers import WhisperConfig, WhisperModel

        self.root, self.data = root, data
        self.clis: dict[str, Any] = {}
        self.ltx, self.whisper, self.prompt = (
            root / "LTX-Video",
            root / "whisper",
            root / "prompt.safetensors",
        )
        torch.manual_seed(0)
        make_ltx("0.9.1", **VAE_CHANGES).save_pretrained(self.ltx / "vae")
        self.transformer = LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=2,
            caption_channels=10,
        )
        self.transformer.save_pretrained(self.ltx / "transformer")
        shape = {
            "d_model": 8,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 8,
        }
        shape |= {
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 8,
            "vocab_size": 60,
        }
        special = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "decoder_start")}
        WhisperModel(WhisperConfig(**shape, **special)).save_pretrained(self.whisper)
        state = {
            "prompt_embeds": torch.randn(6, 10),
            "prompt_mask": torch.tensor([1.0] * 4 + [0.0] * 2),
        }
        save_file(state, self.prompt)

    def run(self, stage: str, *words: str) -> Any:
        """`rest fit` of a stage with the files of configs/paper and an overlay of sizes and
        paths.
        """
        vae = {**LTX_CONFIGS["0.9.1"], **VAE_CHANGES, "decoder_causal": True}
        model: dict[str, Any] = {"vae": {"init_args": {"ltx_config": vae}}}
        data: dict[str, Any] = {
            "data_dir": str(self.data),
            "num_frames": 49,
            "num_workers": 0,
            "progress": False,
        }
        if stage == "vae":
            model["vae"]["init_args"]["weights"] = str(self.ltx)
            model["loss_weights"] = {"lpips": 0.0}
            data["num_frames_train"] = 9
        else:
            model["speech_encoder"] = {"init_args": {"weights": str(self.whisper)}}
            model["speech_ae"] = {"init_args": {"feature_dim": 16, "latent_dim": 8, "width": 8}}
        if stage == "speech_ae":
            del model["vae"]
            data["batch_size"] = 2
        else:
            data["size_px"] = 64
        before = {"teacher": "speech_ae", "student": "teacher", "asd": "student"}.get(stage)
        if before is not None:
            transformer: dict[str, Any] = {
                "caption_channels": 10,
                "prompt": str(self.prompt),
                "speech_dim": 8,
            }
            transformer |= {
                "in_channels": 4,
                "num_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 12,
            }
            model["transformer"] = {"init_args": transformer}
            source = self.ltx if stage == "teacher" else self.final(before)
            parts = {
                "vae": self.final("vae"),
                "speech_ae": self.final(before),
                "transformer": source,
            }
            model["initial"] = {part: str(path) for part, path in parts.items()}
        if stage == "asd":
            model["asd"] = {"teacher": str(self.final("teacher"))}
        trainer = {**TINY_TRAINER, "default_root_dir": str(self.root / stage)}
        overlay = self.root / f"{stage}.yaml"
        overlay.write_text(
            yaml.safe_dump({"model": {"init_args": model}, "data": data, "trainer": trainer})
        )
        files = (f"paper/{stage}", overlay)
        return lightning_cli.run(
            ["fit", *(word for file in files for word in ("--config", str(file))), *words]
        )

    def final(self, stage: str) -> Path:
        return self.root / stage / "final.ckpt"


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory, talkers: Path) -> TinyPaper:
    """All stages after one optimiser step each. Read only."""
    paper = TinyPaper(tmp_path_factory.mktemp("paper"), talkers)
    for stage in STAGES:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "no sample videos")
            paper.clis[stage] = paper.run(stage)
    return paper


@pytest.mark.parametrize("stage", STAGES)
def test_stage_trains(paper: TinyPaper, stage: str) -> None:
    cli = paper.clis[stage]
    assert cli.trainer.global_step == 1
    assert cli.trainer.fit_loop.batch_idx == (0 if stage == "speech_ae" else 3)  # four forwards
    assert paper.final(stage).is_file()
    assert bool(list((paper.root / stage).rglob("samples/*.mp4"))) == (stage != "speech_ae")


def test_teacher_starts_from_ltx(paper: TinyPaper) -> None:
    own = paper.clis["teacher"].model.transformer.state_dict()
    for name, value in paper.transformer.state_dict().items():
        assert torch.allclose(own[name], value, atol=1e-6), name  # one step of the warm-up away


def test_student_streams_with_its_prompt(paper: TinyPaper) -> None:
    from rest_lightning.callbacks.previews import borrowed_head

    with borrowed_head(paper.clis["asd"].model, Sampling(num_steps=2, guidance=6.0), 64) as head:
        assert head.transformer.prompt_embeds.shape == (6, 10)
        session = head.open(torch.zeros(3, 64, 64))
        frames = np.concatenate([session.push(np.zeros(40_000, np.float32)), session.flush()])
    assert frames.shape == (63, 64, 64, 3)


@pytest.mark.parametrize(
    ("stage", "word", "message"),
    [
        (
            "vae",
            "--model.vae.init_args.weights=absent",
            ("^expected LTX VAE weights .*absent.*hf download"),
        ),
        (
            "speech_ae",
            "--model.speech_encoder.init_args.weights=absent",
            ("^expected a Whisper model .*hf download"),
        ),
        (
            "teacher",
            "--model.transformer.init_args.prompt=absent",
            ("^expected the text embedding .* `rest encode"),
        ),
        (
            "teacher",
            "--model.initial.transformer=absent",
            ("^expected a checkpoint .* for transformer.*hf download"),
        ),
        (
            "asd",
            "--model.asd.teacher=absent",
            ("^expected a checkpoint or a model folder for transformer.* train that"),
        ),
    ],
)
def test_what_is_missing_is_one_line(paper: TinyPaper, stage: str, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        paper.run(stage, word)
    assert "\n" not in str(caught.value)


def test_other_weights_than_the_configuration_says(paper: TinyPaper) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"^expected LTX weights for num_layers 3, got 2: set "
            r"num_layers"
        ),
    ):
        paper.run("teacher", "--model.transformer.init_args.num_layers=3")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(paper: TinyPaper) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"^expected a `trainer` that this machine can run, got: "
            r".*gpu"
        ),
    ):
        paper.run("vae", "--trainer.accelerator=gpu")

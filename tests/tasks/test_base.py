"""The learning-rate curve, the parts a stage starts from, and which of them it trains and saves."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_student import make_student, make_teacher
from torch import nn

from rest_lightning.cli import main
from rest_lightning.errors import UserError
from rest_lightning.models.speech import LogMelEncoder
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.models.vae import CompactVAE
from rest_lightning.tasks.base import OptimizerSettings
from rest_lightning.tasks.speech_ae import SpeechAEModule
from rest_lightning.tasks.student import RolloutSettings, StudentModule
from rest_lightning.tasks.teacher import TeacherModule
from rest_lightning.tasks.vae import VAEModule
from rest_lightning.torchvision_compat import ensure_torchvision

ensure_torchvision()
import lightning  # noqa: E402
from lightning.pytorch.callbacks import RichProgressBar, Timer  # noqa: E402

from rest_lightning.lightning_cli import EndlessBar  # noqa: E402


def speech_ae_module(**settings: Any) -> SpeechAEModule:
    speech_ae = SpeechAE(feature_dim=160, num_tokens=2, latent_dim=8, width=8)
    return SpeechAEModule(
        speech_ae, LogMelEncoder(lookahead_frames=2), optimizer=OptimizerSettings(**settings)
    )


def attach(module: lightning.LightningModule, **arguments: Any) -> None:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "accelerator": "cpu",
    }
    module.trainer = lightning.Trainer(**quiet, enable_model_summary=False, **arguments)


@pytest.mark.parametrize("warmup_steps", [0, 1, 4, 10])
def test_warm_up_is_linear_and_then_constant(warmup_steps: int) -> None:
    module = speech_ae_module(warmup_steps=warmup_steps)
    fractions = [module.lr_fraction(step) for step in range(20)]
    assert fractions == pytest.approx(
        [min(1.0, (step + 1) / max(1, warmup_steps)) for step in range(20)]
    )


@pytest.mark.parametrize(("decay_start", "final"), [(0.0, 0.02), (0.5, 0.1), (0.9, 0.0)])
def test_decay_by_steps(decay_start: float, final: float) -> None:
    module = speech_ae_module(warmup_steps=0, decay_start=decay_start, final_lr_fraction=final)
    attach(module, max_steps=100)
    for step in range(0, 130, 10):
        progress = min(1.0, step / 100)
        expected = (
            1.0 if progress <= decay_start else max(final, (1 - progress) / (1 - decay_start))
        )
        assert module.lr_fraction(step) == pytest.approx(expected), step


@pytest.mark.parametrize(
    ("elapsed_s", "step", "progress"), [(0, 0, 0.0), (60, 0, 0.6), (60, 80, 0.8), (200, 1, 1.0)]
)
def test_decay_by_the_time_budget_or_by_steps_whichever_is_further(
    elapsed_s: float, step: int, progress: float
) -> None:
    module = speech_ae_module(warmup_steps=0, decay_start=0.5, final_lr_fraction=0.02)
    timer = Timer(timedelta(seconds=100))
    timer.load_state_dict({"time_elapsed": {"train": elapsed_s}})
    attach(module, max_steps=100, callbacks=[timer])
    assert module.progress(step) == pytest.approx(progress, abs=1e-3)
    assert module.lr_fraction(step) == pytest.approx(
        min(1.0, max(0.02, 2 * (1 - progress))), abs=1e-2
    )


def test_schedule_is_stepped_by_steps_and_parts_have_rates_of_their_own(recipe: Any) -> None:
    module = recipe.clis["student"].model
    module.optimizer_settings = OptimizerSettings(lr=1e-3, lr_factors={"speech_ae": 0.1})
    configured = module.configure_optimizers()
    assert configured["lr_scheduler"]["interval"] == "step"
    groups = configured["optimizer"].param_groups
    rates = {group["name"]: group["initial_lr"] for group in groups}
    assert {name: rates[name] for name in module.trained_parts} == pytest.approx(
        {"transformer": 1e-3, "speech_ae": 1e-4}
    )
    sizes = dict.fromkeys(module.trained_parts, 0)
    for group in groups:
        part = group["name"].split("/")[0]
        sizes[part] += sum(p.numel() for p in group["params"])
        assert group["initial_lr"] == rates[part]
    assert sizes["transformer"] == sum(p.numel() for p in module.transformer.parameters())
    read = [p for name, p in module.speech_ae.named_parameters() if not name.startswith("decoder")]
    # nothing reads the decoder in this stage
    assert sizes["speech_ae"] == sum(p.numel() for p in read)


@pytest.mark.parametrize(
    ("stage", "frozen"),
    [
        ("teacher", {"vae"}),
        ("student", {"vae"}),
        ("asd", {"vae", "teacher", "teacher_speech_ae"}),
        ("rollout", {"vae", "teacher", "teacher_speech_ae"}),
        ("distill", {"vae", "source"}),
    ],
)
def test_frozen_parts_are_left_alone_and_out_of_checkpoints(
    recipe: Any, stage: str, frozen: set[str]
) -> None:
    frozen = frozen | {"speech_encoder"}
    module = recipe.clis[stage].model
    assert set(module.frozen_parts) == frozen
    for name in frozen:
        part = getattr(module.train(), name)
        assert not any(child.training for child in part.modules())
        assert not any(p.requires_grad or p.grad is not None for p in part.parameters())
    assert all(getattr(module, name).training for name in module.trained_parts)
    sources = {"vae": recipe.vae_stage, "teacher": "teacher", "source": "asd"}
    for name in frozen & sources.keys():
        prefix = "vae." if name == "vae" else "transformer."
        state = torch.load(recipe.final(sources[name]), weights_only=False)["state_dict"]
        own = getattr(module, name).state_dict()
        for key, value in own.items():  # averaging rounds: 0.9 * x + 0.1 * x is not always x
            torch.testing.assert_close(value, state[prefix + key], rtol=1e-5, atol=1e-7)
    for file in (recipe.final(stage), next((recipe.out / stage).rglob("last.ckpt"))):
        # last.ckpt is the end of the training, too, although one is due at every second step
        checkpoint = torch.load(file, weights_only=False)
        states = [
            checkpoint[key] for key in ("state_dict", "current_model_state") if key in checkpoint
        ]
        assert len(states) == 1 + ("last" in file.name) and checkpoint["global_step"] == 3
        for state in states:
            assert {key.split(".")[0] for key in state} == {"speech_ae", "transformer"}
        assert checkpoint["rest_parts"].keys() == {"speech_ae", "transformer"}
        assert checkpoint["rest_frozen_parts"].keys() == frozen


@pytest.mark.parametrize("stage", ["teacher", "student", "asd", "rollout", "distill"])
def test_stages_start_from_the_stages_before(recipe: Any, tmp_path: Path, stage: str) -> None:
    cli = recipe.run(stage, tmp_path, "--trainer.max_steps=0", "--final_checkpoint=false")
    before = {"teacher": "speech_ae", "student": "teacher", "asd": "student"}.get(stage, "asd")
    state = torch.load(recipe.final(before), weights_only=False)["state_dict"]
    own = cli.model.state_dict()
    names = [
        name for name in own if name.startswith(("speech_ae.", "transformer.")) and name in state
    ]
    assert names
    assert all(torch.equal(own[name], state[name]) for name in names)
    assert any(name.startswith("transformer.") for name in names) == (stage != "teacher")


def tiny_vae(**changes: Any) -> CompactVAE:
    shape = {
        "latent_channels": 4,
        "widths": (8, 16, 16),
        "encoder_blocks": (1, 1, 1),
        "decoder_blocks": (1, 1, 1),
    }
    return CompactVAE(
        **{**shape, "strides": ((4, 2), (2, 2)), "patch_size": 8, "principal_components": 8}
        | changes
    )


@pytest.mark.parametrize(
    ("part", "source", "message"),
    [
        (
            "vae",
            "absent.ckpt",
            (
                r"expected a checkpoint or a model folder for vae, got no such "
                r"file: .*train"
            ),
        ),
        (
            "vae",
            "speech_ae/final.ckpt",
            (
                r"expected a checkpoint that holds vae, got .* with "
                r"\['speech_ae'\]"
            ),
        ),
        ("vae", "", r"expected a model folder with vae/config\.json, got .*rest export"),
        (
            "transformer",
            "vae/final.ckpt",
            (
                r"expected a part of this stage to initialise, got "
                r"'transformer': remove it"
            ),
        ),
    ],
)
def test_initial_that_cannot_be_used(recipe: Any, part: str, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        VAEModule(tiny_vae(), initial={part: str(recipe.out / source)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        (tiny_vae(latent_channels=8), "with another shape in"),
        (tiny_vae(decoder_blocks=(2, 1, 1)), "with missing decoder"),
        (tiny_vae(encoder_blocks=(0, 1, 1)), "with"),
        (LogMelEncoder(), "expected vae of class LogMelEncoder, got CompactVAE"),
    ],
)
def test_initial_of_another_shape(recipe: Any, vae: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        VAEModule(vae, initial={"vae": str(recipe.final("vae"))})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "--model.initial.vae=absent.ckpt",
            ("^expected a checkpoint or a model folder for vae, got no such file"),
        ),
        ("--data.num_frames_train=10", "num_frames: .*8n"),
    ],
)
def test_mistakes_on_the_command_line_keep_their_one_line(
    recipe: Any, tmp_path: Path, word: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        recipe.run("vae", tmp_path, word)
    assert "\n" not in str(caught.value)


def test_checkpoint_of_somebody_else(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="none of ours"):
        VAEModule(tiny_vae(), initial={"vae": str(tmp_path / "other.ckpt")})


def test_norms_biases_and_tables_do_not_decay() -> None:
    module = make_student()
    module.optimizer_settings.weight_decay = 0.3
    optimizer = module.configure_optimizers()["optimizer"]
    names = {id(weight): name for name, weight in module.named_parameters()}
    decays = {
        names[id(weight)]: group["weight_decay"]
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    assert decays.keys() == {n for n, weight in module.named_parameters() if weight.requires_grad}
    for name, decay in decays.items():
        is_matrix = name.endswith(".weight") and "norm" not in name
        assert decay == (0.3 if is_matrix else 0.0), name
    assert decays["transformer.transformer_blocks.0.scale_shift_table"] == 0.0
    assert decays["transformer.transformer_blocks.0.attn1.to_q.weight"] == 0.3


def test_checkpoints_with_one_group_a_part_go_on() -> None:
    """Moments, rates and settings find their parameters: a step after loading is the same step."""
    steps = []
    for is_old in (True, False):
        module, other = make_student(), make_student()
        optimizer = module.configure_optimizers()["optimizer"]
        gradients = {
            name: torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
            for i, (name, weight) in enumerate(module.named_parameters())
        }
        if is_old:
            parts = [
                {
                    "params": [p for p in getattr(module, part).parameters() if p.requires_grad],
                    "name": part,
                    "weight_decay": 0.01,
                }
                for part in module.trained_parts
            ]
            optimizer = torch.optim.AdamW(parts, lr=3e-3, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        for name, weight in module.named_parameters():
            weight.grad = gradients[name] if weight.requires_grad else None
        optimizer.step()
        checkpoint = {
            "state_dict": module.state_dict(),
            "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [scheduler.state_dict()],
        }
        other.on_load_checkpoint(checkpoint)
        other.load_state_dict(checkpoint["state_dict"])
        configured = other.configure_optimizers()
        configured["optimizer"].load_state_dict(checkpoint["optimizer_states"][0])
        configured["lr_scheduler"]["scheduler"].load_state_dict(checkpoint["lr_schedulers"][0])
        groups = configured["optimizer"].param_groups
        assert len(groups) == 4
        assert {group["weight_decay"] for group in groups} == {0.0, 0.01}
        before = {name: weight.clone() for name, weight in other.named_parameters()}
        for name, weight in other.named_parameters():
            weight.grad = gradients[name] if weight.requires_grad else None
        configured["optimizer"].step()
        steps.append({n: weight - before[n] for n, weight in other.named_parameters()})
    for name, step in steps[0].items():
        torch.testing.assert_close(step, steps[1][name], atol=1e-6, rtol=1e-3)


def saved(stage: Any, path: Path) -> Path:
    """A checkpoint as Lightning writes it."""
    content = {"state_dict": stage.state_dict(), "hyper_parameters": dict(stage.hparams)}
    stage.on_save_checkpoint(content)
    torch.save(content, path)
    torch.load(path, weights_only=True)  # tensors and plain values alone
    return path


def test_a_stage_is_loaded_from_its_checkpoint(tmp_path: Path) -> None:
    stage = make_student(rollout=RolloutSettings(num_steps=3), mean=1.25)
    path = saved(stage, tmp_path / "student.ckpt")
    again = StudentModule.load_from_checkpoint(path)
    assert again.rollout == RolloutSettings(num_steps=3) and again.noise.mean == 1.25
    assert again.optimizer_settings == stage.optimizer_settings
    for name, value in stage.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    other = StudentModule.load_from_checkpoint(path, rollout=None, mouth_weight=3.0)
    assert other.rollout is None and other.mouth_weight == 3.0
    teacher = make_teacher(mean=1.5)
    loaded = TeacherModule.load_from_checkpoint(saved(teacher, tmp_path / "teacher.ckpt"))
    assert type(loaded) is TeacherModule and loaded.noise.mean == 1.5
    with pytest.raises(UserError, match=r"expected a checkpoint of VAEModule, got .*student.ckpt"):
        VAEModule.load_from_checkpoint(path)


def test_a_frozen_part_is_found_or_asked_for(recipe: Any) -> None:
    """The recipe's student names its VAE's checkpoint; without that file it has to be given."""
    path = recipe.final("student")
    loaded = StudentModule.load_from_checkpoint(path)
    assert torch.equal(loaded.vae.latents_std, recipe.clis["student"].model.vae.latents_std)
    assert loaded.sampling == recipe.clis["student"].model.sampling
    assert StudentModule.load_from_checkpoint(path, vae=None).vae is None
    with pytest.raises(UserError, match=r"expected the weights of the frozen vae, .* give vae="):
        StudentModule.load_from_checkpoint(path, initial={"vae": "nowhere.ckpt"})


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_stage_says_what_to_test_instead(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [command, "--config", "embedded/student", "--config", "model/tiny"]
    words += ["--config", "trainer/tiny", "--model.initial", "null"]
    assert main([*words, "--trainer.default_root_dir", str(tmp_path)]) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "error" in each]
    assert f"expected a model for rest {command}, got the stage StudentModule" in line


def test_a_training_without_a_last_epoch_shows_none(tmp_path: Path) -> None:
    trainer = lightning.Trainer(max_epochs=-1, max_steps=2, default_root_dir=tmp_path)
    bar = EndlessBar()
    bar._trainer = trainer
    assert bar._get_train_description(3).strip() == "Epoch 3"
    plain_bar = RichProgressBar()
    plain_bar._trainer = trainer
    assert "-2" in plain_bar._get_train_description(3)  # else Lightning needs no help any more

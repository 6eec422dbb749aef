"""Accumulated gradients are those of a larger batch; checkpoints hold averaged weights beside the
current ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import strategy_run
import torch
from tiny_student import make_conditions, make_student, make_transformer, save_transformer
from torch import Tensor

from rest_lightning.callbacks import MovingAverage
from rest_lightning.callbacks.averaging import averaged_parameters
from rest_lightning.errors import UserError
from rest_lightning.lightning_cli import LastAtTheEnd
from rest_lightning.tasks.a2v import A2VModule, Conditions, LossTable
from rest_lightning.tasks.student import ASDSettings
from rest_lightning.torchvision_compat import ensure_torchvision

ensure_torchvision()
import lightning  # noqa: E402
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402

NO_CHECKPOINTS = {"enable_checkpointing": False}


def fit(
    module: A2VModule,
    batches: list[slice],
    num_rows: int,
    folder: Path,
    validation: Any = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> None:
    """Lightning's loop over batches that are rows of one fixed draw."""

    def training_step(batch: int, batch_idx: int) -> Tensor:
        return strategy_run.losses_of(module, batches[batch], num_rows)["loss"]

    module.training_step = training_step  # type: ignore[method-assign, assignment]
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, **quiet, **settings
    )
    trainer.fit(module, range(len(batches)), validation, ckpt_path=ckpt_path)


@pytest.mark.parametrize("stage", ["teacher", "asd", "rollout", "distill"])
@pytest.mark.parametrize(("num_batches", "batch_size"), [(2, 2), (3, 1)])
def test_accumulated_gradients_are_those_of_one_batch(
    tmp_path: Path, stage: str, num_batches: int, batch_size: int
) -> None:
    num_rows = num_batches * batch_size
    module, whole = (strategy_run.make_stage(stage, tmp_path) for _ in range(2))
    gradients: list[dict[str, Tensor]] = []

    class Record(lightning.Callback):
        def on_before_optimizer_step(self, *args: Any) -> None:
            trained = {
                name: weight.grad
                for name, weight in module.named_parameters()
                if weight.requires_grad
            }
            gradients.append({name: grad.clone() for name, grad in trained.items()})

    batches = [slice(start, start + batch_size) for start in range(0, num_rows, batch_size)]
    settings = {
        "accumulate_grad_batches": num_batches,
        "max_steps": 1,
        "enable_checkpointing": False,
    }
    fit(module, batches, num_rows, tmp_path, callbacks=[Record()], **settings)
    strategy_run.losses_of(whole, slice(None), num_rows)["loss"].backward()
    (found,) = gradients
    for name, weight in whole.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(found[name], weight.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("decay", "accumulate"), [(0.5, 1), (0.9, 2)])
def test_checkpoints_hold_the_moving_average(tmp_path: Path, decay: float, accumulate: int) -> None:
    """Against ``a_1 = w_1, a_n = decay * a_(n-1) + (1 - decay) * w_n`` over the current weights of
    all checkpoints.
    """
    module = strategy_run.make_stage("asd", tmp_path)
    module.optimizer_settings.lr = 1e-2
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    batches = [slice(0, 1), slice(1, 2)] * accumulate * 2
    settings = {"accumulate_grad_batches": accumulate, "max_steps": 4}
    fit(module, batches, 2, tmp_path, callbacks=[MovingAverage(decay), save], **settings)
    average: dict[str, Tensor] = {}
    for step in range(1, 5):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=False)
        current, averaged = checkpoint["current_model_state"], checkpoint["state_dict"]
        trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
        assert current.keys() == trained < averaged.keys()
        for name, weight in current.items():
            average[name] = decay * average[name] + (1 - decay) * weight if step > 1 else weight
            torch.testing.assert_close(averaged[name], average[name], atol=1e-6, rtol=1e-5)
    assert any(
        float((average[name] - weight).abs().max()) > 1e-3 for name, weight in current.items()
    )
    for (
        name,
        weight,
    ) in module.state_dict().items():  # after training, the module has the averaged ones
        if name in average:
            torch.testing.assert_close(weight, average[name], atol=1e-6, rtol=1e-5)


def test_averages_trained_parts_alone_where_they_are(tmp_path: Path) -> None:
    """No copy of the frozen teacher; validation sees the average, training the current weights."""
    module = strategy_run.make_stage("asd", tmp_path)
    averaging = MovingAverage(0.5)
    seen: list[tuple[Tensor, Tensor]] = []

    class Look(lightning.Callback):
        def on_validation_end(self, *args: Any) -> None:
            seen.append((seen_in_validation[-1], module.transformer.proj_in.weight.clone()))

    seen_in_validation: list[Tensor] = []

    def validation_step(batch: int, batch_idx: int) -> None:
        seen_in_validation.append(module.transformer.proj_in.weight.detach().clone())

    module.validation_step = validation_step  # type: ignore[method-assign, assignment]
    module.optimizer_settings.lr = 1e-2
    settings = {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 0}
    callbacks = [averaging, Look()]
    batches = [slice(0, 1)] * 4
    fit(module, batches, 2, tmp_path, range(1), callbacks=callbacks, **settings, **NO_CHECKPOINTS)
    names = {name.split(".")[0] for name in averaging._average}
    assert names == {"transformer", "speech_ae"}
    parameters = averaged_parameters(module)
    held = {value.untyped_storage().data_ptr() for value in averaging._average.values()}
    assert len(held) == len(parameters)
    copied = sum(value.untyped_storage().nbytes() for value in averaging._average.values())
    assert copied == sum(parameter.nbytes for parameter in parameters.values())
    everything = sum(parameter.nbytes for parameter in module.parameters())
    assert copied < 0.6 * everything  # the teacher is the other half
    assert len(seen) == 2
    for averaged, current in seen:
        assert not torch.equal(averaged, current)
    assert torch.equal(module.transformer.proj_in.weight, seen[-1][0])


def test_resuming_without_a_step_left_keeps_the_average(tmp_path: Path) -> None:
    """A run that was killed after its last checkpoint leaves what it would have left."""
    batches, whole = [slice(0, 1)] * 3, strategy_run.make_stage("student", tmp_path)
    whole.optimizer_settings.lr = 1e-2
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    fit(whole, batches, 2, tmp_path, callbacks=[MovingAverage(0.5), save], max_steps=3)
    last = tmp_path / "step=3.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    # Lightning's callback, which runs used before, keeps the current weights of all parts.
    names = checkpoint["state_dict"].keys() - checkpoint["current_model_state"].keys()
    assert names
    kept = {**checkpoint["state_dict"], **checkpoint["current_model_state"]}
    torch.save({**checkpoint, "current_model_state": kept}, tmp_path / "before.ckpt")
    for source in (last, tmp_path / "before.ckpt"):
        resumed, averaging = strategy_run.make_stage("student", tmp_path), MovingAverage(0.5)
        again = {"callbacks": [averaging], "max_steps": 3, **NO_CHECKPOINTS}
        fit(resumed, batches, 2, tmp_path, ckpt_path=source, **again)
        for name, weight in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], weight), name
        for name, weight in checkpoint["current_model_state"].items():
            assert torch.equal(averaging._average[name], weight), name


def test_the_last_checkpoint_does_not_tell_whether_the_run_was_interrupted(tmp_path: Path) -> None:
    """Both are the end, although a checkpoint is due at every second step alone."""
    batches, ends = [slice(0, 1)] * 3, {}
    for name, source in (("whole", None), ("resumed", tmp_path / "whole" / "step=2.ckpt")):
        module = strategy_run.make_stage("student", tmp_path)
        module.optimizer_settings.lr = 1e-2
        save = ModelCheckpoint(
            tmp_path / name, "{step}", save_top_k=-1, every_n_train_steps=2, save_last=True
        )
        present = [LastAtTheEnd(), MovingAverage(0.5), save]
        fit(module, batches, 2, tmp_path, ckpt_path=source, callbacks=present, max_steps=3)
        ends[name] = torch.load(tmp_path / name / "last.ckpt", weights_only=True)
    assert ends["whole"]["global_step"] == ends["resumed"]["global_step"] == 3
    for key in ("state_dict", "current_model_state"):
        for name, weight in ends["whole"][key].items():
            assert torch.equal(ends["resumed"][key][name], weight), name


def test_sharded_networks_take_their_own_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = strategy_run.make_stage("student", tmp_path)
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    module.trainer = lightning.Trainer(accelerator="cpu", callbacks=[EMAWeightAveraging()], **quiet)
    monkeypatch.setattr(module, "_device_mesh", "any mesh")
    with pytest.raises(
        UserError,
        match=r"expected rest_lightning\.callbacks\.MovingAverage .*, got EMAWeightAveraging:",
    ):
        module.configure_model()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["teacher", "asd", "rollout"])
def test_compiled_blocks_train_alike(tmp_path: Path, stage: str) -> None:
    """How far three steps move the weights (averaged), with and without recomputing the blocks."""
    moves = []
    for is_compiled, recomputes in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        module = strategy_run.make_stage(stage, tmp_path)
        start = {name: weight.clone() for name, weight in module.state_dict().items()}
        module.compile_blocks, module.transformer.gradient_checkpointing = is_compiled, recomputes
        fit(
            module,
            [slice(0, 2)] * 3,
            2,
            tmp_path,
            callbacks=[MovingAverage(decay=0.5)],
            max_steps=3,
        )
        state = module.state_dict()
        assert state.keys() == start.keys()
        moves.append(
            torch.cat([(state[name] - weight).flatten() for name, weight in start.items()])
        )
    eager = moves.pop(0)
    for move in (
        moves
    ):  # Adam makes a whole step of a gradient that is rounding alone: compare them all together
        assert 0 < float((move - eager).norm()) <= 0.01 * float(eager.norm())


def test_compiling_needs_a_compiler_and_whole_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = strategy_run.make_stage("student", tmp_path)
    module.compile_blocks = True
    module.trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(
            UserError, match="expected a C\\+\\+ compiler for compile_blocks on a CPU, found none:"
        ):
            module.configure_model()
    monkeypatch.setattr(module, "_device_mesh", "any mesh")
    with pytest.raises(
        UserError, match="expected no compile_blocks with sharded networks, got both:"
    ):
        module.configure_model()


@pytest.mark.parametrize("whose", ["own", "student"])
def test_the_teacher_hears_through_its_own_speech_ae(tmp_path: Path, whose: str) -> None:
    """The student's SpeechAE goes on training; the teacher's speech must not go with it."""
    teacher = save_transformer(make_transformer("full", seed=5), tmp_path / "teacher.ckpt")
    settings = ASDSettings(teacher, teacher_speech=whose)  # type: ignore[arg-type]
    module = make_student(asd=settings, audio_dropout=0.5)
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    assert not any(name.startswith("teacher") for name in trained)
    heard: list[Tensor] = []
    module.teacher.register_forward_pre_hook(lambda _, args: heard.append(args[2]))
    features = torch.randn(4, 49, 10, 160)

    def drops(seed: int) -> int:
        drawn = module.draw(make_conditions(4), torch.Generator().manual_seed(seed))
        return int(drawn.drops.audio.sum())

    seed = next(seed for seed in range(100) if drops(seed) in (1, 2, 3))

    def step() -> tuple[Tensor, Tensor]:
        clean = make_conditions(4)
        speech = module.speech_ae.encode(features)
        conditions = Conditions(clean.latents, speech, None, module.teacher_speech(features))
        inputs = module.draw(conditions, torch.Generator().manual_seed(seed))
        module.losses(inputs)["loss"].backward()
        return heard[-1].detach(), inputs.speech_latents.detach()

    first, student_first = step()
    assert torch.equal(first, student_first)  # both begin with the teacher's SpeechAE
    assert (first == 0).all(dim=(1, 2, 3)).any()  # dropped alike
    with torch.no_grad():
        for parameter in module.speech_ae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    second, student_second = step()
    assert not torch.equal(student_second, student_first)
    assert torch.equal(second, first if whose == "own" else student_second)
    with pytest.raises(UserError, match=r"expected asd\.teacher_speech of own, student, got 'x'"):
        ASDSettings(teacher, teacher_speech="x")  # type: ignore[arg-type]


def test_losses_by_chunk_and_noise_level(tmp_path: Path) -> None:
    """Two draws, against means over the very frames; none of the levels is left out."""
    module = make_student(motion_dropout=0.0)
    table, errors, sigmas = LossTable(), [], []
    for seed in range(2):
        inputs = module.draw(make_conditions(3, 7), torch.Generator().manual_seed(seed))
        velocity = torch.randn_like(inputs.path.velocity)
        table.add(velocity, inputs)
        errors.append((velocity - inputs.path.velocity)[:, :, 1:].square().mean((1, 3, 4)))
        sigmas.append(inputs.path.sigma[:, 1:])
    error, sigma = torch.cat(errors), torch.cat(sigmas)
    means = table.means(lambda x: x)
    for chunk in (0, 1):
        expected = float(error[:, 3 * chunk : 3 * chunk + 3].mean())
        assert means[f"flow_loss_chunk_{chunk + 1}"] == pytest.approx(expected, rel=1e-5)
    assert "flow_loss_chunk_3" not in means
    total = 0
    for low, high in ((0, 0.5), (0.5, 0.8), (0.8, 0.95), (0.95, 1)):
        inside = (sigma > low) & (sigma <= high)
        total += int(inside.sum())
        name = f"flow_loss_sigma_{low:g}_{high:g}"
        assert (name in means) == bool(inside.any())
        if inside.any():
            assert means[name] == pytest.approx(float(error[inside].mean()), rel=1e-5)
    assert total == sigma.numel()
    twice = table.means(lambda x: x + x)  # a second process with the same clips
    assert twice == pytest.approx(means)


def test_chunk_lengths_are_drawn_per_batch() -> None:
    """Every length turns up, noise follows it, and the forward is that of a student of that length
    alone.
    """
    several = make_transformer(trained_lengths=(1, 2, 3))
    module = make_student(several, chunk_lengths=(1, 2, 3))
    drawn = set()
    for seed in range(12):
        inputs = module.draw(make_conditions(num_frames=9), torch.Generator().manual_seed(seed))
        length = inputs.chunk_length
        assert (
            inputs.clean_latents.shape[2]
            == inputs.speech_latents.shape[1]
            == 1 + 8 // length * length
        )
        drawn.add(length)
        chunks = inputs.path.sigma[:, 1:].unflatten(1, (-1, length))
        assert torch.equal(chunks, chunks[:, :, :1].expand_as(chunks))
        alone = make_student(make_transformer(chunk_length=length))
        alone.transformer.load_state_dict(several.state_dict())
        assert torch.equal(module(inputs), alone(inputs))
    assert drawn == {1, 2, 3}
    with pytest.raises(UserError, match=r"expected one set of chunk lengths, got \[1, 2, 3\]"):
        make_student(several)

"""VAE and SpeechAE stages: losses, statistics, learning."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_ltx import make_vae

from rest_lightning.cli import main
from rest_lightning.diffusion.losses import speech_ae_loss
from rest_lightning.errors import UserError
from rest_lightning.models.discriminator import PatchDiscriminator, random_pieces
from rest_lightning.models.speech import LogMelEncoder
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.models.vae import CompactVAE
from rest_lightning.tasks.base import OptimizerSettings
from rest_lightning.tasks.regions import random_crops, region_weights
from rest_lightning.tasks.speech_ae import SpeechAEModule
from rest_lightning.tasks.vae import (
    LatentMoments,
    VAELossWeights,
    VAEModule,
    border_jump_ratio,
    psnr_db,
)
from rest_lightning.torchvision_compat import ensure_torchvision

ensure_torchvision()
from lightning import Callback, Trainer  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402


def module(**weights: float) -> VAEModule:
    vae = CompactVAE(4, (8, 12, 16), (1, 1, 1), (1, 1, 1), ((4, 2), (2, 2)), patch_size=8)
    return VAEModule(vae, VAELossWeights(**weights), OptimizerSettings(lr=1.5e-2, warmup_steps=1))


def batch(num_frames: int = 9) -> dict[str, Any]:
    ramp = torch.linspace(-1, 1, 64)
    image = torch.stack(
        [ramp.expand(64, 64), ramp[:, None].expand(64, 64), ramp.flip(0).expand(64, 64)]
    )
    frames = torch.stack([image.roll(2 * i, dims=-1) for i in range(num_frames)], dim=1)[None]
    return {"frames": frames, "landmarks": torch.full((1, num_frames, 3, 2), 0.5)}


def test_vae_loss_falls_on_one_batch() -> None:
    torch.manual_seed(0)
    task = module(difference=1.0, border=2.0, mouth=4.0)
    optimizer = task.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(40):
        loss = task.losses(batch())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses[::10]


def test_encoders_with_published_statistics_are_not_trained() -> None:
    vae = make_vae("0.9.1")
    with pytest.raises(UserError, match="expected train_encoder false for LTXVideoVAE"):
        VAEModule(vae)
    task = VAEModule(vae.requires_grad_(True), train_encoder=False)
    trained = {name for name, weight in task.named_parameters() if weight.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"decoder"}


def test_speech_ae_loss_falls_on_one_batch() -> None:
    torch.manual_seed(0)
    encoder = LogMelEncoder(lookahead_frames=2)
    speech_ae = SpeechAE(feature_dim=160, num_tokens=2, latent_dim=8, width=16)
    task = SpeechAEModule(speech_ae, encoder, optimizer=OptimizerSettings(lr=1e-2, warmup_steps=1))
    samples = torch.randn(2, 640 * 17) * torch.linspace(0.01, 0.3, 640 * 17)
    features = encoder(encoder.pad(samples))
    optimizer = task.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(60):
        loss = speech_ae_loss(task(features), features, temperature=task.temperature).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses[::10]


@pytest.mark.parametrize(("mouth", "border", "motion"), [(1.0, 1.0, 0.0), (8.0, 3.0, 5.0)])
def test_loss_terms_are_their_definitions(mouth: float, border: float, motion: float) -> None:
    options = {"border": border, "mouth": mouth, "eyes": mouth, "motion": motion}
    task = module(l1=1.0, l2=3.0, difference=2.0, kl=0.5, **options).eval()
    data = batch(17)
    with torch.no_grad():
        terms = task.losses(data)
        reconstruction, mean, log_variance = task(data["frames"])
    weights = region_weights(data["landmarks"], (64, 64), mouth, mouth)
    still = sum(data["frames"][:, :, i] for i in range(17)) / 17
    for i in range(17):
        distance = (data["frames"][:, :, i] - still).abs().mean(dim=1)
        weights[:, 0, i] *= 1 + motion * distance
    error = reconstruction - data["frames"]
    assert float(terms["l1"]) == pytest.approx(float((weights * error.abs()).mean()), rel=1e-5)
    squared = float((weights * error**2).mean())
    assert float(terms["l2"]) == pytest.approx(squared, rel=1e-5)
    total = 0.0
    for i in range(1, 17):
        change = (weights[:, :, i] * (error[:, :, i] - error[:, :, i - 1]).abs()).mean()
        total += float(change) * (border if (i - 1) % 8 == 0 else 1.0) / 16
    assert float(terms["difference"]) == pytest.approx(total, rel=1e-5)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    assert float(terms["kl"]) == pytest.approx(float(kl), rel=1e-5)
    assert float(terms["loss"]) == pytest.approx(
        float(terms["l1"]) + 3 * squared + 2 * total + 0.5 * float(kl), rel=1e-5
    )


def test_region_weights_of_known_and_unknown_landmarks() -> None:
    landmarks = torch.full((1, 2, 3, 2), float("nan"))
    landmarks[0, 0, 0] = torch.tensor([0.5, 0.75])  # mouth of the first frame alone
    weights = region_weights(landmarks, (64, 64), mouth=5.0, eyes=3.0)
    assert weights.shape == (1, 1, 2, 64, 64)
    assert weights[0, 0, 0, 48, 32] == 5
    assert weights[0, 0, 0, 10, 10] == 1
    assert (weights[0, 0, 1] == 1).all()


@pytest.mark.parametrize("centred", [0.0, 0.5, 1.0])
def test_squares_hold_the_mouth_as_often_as_asked(centred: float) -> None:
    torch.manual_seed(0)
    count, side, mouth_px = 400, 16, 20
    frames = torch.arange(128.0 * 128).view(1, 1, 1, 128, 128).expand(count, 3, 1, -1, -1)
    centres = torch.full((count, 1, 2), (mouth_px + 0.5) / 128)
    squares, weights = random_crops(frames, frames[:, :1], centres, side, centred)
    assert squares.shape == (count, 3, 1, side, side)
    assert torch.equal(squares[:, :1], weights)
    held = (squares[:, 0, 0] == mouth_px * 128 + mouth_px).flatten(1).any(1).float().mean()
    by_chance = ((side / (128 - side + 1)) ** 2) * (1 - centred)
    assert float(held) == pytest.approx(centred + by_chance, abs=0.07)
    if centred == 1.0:
        assert held == 1.0


def test_moments_are_those_of_all_latents_together() -> None:
    pieces = [torch.randn(2, 4, 3, 2, 2) * 3 + 1, torch.randn(1, 4, 5, 2, 2)]
    moments = LatentMoments(4)
    for piece in pieces:
        moments.update(piece)
    mean, std = moments.compute()
    for row, part in ((0, slice(0, 1)), (1, slice(1, None))):
        flat = torch.cat([piece[:, :, part].movedim(1, 0).flatten(1) for piece in pieces], dim=1)
        torch.testing.assert_close(mean[row], flat.mean(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(std[row], flat.std(1, correction=0), atol=1e-5, rtol=1e-5)


def test_jump_ratio_and_psnr() -> None:
    steps = torch.ones(24)
    steps[8::8] = 3.0  # from frame 8 to 9 and from 16 to 17
    frames = torch.cat([torch.zeros(1), steps.cumsum(0)])[None, None, :, None, None].expand(
        1, 3, 25, 2, 2
    )
    assert float(border_jump_ratio(frames)) == pytest.approx(3.0)
    assert float(psnr_db(torch.tensor(0.04))) == pytest.approx(20.0)


def test_final_checkpoint_holds_the_statistics_of_its_own_weights(recipe: Any) -> None:
    cli = recipe.clis["vae"]
    state = torch.load(recipe.final("vae"), weights_only=False)["state_dict"]
    data = cli.datamodule.on_after_batch_transfer(next(iter(cli.datamodule.val_dataloader())))
    vae = CompactVAE.from_config(cli.model.vae.config)
    vae.load_state_dict({key.removeprefix("vae."): value for key, value in state.items()})
    with torch.no_grad():
        mean = vae.encode_moments(data["frames"])[0]
    moments = LatentMoments(mean.shape[1])
    moments.update(mean)
    torch.testing.assert_close(vae.latents_mean, moments.compute()[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae.latents_std, moments.compute()[1], atol=1e-4, rtol=1e-4)
    assert state["vae.latents_std"].std() > 0


def test_principal_path_is_set_before_the_first_stage_and_never_trained(recipe: Any) -> None:
    states = [
        torch.load(recipe.final(stage), weights_only=False)["state_dict"]
        for stage in ("vae", "vae_whole")
    ]
    keys = [key for key in states[0] if key.startswith("vae.principal.")]
    assert keys
    for key in keys:
        assert states[0][key].any(), f"{key} was not set"
        # Averaging rounds: 0.9 * x + 0.1 * x is not always x.
        torch.testing.assert_close(states[0][key], states[1][key], atol=1e-6, rtol=1e-5)
    with pytest.raises(
        UserError, match=("expected a VAE with a principal path, got CompactVAE without one")
    ):
        VAEModule(module().vae, principal_batches=1)


def test_training_the_decoder_alone_leaves_the_latents_as_they_are() -> None:
    torch.manual_seed(0)
    vae = CompactVAE(
        4, (8, 12, 16), (1, 1, 1), (1, 1, 1), ((4, 2), (2, 2)), 8, principal_components=8
    )
    assert vae.principal is not None
    for parameter in vae.principal.parameters():
        parameter.normal_(std=0.05)
    task = VAEModule(
        vae, VAELossWeights(), OptimizerSettings(lr=1e-2, warmup_steps=1), train_encoder=False
    )
    frames = batch()["frames"]
    with torch.no_grad():
        before = vae.encode(frames), vae.decode(vae.encode(frames))
    optimizer = task.configure_optimizers()["optimizer"]
    for _ in range(3):
        optimizer.zero_grad()
        task.losses(batch())["loss"].backward()
        optimizer.step()
    task.on_validation_epoch_start()
    task._moments.update(vae.encode_moments(frames)[0])
    task.on_validation_epoch_end()
    with torch.no_grad():
        assert torch.equal(vae.encode(frames), before[0])
        assert not torch.equal(vae.decode(before[0]), before[1])


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_latent_noise_is_relative_to_the_latents_and_for_training_only(strength: float) -> None:
    torch.manual_seed(0)
    vae = CompactVAE(4, (8, 12, 16), (1, 1, 1), (1, 1, 1), ((4, 2), (2, 2)), 8)
    vae.latents_std.copy_(torch.tensor([[0.1, 1.0, 5.0, 2.0], [3.0, 0.2, 1.0, 0.5]]))
    # clamped: practically no noise of the VAE's own
    torch.nn.init.constant_(vae.encoder_out.bias[4:], -60.0)
    task = VAEModule(vae, latent_noise=strength)
    seen: list[torch.Tensor] = []

    def decode_raw(latents: torch.Tensor) -> torch.Tensor:
        seen.append(latents.detach())
        return latents

    vae.decode_raw = decode_raw  # type: ignore[assignment, method-assign]
    frames = torch.rand(64, 3, 17, 32, 32) * 2 - 1
    for training in (True, False):
        task.train(training)
        mean = task(frames)[1].detach()
        error = vae.normalise(seen[-1]) - vae.normalise(mean)
        for slot in (slice(0, 1), slice(1, None)):
            # The strength is uniform in 0 .. s: its mean square is s^2 / 3.
            expected = strength / 3**0.5 if training else 0.0
            spread = error[:, :, slot].square().mean(dim=(0, 2, 3, 4)).sqrt()
            torch.testing.assert_close(spread, torch.full((4,), expected), atol=2e-3, rtol=0.3)


def test_principal_batches_need_the_data_module() -> None:
    import lightning

    vae = CompactVAE(
        4, (8, 12, 16), (1, 1, 1), (1, 1, 1), ((4, 2), (2, 2)), 8, principal_components=8
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    with pytest.raises(
        UserError,
        match="expected the loader of a TalkingHeadDataModule to draw clips from, got DataLoader",
    ):
        trainer.fit(
            VAEModule(vae, principal_batches=1),
            torch.utils.data.DataLoader([batch()], batch_size=None),
        )


def test_a_training_logs_its_speed_and_the_norms_of_its_gradients(tmp_path: Path) -> None:
    class Clips(torch.utils.data.Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> dict[str, Any]:
            time.sleep(0.02)
            clip = {name: value[0] for name, value in batch().items()}
            return {**clip, "clip_id": str(index)}

    task = module()
    norms: list[float] = []

    class Norm(Callback):
        def on_before_optimizer_step(self, *args: Any) -> None:
            grads = [p.grad.flatten() for p in task.vae.parameters() if p.grad is not None]
            norms.append(float(torch.cat(grads).norm()))

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer = Trainer(
        accelerator="cpu", max_steps=4, accumulate_grad_batches=2, log_every_n_steps=2,
        gradient_clip_val=1e-3, logger=logger, callbacks=[Norm()], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(Clips(), batch_size=1))
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["grad_norm/vae"]]
    assert [int(row["step"]) for row in rows] == [1, 3]
    assert [float(row["grad_norm/vae"]) for row in rows] == pytest.approx(norms[1::2], rel=1e-4)
    for row in rows:
        assert 0 < float(row["speed/data_wait"]) < 1
        assert 0 < float(row["speed/samples_per_second"]) < 1 / 0.02


def test_moments_of_several_processes_are_those_of_one() -> None:
    """Processes that saw other clips, one of them none: the sums are added, not the moments."""
    latents = torch.randn(6, 3, 4, 2, 2) * torch.tensor([1.0, 3.0, 0.2]).view(1, 3, 1, 1, 1) + 2
    ranks = [LatentMoments(3) for _ in range(3)]
    whole = LatentMoments(3)
    whole.update(latents)
    for moments, rows in zip(ranks, (latents[:5], latents[5:]), strict=False):
        moments.update(rows)
    shares = {
        name: [getattr(moments, name) for moments in ranks]
        for name in ("count", "sum", "square_sum")
    }
    totals = iter(torch.stack(share).sum(0) for share in shares.values())
    together = ranks[0].reduced(lambda own: next(totals))
    for own, expected in zip(together.compute(), whole.compute(), strict=True):
        torch.testing.assert_close(own, expected)
    assert not torch.allclose(ranks[0].compute()[0], whole.compute()[0], atol=1e-3)


def test_precisions_that_round_the_noise_table_are_refused() -> None:
    for precision, is_good in (("bf16-true", False), ("bf16-mixed", True), ("32-true", True)):
        task = module()
        task.trainer = Trainer(accelerator="cpu", precision=precision, logger=False)  # type: ignore[arg-type]
        if is_good:
            task.setup("fit")
            continue
        with pytest.raises(UserError, match=r"got trainer\.precision bf16-true, .*use bf16-mixed"):
            task.setup("fit")


def judged_module(start: int = 0) -> VAEModule:
    torch.manual_seed(0)
    vae = CompactVAE(4, (8, 12, 16), (1, 1, 1), (1, 1, 1), ((4, 2), (2, 2)), patch_size=8)
    weights, judge = VAELossWeights(adversarial=0.5, kl=0.0), PatchDiscriminator(width=4)
    return VAEModule(vae, weights, discriminator=judge, adversarial_start=start)


def gradients(loss: torch.Tensor, part: torch.nn.Module) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(part.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros(1) if each is None else each.flatten() for each in found])


def test_each_side_of_the_adversarial_loss_moves_its_own_weights() -> None:
    task, data = judged_module(), batch(17)
    terms = task.losses(data)
    vae, judge = task.vae, task.discriminator
    assert not gradients(terms["discriminator"], vae).any()
    assert not gradients(terms["adversarial"], judge).any()
    others = terms["l1"] + terms["difference"]
    together = gradients(terms["loss"], vae)
    apart = gradients(others, vae) + 0.5 * gradients(terms["adversarial"], vae)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        gradients(terms["loss"], judge), 0.03 * gradients(terms["discriminator"], judge)
    )
    waiting = judged_module(start=10).losses(data)
    expected = waiting["l1"] + waiting["difference"] + 0.03 * waiting["discriminator"]
    torch.testing.assert_close(waiting["loss"], expected)
    assert task.eval().losses(data).keys() == {"l1", "l2", "difference", "kl", "loss"}


def test_the_discriminator_learns_what_is_real_and_the_decoder_to_please_it() -> None:
    task, data = judged_module(), batch(17)
    judge, optimizer = task.discriminator, torch.optim.Adam(task.discriminator.parameters(), 1e-2)
    first = None
    for _ in range(30):
        terms = task.losses(data)
        first = first or float(terms["discriminator"].detach())
        optimizer.zero_grad()
        terms["discriminator"].backward()
        optimizer.step()
    assert float(terms["discriminator"].detach()) < 0.5 * first
    frames = task(data["frames"])[0]
    real = judge(random_pieces((data["frames"],), 3, 4)[0]).mean()
    fake = judge(random_pieces((frames,), 3, 4)[0]).mean()
    assert real > 0.5 > -0.5 > fake
    step = torch.autograd.grad(
        task._judged(frames, data["frames"], frames.sum())["adversarial"], frames
    )
    pleased = judge(random_pieces((frames - 0.02 * step[0].sign(),), 3, 4)[0]).mean()
    assert pleased > fake


def test_pieces_are_successive_frames_at_the_same_places() -> None:
    video = torch.arange(2.0 * 3 * 9).view(2, 3, 9, 1, 1)
    ones, twos = random_pieces((video, 2 * video), 4, count=5)
    assert ones.shape == (10, 3, 4, 1, 1)
    torch.testing.assert_close(twos, 2 * ones)
    assert (ones.diff(dim=2) == 1).all()
    assert PatchDiscriminator(4, num_frames=4)(torch.rand(10, 3, 4, 64, 96)).shape == (10, 8, 12)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_an_adversarial_loss_needs_a_discriminator(weight: float) -> None:
    judge = None if weight else PatchDiscriminator(4)
    with pytest.raises(UserError, match=r"expected a discriminator with loss_weights.adversarial"):
        VAEModule(CompactVAE(4), VAELossWeights(adversarial=weight), discriminator=judge)


def test_the_adversarial_stage_goes_on_with_the_decoder(
    recipe: Any, talkers: Path, tmp_path: Path
) -> None:
    words = ["fit", "--config", "embedded/vae_adversarial", "--config", "trainer/tiny"]
    words += ["--config", "size/tiny/vae", f"--data.data_dir={talkers}", "--quiet"]
    words += [f"--model.initial.vae={recipe.final('vae')}", "--trainer.max_steps=2"]
    words += ["--model.adversarial_start=0", f"--trainer.default_root_dir={tmp_path}"]
    assert main(words) == 0
    before = torch.load(recipe.final("vae"), weights_only=True)["state_dict"]
    found = torch.load(tmp_path / "final.ckpt", weights_only=True)
    assert found["rest_parts"].keys() == {"vae", "discriminator"}
    changed = {key for key, old in before.items() if not torch.equal(found["state_dict"][key], old)}
    assert changed and all(".decoder" in key or "principal_in" in key for key in changed), changed

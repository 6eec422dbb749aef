"""What does a model cost before it is trained? Parameters, FLOPs, memory, and time at a given
TFLOP/s, of every size.

``python -m benchmarks.model_cost --tflops 125 --out benchmarks/results/model_cost.json``

Nothing is computed: FLOPs are counted on the meta device, and memory is what the same calls would
allocate, on fake CPU tensors. Both run the project's own networks from configs/<size>/. README.md
explains every number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._cost import (
    LiveBytes,
    Size,
    count_flops,
    fake_tensors,
    prompt_length,
    read_size,
    training_formula,
    transformer_flops,
)
from benchmarks._result import origin, write_result
from rest_lightning.callbacks.averaging import averaged_parameters
from rest_lightning.constants import FPS, SAMPLES_PER_FRAME, TEMPORAL_RATIO, num_latent_frames
from rest_lightning.diffusion.losses import asd_loss, flow_matching_loss, speech_ae_loss
from rest_lightning.errors import UserError, exit_code
from rest_lightning.models.causal import Stream, num_bytes
from rest_lightning.models.speech_ae import SpeechAE
from rest_lightning.models.transformer import A2VDiT
from rest_lightning.tasks.a2v import BLOCK_METHODS, freeze_decoder
from rest_lightning.tasks.vae import freeze_encoder

STAGES = ("vae", "speech_ae", "teacher", "student", "asd")
GPUS = (1, 8, 64)


def trained_parts(size: Size, stage: str) -> dict[str, nn.Module]:
    """The networks that a stage trains, by part."""
    if stage in ("vae", "speech_ae"):
        return {stage: size.parts[stage]}
    return {
        "transformer": size.teacher if stage == "teacher" else size.parts["transformer"],
        "speech_ae": size.parts["speech_ae"],
    }


def frozen_parts(size: Size, stage: str) -> dict[str, nn.Module]:
    """The networks that a stage only reads."""
    names = {"vae": (), "speech_ae": ("speech_encoder",)}.get(stage, ("vae", "speech_encoder"))
    frozen = {name: size.parts[name] for name in names}
    if stage != "asd":
        return frozen
    own = {} if size.teacher_speech_ae is None else {"teacher_speech_ae": size.teacher_speech_ae}
    return {**frozen, "teacher": size.teacher, **own}


@torch.no_grad()
def read_batch(size: Size, stage: str) -> Tensor | tuple[Tensor, Tensor]:
    """What the frozen parts make of one batch: frames (VAE), speech features, or latents and speech
    features.
    """
    if stage == "vae":
        return torch.empty(size.vae_batch, 3, size.vae_frames, size.size_px, size.size_px)
    encoder = size.parts["speech_encoder"]
    num_frames = encoder.left_context_frames + size.num_frames + encoder.lookahead_frames
    features: Tensor = encoder.features(
        torch.empty(size.batch_size, num_frames * SAMPLES_PER_FRAME)
    )
    if stage == "speech_ae":
        return features
    frames = torch.empty(size.batch_size, 3, size.num_frames, size.size_px, size.size_px)
    return size.parts["vae"].encode(frames), features


def train_autoencoder(size: Size, stage: str, batch: Tensor) -> Tensor:
    """Loss of the first two stages; the VAE's without LPIPS, whose network is not this
    project's.
    """
    part = size.parts[stage]
    if stage == "speech_ae":
        return speech_ae_loss(part.decode(part.encode(batch)), batch).loss
    mean, log_variance = part.encode_moments(batch)
    latents = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
    return (part.decode_raw(latents).float() - batch).abs().mean() + mean.square().mean()


def hear(size: Size, stage: str, features: Tensor) -> Tensor:
    """Speech latents of what is trained; ASD's teacher hears through a SpeechAE of its own."""
    if stage == "asd" and size.teacher_speech_ae is not None:
        with torch.no_grad():
            size.teacher_speech_ae.encode(features)
    speech_latents: Tensor = size.parts["speech_ae"].encode(features)
    return speech_latents


def velocity_of(size: Size, stage: str, latents: Tensor, speech_latents: Tensor) -> Tensor:
    """The trained network's velocity of noisy ``latents``."""
    model: A2VDiT = trained_parts(size, stage)["transformer"]  # type: ignore[assignment]
    velocity: Tensor = model(
        latents, latents.new_zeros(latents.shape[0], latents.shape[2]), speech_latents
    )
    return velocity


def transformer_loss(
    size: Size, stage: str, velocity: Tensor, latents: Tensor, speech_latents: Tensor
) -> Tensor:
    """Flow matching, or ASD with the teacher's velocity."""
    if stage != "asd":
        return flow_matching_loss(velocity, latents)
    with torch.no_grad():
        sigma = latents.new_zeros(latents.shape[0], latents.shape[2])
        teacher_velocity = size.teacher(latents, sigma, speech_latents)
    return asd_loss(velocity, teacher_velocity, latents).loss


def training_flops(size: Size, stage: str) -> dict[str, int]:
    """FLOPs of one forward and backward of one batch, by part; sizes on the meta device."""
    batch: Any = None

    def read() -> None:
        nonlocal batch
        batch = read_batch(size, stage)

    counts = {"frozen_encoders": count_flops(read)}
    if stage in ("vae", "speech_ae"):
        counts[stage] = count_flops(lambda: train_autoencoder(size, stage, batch).backward())
        return {**counts, "total": sum(counts.values())}
    latents, features = batch
    # Cut into three graphs, so that each part's backward pass is counted with its forward pass.
    speech = leaf = velocity = cut = torch.empty(0)

    def read_speech() -> None:
        nonlocal speech, leaf
        speech = hear(size, stage, features)
        leaf = speech.detach().requires_grad_()

    def predict() -> None:
        nonlocal velocity, cut
        velocity = velocity_of(size, stage, latents, leaf)
        cut = velocity.detach().requires_grad_()

    counts["speech_ae"] = count_flops(read_speech)
    counts["transformer"] = count_flops(predict)
    counts["loss_and_teacher"] = count_flops(
        lambda: transformer_loss(size, stage, cut, latents, leaf).backward()
    )
    counts["transformer"] += count_flops(lambda: velocity.backward(cut.grad))
    counts["speech_ae"] += count_flops(lambda: speech.backward(leaf.grad))
    return {**counts, "total": sum(counts.values())}


def training_memory(size: Size, stage: str) -> dict[str, int]:
    """Bytes of one training step in bf16-mixed: sizes with fake tensors.

    Returns:
        ``weights`` of all parts, ``gradients``, ``optimizer`` (AdamW) and ``average`` (what
        :class:`~rest_lightning.callbacks.MovingAverage` copies), all float32; ``encoders_peak``
        while the frozen parts read the batch; ``activations_held`` from the forward for the
        backward pass; ``activations_peak`` of both
        passes; ``total``.
    """
    with frozen_as_trained(size, stage):
        return _training_memory(size, stage)


@contextmanager
def frozen_as_trained(size: Size, stage: str) -> Iterator[None]:
    """Parameters that a stage leaves alone need no gradient meanwhile, by the stage's own rules."""
    if stage == "vae" and not size.trains_encoder:
        freeze_encoder(size.parts["vae"])
    if stage in ("teacher", "student", "asd"):
        freeze_decoder(size.parts["speech_ae"])
    try:
        yield
    finally:
        for part in trained_parts(size, stage).values():
            part.requires_grad_(True)


def _training_memory(size: Size, stage: str) -> dict[str, int]:
    trained, frozen = trained_parts(size, stage), frozen_parts(size, stage)
    parameters = [
        parameter
        for part in trained.values()
        for parameter in part.parameters()
        if parameter.requires_grad
    ]
    for parameter in parameters:
        # as in every forward of an accumulation but the first
        parameter.grad = torch.zeros_like(parameter)
    everything = [
        x
        for part in (*trained.values(), *frozen.values())
        for x in (*part.parameters(), *part.buffers())
    ]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in everything)
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    average = sum(
        parameter.nbytes
        for part in trained.values()
        for parameter in averaged_parameters(part).values()
    )
    with LiveBytes([*everything, *(p.grad for p in parameters if p.grad is not None)]) as live:
        batch = read_batch(size, stage)
        encoders_peak, live.peak = live.peak, live.now
        with torch.autocast("cpu", torch.bfloat16):
            if isinstance(batch, Tensor):
                loss = train_autoencoder(size, stage, batch)
            else:
                speech = hear(size, stage, batch[1])
                velocity = velocity_of(size, stage, batch[0], speech)
                loss = transformer_loss(size, stage, velocity, batch[0], speech)
                del velocity, speech
        held = live.now
        loss.backward()
        activations_peak = live.peak
    for parameter in parameters:
        parameter.grad = None
    total = weights + average + 3 * gradients + max(encoders_peak, activations_peak)
    units = [unit for part in everything_sharded(size, stage) for unit in sharding_units(part)]
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 2 * gradients,
        "average": average,
        "encoders_peak": encoders_peak,
        "activations_held": held,
        "activations_peak": activations_peak,
        "total": total,
        "sharded_weights": sum(unit_bytes(unit) for unit in units),
        "largest_unit": max((unit_bytes(unit) for unit in units), default=0),
    }


def everything_sharded(size: Size, stage: str) -> list[nn.Module]:
    """The networks of a stage that FSDP2 spreads, trained and frozen
    (:func:`rest_lightning.tasks.a2v.shard`).
    """
    parts = {**trained_parts(size, stage), **frozen_parts(size, stage)}
    is_spread = stage in ("teacher", "student", "asd")
    return [part for part in parts.values() if is_spread and isinstance(part, (A2VDiT, SpeechAE))]


def sharding_units(part: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters that FSDP2 gathers together: attentions and feed-forward layers one by one, and
    the rest of a network.
    """
    layers: list[nn.Module] = []
    if isinstance(part, A2VDiT):
        blocks = list(part.transformer_blocks)
        every = [getattr(block, name) for block in blocks for name in BLOCK_METHODS]
        layers = [layer for layer in every if layer is not None]
    units = [list(layer.parameters()) for layer in layers]
    inside = {id(parameter) for unit in units for parameter in unit}
    return [*units, [each for each in part.parameters() if id(each) not in inside]]


def unit_bytes(parameters: list[nn.Parameter]) -> int:
    """Bytes of parameters."""
    return sum(each.numel() * each.element_size() for each in parameters)


def memory_per_gpu(memory: dict[str, int], num_gpus: int, is_sharded: bool) -> int:
    """Bytes of a training step on each of ``num_gpus``, one batch on each.

    DDP holds everything on each (its buckets are the gradients). FSDP2 spreads weights, gradients,
    moments and the average, and holds two gathered units at a time: the one that computes and the
    one that comes next; gradients of one unit lie whole before they are spread.

    Args:
        memory: of :func:`training_memory`.
        num_gpus: 1, 8, 64, ...
        is_sharded: FSDP2 in place of DDP.
    """
    if not is_sharded or not memory["sharded_weights"] or num_gpus == 1:
        return memory["total"]
    spread = memory["sharded_weights"] + memory["gradients"]
    spread += memory["optimizer"] + memory["average"]
    gathered = 3 * memory["largest_unit"]
    return memory["total"] - spread + -(-spread // num_gpus) + gathered


# -- streaming -------------------------------------------------------------------------------------


@torch.no_grad()
def streaming_flops(size: Size) -> dict[str, Any]:
    """FLOPs and cached bytes of one stream in its steady state: reference, previous and current
    chunk in the window.
    """
    model: A2VDiT = size.parts["transformer"]
    vae, encoder, speech_ae = (size.parts[name] for name in ("vae", "speech_encoder", "speech_ae"))
    side, length, rows = size.cells, size.chunk_length, 2 if size.guided else 1
    num_frames = TEMPORAL_RATIO * length
    window = (
        encoder.left_context_frames + num_frames + encoder.lookahead_frames
    ) * SAMPLES_PER_FRAME
    features = torch.empty(1, num_frames, encoder.window_steps, encoder.feature_dim)
    past = Stream()
    silence = speech_ae.encode(features[:, :1], past)
    counts = {
        "speech_encoder": count_flops(lambda: encoder.features(torch.empty(1, window))),
        "speech_ae": count_flops(lambda: speech_ae.encode(features, past)),
    }
    latent = torch.empty(1, vae.latent_channels, 1, side, side)
    _, frames_past = vae.start_decode(latent)
    chunk = torch.empty(1, vae.latent_channels, length, side, side)
    reference = torch.empty(1, 3, 1, size.size_px, size.size_px)
    start = {"vae_encode": count_flops(lambda: vae.encode(reference))}
    counts["vae_decode"] = count_flops(lambda: vae.decode_chunk(chunk, frames_past))

    cache = model.new_cache(rows, side, side)
    text, sigma = model.project_prompt(rows), model.embed_sigma(torch.empty(1, 1))
    start["text"] = count_flops(lambda: model.project_prompt(rows))
    start["noise_levels"] = (size.num_steps + 1) * count_flops(
        lambda: model.embed_sigma(torch.empty(1, 1))
    )
    start["id_sink"] = count_flops(
        lambda: model.prefill(latent.expand(rows, -1, -1, -1, -1), cache, text_embeds=text)
    )
    speech_latents = torch.empty(rows, length, *silence.shape[2:])
    speech = model.project_speech(speech_latents)
    counts["speech_keys"] = count_flops(lambda: model.project_speech(speech_latents))
    sample = chunk.expand(rows, -1, -1, -1, -1)
    for _ in range(2):
        step = count_flops(lambda: model(sample, sigma, speech, text, cache=cache))
        cache.commit()
    num_forwards = size.num_steps + (model.cache_options.cache_noise == "clean_pass")
    counts["denoising"] = num_forwards * step
    terms = transformer_flops(
        model,
        rows,
        length,
        side**2,
        [(length * side**2, cache.keys.shape[4])],
        silence.shape[2],
        prompt_length(model),
    )
    return {
        "session_start": start,
        "denoising_step": step,
        "denoising_step_formula": terms["blocks"] + terms["ends"],
        "chunk": {**counts, "total": sum(counts.values())},
        "cache_bytes": {
            name: {
                "id_context": model.new_cache(rows, side, side, dtype=dtype).nbytes,
                "vae_decoder": num_bytes(frames_past) * dtype.itemsize // 4,
                "speech_ae": num_bytes(past) * dtype.itemsize // 4,
            }
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        },
    }


# -- the command -----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return exit_code(lambda: run(parse(arguments)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--size",
        nargs="+",
        default=["embedded", "paper"],
        help=("folders of configs/ (default: both)"),
    )
    parser.add_argument(
        "--tflops", type=float, default=125.0, help=("sustained (default: 40 %% of an A100's 312)")
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/model_cost.json"))
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    """Count every size, write, print."""
    if not args.tflops > 0:
        raise UserError(
            f"expected --tflops above 0, got {args.tflops}: an A100 sustains 100 to 150 in bf16"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "sizes": {name: cost_of(name, args.tflops) for name in args.size},
        "tflops": args.tflops,
        **origin(args),
    }
    write_result(args.out, result)
    for name, cost in result["sizes"].items():
        print(table(name, cost, args.tflops))
    print(f"wrote {args.out}")
    return 0


def cost_of(name: str, tflops: float) -> dict[str, Any]:
    """Everything about one size."""
    with torch.device("meta"):
        size = read_size(name)
        streaming = streaming_flops(size)
        training: dict[str, Any] = {
            stage: {"flops": training_flops(size, stage)} for stage in STAGES
        }
        tokens = size.parts["speech_ae"].num_tokens
    for stage in ("teacher", "student", "asd"):
        model: A2VDiT = trained_parts(size, stage)["transformer"]  # type: ignore[assignment]
        training[stage]["flops"]["transformer_formula"] = training_formula(
            model,
            size.batch_size,
            num_latent_frames(size.num_frames),
            size.cells**2,
            tokens,
            prompt_length(model),
        )
    parameters = parameters_of(size)
    with fake_tensors(*size.parts.values(), size.teacher, *frozen_parts(size, "asd").values()):
        for stage in STAGES:
            memory = training_memory(size, stage)
            training[stage]["bytes"] = memory
            training[stage]["bytes_per_gpu"] = {
                name: {str(count): memory_per_gpu(memory, count, is_sharded) for count in GPUS}
                for name, is_sharded in (("ddp", False), ("fsdp", True))
            }
    for cost in training.values():
        cost["forwards_per_optimizer_step"] = size.accumulate
        cost["optimizer_step_s"] = size.accumulate * cost["flops"]["total"] / tflops / 1e12
    chunk_s, video_s = (
        streaming["chunk"]["total"] / tflops / 1e12,
        TEMPORAL_RATIO * size.chunk_length / FPS,
    )
    return {
        "size_px": size.size_px,
        "num_frames": size.num_frames,
        "batch_size": size.batch_size,
        "vae_frames": size.vae_frames,
        "vae_batch": size.vae_batch,
        "sampler": {"num_steps": size.num_steps, "guided": size.guided},
        "parameters": parameters,
        "streaming": {
            **streaming,
            "chunk_s": chunk_s,
            "video_s": video_s,
            "real_time_factor": video_s / chunk_s,
        },
        "training": training,
    }


def parameters_of(size: Size) -> dict[str, int]:
    """Parameters of every part, and of the kinds of layers inside the transformer."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in size.parts.items()}
    kinds = {"attn1": "self_attention", "attn2": "text_attention", "speech_": "speech_attention"}
    kinds[".ff."] = "feed_forward"
    inside = dict.fromkeys((*kinds.values(), "rest"), 0)
    for name, parameter in size.parts["transformer"].named_parameters():
        inside[next((kind for key, kind in kinds.items() if key in name), "rest")] += (
            parameter.numel()
        )
    return {**counts, **{f"transformer.{kind}": number for kind, number in inside.items()}}


def table(name: str, cost: dict[str, Any], tflops: float) -> str:
    """One size for people."""
    streaming = cost["streaming"]
    lines = [f"\n{name}: {cost['size_px']}x{cost['size_px']}, {cost['num_frames']} frames"]
    lines += [
        (f"  {part:32}{number / 1e6:>12,.2f} M parameters")
        for part, number in cost["parameters"].items()
    ]
    lines.append("  one stream (guided, 8 steps)")
    lines += [
        (f"    {part:30}{flops / 1e9:>12,.2f} GFLOP per chunk")
        for part, flops in streaming["chunk"].items()
    ]
    lines.append(f"    {'denoising step':30}{streaming['denoising_step'] / 1e9:>12,.2f} GFLOP")
    lines += [
        (f"    {part:30}{flops / 1e9:>12,.2f} GFLOP once")
        for part, flops in streaming["session_start"].items()
    ]
    lines += [
        f"    {f'{cached}, bfloat16':30}{number / 1e6:>12,.2f} MB cached"
        for cached, number in streaming["cache_bytes"]["bfloat16"].items()
    ]
    lines.append(
        f"    at {tflops:g} TFLOP/s a chunk of {streaming['video_s']:.2f} s takes "
        f"{1e3 * streaming['chunk_s']:.3g} ms "
        f"({streaming['real_time_factor']:.3g} x real time)"
    )
    heads = ("TFLOP/forward+backward", "s/optimiser step", "activations", "in all")
    lines.append(f"  {'training':12}{heads[0]:>24}{heads[1]:>18}{heads[2]:>14}{heads[3]:>10}")
    for stage, step in cost["training"].items():
        memory = step["bytes"]
        lines.append(
            f"  {stage:12}{step['flops']['total'] / 1e12:>24,.3f}{step['optimizer_step_s']:>18.3g}"
            f"{memory['activations_peak'] / 1e9:>11,.2f} GB{memory['total'] / 1e9:>7,.2f} GB"
        )
    counts = "".join(f"{count:>8} GPUs" for count in GPUS)
    lines.append(f"  {'GB per GPU':24}{counts}")
    for stage, step in cost["training"].items():
        for strategy, sizes in step["bytes_per_gpu"].items():
            figures = "".join(f"{number / 1e9:>13,.2f}" for number in sizes.values())
            lines.append(f"  {stage:12}{strategy:12}{figures}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

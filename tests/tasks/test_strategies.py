"""Two processes with one clip each give the gradients of one process with both: DDP and FSDP2, on
the CPU (gloo).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import strategy_run
import torch
import yaml
from torch.utils._pytree import tree_flatten_with_path

from rest_lightning.parts import build_part, read_part

RESUMED = ("whole", "half", "resumed")
STAGES = ("teacher", "student", "asd", "rollout", "distill")


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, repository: Path
) -> Any:
    """Strategy and folder after one optimiser step of every stage in two processes, and a resumed
    run of one.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp(request.param)
    strategy_run.make_stage("distill", folder)  # writes the frozen networks, once
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(repository), str(repository / "tests/helpers")))
    }
    config = repository / f"configs/trainer/{request.param}.yaml"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, strategy_run.__file__, str(config), str(folder), *STAGES, "resume"],
        env=environment, cwd=repository, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_those_of_one_process(runs: Any, stage: str) -> None:
    strategy, folder = runs
    module = strategy_run.make_stage(stage, folder)
    strategy_run.losses_of(module, slice(None))["loss"].backward()
    results = [torch.load(folder / f"{stage}-{rank}.pt") for rank in range(2)]
    expected = {
        name: weight.grad for name, weight in module.named_parameters() if weight.requires_grad
    }
    for result in results:
        assert result["gradients"].keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(result["gradients"][name], grad, atol=1e-5, rtol=1e-4)
    total = sum([int(grad.numel()) for grad in expected.values() if grad is not None])
    local = [int(result["num_local"]) for result in results]
    assert sum(local) == (total if strategy == "fsdp" else 0)
    assert strategy == "ddp" or max(local) < 0.6 * total


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_processes_draw_for_themselves(runs: Any, stage: str) -> None:
    first, second = (torch.load(runs[1] / f"{stage}-{rank}.pt")["drawn"] for rank in range(2))
    assert not torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_checkpoint_is_that_of_one_process(runs: Any, stage: str) -> None:
    """Whole weights under their usual names, one AdamW step after the start: other stages can begin
    from it.
    """
    _, folder = runs
    module = strategy_run.make_stage(stage, folder)
    optimizer = module.configure_optimizers()["optimizer"]
    strategy_run.losses_of(module, slice(None))["loss"].backward()
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    optimizer.step()
    for part in module.trained_parts:
        description, state = read_part(part, folder / f"{stage}.ckpt")
        build_part(description).load_state_dict(state)
        rate = optimizer.param_groups[0]["lr"]
        for name, weight in getattr(module, part).named_parameters():
            # AdamW's first step has the size of its rate wherever the gradient is not all but zero.
            grad = torch.zeros(()) if weight.grad is None else weight.grad
            clear = (grad.abs() > 1e-3).expand_as(weight)
            torch.testing.assert_close(
                state[name][clear], weight[clear].detach(), atol=0.02 * rate, rtol=0
            )
            assert float((state[name] - before[f"{part}.{name}"]).abs().max()) <= 1.05 * rate
    checkpoint = torch.load(folder / f"{stage}.ckpt", weights_only=False)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"transformer", "speech_ae"}


@pytest.mark.slow
def test_resumed_training_is_the_uninterrupted_one(runs: Any) -> None:
    """Weights, AdamW's moments, learning rate and random state, bit by bit, in both processes'
    shares.
    """
    whole, half, resumed = (
        torch.load(runs[1] / f"{name}.ckpt", weights_only=False) for name in RESUMED
    )
    assert (whole["global_step"], half["global_step"]) == (4, 2)
    keys = ("state_dict", "current_model_state", "averaging_state", "optimizer_states")
    for key in (*keys, "lr_schedulers", "rest_rng_state", "global_step"):
        # By path: under FSDP2 AdamW's pair of betas comes back as a list.
        ours, theirs = (
            dict(tree_flatten_with_path(checkpoint[key])[0]) for checkpoint in (whole, resumed)
        )
        assert ours.keys() == theirs.keys()
        for path, value in ours.items():
            same = (
                torch.equal(value, theirs[path])
                if isinstance(value, torch.Tensor)
                else value == theirs[path]
            )
            assert same, (key, path)
    for name, current in half["current_model_state"].items():  # averages of two steps
        averaged = half["state_dict"][name]
        assert averaged.shape == current.shape
        assert "transformer" not in name or not torch.equal(averaged, current)
    before, after = (
        {k: v for k, v in c["state_dict"].items() if "transformer" in k} for c in (half, whole)
    )
    assert not any(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_command_line_takes_the_file(
    recipe: Any, tmp_path: Path, repository: Path, strategy: str, capsys: Any
) -> None:
    from rest_lightning import lightning_cli

    file = repository / f"configs/trainer/{strategy}.yaml"
    with pytest.raises(SystemExit) as done:
        lightning_cli.run([*recipe.words("asd", tmp_path, overlays=(file,)), "--print_config"])
    assert done.value.code == 0
    given = yaml.safe_load(file.read_text())["trainer"]
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert printed["devices"] == given["devices"]
    assert printed["strategy"]["class_path"] == given["strategy"]["class_path"]
    assert printed["strategy"]["init_args"].items() >= given["strategy"]["init_args"].items()
    if strategy == "fsdp":
        assert [callback["class_path"].rpartition(".")[2] for callback in printed["callbacks"]] == [
            "MovingAverage",
            "ModelCheckpoint",
        ]

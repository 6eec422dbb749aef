"""``rest fit | validate | test | predict``: LightningCLI over the stages and the one data
module.
"""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rest_lightning.torchvision_compat import ensure_torchvision

ensure_torchvision()  # lightning imports torchvision
from lightning.fabric.plugins import TorchCheckpointIO  # noqa: E402
from lightning.pytorch import LightningDataModule, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import (  # noqa: E402
    Callback,
    ModelCheckpoint,
    RichProgressBar,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402
from lightning.pytorch.utilities.exceptions import MisconfigurationException  # noqa: E402

from rest_lightning import callbacks, models, tasks  # noqa: E402
from rest_lightning.config import find_class, read_config  # noqa: E402
from rest_lightning.data.module import TalkingHeadDataModule  # noqa: E402
from rest_lightning.diffusion.sampling import SamplingChanges  # noqa: E402
from rest_lightning.errors import UserError, note  # noqa: E402
from rest_lightning.names import look_in_current_folder  # noqa: E402
from rest_lightning.options import ConfigFile, TellsMistakes, find_user_error  # noqa: E402
from rest_lightning.parts import read_checkpoint  # noqa: E402
from rest_lightning.processes import PARENT_VARIABLE, owned  # noqa: E402
from rest_lightning.tasks.base import AtomicCheckpointIO, plain  # noqa: E402

FINAL_CHECKPOINT = "final.ckpt"
_folders = ExitStack()  # held by the run under way
EXPECTED_WARNINGS = (
    "LightningCLI's args parameter",  # our own command line hands its words on
    r"Found \d+ module\(s\) in eval mode",  # frozen parts are
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own code
)


class StageParser(TellsMistakes, LightningArgumentParser):
    """Lightning's parser, with our errors and configuration files."""


class EndlessBar(RichProgressBar):
    """Lightning's bar for a training that ends by steps or by time: ``Epoch 3``, without "/-2"."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch}".ljust(len(self.validation_description))


class LastAtTheEnd(Callback):
    """``last.ckpt`` is where a training ended, whether or not it was interrupted on the way.

    Lightning's ``ModelCheckpoint`` leaves the last multiple of ``every_n_train_steps`` there; but
    after a resumed training that has reached no multiple, the end.
    """

    def __init__(self) -> None:
        self._saved_step = -1

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the step."""
        self._saved_step = checkpoint["global_step"]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save it, unless this step is saved."""
        if trainer.global_step == self._saved_step:
            return
        for each in trainer.checkpoint_callbacks:
            # without a path yet, Lightning saves it now
            if (
                isinstance(each, ModelCheckpoint)
                and each.save_last is True
                and each.last_model_path
            ):
                trainer.save_checkpoint(each.last_model_path, each.save_weights_only)


class RestCLI(LightningCLI):
    """LightningCLI whose model is any stage; after ``fit`` it validates once and writes
    ``final.ckpt``.

    Args:
        args: the subcommand and its arguments. Where they or their files name a class of ``data``,
            it is the data module; else :class:`TalkingHeadDataModule` is.
        run: whether the subcommand runs; False takes arguments without one.
    """

    def __init__(self, args: list[str], run: bool = True) -> None:
        self.data_class = data_class_of(args)
        self.named = args[0] if args else ""
        super().__init__(
            LightningModule,
            TalkingHeadDataModule if self.data_class is None else LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=self.data_class is not None,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "rest"},
            args=args,
            run=run,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # a static method
        """Lightning's subcommand that the arguments name: parsers of the other three would only
        take time.
        """
        known = super().subcommands()
        return {self.named: known[self.named]} if self.named in known else known

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose ``--config`` takes shipped names, too."""
        parser = StageParser(**kwargs)
        parser.data_class = self.data_class
        what = "shipped name, such as embedded/student, or a path; repeatable, later ones win"
        parser.add_argument("-c", "--config", action=ConfigFile, help=what)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Lightning's, with mistakes told by the subcommand's parser."""
        assert isinstance(parser, StageParser)
        subparsers = getattr(self, "_subcommand_parsers", {})
        parser.active = subparsers.get(args[0]) if isinstance(args, list) and args else None
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """The settings of files and command line rule, and not those of a checkpoint, as in
        Lightning; where the two differ, a note says so. ``last`` is the newest last.ckpt of the
        run's folder, whichever of its versions has it.

        Raises:
            UserError: no such checkpoint.
        """
        name = self.config.get("subcommand")
        path = self.config[name].get("ckpt_path") if name else None
        if not path or "://" in path or path in ("best", "hpc"):
            return
        if path == "last":
            root = Path(self.config[name].trainer.default_root_dir or ".")
            saved = sorted(root.rglob("last.ckpt"), key=lambda found: found.stat().st_mtime)
            if not saved:
                raise UserError(
                    f"expected a run in {root} to go on with, got no last.ckpt there: leave "
                    "--ckpt_path out to begin anew, or name a checkpoint"
                )
            path = self.config[name]["ckpt_path"] = str(saved[-1])
        if not Path(path).is_file():
            raise UserError(
                f"expected a checkpoint to go on from, got no such file: {path}; --ckpt_path last "
                "takes the last one of the run"
            )
        checkpoint = read_checkpoint(path)
        if name != "fit":
            return
        before = dict(_leaves(checkpoint.get("hyper_parameters", {})))
        now = dict(_leaves(plain(self.config[name].model.get("init_args"))))
        changed = sorted(key for key in before.keys() & now.keys() if before[key] != now[key])
        for key in (key for key in changed if key.partition(".")[0] != "initial"):
            note(f"{path} was trained with {key} {before[key]}, goes on with {now[key]}")

    def before_instantiate_classes(self) -> None:
        """A stage that is to be tested says what to do before anything is read for it."""
        command = self.config.get("subcommand")
        if command:
            cls = find_class(self.config[command].model.class_path, "model.class_path", None)
            if isinstance(cls, type) and issubclass(cls, tasks.StageModule):
                cls.refuse(command)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """A stage and its data are configured side by side; what generates videos shares one key,
        ``sampling``.

        So one file of sampling choices serves `rest predict` and the previews of a training run,
        whose callback stands in a list that a configuration file can only replace as a whole. Where
        nothing generates, nothing is linked.
        """
        parser.add_class_arguments(SamplingChanges, "sampling")
        for user in ("model", "trainer.callbacks"):
            parser.link_arguments("sampling", f"{user}.init_args.sampling")
        parser.add_argument(
            "--final_checkpoint",
            type=bool,
            default=True,
            help="after fit, validate and write final.ckpt into trainer.default_root_dir",
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer of the configuration; its checkpoints are whole or absent."""
        trainer = super().instantiate_trainer(**kwargs)
        present: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        present.insert(0, LastAtTheEnd())
        if trainer.max_epochs == -1:
            endless = [EndlessBar() if type(c) is RichProgressBar else c for c in present]
            trainer.callbacks = endless  # type: ignore[attr-defined]
        # else the user has chosen another
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def before_fit(self) -> None:
        """Hold the run's folder until the command ends; ranks that this process starts end with it.

        Raises:
            UserError: another run works in it, or a checkpoint of another stage or size.
        """
        path = self.config["fit"].get("ckpt_path")
        if path and Path(path).is_file() and isinstance(self.model, tasks.StageModule):
            self.model.check_checkpoint(path)
        root = str(self.trainer.default_root_dir)
        if self.trainer.is_global_zero and "://" not in root:  # s3://... has no locks
            _folders.enter_context(owned(root, "rest fit"))
            os.environ[PARENT_VARIABLE] = str(os.getpid())
            _folders.callback(os.environ.pop, PARENT_VARIABLE, None)

    def after_fit(self) -> None:
        """Validate the final weights, and write them where the next stage looks for them, whole or
        not at all.
        """
        if not self.config["fit"]["final_checkpoint"] or self.trainer.interrupted:
            return
        # The module holds the averaged weights by now; without the callback the checkpoint holds
        # them alone, together with the statistics that this validation measures.
        present: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        averaging = (callbacks.MovingAverage, WeightAveraging)
        kept = [each for each in present if not isinstance(each, averaging)]
        self.trainer.callbacks = kept  # type: ignore[attr-defined]
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        target = Path(self.trainer.default_root_dir) / FINAL_CHECKPOINT
        temporary = target.with_name(f".{FINAL_CHECKPOINT}.part")
        # Without the optimiser's states: what comes next starts from the weights.
        self.trainer.save_checkpoint(temporary, weights_only=True)
        if self.trainer.is_global_zero:
            temporary.replace(target)


def run(args: list[str]) -> Any:
    """Run LightningCLI with ``args``, subcommand first; returns it, with ``trainer``, ``model`` and
    ``config``.

    Raises:
        UserError: a user's mistake, also where a stage's constructor found it.
    """
    if "--quiet" in args:
        args = [word for word in args if word != "--quiet"]
        args += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    # Lightning advertises a service in every run.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    _know_short_names()
    look_in_current_folder()
    with _folders:
        return _run(args)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


def _run(args: list[str]) -> Any:
    try:
        return RestCLI(args)
    except Exception as error:
        mistake = find_user_error(error)
        # no GPU, too few devices, ...
        if mistake is None and isinstance(error, MisconfigurationException):
            reason = " ".join(str(error).split()).rstrip(".!")
            raise UserError(
                f"expected a `trainer` that this machine can run, got: {reason}; change "
                "trainer.accelerator, devices, "
                "strategy or precision"
            ) from error
        if mistake is None:
            raise
        raise mistake from None


def data_class_of(args: list[str]) -> str | None:
    """Returns the last class path that the arguments, or the files among them, give ``data``.

    Raises:
        UserError: a file that cannot be read.
    """
    found: str | None = None
    for word, following in itertools.pairwise([*args, ""]):
        option, equals, value = word.partition("=")
        value = value if equals else following
        if option in ("-c", "--config") and value:
            data = read_config(value).content.get("data")
            found = (data.get("class_path") if isinstance(data, dict) else None) or found
        elif option == "--data.class_path" or (option == "--data" and not value.startswith("{")):
            found = value
    return found


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested mappings."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _know_short_names() -> None:
    """Import what packages export: jsonargparse takes ``class_path: StudentModule`` for any class
    that is loaded.
    """
    for package in (callbacks, models, tasks):
        for name in package.__all__:
            getattr(package, name)

"""Training a model on annotated videos by a recipe, in one process or several.

recipe = load_recipe("hmdb51", epochs=10)
train(recipe, read_dataset("hmdb51", root), read_dataset("hmdb51", root, "val"), "runs/hmdb51")

Random numbers depend only on the seed and the number of the update. So a resumed run ends with exactly the weights of
an uninterrupted one, on the same machine and number of processes; on a GPU up to rounding, as the order of sums varies.
"""

import contextlib
import copy
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import timm
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm

from ..checkpoints.card import model_card
from ..checkpoints.save import save_checkpoint
from ..data import Annotations
from ..data.augment import blend_still
from ..data.dataset import seeded
from ..models import EtMamba
from ..words import number_of
from .card import run_card
from .distill import Distillation, named_as
from .evaluate import METRICS, MULTILABEL_METRICS, Scores, evaluate
from .graph import replay_steps
from .loading import batches, datasets
from .optimizer import average, head_of, new_optimizer, new_scheduler, step_if
from .plan import NO_VALIDATION
from .progress import Pace, Progress, Timer
from .recipe import Recipe
from .run_folder import BEST_WEIGHTS, LAST_WEIGHTS, MODEL, SCORES, TENSORBOARD, TRAIN_LOG, VAL_LOG, Log, RunFolder
from .trackers import check_trackers, start_trackers

_logger = logging.getLogger(__name__)

LOG_UPDATES = 10  # updates averaged in a row of the log
MOST_SKIPPED = 20  # updates in a row with a gradient that isn't finite, before the run stops
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TRAIN_COLUMNS = ("update", "epoch", "lr", "loss", "grad_norm", "skipped", "replaced", "clips_per_second")


class TrainingError(RuntimeError):
    """The run can't start or continue; the message says what to do."""


def train(
    recipe: Recipe,
    train_set: Annotations,
    val_set: Annotations,
    folder: str | Path,
    *,
    workers: int = 2,
    save_updates: int = 500,
    progress: bool = False,
    trackers: Sequence[str] = ("tensorboard",),
) -> dict[str, float]:
    """Trains a model, or resumes an interrupted run. Call it in each of accelerate's processes.

    A run of the same folder and settings with more epochs goes on from its last state. Its learning rate then follows
    the schedule of all these epochs, so it isn't the run that would have had them from the start.

    Args:
        recipe: the settings.
        train_set: videos for training.
        val_set: videos for choosing the best epoch; with the same classes.
        folder: the run's folder (see `RunFolder`), shared by all processes.
        workers: decoding processes, per process.
        save_updates: number of updates between saved states; the state is also saved after each epoch.
        progress: whether to show progress bars; without, lines are logged.
        trackers: accelerate's names of the trackers that the logs also go to.

    Returns: metrics (see `Scores.metrics`) of the best epoch's weights on `val_set`, with the recipe's views.

    Raises:
        RunError: the folder contains something else.
        TrainingError: too few videos, incompatible settings, gradients that stay infinite, or a full disk.
        RecordingError: the steps can't be recorded as CUDA graphs.
        ValueError: an unknown tracker, or one that isn't installed.
    """
    check_trackers(trackers)
    run = RunFolder(folder)
    logs = ProjectConfiguration(logging_dir=str(run / TENSORBOARD))
    accelerator = Accelerator(mixed_precision=recipe.precision, log_with=list(trackers), project_config=logs)
    try:
        _check(recipe, train_set, val_set, accelerator)
        with accelerator.main_process_first():
            run.open(_identity(recipe, train_set, val_set, accelerator), recipe.to_yaml())
        accelerator.wait_for_everyone()
        if run.is_finished():
            _logger.info("%s is already finished", run.path)
        else:
            _Training(recipe, train_set, val_set, run, accelerator, workers, save_updates, progress).run_to_end()
            accelerator.wait_for_everyone()
    finally:
        AcceleratorState._reset_state()  # so that the next run in this process can use another precision
    return Scores.load(run / SCORES).metrics()


class _Training:
    """One process of a run; arguments as in `train`."""

    def __init__(
        self,
        recipe: Recipe,
        train_set: Annotations,
        val_set: Annotations,
        run: RunFolder,
        accelerator: Accelerator,
        workers: int,
        save_updates: int,
        progress: bool,
    ) -> None:
        self.recipe, self.run, self.accelerator = recipe, run, accelerator
        self.workers, self.save_updates = workers, save_updates
        self.is_main = accelerator.is_main_process
        self.show_bars = progress and self.is_main
        self.update_clips = recipe.batch_size * accelerator.num_processes
        train_set = replace(train_set, samples=train_set.samples * recipe.repeat)
        self.epoch_updates = len(train_set.samples) // self.update_clips
        self.all_updates = recipe.epochs * self.epoch_updates

        self.distillation = Distillation(recipe, train_set, accelerator) if recipe.teacher else None
        if self.distillation and not train_set.classes:
            train_set = replace(train_set, classes=self.distillation.classes)
            val_set = named_as(val_set, train_set.classes, recipe.teacher)
        torch.manual_seed(recipe.seed)
        self.eval_model = build_model(recipe, train_set.classes, train_set.is_multilabel)
        self.metrics = MULTILABEL_METRICS if train_set.is_multilabel else METRICS
        self.metric = next(iter(self.metrics))  # it chooses the best epoch
        model = copy.deepcopy(self.eval_model)
        self.eval_model.to(accelerator.device)
        self.data, self.val = datasets(recipe, self.eval_model, train_set, val_set)
        model.set_grad_checkpointing(recipe.grad_checkpointing > 0, every=max(1, recipe.grad_checkpointing))
        if recipe.freeze_backbone:
            model.requires_grad_(False)
            head_of(model).requires_grad_(True)
        if self.distillation:
            self.distillation.attach(model, self.val.transform)
        try:
            optimizer = new_optimizer(recipe, model, accelerator)
        except (TypeError, ValueError) as error:
            raise TrainingError(f"opt {recipe.opt!r} with opt_args {recipe.opt_args}: {error}") from error
        self.scheduler = new_scheduler(recipe, optimizer, self.epoch_updates, accelerator.num_processes)
        self.ema = ModelEmaV3(model.to(accelerator.device), recipe.ema, use_warmup=True) if recipe.ema else None
        self.mixup, self.criterion = _criterion(recipe, self.eval_model)
        replay_steps(model.to(accelerator.device), recipe, accelerator, DTYPES[recipe.precision])
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if recipe.compile:  # in place, so that names of weights don't change
            self.model.compile()
            self.eval_model.compile(dynamic=True)  # the last batch may be smaller
        self.progress, self.pace, self.timer = Progress(accelerator.device), Pace(), Timer()
        accelerator.register_for_checkpointing(self.progress, *filter(None, (self.ema, self.distillation)))

    def run_to_end(self) -> None:
        """Trains from the latest state, if there is one, to the end."""
        if states := self.run.states():
            self.accelerator.load_state(str(states[0]))
            _logger.info("resuming after update %d", self.progress.update)
        self.scheduler.step_update(self.progress.update)
        if self.is_main:
            self.run.tidy()
            start_trackers(self.accelerator, self.run, self.progress.update, asdict(self.recipe))
            self.log = Log(self.run / TRAIN_LOG, TRAIN_COLUMNS, self.accelerator.log, self.progress.update)
            columns = ("update", "epoch", *self.metrics, "videos", "failed")
            self.val_log = Log(self.run / VAL_LOG, columns, self.accelerator.log, self.progress.update)
        for epoch in range(self.progress.update // self.epoch_updates, self.recipe.epochs):
            self.epoch(epoch)
            if self.is_evaluated(epoch):
                self.validate(epoch)
            self.save()
        self.finish()

    def epoch(self, epoch: int) -> None:
        """Trains for the rest of an epoch."""
        self.model.train(not self.recipe.freeze_backbone)
        head_of(self.accelerator.unwrap_model(self.model)).train()
        first = self.progress.update % self.epoch_updates
        batches = self.batches(epoch, first)
        bar = tqdm(
            range(first, self.epoch_updates),
            initial=first,
            total=self.epoch_updates,
            desc=f"epoch {epoch + 1}/{self.recipe.epochs}",
            disable=not self.show_bars,
        )
        self.pace.start()
        row_start, row_first = time.perf_counter(), self.progress.update
        for _ in bar:
            rate = max(group["lr"] for group in self.optimizer.param_groups)
            self.update(batches)
            self.pace.count()
            if self.is_main and not self.show_bars and self.pace.updates_per_second and self.timer.is_due():
                self.tell(epoch, rate)
            if self.progress.update % LOG_UPDATES == 0 or self.progress.update == self.all_updates:
                now = time.perf_counter()
                loss = self.row(epoch, rate, (self.progress.update - row_first) * self.update_clips / (now - row_start))
                bar.set_postfix(loss=f"{loss:.3f}", all=self.left(epoch), refresh=False)
                row_start, row_first = now, self.progress.update
            if self.progress.update % self.save_updates == 0 and self.progress.update % self.epoch_updates:
                self.save()

    def row(self, epoch: int, rate: float, clips_per_second: float) -> float:
        """Writes a row of the log, over the updates since the one before; returns the mean loss."""
        counted, updates = self.read(), self.progress.update - self.progress.row
        if skipped := updates - int(counted["counted"]):
            said = "%d of the %d updates before update %d were skipped: their gradients weren't finite"
            _logger.warning(said, skipped, updates, self.progress.update + 1)
        loss = counted["losses"] / max(1, counted["counted"])
        if self.is_main:
            self.log.add(
                update=self.progress.update,
                epoch=epoch,
                lr=rate,
                loss=loss,
                grad_norm=counted["norms"] / max(1, counted["counted"]),
                skipped=counted["skipped"],
                replaced=self.progress.replaced,
                clips_per_second=clips_per_second,
            )
        self.progress.start_row()
        return loss

    def tell(self, epoch: int, rate: float) -> None:
        """Logs a line for those who watch without a terminal; the device has to finish its work for it."""
        counted = self.progress.read()
        _logger.info(
            "epoch %d/%d, update %d/%d: loss %.3f, rate %.2e, %.3g clips/s, %s",
            *(epoch + 1, self.recipe.epochs, self.progress.update, self.all_updates),
            *(counted["losses"] / max(1, counted["counted"]), rate),
            *(self.pace.updates_per_second * self.update_clips, self.left(epoch)),
        )

    def left(self, epoch: int) -> str:
        """How long the rest of the run takes, in words."""
        recipe = self.recipe
        evaluations = sum(map(self.is_evaluated, range(epoch, recipe.epochs))) + recipe.num_clips * recipe.num_crops
        return self.pace.left(self.all_updates - self.progress.update, evaluations)

    def is_evaluated(self, epoch: int) -> bool:
        """Whether there is an evaluation after an epoch."""
        return (epoch + 1) % self.recipe.eval_epochs == 0 or epoch + 1 == self.recipe.epochs

    def update(self, batches: Iterator[dict]) -> None:
        """Updates the weights once. The host doesn't wait for the device, unless the optimiser needs it (`step_if`)."""
        recipe, accelerator, progress = self.recipe, self.accelerator, self.progress
        torch.manual_seed(_seed(recipe.seed, accelerator.process_index, progress.update))  # for drop path
        total = torch.zeros((), device=accelerator.device)
        for part in range(recipe.accumulate):
            batch = next(batches)
            clips, target = self.take(batch, part)
            with contextlib.nullcontext() if part == recipe.accumulate - 1 else accelerator.no_sync(self.model):
                logits = self.model(clips)
                if self.distillation:
                    part_loss = self.distillation.loss(self.criterion, logits, target, clips, batch["index"])
                else:
                    part_loss = self.criterion(logits, target)
                part_loss = part_loss / recipe.accumulate
                accelerator.backward(part_loss)
            total += part_loss.detach()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_grad or float("inf"))
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()  # FSDP2's is a DTensor
        is_finite = norm.isfinite()
        step_if(self.optimizer, is_finite)
        self.optimizer.zero_grad()
        progress.count(accelerator.reduce(total, "mean"), norm, is_finite)
        self.scheduler.step_update(progress.update)
        if self.ema:
            average(self.ema, accelerator.unwrap_model(self.model), progress.update, is_finite)

    def read(self) -> dict[str, float]:
        """`Progress.read`, for which the device has to finish its work.

        Raises:
            TrainingError: too many updates in a row were skipped.
        """
        counted = self.progress.read()
        if counted["most_in_a_row"] >= MOST_SKIPPED:
            raise TrainingError(
                f"the gradients of {MOST_SKIPPED} updates in a row weren't finite; lower lr, set clip_grad, or set "
                f"precision to no. The last saved state is in {self.run.path}"
            )
        return counted

    def take(self, batch: dict, part: int) -> tuple[Tensor, Tensor]:
        """Moves a batch to the device and blends or mixes its clips: [B, C, T, H, W], and labels or targets."""
        recipe, accelerator = self.recipe, self.accelerator
        clips, target = (batch[name].to(accelerator.device, non_blocking=True) for name in ("clip", "label"))
        self.progress.replaced += batch["replaced"]
        with seeded(recipe.seed, accelerator.process_index, self.progress.update, part):
            if recipe.still:
                clips = blend_still(clips, recipe.still)
            if self.mixup is not None:
                clips, target = self.mixup(clips.flatten(1, 2), target)  # as images [B, C·T, H, W]
                clips = clips.unflatten(1, (-1, recipe.num_frames))
        return clips, target

    def batches(self, epoch: int, first: int) -> Iterator[dict]:
        """This process's batches of an epoch, from update `first` on; see `loading.batches`."""
        accelerator = self.accelerator
        return batches(
            self.data,
            self.recipe,
            epoch,
            first,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            workers=self.workers,
            pin_memory=accelerator.device.type == "cuda",
        )

    def validate(self, epoch: int) -> None:
        """Evaluates the current weights with one view per video, and keeps them if they are the best so far."""
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)  # FSDP shards it over the processes
        weights = self.ema.module.state_dict() if self.ema else get_model_state_dict(self.model, options=full)
        if self.is_main:
            kept = self.eval_model.state_dict().keys()  # without the projection to a teacher's features
            self.run.save_weights(LAST_WEIGHTS, {k: v for k, v in cast(Mapping, weights).items() if k in kept})
        start = time.perf_counter()
        metrics = self.scores(LAST_WEIGHTS).metrics()
        self.pace.count_evaluation(time.perf_counter() - start)
        # With few videos many epochs are equally good; the latest has learnt most.
        is_best = metrics[self.metric] >= self.progress.best
        if is_best:
            self.progress.best, self.progress.best_epoch = metrics[self.metric], epoch
        if self.is_main:
            if is_best:
                self.run.copy_weights(LAST_WEIGHTS, BEST_WEIGHTS)
            measured = {name: metrics[name] for name in self.val_log.columns[2:]}
            self.val_log.add(update=self.progress.update, epoch=epoch, **measured)
            said = f"epoch {epoch + 1}: {self.metrics[self.metric]} %.2f%%, best %.2f%% (one view of each video)"
            _logger.info(said, 100 * metrics[self.metric], 100 * self.progress.best)

    def scores(self, weights: str) -> Scores:
        """Evaluates weights of the run's folder on the validation videos; the processes share the work."""
        self.accelerator.wait_for_everyone()
        self.eval_model.load_state_dict(load_file(self.run / weights))
        try:
            return evaluate(
                self.eval_model,
                self.val,
                batch_size=self.recipe.batch_size // self.recipe.accumulate,
                workers=self.workers,
                dtype=DTYPES[self.recipe.precision],
                progress=self.show_bars,
            )
        except ValueError as error:
            raise TrainingError(
                f"validation after update {self.progress.update}: {error}. If the weights have diverged, start a "
                "new run with a lower lr, or with clip_grad"
            ) from error

    def save(self) -> None:
        """Saves the state, completely or not at all; but not that of a run that has to stop."""
        self.read()
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(self.run.draft(self.progress.update)))
        except (OSError, RuntimeError, SafetensorError) as error:  # on a full disk, writers raise different errors
            raise TrainingError(
                f"the state after update {self.progress.update} can't be saved in {self.run.path} ({error}); free "
                "some space and run the same command again to resume from the previous state"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self.run.keep(self.progress.update)
        self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Evaluates the best weights with the recipe's views, and writes the model in the Hub's layout."""
        self.val.num_clips, self.val.num_crops = self.recipe.num_clips, self.recipe.num_crops
        scores = self.scores(BEST_WEIGHTS)
        if not self.is_main:
            return
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.run.drop_model()
        scores.save(self.run / SCORES)
        processes, best_epoch = self.accelerator.num_processes, self.progress.best_epoch
        views = number_of(self.recipe.num_clips * self.recipe.num_crops, "view")
        _logger.info(
            "the model is that of epoch %d; its final accuracy is over %s of each video", best_epoch + 1, views
        )
        videos = len(self.data) // self.recipe.repeat
        card = run_card(self.recipe, processes, best_epoch, videos, scores.metrics())
        params = sum(p.numel() for p in self.eval_model.parameters())
        save_checkpoint(
            self.eval_model,
            self.run / MODEL,
            label_names=self.val.annotations.classes,
            stride=self.recipe.clip.stride,
            card=card,
            readme=lambda config: model_card(self.run.path.resolve().name, config, params, "float32"),
        )


def build_model(recipe: Recipe, classes: list[str], is_multilabel: bool = False) -> EtMamba:
    """Creates the recipe's model for these classes, with its pretrained weights if it names any.

    Videos may be of several classes if `is_multilabel`, whatever they may be for the weights.

    Raises:
        TrainingError: unknown arguments in model_args, or a model of another package.
    """
    try:
        model = timm.create_model(
            recipe.model,
            pretrained=recipe.pretrained or bool(recipe.checkpoint),
            pretrained_cfg_overlay={"file": recipe.checkpoint} if recipe.checkpoint else None,
            num_classes=len(classes),
            num_frames=recipe.num_frames,
            img_size=recipe.img_size,
            drop_rate=recipe.drop,
            drop_path_rate=recipe.drop_path,
            **recipe.model_args,
        )
    except TypeError as error:
        raise TrainingError(f"model {recipe.model!r} with model_args {recipe.model_args}: {error}") from error
    if not isinstance(model, EtMamba):
        raise TrainingError(f"model {recipe.model!r} isn't a model of this package; `etmamba info` lists them")
    model.is_multilabel = is_multilabel
    return model


def _criterion(recipe: Recipe, model: EtMamba) -> tuple[Mixup | None, nn.Module]:
    """The recipe's mixup, or None, and the loss to go with it."""
    settings = {"label_smoothing": recipe.label_smoothing, "num_classes": model.num_classes}
    several = model.is_multilabel
    if recipe.mixup or recipe.cutmix:
        mixup = Mixup(recipe.mixup, recipe.cutmix, **settings, multi_label=several)
        return mixup, BinaryCrossEntropy(0.0) if several else SoftTargetCrossEntropy()
    if several:
        return None, BinaryCrossEntropy(recipe.label_smoothing, smooth_dense=True)
    return None, LabelSmoothingCrossEntropy(recipe.label_smoothing)


def _check(recipe: Recipe, train_set: Annotations, val_set: Annotations, accelerator: Accelerator) -> None:
    processes = accelerator.num_processes
    if recipe.ema and accelerator.distributed_type == DistributedType.FSDP:
        raise TrainingError("averaged weights (ema) aren't supported with FSDP; set ema to 0, or use DDP")
    if processes < (started := int(os.environ.get("WORLD_SIZE", 1))):
        raise TrainingError(
            f"{started} processes were started, but accelerate sees {processes}; without GPUs, set "
            "ACCELERATE_USE_CPU=true (FSDP needs GPUs)"
        )
    updates = len(train_set.samples) * recipe.repeat // (recipe.batch_size * processes)
    if not updates:
        raise TrainingError(
            f"too few videos ({len(train_set.samples)}) for a batch of {recipe.batch_size} in each process "
            f"({processes}); lower batch_size (--set batch_size=N), or take several clips of each (repeat)"
        )
    if round(recipe.warmup_epochs * updates) >= recipe.epochs * updates:
        raise TrainingError(
            f"warmup_epochs {recipe.warmup_epochs:g} leaves no update after it, with epochs={recipe.epochs}; lower it"
        )
    if not val_set.samples:
        raise TrainingError(NO_VALIDATION)
    if not train_set.classes and not recipe.teacher:
        raise TrainingError("the training videos have no labels; set teacher, whose labels are then learnt")
    if train_set.classes and val_set.classes != train_set.classes:
        raise TrainingError("training and validation videos have different classes; use the same for both")
    if val_set.is_multilabel != train_set.is_multilabel:
        raise TrainingError("only the training or only the validation videos have several labels; make both alike")


def _identity(recipe: Recipe, train_set: Annotations, val_set: Annotations, accelerator: Accelerator) -> dict:
    """Everything that must be the same to resume a run."""
    # Runs of earlier versions don't say whether they are multi-label.
    settings = asdict(recipe) | ({"multilabel": True} if train_set.is_multilabel else {})
    del settings["cuda_graphs"]  # the weights are the same up to rounding
    return settings | {
        "processes": accelerator.num_processes,
        "classes": train_set.classes,
        "videos": len(train_set.samples),
        "val_videos": len(val_set.samples),
    }


def _seed(*seeds: int) -> int:
    with seeded(*seeds):
        return torch.initial_seed()

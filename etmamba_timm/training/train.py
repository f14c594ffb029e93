"""Training: a recipe and annotated videos into a trained model, on one process or many.

recipe = load_recipe("hmdb51", epochs=10)
train(recipe, read_dataset("hmdb51", root), read_dataset("hmdb51", root, "val"), "runs/hmdb51")

Everything drawn depends on the seed and the number of the update alone. So a run that is stopped and gone on with ends
with the very weights of one that isn't, on the same machine and number of processes; on a GPU but for rounding, since
kernels there add up in any order.
"""

import contextlib
import copy
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ..checkpoints.card import model_card
from ..checkpoints.save import save_checkpoint
from ..data import Annotations, EvalClips, EvalTransform, TrainClips, TrainTransform, collate
from ..data.dataset import seeded
from .evaluate import Scores, evaluate
from .recipe import Recipe
from .run_folder import BEST_WEIGHTS, LAST_WEIGHTS, MODEL, SCORES, TENSORBOARD, TRAIN_LOG, VAL_LOG, Log, RunFolder

_logger = logging.getLogger(__name__)

LOG_UPDATES = 10  # updates that a row of the log is the mean of
MOST_SKIPPED = 20  # updates in a row whose gradient isn't finite
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TRAIN_COLUMNS = ("update", "epoch", "lr", "loss", "grad_norm", "skipped", "replaced", "clips_per_second")
VAL_COLUMNS = ("update", "epoch", "top1", "top5", "mean_class", "videos", "failed")


class TrainingError(RuntimeError):
    """A run that can't go on; the message names the remedy."""


@dataclass
class Progress:
    """How far a run has come; part of its state.

    Attributes:
        update: updates made, those skipped among them.
        skipped: updates without effect, because the gradient wasn't finite; `in_a_row`: the latest of them.
        replaced: clips of videos that couldn't be decoded, for which others came.
        best: highest top-1 so far, best_epoch: when it was reached.
        losses: sum of losses since the log's last row, norms: of the gradients' norms, counted: of how many updates.
    """

    update: int = 0
    skipped: int = 0
    in_a_row: int = 0
    replaced: int = 0
    best: float = -1.0
    best_epoch: int = 0
    losses: float = 0.0
    norms: float = 0.0
    counted: int = 0

    def state_dict(self) -> dict:
        """For accelerate."""
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        """For accelerate."""
        self.__dict__.update(state)


def train(
    recipe: Recipe,
    train_set: Annotations,
    val_set: Annotations,
    folder: str | Path,
    *,
    workers: int = 2,
    save_updates: int = 500,
    progress: bool = False,
) -> dict:
    """Trains a model, or goes on with it; to be called in each of accelerate's processes.

    Args:
        recipe: the settings.
        train_set: videos to learn from.
        val_set: videos by which the best epoch is chosen; of the same classes.
        folder: of the run, see `RunFolder`; it must be seen by all processes. A run that was stopped is gone on with.
        workers: processes that decode, for each process.
        save_updates: updates from one saved state to the next; one is saved after each epoch as well.
        progress: whether to show bars.

    Returns: figures of the best epoch's weights on `val_set`, over the recipe's views.

    Raises:
        RunError: the folder holds something else.
        TrainingError: too few videos, settings that don't go together, or gradients that stay infinite.
    """
    accelerator = Accelerator(mixed_precision=recipe.precision)
    run = RunFolder(folder)
    try:
        _check(recipe, train_set, val_set, accelerator)
        with accelerator.main_process_first():
            run.open(_identity(recipe, train_set, val_set, accelerator), recipe.to_yaml())
        accelerator.wait_for_everyone()
        if (run / MODEL).exists():
            _logger.info("%s is done already", run.path)
        else:
            _Training(recipe, train_set, val_set, run, accelerator, workers, save_updates, progress).run_to_end()
            accelerator.wait_for_everyone()
    finally:
        AcceleratorState._reset_state()  # else the next run in this process would keep this one's precision
    return Scores.load(run / SCORES).figures()


class _Training:
    """A run in one of its processes; arguments as of `train`."""

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
        self.main = accelerator.is_main_process
        self.bars = progress and self.main
        self.clips = recipe.batch_size * accelerator.num_processes  # of an update
        self.updates = len(train_set.samples) // self.clips  # of an epoch

        torch.manual_seed(recipe.seed)
        self.plain = build_model(recipe, train_set.classes)  # for evaluation
        model = copy.deepcopy(self.plain)
        self.plain.to(accelerator.device)
        self.data, self.val = _datasets(recipe, self.plain, train_set, val_set)
        model.set_grad_checkpointing(recipe.grad_checkpointing)
        if recipe.freeze_backbone:
            model.requires_grad_(False).get_classifier().requires_grad_(True)
        optimizer = _optimizer(recipe, model, accelerator.num_processes)
        self.scheduler = _scheduler(recipe, optimizer, self.updates, accelerator.num_processes)
        self.ema = ModelEmaV3(model.to(accelerator.device), recipe.ema, use_warmup=True) if recipe.ema else None
        self.mixup, self.criterion = _criterion(recipe, self.plain.num_classes)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.at = Progress()
        accelerator.register_for_checkpointing(self.at, *([self.ema] if self.ema else []))

    def run_to_end(self) -> None:
        """From the latest state to the finished model."""
        if states := self.run.states():
            self.accelerator.load_state(str(states[0]))
            _logger.info("goes on after %d updates", self.at.update)
        self.scheduler.step_update(self.at.update)
        if self.main:
            self.run.tidy()
            self.writer = SummaryWriter(str(self.run / TENSORBOARD), purge_step=self.at.update + 1)
            self.log = Log(self.run / TRAIN_LOG, TRAIN_COLUMNS, self.writer, self.at.update)
            self.val_log = Log(self.run / VAL_LOG, VAL_COLUMNS, self.writer, self.at.update)
        for epoch in range(self.at.update // self.updates, self.recipe.epochs):
            self.epoch(epoch)
            if (epoch + 1) % self.recipe.eval_epochs == 0 or epoch + 1 == self.recipe.epochs:
                self.validate(epoch)
            self.save()
        self.finish()

    def epoch(self, epoch: int) -> None:
        """What is left of an epoch."""
        self.model.train(not self.recipe.freeze_backbone)
        first = self.at.update % self.updates
        batches = self.batches(epoch, first)
        bar = tqdm(
            range(first, self.updates),
            initial=first,
            total=self.updates,
            desc=f"epoch {epoch + 1}/{self.recipe.epochs}",
            disable=not self.bars,
        )
        start, since = time.perf_counter(), self.at.update
        for _ in bar:
            rate = max(group["lr"] for group in self.optimizer.param_groups)
            loss = self.update(batches)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if self.at.update % LOG_UPDATES == 0:
                if self.main:
                    now = time.perf_counter()
                    self.log.add(
                        update=self.at.update,
                        epoch=epoch,
                        lr=rate,
                        loss=self.at.losses / max(1, self.at.counted),
                        grad_norm=self.at.norms / max(1, self.at.counted),
                        skipped=self.at.skipped,
                        replaced=self.at.replaced,
                        clips_per_second=(self.at.update - since) * self.clips / (now - start),
                    )
                    start, since = now, self.at.update
                self.at.losses, self.at.norms, self.at.counted = 0.0, 0.0, 0
            if self.at.update % self.save_updates == 0 and self.at.update % self.updates:
                self.save()

    def update(self, batches: Iterator[dict]) -> float:
        """One update of the weights; returns its loss."""
        recipe, accelerator, at = self.recipe, self.accelerator, self.at
        torch.manual_seed(_seed(recipe.seed, accelerator.process_index, at.update))  # for drop path
        loss = torch.zeros((), device=accelerator.device)
        for part in range(recipe.accumulate):
            clips, target = self.take(next(batches), part)
            last = part == recipe.accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                part_loss = self.criterion(self.model(clips), target) / recipe.accumulate
                accelerator.backward(part_loss)
            loss += part_loss.detach()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_grad or float("inf"))
        loss, norm = accelerator.reduce(loss, "mean").item(), float(norm)
        good = math.isfinite(norm)
        if good or accelerator.scaler is not None:  # the scaler leaves it out by itself, and then lowers its scale
            self.optimizer.step()
        self.optimizer.zero_grad()
        at.update += 1
        self.scheduler.step_update(at.update)
        if good:
            at.in_a_row = 0
            at.losses, at.norms, at.counted = at.losses + loss, at.norms + norm, at.counted + 1
            if self.ema:
                self.ema.update(accelerator.unwrap_model(self.model), at.update)
            return loss
        at.skipped, at.in_a_row = at.skipped + 1, at.in_a_row + 1
        _logger.warning("update %d is left out: its gradient isn't finite", at.update)
        if at.in_a_row >= MOST_SKIPPED:
            raise TrainingError(
                f"the gradients of {MOST_SKIPPED} updates in a row weren't finite; lower lr, set clip_grad, or set "
                f"precision to no. The last state saved is in {self.run.path}"
            )
        return loss

    def take(self, batch: dict, part: int) -> tuple[Tensor, Tensor]:
        """Clips [B, C, T, H, W] and labels of a batch on the device, mixed if the recipe says so."""
        recipe, accelerator = self.recipe, self.accelerator
        clips, target = (batch[name].to(accelerator.device, non_blocking=True) for name in ("clip", "label"))
        self.at.replaced += batch["replaced"]
        if self.mixup is None:
            return clips, target
        with seeded(recipe.seed, accelerator.process_index, self.at.update, part):
            clips, target = self.mixup(clips.flatten(1, 2), target)  # takes pictures: [B, C·T, H, W]
        return clips.unflatten(1, (-1, recipe.num_frames)), target

    def batches(self, epoch: int, first: int) -> Iterator[dict]:
        """This process's batches of an epoch from update `first` on, with the number of clips that were replaced."""
        recipe, accelerator = self.recipe, self.accelerator
        self.data.epoch = epoch
        sampler = DistributedSampler(
            self.data, accelerator.num_processes, accelerator.process_index, seed=recipe.seed, drop_last=True
        )
        sampler.set_epoch(epoch)
        batches = list(BatchSampler(sampler, recipe.batch_size // recipe.accumulate, drop_last=True))
        batches = batches[first * recipe.accumulate :]
        loader = DataLoader(
            self.data,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the global one
        )
        for asked, batch in zip(batches, loader, strict=True):
            yield batch | {"replaced": int((batch["index"] != torch.tensor(asked)).sum())}

    def validate(self, epoch: int) -> None:
        """Scores of the weights as they are, one view a video; the best are kept."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)  # FSDP has a part of it in each process
        weights = self.ema.module.state_dict() if self.ema else get_model_state_dict(self.model, options=whole)
        if self.main:
            self.run.save_weights(LAST_WEIGHTS, weights)
        figures = self.scores(LAST_WEIGHTS).figures()
        best = figures["top1"] > self.at.best
        if best:
            self.at.best, self.at.best_epoch = figures["top1"], epoch
        if self.main:
            if best:
                self.run.copy_weights(LAST_WEIGHTS, BEST_WEIGHTS)
            self.val_log.add(update=self.at.update, epoch=epoch, **{k: figures[k] for k in VAL_COLUMNS[2:]})
            _logger.info("epoch %d: top-1 %.2f%%, best %.2f%%", epoch + 1, 100 * figures["top1"], 100 * self.at.best)

    def scores(self, weights: str) -> Scores:
        """Of the validation videos, by weights of the run's folder; the processes share the work."""
        self.accelerator.wait_for_everyone()
        self.plain.load_state_dict(load_file(self.run / weights))
        try:
            return evaluate(
                self.plain,
                self.val,
                batch_size=self.recipe.batch_size // self.recipe.accumulate,
                workers=self.workers,
                dtype=DTYPES[self.recipe.precision],
                progress=self.bars,
            )
        except ValueError as error:
            raise TrainingError(
                f"validation after {self.at.update} updates: {error}. If the weights have grown without bound, start a "
                "new run with a lower lr, or with clip_grad"
            ) from error

    def save(self) -> None:
        """Saves the state, whole or not at all."""
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(self.run.draft(self.at.update)))
        except (OSError, RuntimeError, SafetensorError) as error:  # of a full disk, each writer has its own
            raise TrainingError(
                f"the state after {self.at.update} updates can't be saved in {self.run.path} ({error}); make room "
                "there, and the same command goes on from the one before"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.main:
            self.run.keep(self.at.update)
        self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Scores of the best weights over all views, and the model in the Hub's layout."""
        self.val.num_clips, self.val.num_crops = self.recipe.num_clips, self.recipe.num_crops
        scores = self.scores(BEST_WEIGHTS)
        if not self.main:
            return
        self.writer.close()
        scores.save(self.run / SCORES)
        classes = list(self.val.annotations.classes)
        processes = self.accelerator.num_processes
        card = _card(self.recipe, processes, self.at, len(self.data), scores.figures())
        params = sum(p.numel() for p in self.plain.parameters())
        save_checkpoint(
            self.plain,
            self.run / MODEL,
            label_names=classes,
            stride=self.recipe.clip.stride,
            card=card,
            readme=lambda config: model_card(self.run.path.resolve().name, config, params, "float32"),
        )


def build_model(recipe: Recipe, classes: list[str]) -> nn.Module:
    """The recipe's model with these classes, from the weights that it names or at random."""
    try:
        return timm.create_model(
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


def _datasets(
    recipe: Recipe, model: nn.Module, train_set: Annotations, val_set: Annotations
) -> tuple[TrainClips, EvalClips]:
    evaluation = EvalTransform.from_model(model, size=model.img_size)
    training = TrainTransform(
        size=model.img_size,
        mean=evaluation.mean,
        std=evaluation.std,
        scale=recipe.scale,
        ratio=recipe.ratio,
        flip=recipe.flip,
        rand_augment=recipe.rand_augment,
        erasing=recipe.erasing,
    )
    return TrainClips(train_set, training, recipe.clip, recipe.seed), EvalClips(val_set, evaluation, recipe.clip)


def _optimizer(recipe: Recipe, model: nn.Module, processes: int) -> torch.optim.Optimizer:
    try:
        return create_optimizer_v2(
            model,
            recipe.opt,
            lr=recipe.scaled(recipe.lr, processes),
            weight_decay=recipe.weight_decay,
            betas=recipe.betas,
            layer_decay=None if recipe.layer_decay == 1 else recipe.layer_decay,
            **recipe.opt_args,
        )
    except (TypeError, ValueError) as error:
        raise TrainingError(f"opt {recipe.opt!r} with opt_args {recipe.opt_args}: {error}") from error


def _scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, updates: int, processes: int) -> CosineLRScheduler:
    """A linear warm-up and then a half cosine, stepped at each update."""
    warmup = round(recipe.warmup_epochs * updates)
    return CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * updates - warmup,
        lr_min=recipe.scaled(recipe.min_lr, processes),
        warmup_t=warmup,
        warmup_lr_init=recipe.scaled(recipe.warmup_lr, processes),
        warmup_prefix=True,
        t_in_epochs=False,
    )


def _criterion(recipe: Recipe, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """What mixes the clips, if anything, and the loss that goes with it."""
    if not (recipe.mixup or recipe.cutmix):
        return None, LabelSmoothingCrossEntropy(recipe.label_smoothing)
    mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=num_classes)
    return mixup, SoftTargetCrossEntropy()


def _check(recipe: Recipe, train_set: Annotations, val_set: Annotations, accelerator: Accelerator) -> None:
    processes = accelerator.num_processes
    if recipe.ema and accelerator.distributed_type == DistributedType.FSDP:
        raise TrainingError("averaged weights (ema) can't be kept under FSDP; set ema to 0, or use DDP")
    if processes < (asked := int(os.environ.get("WORLD_SIZE", 1))):
        raise TrainingError(
            f"{asked} processes were started, but accelerate sees {processes}; without GPUs, set "
            "ACCELERATE_USE_CPU=true (FSDP needs GPUs)"
        )
    if len(train_set.samples) < recipe.batch_size * processes:
        raise TrainingError(
            f"{len(train_set.samples)} videos make no batch of {recipe.batch_size} in each of {processes} processes; "
            "lower batch_size"
        )
    updates = len(train_set.samples) // (recipe.batch_size * processes)
    if round(recipe.warmup_epochs * updates) >= recipe.epochs * updates:
        raise TrainingError(
            f"warmup_epochs {recipe.warmup_epochs:g} leaves nothing of {recipe.epochs} epochs; lower it"
        )
    if val_set.classes != train_set.classes:
        raise TrainingError("the classes of the training and the validation videos differ")


def _identity(recipe: Recipe, train_set: Annotations, val_set: Annotations, accelerator: Accelerator) -> dict:
    """What a run must agree with to be gone on with."""
    return asdict(recipe) | {
        "processes": accelerator.num_processes,
        "classes": train_set.classes,
        "videos": len(train_set.samples),
        "val_videos": len(val_set.samples),
    }


def _seed(*seeds: int) -> int:
    with seeded(*seeds):
        return torch.initial_seed()


def _card(recipe: Recipe, processes: int, at: Progress, videos: int, figures: dict) -> dict:
    """The block of config.json that the model card is made of."""
    views = {"frames": recipe.num_frames, "crops": recipe.num_crops, "clips": recipe.num_clips}
    metrics = (("top-1", "top1"), ("top-5", "top5"), ("mean class accuracy", "mean_class"))
    common = {
        "dataset": f"{figures['videos']} validation videos ({recipe.dataset})",
        "views": views,
        "whose": "measured here",
    }
    return {
        "source": f"trained from {_start(recipe)} on {videos:,} videos ({recipe.dataset})",
        "recipe": asdict(recipe) | {"checkpoint": Path(recipe.checkpoint).name, "processes": processes},
        "figures": [common | {"metric": name, "value": round(100 * figures[key], 2)} for name, key in metrics],
        "notes": f"The weights are those after epoch {at.best_epoch + 1} of {recipe.epochs}, the best on these videos "
        "with one view each; so the figures flatter a little, and those on a separate test set would be fairer.",
    }


def _start(recipe: Recipe) -> str:
    if recipe.checkpoint:
        return Path(recipe.checkpoint).name
    return f"the weights of {recipe.model}" if recipe.pretrained else "scratch"

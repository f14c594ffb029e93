"""The clips of a training run: its datasets, and each process's batches of an epoch."""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from ..data import Annotations, EvalClips, EvalTransform, TrainClips, TrainTransform, collate
from ..models import EtMamba
from ..words import number_of
from .recipe import Recipe

_logger = logging.getLogger(__name__)


def datasets(
    recipe: Recipe, model: EtMamba, train_set: Annotations, val_set: Annotations
) -> tuple[TrainClips, EvalClips]:
    """Clips for training and for evaluation, as the recipe and the model want them."""
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


def batches(
    data: TrainClips,
    recipe: Recipe,
    epoch: int,
    first: int,
    *,
    process: int,
    processes: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[dict]:
    """A process's batches of an epoch, from update `first` on; 'replaced' counts clips of another video than drawn.

    Which clips they are depends only on the recipe, the epoch and the number of processes.
    """
    data.epoch = epoch
    clips = drawn(data.annotations, recipe.balance, recipe.seed, epoch)
    sampler: DistributedSampler[int] = DistributedSampler(data, processes, process, seed=recipe.seed, drop_last=True)
    sampler.set_epoch(epoch)
    positions = list(BatchSampler(sampler, recipe.batch_size // recipe.accumulate, drop_last=True))
    todo = [[clips[i] for i in batch] for batch in positions[first * recipe.accumulate :]]
    loader = DataLoader(
        data,
        batch_sampler=todo,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # so that the global one isn't used
    )
    total = 0
    for indices, batch in zip(todo, loader, strict=True):
        total += (replaced := int((batch["index"] != torch.tensor(indices) % len(data)).sum()))
        if total and indices is todo[-1]:
            said = "epoch %d: %s of videos that can't be decoded replaced by clips of others"
            _logger.info(said, epoch + 1, number_of(total, "clip"))
        yield batch | {"replaced": replaced}


def drawn(annotations: Annotations, balance: float, seed: int, epoch: int) -> list[int]:
    """The clips of an epoch, as many as there are videos, as numbers for `TrainClips`.

    A video is drawn in proportion to its class's frequency to the power of -`balance`: with 0 each video once, with 1
    each class equally often; of several labels the rarest counts. Its number of clips is the expected one, rounded up
    or down at random; its class's too.
    """
    count = len(annotations.samples)
    if not balance:
        return list(range(count))
    labels = np.array(annotations.rarest_labels())
    weights = np.bincount(labels)[labels] ** -float(balance)
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(count)
    order = order[np.argsort(labels[order], kind="stable")]  # by class, so that each class has its share
    ends = np.cumsum(weights[order]) * (count / weights.sum())  # each video's share of [0, count)
    hits = np.searchsorted(ends, np.arange(count) + random.random(), side="right").clip(max=count - 1)
    clips = np.bincount(order[hits], minlength=count)
    return [index + again * count for index, number in enumerate(clips.tolist()) for again in range(number)]

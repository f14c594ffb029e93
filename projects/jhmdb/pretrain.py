"""Pretraining without labels, on the training clips: the model fills in masked patches.

python -m projects.jhmdb.pretrain DATA [DATA ...] -o OUT [--checkpoint WEIGHTS] [--target motion] [--set NAME=VALUE ...]

Tubes of patches, the same in all frames, are masked among the pixels and the tokens. From their tokens after the last
block, a linear layer predicts the patches, or how they change to the next frame. (The layer is as in SimMIM, Xie et al.
2022; tubes and normalised patches as in VideoMAE, Tong et al. 2022.) OUT/model is then a checkpoint without a
classifier, for `etmamba train --checkpoint OUT/model/model.safetensors`. The same command resumes a run.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm import tqdm

from etmamba_timm.checkpoints.save import save_checkpoint
from etmamba_timm.data import Annotations, find_layout, read_dataset
from etmamba_timm.data.dataset import seeded
from etmamba_timm.models import EtMamba
from etmamba_timm.models.etmamba import clip_tokens
from etmamba_timm.training.loading import batches, datasets
from etmamba_timm.training.optimizer import new_optimizer, new_scheduler
from etmamba_timm.training.recipe import Recipe, load_recipe, parse_overrides
from etmamba_timm.training.run_folder import MODEL, TRAIN_LOG, Log, RunFolder
from etmamba_timm.training.train import DTYPES, build_model

RECIPE = Path(__file__).with_name("pretrain.yaml")
MASKED = 0.75  # of the patches of a frame
STILL = 0.1  # of normalised pixels: patches that change less aren't scaled up
TARGETS = ("pixels", "motion")
LOG_UPDATES, SAVE_UPDATES = 10, 100

_logger = logging.getLogger(__name__)


def training_videos(folders: list[Path]) -> Annotations:
    """The videos for training of datasets, without their classes."""
    files = []
    for folder in folders:
        layout = find_layout(folder)
        files += [file for file, _ in read_dataset(layout, folder, "train").samples]
        _logger.info("%s (%s): %d videos in all", folder, layout, len(files))
    return Annotations([(file, 0) for file in files], [], [])


class Masked(nn.Module):
    """A model without a classifier, a mask token, and the layer that predicts patches; its output is the loss."""

    def __init__(self, model: EtMamba, target: str) -> None:
        super().__init__()
        self.model, self.target = model, target
        self.mask_token = nn.Parameter(0.02 * torch.randn(model.embed_dim))
        self.predict = nn.Linear(model.embed_dim, model.patch_size**2 * model.in_chans)

    def no_weight_decay(self) -> set[str]:
        return {"mask_token"} | {f"model.{name}" for name in self.model.no_weight_decay()}

    def wanted(self, clips: Tensor) -> Tensor:
        """What is predicted of clips [B, C, T, H, W]: patches [B, T, h, w, p·p·C] of mean 0 and deviation 1.

        Of motion, they are the changes to the next frame (of the last frame, from the one before).
        """
        if self.target == "motion":
            changes = clips.diff(dim=2)
            clips = torch.cat([changes, changes[:, :, -1:]], 2)
        side = self.model.patch_size
        cut = clips.unflatten(4, (-1, side)).unflatten(3, (-1, side))  # [B, C, T, h, p, w, p]
        cut = cut.permute(0, 2, 3, 5, 4, 6, 1).flatten(4)
        deviation, mean = torch.std_mean(cut, -1, keepdim=True)
        return (cut - mean) / (deviation + (STILL if self.target == "motion" else 1e-3))

    def forward(self, clips: Tensor) -> Tensor:
        """Clips [B, C, T, H, W] -> the mean squared error over the masked patches."""
        model, side = self.model, self.model.patch_size
        height, width = (length // side for length in clips.shape[3:])
        order = torch.rand(len(clips), height * width).argsort(1)  # on the CPU, whose generator is seeded
        mask = (order < round(MASKED * height * width)).view(-1, 1, 1, height, width).to(clips.device)
        pixels = mask.repeat_interleave(side, 3).repeat_interleave(side, 4)
        embedded = model.patch_embed(model.stem(model.motion(clips.masked_fill(pixels, 0.0))))  # [B, D, T, h, w]
        embedded = torch.where(mask, self.mask_token.view(1, -1, 1, 1, 1).to(embedded.dtype), embedded)
        positions = model.cls_token, model.pos_embed, model.temporal_pos_embedding, model.grid_size
        tokens, grid = clip_tokens(embedded, *positions)
        for block in model.blocks:
            tokens = block(tokens, grid)
        found = self.predict(model.norm(tokens)[:, 1:]).unflatten(1, grid)  # [B, T, h, w, p·p·C]
        error = (found.float() - self.wanted(clips)).square().mean(-1)
        return error[mask[:, 0].expand_as(error)].mean()


def pretrain(recipe: Recipe, videos: Annotations, folder: Path, target: str, workers: int = 0) -> None:
    """Trains, or goes on; writes the log train.csv, and at the end the folder `model`.

    Of the recipe, what concerns classes and averaged weights has no effect.

    Raises:
        RunError: the folder contains another run.
        RuntimeError: the loss isn't finite.
    """
    run, accelerator = RunFolder(folder), Accelerator(mixed_precision=recipe.precision)
    device = accelerator.device
    run.open(asdict(recipe) | {"target": target, "videos": len(videos.samples)}, recipe.to_yaml())
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, [])
    data, _ = datasets(recipe, model, videos, videos)
    masked = Masked(model, target).to(device).train()
    optimizer = new_optimizer(recipe, masked, accelerator)
    AcceleratorState._reset_state()  # so that the next run in this process can use another precision
    epoch_updates = len(videos.samples) // recipe.batch_size
    scheduler, update, losses = new_scheduler(recipe, optimizer, epoch_updates, 1), 0, []
    if states := run.states():
        state = torch.load(states[0] / "state.pt", map_location=device, weights_only=True)
        masked.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        update = state["update"]
    if update == recipe.epochs * epoch_updates and (run / MODEL).exists():
        return
    run.tidy()
    scheduler.step_update(update)
    log = Log(run / TRAIN_LOG, ("update", "epoch", "lr", "loss"), lambda values, step: None, update)
    autocast = torch.autocast(device.type, DTYPES[recipe.precision], enabled=recipe.precision != "no")
    for epoch in range(update // epoch_updates, recipe.epochs):
        first = update % epoch_updates
        loader = batches(data, recipe, epoch, first, process=0, processes=1, workers=workers, pin_memory=False)
        for batch in tqdm(loader, f"epoch {epoch + 1}/{recipe.epochs}", epoch_updates, initial=first, disable=None):
            with seeded(recipe.seed, update), autocast:
                loss = masked(batch["clip"].to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(masked.parameters(), recipe.clip_grad or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            update += 1
            scheduler.step_update(update)
            losses.append(loss.item())
            if not losses[-1] < float("inf"):
                raise RuntimeError(f"the loss of update {update} isn't finite; lower lr (--set lr=...), or clip_grad")
            is_last = update == recipe.epochs * epoch_updates
            if update % LOG_UPDATES == 0 or is_last:
                rate = max(group["lr"] for group in optimizer.param_groups)
                log.add(update=update, epoch=epoch, lr=rate, loss=sum(losses) / len(losses))
                losses = []
            if update % SAVE_UPDATES == 0 or is_last:
                run.draft(update).mkdir(exist_ok=True)
                state = {"model": masked.state_dict(), "optimizer": optimizer.state_dict(), "update": update}
                torch.save(state, run.draft(update) / "state.pt")
                run.keep(update)
    run.drop_model()
    save_checkpoint(model, run / MODEL, stride=recipe.clip.stride)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="+", help="datasets, as `etmamba train` takes them")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the run's folder")
    parser.add_argument("--checkpoint", type=Path, help="weights to start from (default: from scratch)")
    parser.add_argument("--target", choices=TARGETS, default="pixels", help="what is predicted (default pixels)")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="override settings of pretrain.yaml")
    parser.add_argument("--workers", type=int, default=0, help="decoding processes")
    args = parser.parse_args()
    settings = parse_overrides(args.set) | ({"checkpoint": str(args.checkpoint)} if args.checkpoint else {})
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = load_recipe(RECIPE, **settings)
    pretrain(recipe, training_videos(args.data), args.output, args.target, args.workers)


if __name__ == "__main__":
    main()

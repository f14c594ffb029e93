"""Whether a model uses time: its scores on one frame repeated, and on shuffled frames.

python -m projects.order MODEL DATA OUT

Writes OUT/test_<change>.safetensors with the scores on the test videos of DATA, as `etmamba eval --scores` does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from etmamba_timm.data import EvalClips, EvalTransform, find_layout, read_dataset, with_classes
from etmamba_timm.predict import load_model
from etmamba_timm.training.evaluate import Scores, evaluate

CHANGES = ("one_frame", "shuffled")


class Changed(nn.Module):
    """A model of clips whose frames are changed first.

    Args:
        model: clips [B, C, T, H, W] -> [B, X].
        change: 'one_frame' for the middle frame T times, 'shuffled' for a random order, another one for each clip.
        seed: of the orders, which don't depend on the batch size.
    """

    def __init__(self, model: nn.Module, change: str, seed: int = 0) -> None:
        super().__init__()
        self.model, self.change = model, change
        self.draw = torch.Generator().manual_seed(seed)

    def forward(self, clips: Tensor) -> Tensor:
        length = clips.shape[2]
        if self.change == "one_frame":
            orders = torch.full((len(clips), length), length // 2)
        else:
            orders = torch.stack([torch.randperm(length, generator=self.draw) for _ in clips])
        frames = [clip[:, order] for clip, order in zip(clips, orders.to(clips.device), strict=True)]
        return self.model(torch.stack(frames))


def scores_with(change: str, model: str, data: Path, file: Path, num_clips: int = 1, num_crops: int = 1) -> Scores:
    """Scores on the test videos with a change; those in `file` are not measured again. Arguments as of `tested`."""
    if not file.exists():
        loaded = load_model(model)
        videos = read_dataset(find_layout(data), data, "test")
        videos = with_classes(videos, loaded.pretrained_cfg["label_names"])
        transform = EvalTransform.from_model(loaded, size=loaded.img_size)
        clips = EvalClips(videos, transform, loaded.clip, num_clips, num_crops)
        evaluate(Changed(loaded, change), clips).save(file)
    return Scores.load(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a name that `etmamba eval` takes, such as local-dir:RUN/model")
    parser.add_argument("data", type=Path, help="the dataset")
    parser.add_argument("out", type=Path, help="the folder of the scores")
    parser.add_argument("--num-clips", type=int, default=1, help="as of `etmamba eval`")
    parser.add_argument("--num-crops", type=int, default=1, help="as of `etmamba eval`")
    args = parser.parse_args()
    for change in CHANGES:
        file = args.out / f"test_{change}.safetensors"
        scores = scores_with(change, args.model, args.data, file, args.num_clips, args.num_crops)
        print(f"{change}: {scores.topk(1):.1%} of {len(scores.labels)} videos")


if __name__ == "__main__":
    main()

"""What simple features give: ridge regression on the mean image, and on histograms of motion.

python -m projects.jhmdb.baseline DATA OUT

Writes OUT/mean_image.safetensors and OUT/motion.safetensors, scores for `report`. The strength of the regression is the
best one on validation clips, taken from the training clips by source.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from etmamba_timm.data import SOURCES, open_video, read_dataset, split_videos
from etmamba_timm.training.evaluate import Scores

STRENGTHS = [10.0**power for power in range(1, 7)]


def mean_image(grey: Tensor) -> Tensor:
    """Grey frames [T, h, w] -> [D]: the mean frame, small."""
    return F.adaptive_avg_pool2d(grey.mean(0, keepdim=True), (12, 16)).flatten()


def motion(grey: Tensor) -> Tensor:
    """Grey frames [T, h, w] -> [D]: where edges move, by direction, place and time.

    Histograms of the gradient's direction, which is also that of the motion across an edge, up to its sign: in
    4×4 cells and 3 times, by the change to the next frame (either sign) and by the gradient's strength.
    """
    dy, dx = torch.gradient(grey, dim=(1, 2))
    dt = F.pad(grey.diff(dim=0), (0, 0, 0, 0, 0, 1))
    angle = torch.atan2(dy, dx).add(torch.pi).mul(12 / (2 * torch.pi)).long().clamp(max=11)
    bins = F.one_hot(angle, 12).permute(3, 0, 1, 2).float()  # [12, T, h, w]
    values = torch.cat([bins * strength for strength in (dt.clamp(min=0), -dt.clamp(max=0), torch.hypot(dx, dy))])
    return F.adaptive_avg_pool3d(values[None], (3, 4, 4)).flatten().sqrt()


def ridge(x: Tensor, labels: Tensor, others: Tensor, strength: float) -> Tensor:
    """Features [n, D] and labels -> scores [m, classes] of other features [m, D]; all are standardised by `x`."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, others = (x - mean) / std, (others - mean) / std
    targets = F.one_hot(labels).double() - 1 / (1 + labels.max())
    return others @ x.T @ torch.linalg.solve(x @ x.T + strength * torch.eye(len(x)), targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the dataset")
    parser.add_argument("out", type=Path, help="the folder of the scores")
    args = parser.parse_args()
    train, test = (read_dataset("hmdb51", args.data, part) for part in ("train", "test"))
    parts = [*split_videos(train, 0, SOURCES["hmdb51"]), test]
    clips = []
    for path, _ in [sample for part in parts for sample in part.samples]:
        reader = open_video(path)
        rgb = reader.read([i * (reader.info.num_frames - 1) // 15 for i in range(16)]).float() / 255
        clips.append(F.interpolate(rgb.mean(-1)[None], size=(66, 88), mode="area")[0])
    labels = torch.tensor([label for part in parts for _, label in part.samples])
    sizes = [len(part.samples) for part in parts]
    for function in (mean_image, motion):
        x = torch.stack([function(grey) for grey in clips]).double()
        (a, b, c), (la, lb, lc) = x.split(sizes), labels.split(sizes)
        strength = max(STRENGTHS, key=lambda s: (ridge(a, la, b, s).argmax(1) == lb).double().mean())
        scores = ridge(torch.cat([a, b]), torch.cat([la, lb]), c, strength).softmax(1).float()
        found = Scores(scores, lc, torch.arange(len(lc)), 0, len(test.missing), test.classes)
        found.save(args.out / f"{function.__name__}.safetensors")
        print(f"{function.__name__}: {found.topk(1):.1%} of {len(lc)} test clips, strength {strength:g}")


if __name__ == "__main__":
    main()

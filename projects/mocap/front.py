"""The README's picture: a timeline over test videos that come with the tests, with frames of the video above it.

python -m projects.mocap.front
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from etmamba_timm.predict import load_model
from etmamba_timm.seeing.plots import COLOURS, new_figure, save_figure
from etmamba_timm.seeing.timeline import timeline

from .figures import CLIP, HOP
from .join import join
from .sheet import read
from .ship import IMAGES, NAME, VIDEOS
from .variation import FPS

JOINED, SEED = 8, 0  # videos; of the first ten seeds, 6 to 8 videos are right in their middle, 6.6 on average
RIGHT, WRONG = COLOURS[2], COLOURS[3]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        long = Path(folder, "long.mp4")
        truth = join(VIDEOS.parent, long, JOINED, SEED)
        found = timeline(load_model(NAME), long, clip_seconds=CLIP, hop=HOP)
        frames = read(long)
    end = found.times[-1, 1].item()
    figure = new_figure(11, 4.2)
    colours = [*COLOURS, "#999999", "#8C564B", "#BCBD22"]
    shown = [name for _, name in truth]
    grid = figure.add_gridspec(2, JOINED, height_ratios=(1.25, 2))
    for i, ((start, name), (after, _)) in enumerate(zip(truth, [*truth[1:], (end, "")], strict=True)):
        middle = (start + after) / 2
        moment = ((found.times[:, 0] <= middle) & (middle < found.times[:, 1])).nonzero()[0, 0]
        said = found.classes[found.probabilities[moment].argmax()]
        shown.append(said)
        axes = figure.add_subplot(grid[0, i])
        axes.imshow(frames[int(middle * FPS)])
        axes.set_title(said.replace("_", " "), fontsize=9, color=RIGHT if said == name else WRONG)
        axes.set_axis_off()
    axes = figure.add_subplot(
        grid[1, :], xlabel="seconds", title=f"{NAME}: class probabilities over time", xlim=(0, end)
    )
    for name, colour in zip(dict.fromkeys(shown), colours, strict=False):
        probabilities = found.probabilities[:, found.classes.index(name)]
        axes.plot(found.times.mean(1), probabilities, linewidth=2, color=colour, label=name.replace("_", " "))
        axes.fill_between(found.times.mean(1), probabilities, color=colour, alpha=0.15)
    for start, _ in truth[1:]:
        axes.axvline(start, color="gray", linewidth=0.8, linestyle=":")
    axes.set(ylim=(0, 1))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    save_figure(figure, IMAGES / "timeline.png")


if __name__ == "__main__":
    main()

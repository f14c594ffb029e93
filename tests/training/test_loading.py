"""Which clips an epoch has."""

from collections import Counter
from pathlib import Path

import pytest

from etmamba_timm.data import Annotations
from etmamba_timm.training.loading import drawn


def videos(*counts: int) -> Annotations:
    """So many videos of each class."""
    samples = [(Path(f"{label}-{i}.mp4"), label) for label, count in enumerate(counts) for i in range(count)]
    return Annotations(samples, [str(label) for label in range(len(counts))], [])


@pytest.mark.parametrize(("balance", "expected"), [(0, (90, 9, 1)), (0.5, (70.3, 22.2, 7.4)), (1, (33.3, 33.3, 33.3))])
def test_classes_are_drawn_by_their_frequency(balance, expected):
    """Expected: 100 times frequency ** (1 - balance), over the sum of it."""
    annotations = videos(90, 9, 1)
    epochs = [drawn(annotations, balance, seed=0, epoch=epoch) for epoch in range(60)]
    assert {len(epoch) for epoch in epochs} == {100}
    of_class = [Counter(annotations.samples[i % 100][1] for i in epoch) for epoch in epochs]
    for label, count in enumerate(expected):
        assert all(abs(counts[label] - count) <= 1.1 for counts in of_class)
        assert sum(counts[label] for counts in of_class) / 60 == pytest.approx(count, abs=0.3)


def test_videos_of_a_class_take_turns():
    """None is drawn a third time before others come, and each epoch draws others."""
    annotations = videos(6, 3)
    epochs = [drawn(annotations, 1, seed=0, epoch=epoch) for epoch in range(40)]
    times = [Counter(i % 9 for i in epoch) for epoch in epochs]
    assert all(counts[i] <= 1 for counts in times for i in range(6))
    assert all(1 <= counts[i] <= 2 for counts in times for i in range(6, 9))
    assert all(any(counts[i] == 0 for counts in times) for i in range(6))
    assert all(len(set(epoch)) == 9 for epoch in epochs)  # a video's second clip has another number


def test_of_several_labels_the_rarest_counts():
    """One of ten videos of class 0 is of class 1 too, and another of none: these two are as frequent as all others."""
    samples = [(Path(f"{i}.mp4"), (0, 1) if i == 4 else () if i == 7 else (0,)) for i in range(10)]
    annotations = Annotations(samples, ["often", "seldom"], [])
    assert annotations.rarest_labels() == [0, 0, 0, 0, 1, 0, 0, 2, 0, 0]
    clips = Counter(i % 10 for epoch in range(60) for i in drawn(annotations, 1, seed=0, epoch=epoch))
    assert [clips[4] / 60, clips[7] / 60] == pytest.approx([10 / 3, 10 / 3], abs=0.2)


def test_it_depends_on_seed_and_epoch_alone():
    draws = [drawn(videos(20, 5), 1, seed, epoch) for seed, epoch in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert draws[0] != draws[3]

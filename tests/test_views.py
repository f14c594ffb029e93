"""A model over views: results don't depend on the batches, and errors stay with their files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from videos import write_video

from etmamba_timm.data import Clip, EvalTransform, Views
from etmamba_timm.views import mean_over_views


class Model(nn.Module):
    """Means of the colours of each frame; remembers its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.sizes: list[int] = []

    def forward(self, clips: Tensor) -> Tensor:
        self.sizes.append(len(clips))
        return (clips * self.weight).mean((3, 4)).flatten(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Six videos, the third of which can't be decoded."""
    folder = tmp_path_factory.mktemp("videos")
    files = [write_video(folder / f"{i}.mp4", 20, first_number=37 * i) for i in range(6)]
    files[2].write_text("text")
    return files


def views(files, num_clips=1, num_crops=1) -> Views:
    return Views(files, EvalTransform((32, 40)), Clip(4, 2), num_clips, num_crops)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 100])
@pytest.mark.parametrize(("num_clips", "num_crops"), [(1, 1), (2, 3)])
def test_results_do_not_depend_on_the_batches(files, batch_size, workers, num_clips, num_crops):
    """Tolerance: float32's rounding in means over 1280 pixels of order 1."""
    model, these = Model(), views(files, num_clips, num_crops)
    results = list(mean_over_views(model, model, these, batch_size=batch_size, workers=workers))
    total = 5 * num_clips * num_crops
    assert model.sizes == [batch_size] * (total // batch_size) + [total % batch_size] * (total % batch_size > 0)
    assert (
        str(results[2])
        == f"{files[2]}: is a text file, not a video; name a video file, for instance an mp4, webm or avi"
    )
    for index in (0, 1, 3, 4, 5):
        one = torch.cat([these.transform.normalize(clip) for clip in these.read(index)])
        with torch.no_grad():
            expected = torch.cat([model(view[None]) for view in one]).double().mean(0)
        assert results[index].dtype == torch.float64
        torch.testing.assert_close(results[index], expected, rtol=1e-5, atol=1e-6)
    softmax = list(mean_over_views(model, model, these, scores=True, batch_size=batch_size))
    assert softmax[0].sum().item() == pytest.approx(1)


def test_only_the_files_that_are_asked_for_in_their_order(files):
    model = Model()
    every = list(mean_over_views(model, model, views(files)))
    some = list(mean_over_views(model, model, views(files), [5, 2, 0], batch_size=2, workers=2))
    torch.testing.assert_close(some[0], every[5])
    torch.testing.assert_close(some[2], every[0])
    assert str(some[1]) == str(every[2])
    assert list(mean_over_views(model, model, views(files), [], workers=2)) == []


def test_results_come_as_soon_as_they_are_there(files):
    model = Model()
    results = mean_over_views(model, model, views(files), batch_size=2)
    next(results)
    assert model.sizes == [2]
    next(results), next(results)
    assert model.sizes == [2]  # the third has no views


def test_an_error_of_the_model_is_that_of_the_files_in_the_batch(files):
    class Failing(Model):
        def forward(self, clips: Tensor) -> Tensor:
            if len(self.sizes) == 1:
                self.sizes.append(len(clips))
                raise RuntimeError("out of memory")
            return super().forward(clips)

    model = Failing()
    results = list(mean_over_views(model, model, views(files, num_crops=3), batch_size=4))
    # Batches 0001, 1133, 3444, 555: the second one fails.
    assert [str(result) if isinstance(result, Exception) else "-" for result in results] == [
        "-",
        "out of memory",
        str(results[2]),
        "out of memory",
        "-",
        "-",
    ]


def test_a_file_that_breaks_off_is_an_error_whatever_was_in_batches_before(files):
    class Breaking(Views):
        def read(self, index):
            for count, clip in enumerate(super().read(index)):
                if index == 1 and count == 3:
                    raise ValueError("broken off")
                yield clip

    model, good = Model(), views(files, 5)
    these = Breaking(files, good.transform, good.clip, 5)
    results = list(mean_over_views(model, model, these, batch_size=2))
    assert str(results[1]) == "broken off"
    for result, expected in zip(results, mean_over_views(model, model, good), strict=True):
        if isinstance(result, Tensor):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_the_generator_may_be_left_alone(files):
    """What runs between two results isn't under the model's contexts."""
    model = Model()
    results = mean_over_views(model, model, views(files), dtype=torch.bfloat16)
    first = next(results)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert not first.is_inference()
    results.close()


def test_half_precision_models_take_clips_in_it(files):
    model = Model().bfloat16()
    result = next(mean_over_views(model, model, views(files)))
    expected = next(mean_over_views(Model(), Model(), views(files)))
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02)


def test_no_batch(files):
    with pytest.raises(ValueError, match="batch_size is 0; it must be 1 or more"):
        next(mean_over_views(Model(), Model(), views(files), batch_size=0))


@pytest.mark.parametrize("failing", [None, 1, 3])
def test_a_batch_that_runs_while_the_next_is_read(files, monkeypatch, failing):
    """The order of events on a GPU, with a stand-in for it: a batch's outputs are used after the next is launched."""
    happened = []

    class Event:
        def __init__(self, blocking: bool) -> None:
            self.number = None

        def record(self, stream) -> None:
            self.number = happened.count("launched")
            happened.append("launched")

        def synchronize(self) -> None:
            happened.append(f"waited for {self.number}")
            if self.number == failing:
                raise RuntimeError("the device failed")

    monkeypatch.setattr("etmamba_timm.views._is_cuda", lambda device: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    model = Model()
    results = list(mean_over_views(model, model, views(files), batch_size=1))
    launched, waited = ["launched"] * 2, [f"waited for {i}" for i in range(5)]
    assert happened == [*launched, waited[0], "launched", waited[1], "launched", waited[2], "launched", *waited[3:]]
    monkeypatch.undo()
    number = {0: 0, 1: 1, 3: 2, 4: 3, 5: 4}  # of each good file's batch
    for index, (result, expected) in enumerate(zip(results, mean_over_views(model, model, views(files)), strict=True)):
        if index in number and number[index] == failing:
            assert str(result) == "the device failed"
        elif index in number:
            torch.testing.assert_close(result, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 2), (100, 1)])
def test_a_gpu_gives_the_same(files, batch_size, workers):
    """Tolerance: float32 sums in another order."""
    expected = list(mean_over_views(Model(), Model(), views(files, 3, 3)))
    model = Model().cuda()
    results = list(mean_over_views(model, model, views(files, 3, 3), batch_size=batch_size, workers=workers))
    for result, other in zip(results, expected, strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(result, other, rtol=1e-4, atol=1e-5)
        else:
            assert str(result) == str(other)

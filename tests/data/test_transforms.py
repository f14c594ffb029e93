"""The evaluation transform: which part of the picture it keeps, and in what scale."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from etmamba_timm.data import EvalTransform

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def gradient(height: int, width: int, frames: int = 2) -> torch.Tensor:
    """Frames whose red grows downwards and whose green grows rightwards, from 0 to 255."""
    y = torch.linspace(0, 255, height)[:, None].expand(height, width)
    x = torch.linspace(0, 255, width)[None, :].expand(height, width)
    picture = torch.stack([y, x, torch.full_like(x, 100)], dim=-1).round().to(torch.uint8)
    return picture.expand(frames, height, width, 3).contiguous()


def test_layout_and_scale():
    frames = torch.zeros(5, 20, 30, 3, dtype=torch.uint8)
    frames[..., 0], frames[..., 1], frames[2] = 255, 51, 255
    mean, std = (0.5, 0.25, 0.1), (0.5, 0.1, 0.2)
    clip = EvalTransform((8, 12), mean, std)(frames)
    assert clip.shape == (1, 3, 5, 8, 12)
    assert clip.dtype == torch.float32
    assert clip.is_contiguous()
    expected = torch.tensor([(1 - 0.5) / 0.5, (0.2 - 0.25) / 0.1, (0 - 0.1) / 0.2])
    torch.testing.assert_close(clip[0, :, 0], expected[:, None, None].expand(3, 8, 12))
    white = torch.tensor([(1 - 0.5) / 0.5, (1 - 0.25) / 0.1, (1 - 0.1) / 0.2])
    torch.testing.assert_close(clip[0, :, 2], white[:, None, None].expand(3, 8, 12))


@pytest.mark.parametrize(
    ("height", "width", "size", "crop_pct", "resized"),
    [
        (240, 320, (224, 224), 1.0, (224, 298)),
        (320, 240, (224, 224), 1.0, (298, 224)),
        (240, 320, (224, 224), 0.875, (256, 341)),
        (240, 240, (224, 224), 0.9, (248, 248)),
        (60, 80, (224, 224), 1.0, (224, 298)),  # smaller than the view
        (240, 320, (128, 224), 1.0, (168, 224)),  # the width decides
        (240, 320, (224, 128), 1.0, (224, 298)),
        (1, 400, (16, 16), 1.0, (16, 6400)),
    ],
)
def test_resized_size(height, width, size, crop_pct, resized):
    assert tuple(EvalTransform(size, crop_pct=crop_pct)._covering(height, width)) == resized


@pytest.mark.parametrize(("height", "width"), [(100, 300), (300, 100)])
def test_three_crops_are_start_centre_end(height, width):
    transform = EvalTransform((64, 64), **PLAIN)
    views = transform(gradient(height, width), num_crops=3)
    assert views.shape == (3, 3, 2, 64, 64)
    long, short = (1, 0) if width > height else (0, 1)  # the channel that grows along each side
    starts = views[:, long].amin(dim=(1, 2, 3))
    ends = views[:, long].amax(dim=(1, 2, 3))
    torch.testing.assert_close(starts, torch.tensor([0, 1 / 3, 2 / 3]), atol=0.01, rtol=0)
    torch.testing.assert_close(ends, torch.tensor([1 / 3, 2 / 3, 1]), atol=0.01, rtol=0)
    assert views[:, short].min() < 0.01
    assert views[:, short].max() > 0.99
    torch.testing.assert_close(views[1:2], transform(gradient(height, width)), atol=0, rtol=0)


def test_crops_go_where_more_is_left_over():
    views = EvalTransform((32, 96), **PLAIN)(gradient(100, 120), num_crops=3)  # 80 × 96 after resizing
    starts = views[:, 0].amin(dim=(1, 2, 3))
    torch.testing.assert_close(starts, torch.tensor([0, 0.3, 0.6]), atol=0.01, rtol=0)
    torch.testing.assert_close(views[0, 1], views[2, 1], atol=0, rtol=0)


def test_crop_pct_cuts_both_sides():
    clip = EvalTransform((50, 50), crop_pct=0.5, **PLAIN)(gradient(100, 100))
    for channel in (0, 1):
        assert clip[0, channel].min() == pytest.approx(0.25, abs=0.01)
        assert clip[0, channel].max() == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(200, 301), (333, 240), (60, 70)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_agrees_with_timm(height, width, interpolation, crop_pct):
    picture = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    theirs = create_transform((3, 112, 112), interpolation=interpolation, crop_pct=crop_pct)
    expected = theirs(Image.fromarray(picture[0].numpy()))
    ours = EvalTransform((112, 112), interpolation=interpolation, crop_pct=crop_pct)(picture)[0, :, 0]
    level = 1 / 255 / 0.224  # PIL rounds between its two passes
    torch.testing.assert_close(ours, expected, atol=2 * level, rtol=0)


def test_luminance():
    frames = torch.zeros(3, 20, 20, 3, dtype=torch.uint8)
    for frame, channel in enumerate(range(3)):
        frames[frame, ..., channel] = 255
    clip = EvalTransform((10, 10), (0.5,), (0.5,))(frames)
    assert clip.shape == (1, 1, 3, 10, 10)
    weights = (clip[0, 0, :, 5, 5] * 0.5) + 0.5
    torch.testing.assert_close(weights, torch.tensor([0.299, 0.587, 0.114]), atol=1 / 255, rtol=0)


def test_frames_are_left_alone():
    frames = gradient(32, 32)
    kept = frames.clone()
    EvalTransform((32, 32))(frames, num_crops=3)
    assert torch.equal(frames, kept)


@settings(deadline=None, max_examples=30)
@given(*[st.integers(1, 60)] * 4, st.floats(0.3, 1), st.sampled_from([1, 3]))
def test_any_sizes(height, width, view_height, view_width, crop_pct, num_crops):
    frames = torch.full((1, height, width, 3), 200, dtype=torch.uint8)
    views = EvalTransform((view_height, view_width), crop_pct=crop_pct, **PLAIN)(frames, num_crops)
    assert views.shape == (num_crops, 3, 1, view_height, view_width)
    torch.testing.assert_close(views, torch.full_like(views, 200 / 255))


class Model(torch.nn.Module):
    """What a timm model shows of itself."""

    def __init__(self, **traits):
        super().__init__()
        self.pretrained_cfg = {
            "input_size": (3, 96, 128),
            "mean": (0.1, 0.2, 0.3),
            "std": (0.4, 0.5, 0.6),
            "interpolation": "bicubic",
            "crop_pct": 0.95,
        }
        for name, value in traits.items():
            setattr(self, name, value)


def test_from_model():
    expected = EvalTransform((96, 128), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic", 0.95)
    assert EvalTransform.from_model(Model()) == expected
    overridden = EvalTransform.from_model(Model(), crop_pct=1.0, size=(64, 64))
    assert overridden == EvalTransform((64, 64), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic", 1.0)


def test_from_model_of_one_channel():
    transform = EvalTransform.from_model(Model(in_chans=1))
    assert transform.mean == pytest.approx((0.2,))
    assert transform.std == pytest.approx((0.5,))
    assert transform(gradient(20, 20)).shape == (1, 1, 2, 96, 128)


def test_from_model_of_other_channels():
    with pytest.raises(ValueError, match=r"takes 4 channels; video frames have 3 \(RGB\) or 1"):
        EvalTransform.from_model(Model(in_chans=4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": (224,)}, r"give \(height, width\)"),
        ({"size": (0, 224)}, "each 1 or more"),
        ({"mean": (0.5, 0.5)}, r"mean has 2 values and std 3; give 3 each \(RGB\) or 1 each"),
        ({"mean": (0.5,)}, "mean has 1 value and std 3"),
        ({"std": (0.5, 0.0, 0.5)}, "every value must be above 0"),
        ({"interpolation": "lanczos"}, "'lanczos'; choose one of bilinear, bicubic, nearest"),
        ({"crop_pct": 0.0}, "above 0 and at most 1"),
        ({"crop_pct": 1.5}, "above 0 and at most 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        EvalTransform(**fields)


@pytest.mark.parametrize("num_crops", [0, 2, 5])
def test_bad_num_crops(num_crops):
    with pytest.raises(ValueError, match=f"num_crops is {num_crops}; use 1"):
        EvalTransform((8, 8))(gradient(10, 10), num_crops)


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(2, 10, 10, 3),
        torch.zeros(10, 10, 3, dtype=torch.uint8),
        torch.zeros(2, 3, 10, 10, dtype=torch.uint8),
        torch.zeros(0, 10, 10, 3, dtype=torch.uint8),
        np.zeros((2, 10, 10, 3)),
        np.zeros((2, 10, 10, 3), np.uint16),
        np.zeros((10, 10, 3), np.uint8),
        [[[[0, 0, 0]]]],
    ],
)
def test_bad_frames(frames):
    with pytest.raises(ValueError, match=r"give uint8 \[T, H, W, 3\] RGB"):
        EvalTransform((8, 8))(frames)


def test_numpy_arrays_are_taken():
    """Also those that PyTorch refuses or warns of: read-only ones, and colours in reverse (from OpenCV's BGR)."""
    frames = gradient(10, 12)
    bgr = frames.flip(-1).numpy()
    bgr.flags.writeable = False
    transform = EvalTransform((8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(transform(bgr[..., ::-1], 3), transform(frames, 3), rtol=0, atol=0)
        torch.testing.assert_close(transform(bgr), transform(frames.flip(-1)), rtol=0, atol=0)

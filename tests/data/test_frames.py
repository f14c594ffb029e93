"""Folders of frames are read as video files are."""

import os
import pickle

import pytest
import timm
import torch
from PIL import Image
from videos import numbers, picture, write_frames, write_video

import etmamba_timm  # noqa: F401 (registers the models)
from etmamba_timm.cli import main
from etmamba_timm.data import FrameFolder, VideoError, open_video, probe, read_frames, read_list
from etmamba_timm.predict import extract_features
from etmamba_timm.seeing.timeline import timeline


@pytest.mark.parametrize("name", ["img_{:05}.jpg", "{}.png", "v1 frame-{}.JPEG", "{}.webp", "{:03}.tif"])
def test_frames_by_number_in_natural_order(tmp_path, name):
    reader = pickle.loads(pickle.dumps(open_video(write_frames(tmp_path / "video", 25, name))))
    assert isinstance(reader, FrameFolder)
    info = reader.info
    assert (info.num_frames, info.height, info.width, info.fps, info.duration) == (25, 48, 64, 0, 0)
    frames = reader.read([7, 0, 24, 7])
    assert (frames.shape, frames.dtype) == ((4, 48, 64, 3), torch.uint8)
    assert numbers(frames) == [7, 0, 24, 7]
    assert numbers(reader.stream([12, 3, 3])) == [3, 12]
    assert reader.read([]).shape == (0, 48, 64, 3)
    with pytest.raises(IndexError, match="frames 0 to 25 are wanted; choose from 0 to 24"):
        reader.read([0, 25])


def test_gaps_other_files_and_other_modes(tmp_path):
    """Missing frames are no frames; grey, transparent and turned pictures are read as they are shown."""
    folder = write_frames(tmp_path / "video", 12, "{}.png")
    for i in (0, 5):
        (folder / f"{i}.png").unlink()
    (folder / "notes.txt").touch()
    (folder / "._1.png").touch()
    assert numbers(read_frames(folder, range(probe(folder).num_frames))) == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    image = Image.fromarray(picture(9))
    image.convert("L").save(folder / "9.png")
    image.convert("RGBA").save(folder / "10.png")
    turned = image.transpose(Image.Transpose.ROTATE_90)  # anticlockwise, so the reader turns it clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "11.png", exif=exif)
    assert numbers(read_frames(folder, [7, 8, 9])) == [9, 9, 9]


def test_what_cannot_be_read(tmp_path):
    folder = write_frames(tmp_path / "video", 4, "{}.png")
    os.mkdir(tmp_path / "empty")
    with pytest.raises(
        VideoError, match="empty: is a folder without pictures; name a video file, or a folder of frames"
    ):
        open_video(tmp_path / "empty")
    with pytest.raises(VideoError, match="doesn't tell when they are shown; make a video of it"):
        open_video(folder).times()
    Image.fromarray(picture(2, 24, 32)).save(folder / "2.png")
    with pytest.raises(VideoError, match=r"2.png: is 32×24 pixels, and the folder's first picture 64×48"):
        open_video(folder).read([0, 2])
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:100])
    with pytest.raises(VideoError, match="3.png: can't be read as a picture"):
        next(open_video(folder).stream([3]))
    assert numbers(open_video(folder).read([0, 1])) == [0, 1]  # the others can
    (folder / "0.png").write_bytes(b"")
    with pytest.raises(VideoError, match="0.png: can't be read as a picture"):
        open_video(folder)


@pytest.mark.parametrize("line", ["{0} {1}", "{0},{1}", "{1},{0}", "{0} 24 {1}"])
def test_lists_name_folders(tmp_path, line):
    """Folders of classes that are called as a label are no videos."""
    for i, label in enumerate(("run", "jump", "run")):
        write_frames(tmp_path / label / f"v{i}", 24, "{}.jpg")
    rows = [line.format(f"{label}/v{i}", label) for i, label in enumerate(("run", "jump", "run"))]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    read = read_list(tmp_path / "list.txt")
    assert [(path.name, read.classes[label]) for path, label in read.samples] == [
        *(("v0", "run"), ("v1", "jump"), ("v2", "run"))
    ]


def test_the_same_as_of_the_video(tmp_path, capsys):
    """Features, classes and clips; a timeline needs times."""
    video = write_video(tmp_path / "video.mkv", 24, codec="ffv1", pix_fmt="bgr0")
    folder = write_frames(tmp_path / "frames", 24, "{}.png")
    model = timm.create_model("etmamba_ti", num_classes=3, num_frames=4, img_size=32, depth=1, embed_dim=16).eval()
    torch.testing.assert_close(extract_features(model, folder), extract_features(model, video), rtol=0, atol=0)
    with pytest.raises(VideoError, match="doesn't tell when they are shown"):
        timeline(model, folder)
    assert main(["predict", str(folder), str(tmp_path), "--model", "etmamba_ti.mocap"]) == 1
    told = capsys.readouterr()
    assert told.out.startswith(f"{folder}\n")
    assert f"{tmp_path}: is a folder without pictures" in told.err
    assert f"(of videos, all: {tmp_path}/*.mkv; pictures" in told.err


def test_videos_in_folders_of_classes_are_pointed_to(tmp_path):
    (tmp_path / "clips" / "run").mkdir(parents=True)
    (tmp_path / "clips" / "notes.txt").touch()
    with pytest.raises(VideoError, match=r"clips/\*\.mp4; pictures"):
        FrameFolder(tmp_path / "clips")
    (tmp_path / "clips" / "run" / "a.avi").touch()
    with pytest.raises(VideoError, match=r"clips/\*/\*\.avi; pictures"):
        FrameFolder(tmp_path / "clips")

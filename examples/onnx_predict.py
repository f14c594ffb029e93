"""Classifies a video with a file of `etmamba export`; needs only numpy, av and onnxruntime.

python onnx_predict.py clips.onnx new.mp4
"""

import json
import sys

import av
import numpy as np
import onnxruntime


def main(model: str, video: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["etmamba"])
    with av.open(video) as container:
        frames = list(container.decode(video=0))
    chosen = [crop(frames[i], *about["size"]) for i in indices(len(frames), **about["clip"])]
    clip = (np.stack(chosen) / 255 - about["mean"]) / about["std"]  # [T, H, W, C]
    [logits] = session.run(None, {"clip": clip.transpose(3, 0, 1, 2)[None].astype(np.float32)})
    if about.get("problem_type") == "multi_label_classification":
        scores = 1 / (1 + np.exp(-logits[0]))
    else:
        scores = np.exp(logits[0] - logits.max())
        scores /= scores.sum()
    for i in scores.argsort()[:-6:-1]:
        print(f"{scores[i]:8.2%}  {about['labels'][i]}")


def indices(length: int, num_frames: int, stride: int | str | None) -> list[int]:
    """The frames of one clip: spread over the video, or from its middle."""
    if stride == "spread":
        return [int((i + 0.5) * length / num_frames) for i in range(num_frames)]
    step = stride or 2
    start = max(0, (length - (num_frames - 1) * step - 1) // 2)
    return [min(start + i * step, length - 1) for i in range(num_frames)]


def crop(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """Resizes a frame until it covers the size, and takes its middle."""
    scale = max(height / frame.height, width / frame.width)
    size = {"width": round(frame.width * scale), "height": round(frame.height * scale)}
    pixels = frame.reformat(**size, format="rgb24", interpolation="AREA").to_ndarray()
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python onnx_predict.py MODEL.onnx VIDEO")
    main(*sys.argv[1:])

"""Files that `etmamba_timm.export` wrote, run as models: by onnxruntime, OpenVINO or PyTorch.

model = load_exported("clips.onnx")  # for `predict` and `predict_files`, like any other model
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoints.config import MULTILABEL
from .checkpoints.read import architecture_of
from .clip import Clip
from .data import EvalTransform
from .models import EtMamba
from .predict import class_names

RUNTIMES = {".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "torch"}


class ExportedModel(nn.Module):
    """A model from a file: normalised clips [B, C, T, H, W] -> logits [B, classes], on the CPU.

    Attributes:
        about: what the file says of itself; see `export_model`.
        clip, img_size, in_chans, num_classes, is_multilabel, pretrained_cfg: as a model's.
    """

    global_pool = "file"  # it pools; how is in the file

    def __init__(self, run: Callable[[np.ndarray], np.ndarray], about: dict) -> None:
        super().__init__()
        self.run, self.about = run, about
        self.clip, self.img_size = Clip.from_config(about["clip"]), tuple(about["size"])
        self.in_chans, self.num_classes = len(about["mean"]), len(about["labels"])
        self.num_frames, self.stride = self.clip.num_frames, self.clip.stride
        self.is_multilabel = about.get("problem_type") == MULTILABEL
        # A file that takes frames normalises them itself.
        mean, std = ([0.0], [1 / 255]) if about["input"] == "frames" else (about["mean"], about["std"])
        self.pretrained_cfg = {
            "label_names": about["labels"],
            "input_size": (self.in_chans, *self.img_size),
            "mean": mean * (self.in_chans // len(mean)),
            "std": std * (self.in_chans // len(std)),
            "interpolation": about["interpolation"],
            "crop_pct": about["crop_pct"],
        }
        self.cls_token = nn.Parameter(torch.empty(0), requires_grad=False)  # says which device and dtype
        self.eval()

    def forward(self, clips: Tensor) -> Tensor:
        if self.about["input"] == "frames":
            clips = clips.round().to(torch.uint8).permute(0, 2, 3, 4, 1)
        return torch.from_numpy(self.run(clips.contiguous().numpy()))


def load_exported(file: str | Path, runtime: str | None = None) -> ExportedModel:
    """Loads a file that `export_model` wrote.

    Args:
        file: `.onnx`, `.xml` or `.pt2`.
        runtime: 'onnxruntime', 'openvino' (which also runs `.onnx`) or 'torch'; by default the suffix's own.

    Raises:
        ValueError: another suffix, a runtime that can't run it, a file that isn't one of `export_model`'s, or a
            runtime that isn't installed.
        FileNotFoundError: no such file.
    """
    file = Path(file)
    runtime = runtime or RUNTIMES.get(file.suffix)
    if runtime is None or (file.suffix, runtime) not in _LOADERS:
        pairs = ", ".join(f"{suffix} by {name}" for suffix, name in _LOADERS)
        raise ValueError(f"{file}: {f'{runtime} does not run it' if runtime else 'unknown suffix'}; choose {pairs}")
    if not file.is_file():
        raise FileNotFoundError(f"{file} doesn't exist; `etmamba export` writes such files")
    try:
        importlib.import_module(runtime)
    except ImportError:
        raise ValueError(f"{runtime} isn't installed; pip install 'etmamba-timm[export]'") from None
    try:
        run, text = _LOADERS[file.suffix, runtime](str(file))
        return ExportedModel(run, json.loads(text))
    except Exception as error:  # each library has its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} isn't a file that `etmamba export` wrote, or is damaged: {reason}") from error


def describe(model: EtMamba, dtype: str, from_frames: bool) -> str:
    """What a file says of itself, as JSON."""
    transform = EvalTransform.from_model(model, size=model.img_size)
    about = {
        "architecture": architecture_of(model.state_dict()),
        "dtype": dtype,
        "input": "frames" if from_frames else "clip",
        "output": "logits",
        "problem_type": MULTILABEL if model.is_multilabel else "single_label_classification",
        "labels": class_names(model, model.num_classes),
        "clip": model.clip.to_config(),
        "size": transform.size,
        "mean": transform.mean,
        "std": transform.std,
        "interpolation": transform.interpolation,
        "crop_pct": transform.crop_pct,
    }
    return json.dumps(about)


def _onnxruntime(file: str) -> tuple[Callable, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0], session.get_modelmeta().custom_metadata_map["etmamba"]


def _openvino(file: str) -> tuple[Callable, str]:
    import openvino

    core = openvino.Core()
    model = core.read_model(file)
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", threads)
    about = model.get_rt_info("etmamba") if file.endswith(".xml") else model.get_rt_info(["framework", "etmamba"])
    return lambda x: compiled(x)[0], about.astype(str)


def _torch(file: str) -> tuple[Callable, str]:
    files = {"etmamba.json": ""}
    program = torch.export.load(file, extra_files=files).module()
    return lambda x: program(torch.from_numpy(x)).detach().numpy(), files["etmamba.json"]


_LOADERS = {
    (".onnx", "onnxruntime"): _onnxruntime,
    (".onnx", "openvino"): _openvino,
    (".xml", "openvino"): _openvino,
    (".pt2", "torch"): _torch,
}

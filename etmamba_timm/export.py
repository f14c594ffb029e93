"""Models as files that run without this package: ONNX, OpenVINO, and PyTorch's exported programs.

model = load_model("local-dir:runs/clips/model")
print(export_model(model, "clips.onnx"))  # how far the file's results are from the model's

`etmamba_timm.runtime` loads them again. Every file is run in a process of its own before it gets its name.
"""

import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .checkpoints.manifest import sample_video
from .data import EvalTransform, Views
from .models import EtMamba
from .ops import plain_operators
from .predict import check_model
from .runtime import RUNTIMES, describe

if TYPE_CHECKING:
    import onnx_ir

OPSET = 20  # of ONNX
# The largest allowed difference from the model, relative to the largest logit. int8 is only reported.
BOUNDS = {"float32": 1e-4, "float16": 2e-2}


class ExportError(RuntimeError):
    """The model can't be exported, or the file's results aren't the model's."""


def export_model(
    model: EtMamba,
    file: str | Path,
    *,
    dtype: Literal["float32", "float16", "int8"] = "float32",
    from_frames: bool = False,
    calibration: Sequence[str | Path] = (),
) -> dict[str, float]:
    """Writes a model as a file that runs without this package, for any batch and number of frames, and checks it.

    The picture size is the model's. ETMamba is folded. The file holds, as JSON under
    `etmamba`, what is needed to use it: `labels`, `clip` (frames and stride), `mean`, `std`, `size`, `interpolation`,
    `crop_pct`, `problem_type` and the architecture. Its output are logits [B, classes] in float32: take the softmax, or
    the sigmoid if `problem_type` is "multi_label_classification".

    Args:
        model: a model in evaluation mode, with a classifier. It isn't changed.
        file: `.onnx`, `.xml` for OpenVINO (weights go into a `.bin` beside it), `.pt2` for PyTorch's exported program.
        dtype: of the weights. float16 halves the file; sums and the scan's states stay in float32. int8 is only for
            `.onnx`: weights and inputs of the linear layers.
        from_frames: take RGB frames, uint8 [B, T, H, W, 3] of the model's size, instead of normalised clips
            [B, C, T, H, W]. Resizing and cropping are left to the caller.
        calibration: videos that tell the range of int8's inputs (some 100). Without them each input is scaled by
            its own range as the model runs.

    Returns: the largest difference from the model's logits, relative to the largest logit, on "random" clips and on the
        sample "video".

    Raises:
        ValueError: another suffix, a model without classes or in training mode, a missing package, or calibration for
            another dtype.
        VideoError: a video that can't be read.
        ExportError: the file gives other results; it isn't written.
    """
    file = Path(file)
    check_target(file, dtype)
    if calibration and dtype != "int8":
        raise ValueError(f"calibration is for int8, and dtype is {dtype}")
    check_model(model, need_classes=True)
    deployed = Deployed(model, torch.float16 if dtype == "float16" else torch.float32, from_frames)
    about = describe(model, dtype, from_frames)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.stem}-") as folder:
        written = Path(folder) / file.name
        with _quiet():
            _write(deployed, written, about)
            if dtype == "int8":
                _quantise(deployed, written, calibration)
        differences = _check(model, written, dtype, from_frames)
        if (worst := max(differences.values())) > BOUNDS.get(dtype, float("inf")):
            raise ExportError(
                f"{file} isn't written: its results differ from the model's by {worst:.1e} of the largest logit, "
                f"and at most {BOUNDS[dtype]:.0e} is allowed for {dtype}"
            )
        for part in Path(folder).iterdir():  # OpenVINO's weights first: whoever sees the .xml finds them
            if part != written:
                os.replace(part, file.parent / part.name)
        os.replace(written, file)
    return differences


def check_target(file: Path, dtype: str) -> None:
    """Raises the errors of `export_model` about its file, before anything is loaded or computed."""
    if file.suffix not in RUNTIMES:
        raise ValueError(f"{file}: choose a file name that ends in {', '.join(RUNTIMES)}")
    if dtype == "int8" and file.suffix != ".onnx":
        raise ValueError(f"int8 is only for .onnx, and {file.name} isn't")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent} doesn't exist; create it first")
    needed = ["onnx", "onnxscript", "onnxruntime"] + (["openvino"] if file.suffix == ".xml" else [])
    if file.suffix != ".pt2" and (missing := [name for name in needed if importlib.util.find_spec(name) is None]):
        raise ValueError(f"{', '.join(missing)} isn't installed; pip install 'etmamba-timm[export]'")


class Deployed(nn.Module):
    """A folded copy of a model that takes float32 clips or uint8 frames, and gives float32 logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: EtMamba, dtype: torch.dtype, from_frames: bool) -> None:
        super().__init__()
        self.model = deepcopy(model).to("cpu", dtype)
        self.model.fold()
        self.dtype, self.from_frames = dtype, from_frames
        transform = EvalTransform.from_model(model, size=model.img_size)
        self.register_buffer("mean", 255 * torch.tensor(transform.mean).view(-1, 1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(transform.std).view(-1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: a clip [B, C, T, H, W], or frames, uint8 [B, T, H, W, C] -> logits [B, classes]."""
        if self.from_frames:
            x = (x.permute(0, 4, 1, 2, 3).float() - self.mean) / self.std
        return self.model(x.to(self.dtype)).float()

    def example(self, batch: int) -> Tensor:
        """Random inputs."""
        size = (self.model.num_frames, *self.model.img_size)
        if self.from_frames:
            return torch.randint(0, 256, (batch, *size, self.model.in_chans), dtype=torch.uint8)
        return torch.randn(batch, self.model.in_chans, *size)


def _write(deployed: Deployed, file: Path, about: str) -> None:
    example = deployed.example(2)
    frames_at = 1 if deployed.from_frames else 2
    sizes = {0: torch.export.Dim("batch", min=1), frames_at: torch.export.Dim("frames", min=1)}
    torch.compiler.reset()  # what an earlier export found out about the scan's length would be taken for granted
    with torch.no_grad(), plain_operators():
        program = torch.export.export(deployed, (example,), dynamic_shapes=(sizes,), strict=False)
        if file.suffix == ".pt2":
            torch.export.save(program, file, extra_files={"etmamba.json": about})
            return
        onnx_file = file.with_suffix(".onnx")
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            optimize=False,  # takes minutes
            input_names=[_input_name(deployed)],
            output_names=["logits"],
        )
    assert onnx_program is not None
    _simplify(onnx_program.model)
    onnx_program.model.metadata_props["etmamba"] = about
    onnx_program.save(onnx_file)
    if file.suffix == ".xml":
        import openvino

        converted = openvino.convert_model(onnx_file)
        converted.set_rt_info(about, "etmamba")
        openvino.save_model(converted, file, compress_to_fp16=deployed.dtype == torch.float16)
        onnx_file.unlink()


def _simplify(model: "onnx_ir.Model") -> None:
    """Computes what doesn't depend on the input, and joins what is computed twice: a quarter of the nodes remain."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    fold_constants(model, onnx_shape_inference=True)
    CommonSubexpressionEliminationPass()(model)
    remove_unused_nodes(model)


def _quantise(deployed: Deployed, file: Path, calibration: Sequence[str | Path]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

    class Clips(CalibrationDataReader):
        def __init__(self) -> None:
            self.videos = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            video = next(self.videos, None)
            return None if video is None else {_input_name(deployed): _input(deployed, video).numpy()}

    exact = file.rename(file.with_name("exact.onnx"))
    layers = ["MatMul", "Gemm"]
    if calibration:
        quantize_static(exact, file, Clips(), op_types_to_quantize=layers, per_channel=True)
    else:
        quantize_dynamic(exact, file, weight_type=QuantType.QInt8, op_types_to_quantize=layers)
    exact.unlink()


_RUN = """
import sys
sys.modules["etmamba_timm"] = None  # the file must do without
import numpy as np
file, inputs, outputs = sys.argv[1:]
if file.endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    run = lambda x: session.run(None, {name: x})[0]
elif file.endswith(".xml"):
    import openvino
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    run = lambda x: compiled(x)[0]
else:
    import torch
    program = torch.export.load(file).module()
    run = lambda x: program(torch.from_numpy(x)).detach().numpy()
np.savez(outputs, **{name: run(x) for name, x in np.load(inputs).items()})
"""


@torch.no_grad()
def _check(model: EtMamba, file: Path, dtype: str, from_frames: bool) -> dict[str, float]:
    """Runs the file in another process, that can't import this package; see `export_model` for the result."""
    exact = Deployed(model, torch.float32, from_frames)
    inputs = {"random": exact.example(3), "video": _input(exact, sample_video())}
    expected = {name: exact(x) for name, x in inputs.items()}
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.npz", Path(folder) / "found.npz"
        np.savez(given, **{name: x.numpy() for name, x in inputs.items()})  # type: ignore[arg-type]
        command = [sys.executable, "-I", "-c", _RUN, str(file), str(given), str(found)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ExportError(f"{file.name} isn't written: it doesn't run in {RUNTIMES[file.suffix]}: {reason}")
        results = {name: torch.from_numpy(x) for name, x in np.load(found).items()}
    return {name: ((results[name] - y).abs().max() / y.abs().max()).item() for name, y in expected.items()}


def _input_name(deployed: Deployed) -> str:
    return "frames" if deployed.from_frames else "clip"


def _input(deployed: Deployed, video: str | Path) -> Tensor:
    """A clip of a video as an input."""
    model = deployed.model
    transform = EvalTransform.from_model(model, size=model.img_size)
    frames = next(Views([Path(video)], transform, model.clip).read(0))  # uint8 [1, T, H, W, C]
    return frames if deployed.from_frames else transform.normalize(frames)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on their own workings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


__all__ = ["ExportError", "export_model"]

"""Saves a model as a folder in the Hub's layout: model.safetensors, config.json, and a file for transformers."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from timm.models._hub import save_config_for_hf
from torch import Tensor

from ..clip import Clip, Stride
from ..models import EtMamba
from ..words import number_of
from .config import CONFIG_FILE, MODEL_TYPE, MULTILABEL, PROCESSOR, PROCESSOR_FILE, WEIGHTS_FILE

# Few, and used in float32 by every model: halving them would cost accuracy and save nothing.
KEPT_IN_FLOAT32 = ("A_log", "A_b_log", "D", "D_b", "dt_proj.bias", "dt_proj_b.bias")


def save_checkpoint(
    model: EtMamba,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    label_names: Sequence[str] | None = None,
    stride: Stride = None,
    card: Mapping | None = None,
    readme: Callable[[dict], str] | None = None,
) -> None:
    """Writes a model to a new folder, whole or not at all; `timm.create_model("local-dir:FOLDER")` reads it.

    Args:
        model: built by timm or an entry point; its constructor arguments go to `model_args` of config.json.
        folder: a path that doesn't exist yet, or an empty folder.
        dtype: of the stored weights, except those that the scan uses in float32; None keeps their own. A float32
            model comes back bit by bit.
        label_names: the classes' names, in order; None for those of the model's `pretrained_cfg`.
        stride: frames from one of a clip to the next, or 'spread' over the whole video; None for the model's own.
        card: what the model card says, {"licence", "source", "recipe", "figures", "notes"}, all optional.
        readme: makes the text of README.md from the contents of config.json; None for no such file.

    Raises:
        FileExistsError: the folder isn't empty.
        ValueError: names for another number of classes, weights that aren't finite in `dtype`.
    """
    check_new_folder(folder)
    folder = Path(folder).resolve()  # of '.' too
    names, known = list(label_names or ()), model.pretrained_cfg.get("label_names") or ()
    if label_names is None and len(known) == model.num_classes:  # else they are those of a classifier that was replaced
        names = list(known)
    if names and len(names) != model.num_classes:
        raise ValueError(
            f"{number_of(len(names), 'label name')} for {number_of(model.num_classes, 'class')}; give one for each"
        )
    clip = Clip(model.num_frames, model.stride if stride is None else stride)
    blocks: dict = {"model_type": MODEL_TYPE, "clip": clip.to_config()}
    if model.is_multilabel:
        blocks["problem_type"] = MULTILABEL
    if names:
        blocks["label_names"] = names
    if card:
        blocks["card"] = dict(card)
    tensors = stored_tensors(model.state_dict(), dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        (draft / WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt"}))  # save_file lets nobody else read it
        data = {"input_size": (model.in_chans, *model.img_size)}
        save_config_for_hf(model, str(draft / CONFIG_FILE), model_config=blocks, data_config=data)
        config = json.loads((draft / CONFIG_FILE).read_text(encoding="utf-8"))
        config["pretrained_cfg"].pop("label_names", None)  # they stand at the root
        config["model_args"].pop("num_classes", None)  # so does it; transformers gives it beside these
        (draft / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (draft / PROCESSOR_FILE).write_text(PROCESSOR, encoding="utf-8")
        if readme is not None:
            (draft / "README.md").write_text(readme(config), encoding="utf-8")
        draft.chmod(0o777 & ~_umask())
        if folder.exists():
            folder.rmdir()  # it is empty; Windows wouldn't replace it
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_new_folder(folder: str | Path) -> None:
    """Raises FileExistsError unless a folder doesn't exist yet or is empty. Call it before a long computation."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder.resolve()} exists already; name another folder, or remove it")


def stored_tensors(state_dict: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The weights as they are stored: on the CPU, in `dtype` but for `KEPT_IN_FLOAT32`.

    Raises:
        ValueError: a weight isn't finite, in `dtype` or anyway.
    """
    out = {}
    for key, value in state_dict.items():
        keep = dtype is None or key.endswith(tuple("." + name for name in KEPT_IN_FLOAT32))
        out[key] = value.detach().cpu().to(value.dtype if keep else dtype).contiguous()
        if not out[key].isfinite().all():
            if value.isfinite().all():
                raise ValueError(f"{key} is too large for {dtype}; store it in bfloat16 or float32")
            raise ValueError(f"{key} holds NaN or infinity; its training went wrong, save an earlier model")
    return out


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

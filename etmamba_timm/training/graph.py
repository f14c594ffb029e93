"""Training steps as CUDA graphs: two calls start thousands of small kernels, instead of Python one by one."""

import logging

import torch
from accelerate import Accelerator, DistributedType

from ..checkpoints.errors import first_line
from ..models import EtMamba
from .recipe import Recipe

_logger = logging.getLogger(__name__)


class RecordingError(RuntimeError):
    """The steps of a run can't be recorded; the message says what to do."""


def replay_steps(model: EtMamba, recipe: Recipe, accelerator: Accelerator, dtype: torch.dtype | None) -> bool:
    """Records the forward and the backward pass of a batch; in training mode, the model then replays them.

    A recording is of one batch size on one GPU, runs no hooks, and its gradients are for one step, not to be added up.
    So other runs aren't recorded. Names of weights don't change.

    Args:
        model: on the device, before `Accelerator.prepare`; in place.
        recipe: the settings.
        accelerator: of the run.
        dtype: of autocast, or None.

    Returns: whether the model replays.

    Raises:
        RecordingError: something in the model can't be recorded, or there isn't enough memory.
    """
    is_alone = accelerator.device.type == "cuda" and accelerator.distributed_type == DistributedType.NO
    is_whole = not (recipe.freeze_backbone or recipe.feature_weight or recipe.grad_checkpointing)
    if not (recipe.cuda_graphs and is_alone and is_whole and recipe.accumulate == 1 and not recipe.compile):
        return False
    size = (recipe.batch_size, model.in_chans, recipe.num_frames, *recipe.img_size)
    clips = torch.zeros(size, device=next(model.parameters()).device)
    if warns := getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None):
        warns(False)  # PyTorch's: gradients are recorded on one stream and added up on another, which waits for it
    try:
        # Without a cache: weights cast while recording would stay as they are then.
        with torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
            torch.cuda.make_graphed_callables(model.train(), (clips,), allow_unused_input=True)
    except (AssertionError, RuntimeError) as error:  # after which PyTorch's random numbers may be of no more use
        raise RecordingError(
            f"the steps can't be recorded as CUDA graphs ({first_line(error)}); start again with cuda_graphs=false, "
            "which runs them kernel by kernel, or with a smaller batch_size if memory was too small"
        ) from error
    _logger.info("training steps are replayed as CUDA graphs")
    return True

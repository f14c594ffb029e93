"""Which runs replay their steps as CUDA graphs, and that this changes nothing."""

from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate import DistributedType

import etmamba_timm  # registers the models  # noqa: F401
from etmamba_timm.ops.kernels import load_gpu
from etmamba_timm.training.graph import RecordingError, replay_steps
from etmamba_timm.training.recipe import Recipe

SETTINGS = {"batch_size": 2, "num_frames": 2, "size": 32, "drop_path": 0.0}


def small(drop_path: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("etmamba_ti", num_classes=5, num_frames=2, img_size=32, depth=2, drop_path_rate=drop_path)


def on(device: str, kind: DistributedType = DistributedType.NO) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), distributed_type=kind)


@pytest.fixture
def _gpu() -> None:
    if reason := load_gpu.why_not():
        pytest.skip(reason)


@pytest.fixture
def recorded(monkeypatch) -> list:
    """What is given to PyTorch to be recorded."""
    calls: list = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *args, **kwargs: calls.append(args))
    return calls


def test_the_whole_batch_is_recorded_in_training_mode(recorded):
    model = small().eval()
    assert replay_steps(model, Recipe(**SETTINGS), on("cuda"), torch.bfloat16)
    [(given, (clips,))] = recorded
    assert given is model
    assert model.training
    assert clips.shape == (2, 3, 2, 32, 32)
    assert clips.dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"cuda_graphs": False},
        {"accumulate": 2},
        {"compile": True},
        {"grad_checkpointing": 1},
        {"freeze_backbone": True},
        {"teacher": "etmamba_ti", "feature_weight": 0.5},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_what_a_recording_does_not_fit_is_not_recorded(changes, recorded):
    assert not replay_steps(small(), Recipe(**SETTINGS | changes), on("cuda"), None)
    assert not recorded


@pytest.mark.parametrize("where", [on("cpu"), on("mps"), on("cuda", DistributedType.MULTI_GPU)])
def test_only_one_gpu_without_wrappers_records(where, recorded):
    assert not replay_steps(small(), Recipe(**SETTINGS), where, None)
    assert not recorded


def test_what_cannot_be_recorded_is_an_error_with_a_remedy(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    with pytest.raises(RecordingError, match="not permitted when stream is capturing.*cuda_graphs=false"):
        replay_steps(small(), Recipe(**SETTINGS), on("cuda"), None)


@pytest.mark.cuda
@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_replayed_steps_have_the_same_loss_and_gradients(dtype):
    def step(model, clips):
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            loss = torch.nn.functional.cross_entropy(model(clips).float(), torch.tensor([1, 3], device="cuda"))
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return [loss.detach(), *grads]

    model = small().cuda().train()
    batches = torch.randn(3, 2, 3, 2, 32, 32, device="cuda")
    plain = [step(model, clips) for clips in batches]
    assert replay_steps(model, Recipe(**SETTINGS), on("cuda"), dtype)
    for clips, wanted in zip(batches, plain, strict=True):
        torch.testing.assert_close(step(model, clips), wanted, rtol=1e-3, atol=1e-4)
    assert model.eval()(batches[0, :1]).shape == (1, 5)  # another batch, not replayed


@pytest.mark.cuda
@pytest.mark.usefixtures("_gpu")
def test_drop_path_follows_the_seed_of_the_update():
    model = small(drop_path=0.5).cuda()
    assert replay_steps(model, Recipe(**SETTINGS), on("cuda"), None)
    clips, found = torch.randn(2, 3, 2, 32, 32, device="cuda"), []
    for seed in (*range(8), 0):
        torch.manual_seed(seed)
        found.append(model(clips).detach().clone())
    assert torch.equal(found[0], found[-1])
    assert any(not torch.equal(found[0], other) for other in found[1:-1])

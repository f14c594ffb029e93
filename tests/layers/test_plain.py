"""A plain submodule leaves its work to the fused kernel; one with hooks is called, and both agree."""

import copy

import pytest
import torch
from parts import (
    MODELS,
    PARTS,
    assert_close,
    clip,
    drawn,
    leaves,
    look,
    needs_kernels,
    part_input,
    run_part,
    small,
)
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from etmamba_timm.layers import EbsBlock
from etmamba_timm.layers.ssm import ssm
from etmamba_timm.ops import selective_scan

KERNELS = {"scan", "short_conv", "local_conv", "conv_norm_relu"}
FUSED = {  # the submodules of STFP and STCM whose work a kernel does, and which kernel
    "stem.conv1.depthwise": "conv_norm_relu",
    "stem.skip.pointwise": "conv_norm_relu",
    "stem.conv3.norm": "conv_norm_relu",
    "blocks.1.mixer.conv1d": "short_conv",
    "blocks.0.local.conv3": "local_conv",
    "blocks.0.local.conv5": "local_conv",
    "blocks.1.local.conv7": "local_conv",
}


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operators(model: nn.Module, x: Tensor) -> list[str]:
    with torch.no_grad(), Operators() as ran:
        model(x)
    return ran.seen


# --- called and fused are the same ---------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_called_agrees_with_fused(name):
    """Output and all gradients, with a hook on every submodule, and with one on each submodule alone."""
    part = drawn(PARTS[name]())
    x = part_input(part)
    expected = run_part(part, x)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [x, *part.parameters()], weight)
    for hooked in ([*part.modules()], *([leaf] for leaf in leaves(part).values())):
        handles = [module.register_forward_hook(look) for module in hooked]
        out = run_part(part, x)
        assert_close(out, expected)
        grads = torch.autograd.grad(out, [x, *part.parameters()], weight)
        for grad, wanted_grad in zip(grads, wanted, strict=True):
            assert_close(grad, wanted_grad)
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", PARTS)
def test_what_a_hook_returns_counts(name):
    """Half the output, by a hook on one submodule at a time, is half the weight and bias."""
    part = drawn(PARTS[name]())
    x = part_input(part).detach()
    untouched = run_part(part, x)
    for leaf_name, leaf in leaves(part).items():
        halved = copy.deepcopy(part)
        with torch.no_grad():
            for parameter in halved.get_submodule(leaf_name).parameters():
                parameter.mul_(0.5)
        expected = run_part(halved, x)
        assert (expected - untouched).abs().max() > 1e-6
        with leaf.register_forward_hook(lambda module, args, out: out * 0.5):
            assert_close(run_part(part, x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_in_half_precision(name, dtype):
    model, x = small(name, torch.float32), clip(torch.float32)
    expected = model(x)
    for module in model.modules():
        module.register_forward_hook(look)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        if dtype == "autocast":
            out = model(x)
        else:
            out = model.to(dtype)(x.to(dtype))
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert_close(out.float(), expected, 0.05)


def test_wrappers_may_return_another_dtype():
    """Under autocast some adapters give back float32 for bfloat16: the scan gets one dtype all the same."""
    model, x = small(dtype=torch.float32), clip(torch.float32)
    expected = model(x)
    for leaf in leaves(model.blocks).values():
        leaf.register_forward_hook(lambda module, args, out: out.float())
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(model(x).float(), expected, 0.05)


# --- the kernels run where they may --------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("name", MODELS)
def test_an_untouched_model_runs_the_kernels(name):
    seen = operators(small(name), clip())
    assert set(seen) >= {"scan", "short_conv"}
    assert ("conv_norm_relu" in seen) == (name != "videomamba_ti")
    assert ("local_conv" in seen) == (name == "etmamba_ti")
    assert seen.count("convolution") == 1  # the patches


@needs_kernels
@pytest.mark.parametrize("name", FUSED)
def test_only_the_touched_group_is_called(name):
    model, x = small(), clip()
    before = operators(model, x)
    with model.get_submodule(name).register_forward_hook(look):
        seen = operators(model, x)
    assert {kernel: before.count(kernel) - seen.count(kernel) for kernel in KERNELS} == {
        kernel: int(kernel == FUSED[name]) for kernel in KERNELS
    }
    assert operators(model, x) == before


def test_the_step_bias_is_added_in_float32():
    """In a bfloat16 model the scan adds a plain dt_proj's bias, in float32; a called one has added its own."""
    mixer = EbsBlock(64).bfloat16().mixer
    u, z = torch.randn(2, 2, 51, 64, dtype=torch.bfloat16)
    biases = []

    def scan(u: Tensor, delta: Tensor, A: Tensor, *args: Tensor, **kwargs) -> Tensor:
        biases.append(bias := kwargs["delta_bias"])
        y = selective_scan(u, delta, A, *args, **kwargs)
        in_float32 = {"D": kwargs["D"].float(), "delta_bias": bias if bias is None else bias.float(), "A_log": False}
        assert torch.equal(y, selective_scan(u, delta, -A.float().exp(), *args, **(kwargs | in_float32)))
        return y

    for _ in range(2):
        ssm(scan, u, z, mixer.x_proj, mixer.dt_proj, mixer.A_log, mixer.D)
        mixer.dt_proj.register_forward_hook(look)
    plain, called = biases
    assert plain is mixer.dt_proj.bias
    assert called is None


# --- hooks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_hooks_fire_on_every_submodule(name, fold):
    model = small(name).train()
    if fold:
        model.fold()
    seen = {kind: set() for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre")}
    for module_name, module in model.named_modules():
        for kind, names in seen.items():
            getattr(module, f"register_{kind}_hook")(lambda *_, names=names, name=module_name: names.add(name))
    model(clip().requires_grad_()).sum().backward()
    every = {module_name for module_name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    for kind, names in seen.items():
        assert names == every, kind


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules_at_once_fire(kind):
    model, seen = small().train(), set()
    register = getattr(global_hooks, f"register_module_{kind}_hook")
    with register(lambda module, *_: seen.add(module)):
        model(clip().requires_grad_()).sum().backward()
    assert seen == {module for module in model.modules() if not isinstance(module, nn.ModuleList)}


@needs_kernels
def test_pytorchs_own_trackers_see_what_runs_without_them():
    model, x = small(), clip()
    before = operators(model, x)
    with FlopCounterMode(display=False) as counter:
        assert operators(model, x) == before
    fused = counter.get_total_flops()
    model.blocks[0].register_forward_hook(look)  # hooks of its owner, on a module that isn't fused
    for leaf in leaves(model).values():
        leaf.register_forward_hook(look)
    with FlopCounterMode(display=False) as counter:
        assert KERNELS & set(operators(model, x)) == {"scan"}
    assert counter.get_total_flops() == fused


# --- PyTorch's transforms ------------------------------------------------------------------------


def touched(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model each of whose submodules has a hook, and each of whose matrices and kernels a parametrisation."""
    model = small(name, dtype)
    for leaf in leaves(model).values():
        leaf.register_forward_hook(lambda module, args, out: out * 0.9)
        if leaf.weight.ndim > 1:
            parametrizations.weight_norm(leaf)
    return model


@pytest.mark.parametrize("name", ["videomamba_ti_stfp", "etmamba_ti"])
def test_compiled_in_one_piece(name):
    model, x = touched(name), clip()
    out, expected = torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x)
    assert_close(out, expected)
    grads, wanted = (torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (out, expected))
    for grad, wanted_grad in zip(grads, wanted, strict=True):
        assert_close(grad, wanted_grad)


@pytest.mark.skipif(torch.__version__.startswith("2.4."), reason="PyTorch 2.4 can't compile a model with hooks")
def test_a_hook_that_comes_after_compilation_acts_once_it_is_compiled_anew():
    """PyTorch's own rule for hooks: a compiled graph doesn't look for new ones."""
    model, x = small(), clip()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), model(x))
    model.blocks[0].mixer.dt_proj.register_forward_hook(lambda module, args, out: out * 0.5)
    torch._dynamo.reset()
    assert_close(compiled(x), model(x))


@pytest.mark.skipif(torch.__version__.startswith("2.4."), reason="PyTorch 2.4 exports for fixed shapes alone")
def test_exported_for_any_batch_and_number_of_frames():
    model, x = touched("etmamba_ti"), clip()
    dims = {0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim("frames", min=1, max=64)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(dims,)).module()
    for other in (x, torch.randn(3, 3, 5, 32, 32, dtype=torch.float64)):
        assert_close(exported(other), model(other))


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_in_the_backward_pass(name):
    model, x = touched(name).train(), clip()
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    grads = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for grad, wanted in zip(grads, expected, strict=True):
        assert_close(grad, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_forward_mode_agrees_with_backward_mode(name):
    model, x, tangent = touched(name), clip(), clip()
    _, derivative = torch.func.jvp(model, (x,), (tangent,))
    x.requires_grad_()
    weight = torch.randn_like(derivative)
    (gradient,) = torch.autograd.grad(model(x), x, weight)
    torch.testing.assert_close((derivative * weight).sum(), (gradient * tangent).sum(), rtol=1e-8, atol=1e-8)


@needs_kernels
def test_other_parameters_by_functional_call():
    model, other, x = small(), small(dtype=torch.float64), clip()
    weights = {name: p.detach() * 0.9 for name, p in other.named_parameters()}
    expected = copy.deepcopy(model)
    expected.load_state_dict(weights)
    assert torch.equal(torch.func.functional_call(model, weights, (x,)), expected(x))

"""A submodule that was wrapped, replaced or hooked acts; an untouched one leaves its work to the fused kernel."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import etmamba_timm  # noqa: F401 (registers the models)
from etmamba_timm.layers import BiMambaBlock, EbsBlock, StcmBlock, Stfp
from etmamba_timm.ops import scan_backends

TOLERANCE = 1e-10  # in float64, relative to the largest value
GRID = (2, 3, 4)
TOKENS, CLIP = (2, 25, 20), (2, 3, 3, 5, 7)
PARTS = {
    "stfp": lambda: Stfp(3),
    "stcm": lambda: StcmBlock(20),
    "stcm, folded": lambda: folded(StcmBlock(20)),
    "stcm, d_conv=2": lambda: StcmBlock(20, d_conv=2),
    "ebs": lambda: EbsBlock(20),
    "ebs, folded": lambda: folded(EbsBlock(20)),
    "ebs, d_conv=0": lambda: EbsBlock(20, d_conv=0),
    "bimamba": lambda: BiMambaBlock(20),
    "bimamba, d_conv=0": lambda: BiMambaBlock(20, d_conv=0),
}
MODELS = ("videomamba_ti", "videomamba_ti_stfp", "etmamba_ti_ebs", "etmamba_ti")
SMALL = {"depth": 2, "embed_dim": 32, "img_size": 32, "num_frames": 3, "num_classes": 5, "global_pool": "avg"}
KERNELS = {"cpu_scan", "cpu_short_conv", "cpu_local_conv", "cpu_conv_norm_relu"}
FUSED = {  # the submodules of STFP and STCM whose work a kernel does, and which kernel
    "stem.conv1.depthwise": "cpu_conv_norm_relu",
    "stem.skip.pointwise": "cpu_conv_norm_relu",
    "stem.conv3.norm": "cpu_conv_norm_relu",
    "blocks.1.mixer.conv1d": "cpu_short_conv",
    "blocks.0.local.conv3": "cpu_local_conv",
    "blocks.0.local.conv5": "cpu_local_conv",
    "blocks.1.local.conv7": "cpu_local_conv",
}
needs_kernels = pytest.mark.skipif(
    scan_backends()["cpu"] is not None, reason=f"the kernels can't run: {scan_backends()['cpu']}"
)


def folded(block: nn.Module) -> nn.Module:
    block.reparameterize()
    return block


def drawn(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The module with noise on all of its parameters, so that nothing hides behind an initial 0 or 1."""
    module.to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def small(name: str = "etmamba_ti", dtype: torch.dtype = torch.float64, **kwargs) -> nn.Module:
    return drawn(timm.create_model(name, **(SMALL | kwargs)), dtype).eval()


def clip(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 3, 32, 32, dtype=dtype)


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The submodules with weights, by name."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def run_part(part: nn.Module, x: Tensor) -> Tensor:
    return part(x) if isinstance(part, Stfp) else part(x, GRID)


def part_input(part: nn.Module) -> Tensor:
    return torch.randn(CLIP if isinstance(part, Stfp) else TOKENS, dtype=torch.float64, requires_grad=True)


def look(module, args, output) -> None:
    """A forward hook that changes nothing."""


def assert_close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> None:
    assert a.dtype == b.dtype
    assert b.any()
    assert (a - b).abs().max() <= tolerance * b.abs().max()


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
    assert set(seen) >= {"cpu_scan", "cpu_short_conv"}
    assert ("cpu_conv_norm_relu" in seen) == (name != "videomamba_ti")
    assert ("cpu_local_conv" in seen) == (name == "etmamba_ti")
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


@needs_kernels
def test_the_step_bias_is_added_in_float32():
    """In bfloat16 the bias of a plain dt_proj is added within the scan, which a called one can't have."""
    torch.manual_seed(0)
    block = EbsBlock(64)
    x = torch.randn(2, 51, 64)
    expected = block.double()(x.double(), GRID)
    block.bfloat16()
    fused = block(x, GRID)
    block.mixer.dt_proj.register_forward_hook(look)
    assert (fused - expected).abs().mean() <= (block(x, GRID) - expected).abs().mean()


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
        assert KERNELS & set(operators(model, x)) == {"cpu_scan"}
    assert counter.get_total_flops() == fused


# --- wrapped and replaced ------------------------------------------------------------------------


def set_forward(module: nn.Module) -> Callable[[], None]:
    """Half the output, by a forward on the instance, as offloading and some adapters do it."""
    own = module.forward
    module.forward = lambda x: own(x) * 0.5
    return lambda: delattr(module, "forward")


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces a submodule."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


class Half(nn.Module):
    """Half of what the wrapped module gives; it has no attribute of it."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapped(x) * 0.5


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("way", ["forward on the instance", "a module around it", "a subclass"])
def test_wrapped_one_by_one(name, way):
    part = drawn(PARTS[name]())
    x = part_input(part).detach()
    for leaf_name, leaf in leaves(part).items():
        wrapped, halved = copy.deepcopy(part), copy.deepcopy(part)
        with torch.no_grad():
            for parameter in halved.get_submodule(leaf_name).parameters():
                parameter.mul_(0.5)
        inner = wrapped.get_submodule(leaf_name)
        if way == "forward on the instance":
            set_forward(inner)
        elif way == "a module around it":
            put(wrapped, leaf_name, Half(inner))
        else:
            kind = type(leaf)
            inner.__class__ = type(
                "Other", (kind,), {"forward": lambda self, x, kind=kind: kind.forward(self, x) * 0.5}
            )
        assert_close(run_part(wrapped, x), run_part(halved, x))


def test_replaced_by_a_convolution_of_another_kind():
    """Of the same type, but not what the kernel computes: it is called, not taken for the one that was there."""
    block = drawn(StcmBlock(20))
    x = torch.randn(TOKENS, dtype=torch.float64)
    for name, kwargs in {
        "local.conv3": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        "local.conv5": {"kernel_size": 3, "padding": 1},
        "local.conv7": {"kernel_size": 7, "padding": 3},
        "mixer.conv1d": {"kernel_size": 2, "dilation": 3},
    }.items():
        other, old = copy.deepcopy(block), block.get_submodule(name)
        width = old.in_channels
        new = type(old)(width, width, groups=width, **kwargs).double()
        put(other, name, new)
        expected = copy.deepcopy(other)
        expected.get_submodule(name).register_forward_hook(look)
        assert_close(other(x, GRID), expected(x, GRID), 0)
    for name in ("local.conv3", "mixer.conv1d", "mixer.dt_proj"):
        without, zeros = copy.deepcopy(block), copy.deepcopy(block)
        without.get_submodule(name).bias = None
        nn.init.zeros_(zeros.get_submodule(name).bias)
        assert_close(without(x, GRID), zeros(x, GRID))


def test_a_compiled_submodule_is_called():
    part = drawn(StcmBlock(20))
    x = torch.randn(TOKENS, dtype=torch.float64)
    expected = run_part(part, x)
    for name in leaves(part):
        put(part, name, torch.compile(part.get_submodule(name), backend="eager"))
    assert_close(run_part(part, x), expected)


def test_pruned():
    """As when the pruning is made permanent; what is cut gets no gradient."""
    model, x = small(), clip()
    untouched = model(x)
    for leaf in leaves(model).values():
        prune.random_unstructured(leaf, "weight", 0.3)
    out = model(x)
    out.square().sum().backward()
    for leaf in leaves(model).values():
        assert leaf.weight_orig.grad.any()
        assert not leaf.weight_orig.grad[leaf.weight_mask == 0].any()
        prune.remove(leaf, "weight")
    assert_close(out, model(x))
    assert (out - untouched).abs().max() > 0.01 * untouched.abs().max()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (parametrizations.weight_norm, lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight")),
        (parametrizations.spectral_norm, lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight")),
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    ],
)
def test_weight_and_spectral_norm(wrap, unwrap):
    model, x = small(), clip()
    chosen = [leaf for leaf in leaves(model).values() if leaf.weight.ndim > 1]
    for leaf in chosen:
        wrap(leaf)
    model.eval()
    out = model(x)
    out.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    for leaf in chosen:
        unwrap(leaf)
    assert_close(out, model(x))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_quantised(name):
    """PyTorch's dynamic quantisation replaces every linear layer by one whose weight is a method."""
    model, x = small(name, torch.float32), clip(torch.float32)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(isinstance(m, nn.Linear) for m in quantised.modules())
    with torch.no_grad():
        expected, out = model(x), quantised(x)
        assert not torch.equal(out, expected)
        assert_close(out, expected, 0.1)
        # each layer acts: with one's scale doubled, the output is another one
        for layer in ("dt_proj", "x_proj"):
            mixer = quantised.blocks[0].mixer
            with getattr(mixer, layer).register_forward_hook(lambda module, args, y: y * 2):
                assert (quantised(x) - out).abs().max() > 1e-3 * out.abs().max()


# --- low-rank adapters ---------------------------------------------------------------------------


def with_lora(model: nn.Module, target_modules: str | list[str] = "all-linear", rank: int = 4) -> nn.Module:
    """The model in peft's wrapper, with adapters that do something from the start."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=rank, target_modules=target_modules, init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("name", MODELS)
def test_lora_on_every_linear_layer(name):
    model = timm.create_model(name, img_size=32, num_frames=3, num_classes=5, global_pool="avg")
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"]
    keys, x = model.state_dict().keys(), clip(torch.float32)
    untouched = model.eval()(x)
    adapted = with_lora(model, linear).eval()
    out = adapted(x)
    out.square().sum().backward()
    adapters = {n: p for n, p in adapted.named_parameters() if "lora" in n}
    assert len(adapters) == 2 * len(linear)
    assert [n for n, p in adapters.items() if p.grad is None or not p.grad.any()] == []
    assert {n for n, p in adapted.named_parameters() if p.grad is not None} == adapters.keys()
    assert (out - untouched).abs().max() > 0.01 * untouched.abs().max()
    adapted.merge_adapter()
    assert_close(adapted(x), out, 1e-5)
    adapted.unmerge_adapter()
    merged = adapted.merge_and_unload()
    assert merged.state_dict().keys() == keys
    assert_close(merged(x), out, 1e-5)


def test_lora_on_all_linear():
    """By peft's own name for them."""
    adapted = with_lora(small(dtype=torch.float32))
    adapted(clip(torch.float32)).square().sum().backward()
    adapters = {n: p for n, p in adapted.named_parameters() if "lora" in n}
    assert sum("dt_proj" in n for n in adapters) == 4
    assert [n for n, p in adapters.items() if p.grad is None or not p.grad.any()] == []


def test_lora_on_convolutions():
    """On those that peft can adapt: its adapters know no dilation, and it doesn't merge depthwise ones."""
    convolutions = ["depthwise", "pointwise", "local.conv3", "conv1d"]
    with pytest.warns(UserWarning, match="groups > 1"):
        adapted = with_lora(small(dtype=torch.float32), convolutions, rank=96)
    adapted(clip(torch.float32)).square().sum().backward()
    adapters = {n: p for n, p in adapted.named_parameters() if "lora" in n}
    assert len(adapters) == 2 * (3 + 4 + 2 * 2)
    assert [n for n, p in adapters.items() if p.grad is None or not p.grad.any()] == []


# --- folding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["in_proj", "pw", "out_proj", "fusion"])
def test_a_wrapped_block_refuses_to_be_folded(layer):
    model, x = small(), clip()
    wrapped = next(m for n, m in model.named_modules() if n.endswith(layer))
    prune.random_unstructured(wrapped, "weight", 0.3)
    expected = model(x)
    with pytest.raises(
        ValueError, match=rf"can't fold a block whose (mixer\.)?{layer} isn't a plain nn\.Linear; first"
    ):
        model.fold()
    assert torch.equal(model(x), expected)
    prune.remove(wrapped, "weight")
    assert_close(model.fold()(x), expected)


def test_adapters_on_what_folding_leaves_alone():
    """They work on a folded model as on the model itself, and don't hinder the folding."""
    model, x = small(), clip()
    for mixer in (block.mixer for block in model.blocks):
        mixer.dt_proj, mixer.conv1d = Half(mixer.dt_proj), Half(mixer.conv1d)
    expected = model(x)
    assert_close(model.fold()(x), expected)


# --- PyTorch's transforms ------------------------------------------------------------------------


def touched(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model each of whose submodules has a hook, and each of whose matrices and kernels a parametrisation."""
    model = small(name, dtype)
    for leaf in leaves(model).values():
        leaf.register_forward_hook(lambda module, args, out: out * 0.9)
        if leaf.weight.ndim > 1:
            parametrizations.weight_norm(leaf)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_compiled_in_one_piece(name):
    model, x = touched(name), clip()
    out, expected = torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x)
    assert_close(out, expected)
    grads, wanted = (torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (out, expected))
    for grad, wanted_grad in zip(grads, wanted, strict=True):
        assert_close(grad, wanted_grad)


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

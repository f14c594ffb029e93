"""The operators of gpu.py: times beside floors and plain twins, the scan's segments, and whether all is right."""

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import timm
import torch
from gpu_bench import Bench, Key, Task
from torch import Tensor

from etmamba_timm.ops import bidirectional_scan, conv_norm_relu, local_conv, scan_backends, short_conv
from etmamba_timm.ops.scan.backend import ScanInputs

SHORT, LOCAL, STAGE, SCAN = (
    importlib.import_module(f"etmamba_timm.ops.{name}")
    for name in ("short_conv", "local_conv", "conv_norm_relu", "scan.selective_scan")
)
STATE, LENGTH = 16, 3137
CONVOLUTIONS = ("short convolution", "local branch", "STFP stage")
SCANS = ((8, 576), (1, 576), (32, 576), (8, 1152), (1, 192))  # batch, width
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
# max|a - b| / max|b| against float64: activations and their gradients, gradients of parameters; as in tests/ops
BOUNDS = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 3e-2), "float16": (1e-2, 3e-2)}
MODEL_BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}  # of logits; the second under autocast


class Operator(NamedTuple):
    """An operator on some inputs, of which the first few are activations."""

    call: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: list[Tensor]
    activations: int
    residual: Tensor | None = None  # one of the inputs, whose gradient is the output's: not moved in the backward pass

    def bytes(self, out: Tensor) -> tuple[int, int]:
        """Of all inputs and outputs once, forward and backward."""
        inputs, result = sum(map(_bytes, self.inputs)), _bytes(out)
        residual = 0 if self.residual is None else _bytes(self.residual)
        return inputs + result, 2 * (inputs - residual) + result


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def scan(batch: int, width: int, length: int, state: int, dtype: torch.dtype, device: torch.device) -> Operator:
    """Both directions, with the strides of EBS: channels next to each other, z, B and C parts of wider tensors."""
    rank = math.ceil(width / 16)

    def tokens(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    u, delta = tokens(2, batch, length, width), tokens(2, batch, length, width) - 2
    z = tokens(batch, length, 4 * width).unflatten(-1, (2, 2, width)).permute(2, 3, 0, 1, 4)[1]
    _, b, c = tokens(2, batch, length, rank + 2 * state).split([rank, state, state], -1)
    A = -torch.arange(1, state + 1.0, device=device).repeat(width, 1)
    D, bias = torch.ones(width, device=device), torch.randn(width, device=device)
    inputs = [u.mT, delta.mT, b.mT, c.mT, z.mT, A, D, bias]

    def call(u, delta, b, c, z, A, D, bias, backend="auto"):
        return bidirectional_scan(u, delta, A, b, c, D, z, bias, True, backend)

    return Operator(call, lambda *inputs: call(*inputs, backend="torch"), inputs, 5)


def convolutions(batch: int, frames: int, side: int, width: int, dtype, device, parameters) -> dict[str, Operator]:
    """The others as ETMamba calls them: clips of `frames` × side², `width` channels; parameters in that dtype."""

    def random(*shape: int, dtype=dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def some(*shapes: Sequence[int]) -> list[Tensor]:
        return [random(*shape, dtype=parameters) * 0.3 for shape in shapes]

    grid = (frames, side // 16, side // 16)
    tokens, channels = 1 + math.prod(grid), width // 4
    x = random(batch, tokens, 2, width).permute(2, 0, 1, 3)  # both directions, as EBS hands them over
    inputs = [x, *some((width, 1, 4), (width,))]
    short = Operator(short_conv, partial(SHORT._plain, reverse=False), inputs, 1)

    def local(function):
        return lambda x, residual, *rest: function(x, residual, list(rest[:3]), list(rest[3:]), grid)

    residual = random(batch, tokens, width, dtype=torch.float32)
    shapes = [*((channels, 1, k, k) for k in LOCAL.SIDES), *[(channels,)] * 3]
    inputs = [random(batch, tokens, channels), residual, *some(*shapes)]
    branch = Operator(local(local_conv), local(LOCAL._plain), inputs, 2, residual)

    def stage(function):
        return lambda x, residual, *p: function(x, (p[0], p[1]), (p[2], p[3]), (p[4], p[5]), 1e-5, residual)

    clip, added = random(batch, 3, frames, side, side), random(batch, 3, frames, side, side)
    inputs = [clip, added, *some((3, 1, 3, 3, 3), (3,), (3, 3, 1, 1, 1), (3,), (3,), (3,))]
    # Biases far apart keep the norm's variance away from 0, where no precision would be enough.
    inputs[5] = 10.0 * torch.arange(3, device=device, dtype=parameters)
    stfp = Operator(stage(conv_norm_relu), stage(STAGE._plain), inputs, 2, added)
    return dict(zip(CONVOLUTIONS, (short, branch, stfp), strict=True))


class Passes:
    """The passes of a function over inputs, each as a call without arguments."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self.function, self.inputs = function, inputs
        self.leaves = [t.detach().requires_grad_() for t in inputs]
        self.dout = torch.randn_like(self.forward())

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.function(*self.inputs)

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.function(*self.leaves), self.leaves, self.dout)

    def backward(self) -> Callable[[], tuple[Tensor, ...]]:
        """After a forward pass that isn't timed."""
        out = self.function(*self.leaves)
        return lambda: torch.autograd.grad(out, self.leaves, self.dout, retain_graph=True)


def _time(
    bench: Bench,
    what: str,
    case: str,
    dtype: str,
    operator: Operator,
    passes: Passes,
    compared: Key | None = None,
    exponentials: float = 0.0,
    note: str = "",
) -> None:
    """Rows of the forward pass, and of the backward pass (of a scan: of both together).

    Args:
        operator: what the floors are of; exponentials: their milliseconds in a forward pass. They have to be computed
            again in the backward pass.
        compared: what, case and dtype of the rows to compare with.
    """
    forward, backward = (moved / bench.bytes * 1e3 for moved in operator.bytes(passes.dout))
    ways = [("forward", passes.forward, forward, exponentials)]
    if exponentials:
        ways.append(("forward + backward", passes.both, forward + backward, 2 * exponentials))
    else:
        ways.append(("backward", passes.backward(), backward, 0.0))
    for way, function, *floors in ways:
        key = (compared[0], f"{compared[1]}, {way}", compared[2]) if compared else None
        timed = bench.time(function, queued=True)
        timed["note"] = "; ".join(filter(None, (note, timed.get("note", ""))))
        timed |= {"floor_ms": max(floors), "floor_of": "bytes" if floors[0] >= floors[1] else "exponentials"}
        bench.record(what, f"{case}, {way}", dtype, key, **timed)


def _full_scan(bench: Bench, batch: int, width: int, dtype: str = "bfloat16") -> Operator:
    return scan(batch, width, 65 if bench.tiny else LENGTH, STATE, DTYPES[dtype], bench.device)


def scan_tasks(bench: Bench) -> list[Task]:
    shapes = ((2, 32), (1, 48)) if bench.tiny else SCANS
    first = ("scan", "{}×{}".format(*shapes[0]), "bfloat16")

    def run(batch: int, width: int, dtype: str) -> None:
        case = f"{batch}×{width}"
        operator = _full_scan(bench, batch, width, dtype)
        u, delta, b, c, z, A, D, bias = operator.inputs
        inputs = ScanInputs(u, delta, A, b, c, D, z, bias, True)
        can_run = (row for row in SCAN.BACKENDS.values() if row.rejects(inputs) is None and row.why_not() is None)
        backend = next(can_run).name
        exponentials = u.numel() * STATE / bench.exponentials * 1e3  # the states' alone

        def time(what: str, function, tensors: list[Tensor], compared: Key | None, note: str) -> None:
            passes = Passes(function, tensors)
            _time(bench, what, case, dtype, operator, passes, compared, exponentials, note)

        own = ("scan", case, dtype)
        time("scan", operator.call, operator.inputs, None if own == first else first, f"backend {backend!r}")
        if scan_backends()["mamba_ssm"] is None:
            from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

            def theirs(u, delta, b, c, z, A, D, bias):
                return selective_scan_fn(u, delta, A, b, c, D, z, bias, True)

            rows = [t.flatten(0, 1).contiguous() for t in (u, delta, b, c, z)]
            time("mamba-ssm's kernel", theirs, [*rows, A, D, bias], own, "rows that are contiguous already")
            del rows
            copied = partial(operator.call, backend="mamba_ssm")
            time("mamba-ssm, from EBS", copied, operator.inputs, own, "with its copies")
        if own == first:
            time("scan, plain twin", operator.plain, operator.inputs, own, "backend 'torch'")

    cases = [(*shape, "bfloat16") for shape in shapes] + [(*shapes[0], "float32"), (*shapes[0], "float16")]
    return [Task(3 if i else 1, "scan {}×{} {}".format(*case), partial(run, *case)) for i, case in enumerate(cases)]


def convolution_tasks(bench: Bench) -> list[Task]:
    def run(name: str, dtype: str) -> None:
        shape = (1, 2, 48, 16) if bench.tiny else (8, 16, 224, 576)
        operator = convolutions(*shape, DTYPES[dtype], bench.device, DTYPES[dtype])[name]
        case = "×".join(map(str, operator.inputs[0].shape))
        _time(bench, name, case, dtype, operator, Passes(operator.call, operator.inputs))
        plain = Passes(operator.plain, operator.inputs)
        _time(bench, f"{name}, plain twin", case, dtype, operator, plain, (name, case, dtype))

    cases = [(name, dtype) for dtype in ("bfloat16", "float32") for name in CONVOLUTIONS]
    return [Task(1 if case[1] == "bfloat16" else 4, " ".join(case), partial(run, *case)) for case in cases]


def around(chosen: int) -> list[int]:
    """The numbers of segments to compare a choice with."""
    tried = {1, chosen // 2, chosen * 3 // 4, chosen - 1, chosen, chosen + 1, chosen * 3 // 2, chosen * 2}
    return sorted(n for n in tried if n > 0)


def segment_tasks(bench: Bench) -> list[Task]:
    """Whether the scan's number of segments is well chosen: `segments` of ops/scan/gpu.py is replaced by constants."""

    def run(batch: int, width: int) -> None:
        name = f"segments of the scan {batch}×{width}"
        try:
            module = importlib.import_module("etmamba_timm.ops.scan.gpu")
            choose = module.segments
        except (ImportError, AttributeError) as error:
            return bench.leave_out(name, str(error))
        operator = _full_scan(bench, batch, width)
        passes = Passes(operator.call, operator.inputs)
        for way, function in (("forward", passes.forward), ("backward", passes.backward())):
            chosen: list[object] = []
            try:
                module.segments = lambda *a, chosen=chosen, **k: chosen.append(choose(*a, **k)) or chosen[-1]
                function()
                if not chosen or not isinstance(chosen[-1], int):
                    bench.leave_out(f"{name}, {way}", f"the scan chose {chosen[-1:]}, no number")
                    continue
                tried: dict[int, float] = {}
                for n in around(chosen[-1]):
                    module.segments = lambda *_, n=n, **__: n
                    tried[n] = bench.time(function, queued=True)["ms"]
            finally:
                module.segments = choose
            best, taken = min(tried, key=tried.get), chosen[-1]
            note = f"chosen: {taken}, best: {best}; ms: " + ", ".join(f"{n}: {ms:.4g}" for n, ms in tried.items())
            values = {"ms": tried[taken], "floor_ms": tried[best], "floor_of": "best number of segments"}
            bench.record("segments", f"{batch}×{width}, {way}", "bfloat16", **values, note=note)

    shapes = ((2, 32),) if bench.tiny else SCANS
    return [Task(4, "segments {}×{}".format(*shape), partial(run, *shape)) for shape in shapes]


def error(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|; where b is 0 throughout, max|a|. Infinity if it isn't a number."""
    a, b = a.detach().cpu().double(), b.detach()
    found = (a - b).abs().max().item() / (b.abs().max().item() or 1.0)
    return math.inf if math.isnan(found) else found


def check(bench: Bench) -> bool:
    """Outputs and gradients of each operator, and logits of small models, against float64 on the CPU."""
    torch.backends.cudnn.allow_tf32, before = False, torch.backends.cudnn.allow_tf32
    right = True
    for name, measure, bounds in _checks(bench.device):
        try:
            found = measure()
            fine = all(error <= bound for error, bound in zip(found, bounds, strict=True))
            said = f"errors {', '.join(f'{error:.1e}' for error in found)}; bounds {', '.join(map(str, bounds))}"
        except Exception as failure:
            fine, said = False, f"{type(failure).__name__}: {failure}"
        right &= fine
        print(f"{'right' if fine else 'WRONG'}: {name}: {said}", flush=True)
    torch.backends.cudnn.allow_tf32 = before
    return right


def _checks(device: torch.device) -> Iterator[tuple[str, Callable[[], tuple[float, ...]], tuple[float, ...]]]:
    """The name of each check, what measures its errors, and their bounds."""
    torch.manual_seed(0)
    for dtype, bounds in BOUNDS.items():
        for shape in ((2, 64, 300, 16), (1, 37, 131, 16), (2, 24, 70, 5)):
            operator = scan(*shape, DTYPES[dtype], device)
            yield f"scan {shape}, {dtype}", partial(_errors, operator), bounds
        for parameters in dict.fromkeys((dtype, "float32")):
            for shape in ((2, 3, 48, 64), (1, 2, 80, 44)):
                made = convolutions(*shape, DTYPES[dtype], device, DTYPES[parameters])
                for name, operator in made.items():
                    yield f"{name} {shape}, {dtype}, parameters {parameters}", partial(_errors, operator), bounds
    for model in ("etmamba_ti", "videomamba_ti"):
        for dtype, bound in MODEL_BOUNDS.items():
            measure = partial(_model_errors, model, DTYPES[dtype], device)
            yield f"logits of {model}, 2 blocks, {dtype}", measure, (bound,)


def _errors(operator: Operator) -> tuple[float, float]:
    """Of the output and the activations' gradients; of the parameters' gradients."""
    leaves = [t.detach().requires_grad_() for t in operator.inputs]
    wanted = [t.detach().cpu().double().requires_grad_() for t in operator.inputs]
    out, expected = operator.call(*leaves), operator.plain(*wanted)
    dout = torch.randn(out.shape, device=out.device).to(out.dtype)
    grads = torch.autograd.grad(out, leaves, dout)
    expected_grads = torch.autograd.grad(expected, wanted, dout.cpu().double())
    errors = [error(a, b) for a, b in zip((out, *grads), (expected, *expected_grads), strict=True)]
    first = 1 + operator.activations
    return max(errors[:first]), max(errors[first:])


def _model_errors(name: str, dtype: torch.dtype, device: torch.device) -> tuple[float]:
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, num_classes=10, num_frames=4, img_size=64).eval()
    clip = torch.randn(2, 3, 4, 64, 64)
    with torch.no_grad():
        expected = model.double()(clip.double())
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return (error(model.float().to(device)(clip.to(device)), expected),)

"""Folding: linear maps of an EBS or STCM block that meet with nothing between them become one."""

from collections.abc import Mapping

import torch
from torch import Tensor


def fold_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of unfolded EBS or STCM blocks -> that of the same blocks folded; other tensors stay as they are.

    `PW_s` goes into the x rows of each direction's projection, and, where there is a fusion, `Lin_out` into its first
    half. Exact, biases included, since `Conv_s` pads after `PW_s`. Products are taken in float64.
    """
    out = dict(weights)
    for key in weights:
        prefix, found, _ = key.rpartition("mixer.pw.weight")
        if found:
            mixer = f"{prefix}mixer."
            pw, pw_bias = out.pop(f"{mixer}pw.weight"), out.pop(f"{mixer}pw.bias")
            _fold_into_projection(out, mixer, pw, pw_bias)
            if f"{prefix}fusion.weight" in out:
                _fold_into_fusion(out, prefix, out.pop(f"{mixer}out_proj.weight"), out.pop(f"{mixer}out_proj.bias"))
    return out


def _fold_into_projection(out: dict[str, Tensor], mixer: str, pw: Tensor, pw_bias: Tensor) -> None:
    weight, bias = out[f"{mixer}in_proj.weight"], out[f"{mixer}in_proj.bias"]  # rows Fx, Bx, Fz, Bz: [4E, D], [4E]
    x, z = weight.chunk(2)
    x_bias, z_bias = bias.chunk(2)
    x = torch.cat([_product(pw, rows) for rows in x.chunk(2)])
    x_bias = torch.cat([_product(pw, rows[:, None], pw_bias[:, None])[:, 0] for rows in x_bias.chunk(2)])
    out[f"{mixer}in_proj.weight"], out[f"{mixer}in_proj.bias"] = torch.cat([x, z]), torch.cat([x_bias, z_bias])


def _fold_into_fusion(out: dict[str, Tensor], prefix: str, linear: Tensor, linear_bias: Tensor) -> None:
    weight, bias = out[f"{prefix}fusion.weight"], out[f"{prefix}fusion.bias"]  # [D, 2D], [D]
    mixed, local = weight.chunk(2, dim=1)
    out[f"{prefix}fusion.weight"] = torch.cat([_product(mixed, linear), local], dim=1)  # [D, E + D]
    out[f"{prefix}fusion.bias"] = _product(mixed, linear_bias[:, None], bias[:, None])[:, 0]


def _product(a: Tensor, b: Tensor, add: Tensor | None = None) -> Tensor:
    product = _float64(a) @ _float64(b)
    return (product if add is None else product + _float64(add)).to(a)


def _float64(x: Tensor) -> Tensor:
    return x.to("meta" if x.is_meta else "cpu", torch.float64)  # on the CPU: MPS has no float64

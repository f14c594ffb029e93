"""ETMamba and VideoMamba written out from the papers' formulas: loops over NumPy float64, no code of the package.

Every function takes plain arrays, or a dict of parameters by the names of the module's `state_dict`. Slow on purpose,
for small sizes only: convolutions and scans loop over batch, positions, taps and states; only channels form a vector.

Shapes: clip [B, C, T, H, W]; tokens [B, N, D] with the class token first, N = 1 + t·h·w, frame by frame, row by row.
"""

from collections.abc import Mapping

import numpy as np

Array = np.ndarray
Params = Mapping[str, Array]


def sub(params: Params, prefix: str) -> dict[str, Array]:
    """The parameters whose names start with `prefix` and a dot, without that prefix."""
    return {name[len(prefix) + 1 :]: value for name, value in params.items() if name.startswith(prefix + ".")}


# --- elementwise functions, norms and linear maps -------------------------------------------------


def relu(x: Array) -> Array:
    return np.where(x > 0, x, 0.0)


def silu(x: Array) -> Array:
    """x · sigmoid(x), with sigmoid(x) = exp(-log(1 + exp(-x)))."""
    return x * np.exp(-softplus(-x))


def softplus(x: Array) -> Array:
    """log(1 + exp(x)), without overflow and without a cut-off."""
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    """x [..., D] normalised over D: (x - mean) / sqrt(var + eps) · weight + bias, with the biased variance."""
    width = x.shape[-1]
    centred = x - (np.sum(x, axis=-1) / width)[..., None]
    variance = np.sum(centred * centred, axis=-1) / width
    return centred / np.sqrt(variance + eps)[..., None] * weight + bias


def rms_norm(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    """x [..., D] divided by its root mean square over D, times weight."""
    mean_square = np.sum(x * x, axis=-1) / x.shape[-1]
    return x / np.sqrt(mean_square + eps)[..., None] * weight


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [..., I], weight [O, I], bias [O] -> [..., O]."""
    out = np.zeros((*x.shape[:-1], len(weight)))
    for o in range(len(weight)):
        out[..., o] = np.sum(x * weight[o], axis=-1)
        if bias is not None:
            out[..., o] += bias[o]
    return out


# --- convolutions ---------------------------------------------------------------------------------


def conv3d_depthwise(x: Array, weight: Array, bias: Array) -> Array:
    """x [B, C, T, H, W], weight [C, 1, 3, 3, 3], bias [C] -> [B, C, T, H, W]; stride 1, zero padding 1."""
    batch, channels, frames, height, width = x.shape
    assert weight.shape == (channels, 1, 3, 3, 3)
    out = np.zeros(x.shape)
    for b in range(batch):
        for t in range(frames):
            for i in range(height):
                for j in range(width):
                    total = bias.copy()
                    for dt in (-1, 0, 1):
                        for di in (-1, 0, 1):
                            for dj in (-1, 0, 1):
                                if 0 <= t + dt < frames and 0 <= i + di < height and 0 <= j + dj < width:
                                    tap = weight[:, 0, dt + 1, di + 1, dj + 1]
                                    total = total + tap * x[b, :, t + dt, i + di, j + dj]
                    out[b, :, t, i, j] = total
    return out


def conv2d_depthwise(x: Array, weight: Array, bias: Array, dilation: int) -> Array:
    """x [h, w, C], weight [C, 1, k, k], bias [C] -> [h, w, C]; dilated, zero padding so that the size stays."""
    height, width, channels = x.shape
    size = weight.shape[-1]
    assert weight.shape == (channels, 1, size, size)
    out = np.zeros(x.shape)
    for i in range(height):
        for j in range(width):
            total = bias.copy()
            for ki in range(size):
                for kj in range(size):
                    row = i + dilation * (ki - size // 2)
                    column = j + dilation * (kj - size // 2)
                    if 0 <= row < height and 0 <= column < width:
                        total = total + weight[:, 0, ki, kj] * x[row, column]
            out[i, j] = total
    return out


def causal_conv(x: Array, weight: Array, bias: Array, reverse: bool) -> Array:
    """Mamba's depthwise convolution over the tokens: x [B, N, E], weight [E, 1, K], bias [E] -> [B, N, E].

    The last tap meets the token itself, the earlier ones the tokens before it (after it, if `reverse`); zeros outside.
    """
    batch, tokens, channels = x.shape
    taps = weight.shape[-1]
    assert weight.shape == (channels, 1, taps)
    out = np.zeros(x.shape)
    for b in range(batch):
        for n in range(tokens):
            total = bias.copy()
            for k in range(taps):
                age = taps - 1 - k
                source = n + age if reverse else n - age
                if 0 <= source < tokens:
                    total = total + weight[:, 0, k] * x[b, source]
            out[b, n] = total
    return out


# --- the selective scan ---------------------------------------------------------------------------


def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> Array:
    """Mamba's selective SSM in mamba-ssm's layout: u, delta, z [B, D, L]; A [D, N]; B, C [B, N, L]; D, delta_bias [D].

    h_t = exp(delta_t · A) · h_(t-1) + delta_t · B_t · u_t from h = 0; y_t = Σ_n C_t,n · h_t,n + D · u_t, and with z
    times SiLU(z_t). With `reverse` time runs from the last position to the first.
    """
    batch, channels, length = u.shape
    states = A.shape[1]
    y = np.zeros(u.shape)
    for b in range(batch):
        h = np.zeros((states, channels))
        for t in reversed(range(length)) if reverse else range(length):
            step = delta[b, :, t]
            if delta_bias is not None:
                step = step + delta_bias
            if delta_softplus:
                step = softplus(step)
            total = np.zeros(channels)
            for n in range(states):
                h[n] = np.exp(step * A[:, n]) * h[n] + step * B[b, n, t] * u[b, :, t]
                total = total + C[b, n, t] * h[n]
            if D is not None:
                total = total + D * u[b, :, t]
            if z is not None:
                total = total * silu(z[b, :, t])
            y[b, :, t] = total
    return y


def input_dependent_scan(params: Params, u: Array, z: Array, reverse: bool) -> Array:
    """The selective SSM with delta, B and C projected from its input; u, z and the result: tokens [B, N, E].

    Rows of `x_proj`: R for the low-rank delta, then one per state for B, then one per state for C.
    """
    A = -np.exp(params["A_log"])  # [E, states]
    states = A.shape[1]
    rank = params["dt_proj.weight"].shape[1]
    assert params["x_proj.weight"].shape[0] == rank + 2 * states
    projected = linear(u, params["x_proj.weight"])  # [B, N, R + 2·states]
    low_rank = projected[..., :rank]
    B = projected[..., rank : rank + states]
    C = projected[..., rank + states :]
    y = selective_scan(
        u.swapaxes(1, 2),  # [B, N, E] -> [B, E, N]
        linear(low_rank, params["dt_proj.weight"]).swapaxes(1, 2),
        A,
        B.swapaxes(1, 2),
        C.swapaxes(1, 2),
        params["D"],
        z=z.swapaxes(1, 2),
        delta_bias=params["dt_proj.bias"],
        delta_softplus=True,
        reverse=reverse,
    )
    return y.swapaxes(1, 2)  # [B, E, N] -> [B, N, E]


# --- STFP, paper 3.2 ------------------------------------------------------------------------------


def stfp(params: Params, clip: Array) -> Array:
    """Spatiotemporal feature preservation, clip [B, C, T, H, W] -> the same shape (paper 3.2):

        S1 = ReLU(LN(DW3(ReLU(LN(DW3(X))))));  S2 = ReLU(LN(DW3(S1 + ReLU(LN(PW(X))))));  STFP = S2 + X

    With one channel the norms are constant, and the stem is the identity.
    """
    if clip.shape[1] == 1:
        return clip

    def pointwise(name: str, x: Array) -> Array:
        weight = params[f"{name}.weight"]  # [C, C, 1, 1, 1]
        mixed = linear(np.moveaxis(x, 1, -1), weight[:, :, 0, 0, 0], params[f"{name}.bias"])
        return np.moveaxis(mixed, -1, 1)

    def separable(name: str, x: Array) -> Array:
        x = conv3d_depthwise(x, params[f"{name}.depthwise.weight"], params[f"{name}.depthwise.bias"])
        return pointwise(f"{name}.pointwise", x)

    def relu_norm(name: str, x: Array) -> Array:
        normed = layer_norm(np.moveaxis(x, 1, -1), params[f"{name}.norm.weight"], params[f"{name}.norm.bias"])
        return relu(np.moveaxis(normed, -1, 1))

    s1 = relu_norm("conv1", separable("conv1", clip))
    s1 = relu_norm("conv2", separable("conv2", s1))
    s2 = s1 + relu_norm("skip", pointwise("skip.pointwise", clip))
    s2 = relu_norm("conv3", separable("conv3", s2))
    return s2 + clip


# --- EBS, paper 3.3 -------------------------------------------------------------------------------


def ebs(params: Params, tokens: Array) -> Array:
    """Efficient bidirectional sharing, normalised tokens [B, N, D] -> [B, N, D] (paper 3.3):

        u_d = SiLU(Conv_s(PW_s(d_x)));  EBS = Lin(SSM_s(u_F) ⊗ SiLU(F_z) + SSM_s(u_B) ⊗ SiLU(B_z))

    The rows of `in_proj` are F_x, B_x, F_z, B_z. Convolution and SSM of the backward direction run in reverse order.
    Without `conv1d` among the parameters Conv_s is left out, as in the paper's own formula.
    """
    inner = params["pw.weight"].shape[0]
    assert params["in_proj.weight"].shape[0] == 4 * inner
    projected = linear(tokens, params["in_proj.weight"], params["in_proj.bias"])
    forward_x = projected[..., :inner]
    backward_x = projected[..., inner : 2 * inner]
    forward_z = projected[..., 2 * inner : 3 * inner]
    backward_z = projected[..., 3 * inner :]

    def direction(x: Array, z: Array, reverse: bool) -> Array:
        x = linear(x, params["pw.weight"], params["pw.bias"])
        if "conv1d.weight" in params:
            x = causal_conv(x, params["conv1d.weight"], params["conv1d.bias"], reverse)
        return input_dependent_scan(params, silu(x), z, reverse)

    both = direction(forward_x, forward_z, reverse=False) + direction(backward_x, backward_z, reverse=True)
    return linear(both, params["out_proj.weight"], params["out_proj.bias"])


def ebs_block(params: Params, tokens: Array, grid: tuple[int, int, int] | None = None) -> Array:
    """X + EBS(LN(X)), tokens [B, N, D] (ablation row c of the paper's Table 5)."""
    return tokens + ebs(sub(params, "mixer"), layer_norm(tokens, params["norm.weight"], params["norm.bias"]))


# --- STCM, paper 3.4 ------------------------------------------------------------------------------


def stcm_local(params: Params, normed: Array, tokens: Array, grid: tuple[int, int, int]) -> Array:
    """The local branch LN(SiLU(Xc) + X), Xc = concat(DC3(X'), DC5(X'), DC7(X'), X'), X' = PW(LN(X)) (paper 3.4).

    `normed` is LN(X), `tokens` X itself, both [B, N, D]; convolutions stay within a frame of `grid` (t, h, w); the
    class token has no neighbours, its SiLU(Xc) is 0.
    """
    batch, count, _ = tokens.shape
    frames, height, width = grid
    assert count == 1 + frames * height * width
    reduced = linear(normed, params["proj.weight"], params["proj.bias"])  # [B, N, D/4]
    activated = np.zeros(tokens.shape)
    for b in range(batch):
        for t in range(frames):
            plane = np.zeros((height, width, reduced.shape[-1]))
            for i in range(height):
                for j in range(width):
                    plane[i, j] = reduced[b, 1 + (t * height + i) * width + j]
            dc3 = conv2d_depthwise(plane, params["conv3.weight"], params["conv3.bias"], dilation=1)
            dc5 = conv2d_depthwise(plane, params["conv5.weight"], params["conv5.bias"], dilation=2)
            dc7 = conv2d_depthwise(plane, params["conv7.weight"], params["conv7.bias"], dilation=3)
            for i in range(height):
                for j in range(width):
                    xc = np.concatenate([dc3[i, j], dc5[i, j], dc7[i, j], plane[i, j]])
                    activated[b, 1 + (t * height + i) * width + j] = silu(xc)
    return layer_norm(activated + tokens, params["norm.weight"], params["norm.bias"])


def stcm_block(params: Params, tokens: Array, grid: tuple[int, int, int]) -> Array:
    """X + Fuse(concat[EBS(LN(X)), LN(SiLU(Xc) + X)]), tokens [B, N, D], grid (t, h, w) (paper 3.4)."""
    normed = layer_norm(tokens, params["norm.weight"], params["norm.bias"])
    mixed = ebs(sub(params, "mixer"), normed)
    local = stcm_local(sub(params, "local"), normed, tokens, grid)
    fused = linear(np.concatenate([mixed, local], axis=-1), params["fusion.weight"], params["fusion.bias"])
    return tokens + fused


# --- the baseline: VideoMamba ---------------------------------------------------------------------


def bimamba(params: Params, tokens: Array) -> Array:
    """VideoMamba's bidirectional mixer, normalised tokens [B, N, D] -> [B, N, D].

    `in_proj` gives x and z; each direction has its own convolution and SSM (the backward one's are named `*_b`), both
    see the same x and the gate SiLU(z); their sum goes through `out_proj`.
    """
    inner = params["in_proj.weight"].shape[0] // 2
    projected = linear(tokens, params["in_proj.weight"])
    x, z = projected[..., :inner], projected[..., inner:]
    forward = {name: params[name] for name in ("x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D")}
    backward = {
        "x_proj.weight": params["x_proj_b.weight"],
        "dt_proj.weight": params["dt_proj_b.weight"],
        "dt_proj.bias": params["dt_proj_b.bias"],
        "A_log": params["A_b_log"],
        "D": params["D_b"],
    }
    u_f = silu(causal_conv(x, params["conv1d.weight"], params["conv1d.bias"], reverse=False))
    u_b = silu(causal_conv(x, params["conv1d_b.weight"], params["conv1d_b.bias"], reverse=True))
    y_f = input_dependent_scan(forward, u_f, z, reverse=False)
    y_b = input_dependent_scan(backward, u_b, z, reverse=True)
    return linear(y_f + y_b, params["out_proj.weight"])


def bimamba_block(params: Params, tokens: Array, grid: tuple[int, int, int] | None = None) -> Array:
    """X + BiMamba(RMSNorm(X)), tokens [B, N, D] (ablation rows a and b of the paper's Table 5)."""
    return tokens + bimamba(sub(params, "mixer"), rms_norm(tokens, params["norm.weight"]))


# --- the whole model, paper 3.1 -------------------------------------------------------------------

BLOCKS = {"bimamba": bimamba_block, "ebs": ebs_block, "stcm": stcm_block}
STEMS = {"none": lambda params, clip: clip, "stfp": stfp}


def embed(params: Params, clip: Array, patch_size: int) -> Array:
    """X = [X_cls, patches(clip)] + p_s + p_t, clip [B, C, T, H, W] -> tokens [B, 1 + t·h·w, D] (paper 3.1).

    p_s covers class token and positions of a frame, p_t the patches of each frame; both must fit the clip as they are.
    """
    weight, bias = params["patch_embed.proj.weight"], params["patch_embed.proj.bias"]
    cls_token, spatial, temporal = params["cls_token"], params["pos_embed"], params["temporal_pos_embedding"]
    batch, channels, frames, height, width = clip.shape
    rows, columns, dim = height // patch_size, width // patch_size, len(weight)
    assert (height, width) == (rows * patch_size, columns * patch_size)
    assert weight.shape == (dim, channels, 1, patch_size, patch_size)
    assert spatial.shape == (1, 1 + rows * columns, dim)
    assert temporal.shape == (1, frames, dim)
    tokens = np.zeros((batch, 1 + frames * rows * columns, dim))
    for b in range(batch):
        tokens[b, 0] = cls_token[0, 0] + spatial[0, 0]
        for t in range(frames):
            for i in range(rows):
                for j in range(columns):
                    top, left = i * patch_size, j * patch_size
                    patch = clip[b, :, t, top : top + patch_size, left : left + patch_size]  # [C, p, p]
                    n = 1 + (t * rows + i) * columns + j
                    for d in range(dim):
                        tokens[b, n, d] = np.sum(weight[d, :, 0] * patch) + bias[d]
                    tokens[b, n] += spatial[0, 1 + i * columns + j] + temporal[0, t]
    return tokens


def model(
    params: Params, clip: Array, *, stem: str, block: str, depth: int, patch_size: int, global_pool: str = "token"
) -> dict[str, Array]:
    """A whole model in evaluation: clip [B, C, T, H, W], or a one-frame clip [B, C, H, W] (paper 3.1).

    `stem`: 'none', 'stfp'; `block`: 'bimamba', 'ebs', 'stcm'; `global_pool`: 'token', 'avg' (mean of the patch tokens).
    Gives `features` [B, N, D] after the final norm, `pooled` [B, D] and `logits` [B, classes].
    """
    if clip.ndim == 4:
        clip = clip[:, :, None]  # [B, C, H, W] -> [B, C, 1, H, W]
    params = {name: np.asarray(value, dtype=np.float64) for name, value in params.items()}
    clip = clip.astype(np.float64)
    grid = (clip.shape[2], clip.shape[3] // patch_size, clip.shape[4] // patch_size)
    x = embed(params, STEMS[stem](sub(params, "stem"), clip), patch_size)
    for i in range(depth):
        x = BLOCKS[block](sub(params, f"blocks.{i}"), x, grid)
    if block == "bimamba":
        features = rms_norm(x, params["norm.weight"])
    else:
        features = layer_norm(x, params["norm.weight"], params["norm.bias"])
    if global_pool == "token":
        pooled = features[:, 0]
    elif global_pool == "avg":
        pooled = np.sum(features[:, 1:], axis=1) / (features.shape[1] - 1)
    else:
        raise ValueError(f"global_pool is {global_pool!r}; this transcription knows 'token' and 'avg'")
    logits = linear(pooled, params["head.weight"], params["head.bias"])
    return {"features": features, "pooled": pooled, "logits": logits}


# --- names, shapes and random values of the parameters --------------------------------------------

Shapes = dict[str, tuple[int, ...]]


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def stfp_shapes(channels: int) -> Shapes:
    """Names and shapes of STFP's parameters (paper 3.2)."""
    shapes: Shapes = {}
    for stage in ("conv1", "conv2", "conv3", "skip"):
        if stage != "skip":
            shapes[f"{stage}.depthwise.weight"] = (channels, 1, 3, 3, 3)
            shapes[f"{stage}.depthwise.bias"] = (channels,)
        shapes[f"{stage}.pointwise.weight"] = (channels, channels, 1, 1, 1)
        shapes[f"{stage}.pointwise.bias"] = (channels,)
        shapes[f"{stage}.norm.weight"] = shapes[f"{stage}.norm.bias"] = (channels,)
    return shapes


def ebs_shapes(dim: int, d_state: int = 16, expand: int = 2, d_conv: int = 4) -> Shapes:
    """Names and shapes of EBS's parameters: one direction is E = expand · D / 2 wide, dt has rank ceil(D / 16).

    With `d_conv` 0 there is no Conv_s.
    """
    inner, rank = expand * dim // 2, -(-dim // 16)
    shapes: Shapes = {
        "in_proj.weight": (4 * inner, dim),
        "in_proj.bias": (4 * inner,),
        "pw.weight": (inner, inner),
        "pw.bias": (inner,),
        "x_proj.weight": (rank + 2 * d_state, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "A_log": (inner, d_state),
        "D": (inner,),
        "out_proj.weight": (dim, inner),
        "out_proj.bias": (dim,),
    }
    if d_conv:
        shapes |= {"conv1d.weight": (inner, 1, d_conv), "conv1d.bias": (inner,)}
    return shapes


def bimamba_shapes(dim: int, d_state: int = 16, expand: int = 2, d_conv: int = 4) -> Shapes:
    """Names and shapes of VideoMamba's mixer: x and z are expand · D wide, the backward direction's names end in _b."""
    inner, rank = expand * dim, -(-dim // 16)
    shapes: Shapes = {"in_proj.weight": (2 * inner, dim), "out_proj.weight": (dim, inner)}
    for suffix, a_log in (("", "A_log"), ("_b", "A_b_log")):
        shapes[f"conv1d{suffix}.weight"] = (inner, 1, d_conv)
        shapes[f"conv1d{suffix}.bias"] = (inner,)
        shapes[f"x_proj{suffix}.weight"] = (rank + 2 * d_state, inner)
        shapes[f"dt_proj{suffix}.weight"] = (inner, rank)
        shapes[f"dt_proj{suffix}.bias"] = (inner,)
        shapes[a_log] = (inner, d_state)
        shapes[f"D{suffix}"] = (inner,)
    return shapes


def block_shapes(block: str, dim: int, **mixer: int) -> Shapes:
    """Names and shapes of one block: 'bimamba', 'ebs' or 'stcm'; `mixer` as for `ebs_shapes`."""
    if block == "bimamba":
        return {"norm.weight": (dim,), **prefixed("mixer", bimamba_shapes(dim, **mixer))}
    shapes: Shapes = {"norm.weight": (dim,), "norm.bias": (dim,), **prefixed("mixer", ebs_shapes(dim, **mixer))}
    if block == "stcm":
        quarter = dim // 4
        shapes |= {"local.proj.weight": (quarter, dim), "local.proj.bias": (quarter,)}
        for size in (3, 5, 7):
            shapes |= {f"local.conv{size}.weight": (quarter, 1, size, size), f"local.conv{size}.bias": (quarter,)}
        shapes |= {"local.norm.weight": (dim,), "local.norm.bias": (dim,)}
        shapes |= {"fusion.weight": (dim, 2 * dim), "fusion.bias": (dim,)}
    return shapes


def model_shapes(
    *,
    stem: str,
    block: str,
    depth: int,
    dim: int,
    channels: int,
    grid: tuple[int, int, int],
    patch_size: int,
    classes: int,
) -> Shapes:
    """Names and shapes of a whole model for token grid (t, h, w)."""
    frames, rows, columns = grid
    shapes: Shapes = {
        "patch_embed.proj.weight": (dim, channels, 1, patch_size, patch_size),
        "patch_embed.proj.bias": (dim,),
        "cls_token": (1, 1, dim),
        "pos_embed": (1, 1 + rows * columns, dim),
        "temporal_pos_embedding": (1, frames, dim),
        "norm.weight": (dim,),
        "head.weight": (classes, dim),
        "head.bias": (classes,),
    }
    if block != "bimamba":
        shapes["norm.bias"] = (dim,)
    if stem == "stfp":
        shapes |= prefixed("stem", stfp_shapes(channels))
    for i in range(depth):
        shapes |= prefixed(f"blocks.{i}", block_shapes(block, dim))
    return shapes


def random_params(shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator) -> dict[str, Array]:
    """A value away from 0 and 1 for every parameter, in a range that a trained model could have."""
    params = {}
    for name in sorted(shapes):
        shape, last = shapes[name], name.rpartition(".")[2]
        noise = rng.standard_normal(shape)
        if last in ("A_log", "A_b_log"):
            value = np.log(np.arange(1, shape[1] + 1)) + 0.3 * noise
        elif last in ("D", "D_b") or (last == "weight" and len(shape) == 1):  # skip of the scan, scale of a norm
            value = 1 + 0.4 * noise
        elif last == "weight":
            value = noise / np.sqrt(np.prod(shape[1:]))
        elif "dt_proj" in name:  # softplus of it is the usual step size
            value = 0.7 * noise - 1
        else:  # biases, class token, positions
            value = 0.4 * noise
        params[name] = value
    return params

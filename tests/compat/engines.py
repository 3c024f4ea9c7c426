"""What the engines' functions compute, written plainly in float64 PyTorch from their documented semantics."""

from itertools import pairwise

import torch


def l2norm(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def post_conv(conv_output, a, b, A_log, dt_bias, heads, key_dim, value_dim, apply_l2norm, output_g_exp):
    value_heads = len(A_log)
    q, k, v = conv_output.split([heads * key_dim, heads * key_dim, value_heads * value_dim], -1)
    q, k = q.unflatten(-1, (heads, key_dim)).double(), k.unflatten(-1, (heads, key_dim)).double()
    if apply_l2norm:
        q, k = l2norm(q), l2norm(k)
    x = a.double() + dt_bias.double()
    g = -A_log.double().exp() * (x.clamp(min=0) + torch.log1p((-x.abs()).exp()))
    return q, k, v.unflatten(-1, (value_heads, value_dim)), g.exp() if output_g_exp else g, b.double().sigmoid()


def block_quant(y, group_size, qmax, least_scale, power_of_two=False):
    """q as float64 before the rounding to its dtype, and scale, of y [..., D]."""
    groups = y.double().unflatten(-1, (-1, group_size))
    scale = (groups.abs().amax(-1) / qmax).clamp(min=least_scale)
    if power_of_two:
        scale = torch.exp2(scale.log2().ceil())
    return (groups / scale[..., None]).clamp(-qmax, qmax).flatten(-2), scale


def silu_and_mul(x):
    gate, up = x.double().chunk(2, -1)
    return gate * gate.sigmoid() * up


def rounded_silu_and_mul(x):
    """silu(gate), and then the product, rounded to x's dtype."""
    gate, up = x.chunk(2, -1)
    gate = gate.double()
    return ((gate * gate.sigmoid()).to(x.dtype).double() * up.double()).to(x.dtype)


def pos_embed(weight, t, h, w, side, merge):
    """Bilinear with corners aligned, then the rows of each merge x merge block together."""
    grid = weight.double().unflatten(0, (side, side))

    def taps(size):
        place = torch.arange(size, dtype=torch.float64) * (side - 1) / max(size - 1, 1)
        low = place.floor().long()
        return low, (low + 1).clamp(max=side - 1), place - low

    (top, bottom, dh), (left, right, dw) = taps(h), taps(w)
    dh, dw = dh[:, None, None], dw[None, :, None]
    out = (1 - dh) * (1 - dw) * grid[top][:, left] + (1 - dh) * dw * grid[top][:, right]
    out = out + dh * (1 - dw) * grid[bottom][:, left] + dh * dw * grid[bottom][:, right]
    blocks = out.unflatten(1, (w // merge, merge)).unflatten(0, (h // merge, merge)).transpose(1, 2)
    return blocks.reshape(h * w, -1).repeat(t, 1)


def delta_rule(q, k, v, g, beta, boundaries, states, scale=None):
    """o [L, HV, V] and the last states [S, HV, V, K] of packed sequences with states [S, HV, V, K] before them."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = v.shape[1] // q.shape[1]
    q, k = (x.double().repeat_interleave(group, 1) for x in (q, k))
    v, g, beta = v.double(), g.double(), beta.double()
    out, last = torch.zeros_like(v), []
    for i, (first, end) in enumerate(pairwise(boundaries)):
        state = states[i].double()
        for row in range(first, end):
            state = state * g[row].exp()[:, None, None]
            answer = (state * k[row][:, None]).sum(-1)
            state = state + (beta[row][:, None] * (v[row] - answer))[..., None] * k[row][:, None]
            out[row] = scale * (state * q[row][:, None]).sum(-1)
        last.append(state)
    return out, torch.stack(last)


def gated_rms_norm(x, z, weight, eps, activation):
    gate = z.double()
    act = gate.sigmoid() * (gate if activation in ("swish", "silu") else 1)
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() * act

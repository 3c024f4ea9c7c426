"""flash-linear-attention. Its chunked delta rule hands on to FlashQLA where that is installed."""

from types import SimpleNamespace
from typing import Any

from polyfuse.bench.peers.base import Package, Peer, Prepared, options, places


def gated_rms_norm(norm: Any, a: SimpleNamespace) -> Prepared:
    return Prepared(lambda: norm(a.x, a.gate, a.weight, None, activation=a.activation, eps=a.eps))


def chunk_gated_delta_rule(rule: Any, a: SimpleNamespace) -> Prepared:
    arrays = [x.unsqueeze(0) for x in (a.q, a.k, a.v, a.g, a.beta)]
    packed = {} if a.cu_seqlens is None else {"cu_seqlens": a.cu_seqlens.long(), "cu_seqlens_cpu": a.cu_seqlens.cpu()}
    more = {"scale": a.scale, "initial_state": a.initial_state, "output_final_state": a.output_final_state}
    none = a.g.new_empty(0, a.v.shape[1], a.k.shape[2], a.v.shape[2])

    def results(found: Any) -> list[Any]:
        o, state = found
        return [o[0], none if state is None else state]

    return Prepared(lambda: rule(*arrays, **more, **packed), results)


def decode(conv: Any, rule: Any, norm: Any, a: SimpleNamespace) -> Prepared:
    """One token of each sequence. FLA has no pools: the new recurrent state is an array of its own."""
    batch, heads, key, value = len(a.x), a.num_k_heads, a.head_k_dim, a.head_v_dim
    sizes = [heads * key, heads * key, len(a.A_log) * value]
    gate = a.z.view(batch, -1, value)

    def run() -> Any:
        y, _ = conv(a.x.unsqueeze(1), a.conv_state, weight=a.conv_weight, bias=a.conv_bias, activation="silu")
        q, k, v = y.split(sizes, -1)
        o, state = rule(
            q.unflatten(-1, (-1, key)),
            k.unflatten(-1, (-1, key)),
            v.unflatten(-1, (-1, value)),
            g=a.a.unsqueeze(1),
            beta=a.b.unsqueeze(1),
            scale=a.scale,
            initial_state=a.recurrent_state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            A_log=a.A_log,
            dt_bias=a.dt_bias,
            use_beta_sigmoid_in_kernel=True,
        )
        return norm(o.squeeze(1), gate, a.norm_weight, None, eps=a.norm_eps), state

    return Prepared(run, lambda found: [found[0].flatten(1), a.conv_state, found[1]])


NORM = places("rms_norm_gated", "fla.modules.norm.fused_norm_gate", "fla.modules.fused_norm_gate")
PACKAGE = Package(
    ("flash-linear-attention", "fla-core"),
    (
        Peer(
            "gated_rms_norm",
            "fla rms_norm_gated",
            (NORM,),
            gated_rms_norm,
            options("gated_rms_norm", eps=None, activation=None),
        ),
        Peer(
            "gated_delta_rule",
            "fla chunk_gated_delta_rule",
            (places("chunk_gated_delta_rule", "fla.ops.gated_delta_rule"),),
            chunk_gated_delta_rule,
            options("gated_delta_rule", scale=None, output_final_state=None),
            takes=("initial_state", "cu_seqlens"),
        ),
        Peer(
            "gdn_decode",
            "fla conv + fused_recurrent + rms_norm_gated",
            (
                places("causal_conv1d_update", "fla.modules.causal_conv1d", "fla.modules.convolution"),
                places("fused_recurrent_gated_delta_rule", "fla.ops.gated_delta_rule"),
                NORM,
            ),
            decode,
            options("gdn_decode", norm_eps=None, scale=None),
            takes=("conv_bias",),
            needs=("z",),
            tolerance={"out": 2.0**-6, "recurrent_state": 2.0**-6},
            reason="what the conv and the delta rule return is rounded to the dtype of x",
        ),
    ),
    with_versions=("flash-qla",),
)

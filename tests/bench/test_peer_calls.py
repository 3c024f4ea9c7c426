"""Each adapter's call, of a stand-in with the signature that the package has, gives the op's results.

Stand-ins are ours where `polyfuse.compat` has the function, else a few lines of PyTorch. What a stand-in rounds as the
package does is within what the peer states; all else is right by the oracle.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import polyfuse
from polyfuse.bench.cases import bench_cases
from polyfuse.bench.peers import PACKAGES, Peer, check
from polyfuse.bench.peers.check import Truth
from polyfuse.compat import sglang, vllm
from polyfuse.conformance import Case, make_inputs, place
from polyfuse.conformance.checks.values import as_tuple
from polyfuse.spec import OPS, Unsupported

PEERS = {peer.name: peer for package in PACKAGES for peer in package.peers}
HEADS = {"num_k_heads": 2, "head_k_dim": 64, "head_v_dim": 64}
ARRAYS = "T", "x", "z", "a", "b", "conv_weight", "weight", "norm_weight", "initial_state", "conv_state", "gate"
BFLOAT16 = dict.fromkeys(ARRAYS, "bfloat16")


def case(op, dims, attrs=None, **more):
    tensors = {name for t in OPS[op].tensors for name in (t.name, t.dtype_var) if "bfloat16" in t.dtypes}
    dtypes = {name: dtype for name, dtype in BFLOAT16.items() if name in tensors}
    return Case("peers", dims, attrs or {}, dtypes | more.pop("dtypes", {}), **more)


QUANT = {"...": (40,), "D": 256}
MASKED = case("silu_mul_block_quant", {"...": (2, 9), "D": 256, "E": 2}, present=("num_rows",),
              fill={"num_rows": "rows_8"})  # fmt: skip
RULE = case("gated_delta_rule", {"L": 70, "H": 2, "HV": 4, "K": 64, "V": 32, "S": 1}, {"output_final_state": True},
            present=("initial_state",), fill={"q": "unit", "k": "unit", "g": "decay", "beta": "gate"})  # fmt: skip
DECODE = case("gdn_decode", {"...": (3,), "HV": 4, "W": 4, "n": 4, "conv_slots": 3, "slots": 3}, HEADS, present=("z",))
CASES = {
    "silu_mul_block_quant": case("silu_mul_block_quant", QUANT),
    "block_quant": case("block_quant", QUANT, {"scale_layout": "col_major"}),
    "rms_norm_block_quant": case("rms_norm_block_quant", QUANT, {"weight_offset": 1.0}, present=("residual",)),
    "gated_rms_norm": case("gated_rms_norm", {"...": (5, 4), "V": 64}),
    "gated_delta_rule": RULE,
    "gdn_post_conv": case("gdn_post_conv", {"L": 9, "HV": 4}, HEADS),
    "gdn_conv_prep": case("gdn_conv_prep", {"L": 9, "HV": 4, "W": 4, "S": 1}, HEADS | {"output_final_state": True}),
    "gdn_decode": DECODE,
    "pos_embed_interpolate": case("pos_embed_interpolate", {"N": 12, "D": 32},
                                  host={"grid_thw": ((1, 6, 8), (2, 4, 4))}, dtypes={"table": "bfloat16"}),
    "segment_attention": case("segment_attention", {"rows": 20, "heads": 2, "dim": 32, "N": 3}, {"max_seqlen": 12},
                              host={"cu_seqlens": (0, 12, 20)}, as_tensor=("cu_seqlens",)),
}  # fmt: skip


def conv(x, weight, bias, before):
    """Rows [L, C] behind the inputs `before` [C, W - 1], through a conv and a SiLU."""
    whole = torch.cat([before, x.mT], 1)[None]
    y = F.conv1d(whole.float(), weight[:, None].float(), None if bias is None else bias.float(), groups=len(weight))
    return F.silu(y[0]).to(x.dtype), whole[0, :, -before.shape[1] :]


def causal_conv1d_fn(x, weight, bias, conv_states, query_start_loc, cache_indices=None, has_initial_state=None,
                     activation="silu", pad_slot_id=-1, metadata=None):  # fmt: skip
    assert x.stride(0) == 1
    assert conv_states.stride(1) == 1
    assert metadata.batch_ptr == "batches"
    out = torch.empty_like(x)
    for number, slot in enumerate(cache_indices.tolist()):
        assert slot > 0
        rows = slice(*query_start_loc[number : number + 2].tolist())
        before = conv_states[slot] * has_initial_state[number]
        out[:, rows], conv_states[slot] = conv(x[:, rows].mT, weight, bias, before)
    return out


def compute_causal_conv1d_metadata(query_start_loc_p_cpu, *, device):
    assert query_start_loc_p_cpu.device.type == "cpu"
    return {}, "batches", "offsets"


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, conv_state_indices=None):
    for row, slot in enumerate(conv_state_indices.tolist()):
        y, conv_state[slot] = conv(x[row : row + 1], weight, bias, conv_state[slot].clone())
        x[row] = y[:, 0]
    return x


def packed_decode(mixed_qkv, a, b, A_log, dt_bias, scale, initial_state, out, ssm_state_indices,
                  use_qk_l2norm_in_kernel=False):  # fmt: skip
    _, heads, value, key = initial_state.shape
    count = (mixed_qkv.shape[1] - heads * value) // (2 * key)
    q, k, v, g, beta = polyfuse.gdn_post_conv(
        mixed_qkv, a, b, A_log, dt_bias, num_k_heads=count, head_k_dim=key, head_v_dim=value, backend="torch"
    )
    o, state = polyfuse.gated_delta_rule(
        q, k, v, g, beta, initial_state=initial_state[ssm_state_indices.long()].mT.float(), scale=scale,
        cu_seqlens=torch.arange(len(q) + 1), output_final_state=True, backend="torch",
    )  # fmt: skip
    out.copy_(o[:, None])
    initial_state[ssm_state_indices.long()] = state.mT.to(initial_state.dtype)
    return out, initial_state


def rms_norm_per_block_quant(input, weight, epsilon, quant_dtype, group_size, scale_ub=None, residual=None,
                             is_scale_transposed=False, tma_alignment=0):  # fmt: skip
    q, scale, total = polyfuse.rms_norm_block_quant(
        input, weight, residual=residual, eps=epsilon, group_size=group_size[1], backend="torch"
    )
    residual.copy_(total)
    return q, scale


current_platform = SimpleNamespace(is_cuda=lambda: True, name="cuda")


def by_triton_without_cuda(y, tokens_per_expert, num_parallel_tokens=16, group_size=128):
    assert (current_platform.is_cuda(), current_platform.name) == (False, "cuda")
    return persistent_masked_m_silu_mul_quant(y, tokens_per_expert, num_parallel_tokens, group_size)


def per_token_group_quant_fp8(x, group_size, eps=1e-10, dtype=None, column_major_scales=False,
                              tma_aligned_scales=False, out_q=None, use_ue8m0=None):  # fmt: skip
    layout = "col_major" if column_major_scales else "row_major"
    return polyfuse.block_quant(x, group_size=group_size, scale_layout=layout, backend="torch")


def sglang_per_token_group_quant_fp8(x, group_size, eps=1e-10, column_major_scales=False, scale_tma_aligned=False,
                                     scale_ue8m0=False):  # fmt: skip
    return per_token_group_quant_fp8(x, group_size, eps, None, column_major_scales, scale_tma_aligned)


def sgl_per_token_group_quant_8bit(input, output_q, output_s, group_size, eps, fp8_min, fp8_max, scale_ue8m0=False):
    assert (fp8_min, fp8_max) == (-448.0, 448.0)
    q, scale = polyfuse.block_quant(input, group_size=group_size, backend="torch")
    output_q.copy_(q)
    output_s.copy_(scale)


def persistent_masked_m_silu_mul_quant(y, tokens_per_expert, num_parallel_tokens=16, group_size=128):
    return polyfuse.silu_mul_block_quant(y, num_rows=tokens_per_expert, group_size=group_size, backend="torch")


def silu_mul_per_token_group_quant_fp8_colmajor(input, output=None, use_ue8m0=None, eps=1e-10):
    return polyfuse.silu_mul_block_quant(input, materialize=True, scale_layout="col_major", backend="torch")


def fla_rms_norm_gated(x, g, weight, bias, activation="swish", residual=None, prenorm=False, residual_in_fp32=False,
                       eps=1e-6):  # fmt: skip
    name = {"swish": "silu"}.get(activation, activation)
    return polyfuse.gated_rms_norm(x, g, weight, eps=eps, activation=name, backend="torch")


def fla_chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                               cu_seqlens=None, cu_seqlens_cpu=None):  # fmt: skip
    o, state = polyfuse.gated_delta_rule(
        *(x[0] for x in (q, k, v, g, beta)), scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
        output_final_state=output_final_state, backend="torch",
    )  # fmt: skip
    return o[None], state if output_final_state else None


def fla_causal_conv1d_update(x, cache, residual=None, weight=None, bias=None, activation=None):
    y = torch.empty_like(x)
    for row in range(len(x)):
        found, last = conv(x[row], weight, bias, cache[row, :, 1:])
        y[row] = found.mT
        cache[row] = torch.cat([cache[row, :, 1:2], last], 1)
    return y, cache


def fla_fused_recurrent(q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None,
                        output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, A_log=None,
                        dt_bias=None, use_beta_sigmoid_in_kernel=False):  # fmt: skip
    pool = initial_state.mT.contiguous()
    slots = torch.arange(len(q))
    out = v.new_empty(v.shape)
    mixed = torch.cat([x[:, 0].flatten(1) for x in (q, k, v)], -1)
    packed_decode(mixed, g[:, 0], beta[:, 0], A_log, dt_bias, scale, pool, out, slots, True)
    return out, pool.mT


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert (casting_mode, in_place) == ("gemma", False)
    return (F.rms_norm(X.float(), X.shape[-1:], None, eps) * (offset + W.float())).to(X.dtype)


def attention(q, k, v, *bounds, softmax_scale=None, scale=None):
    ends, other, longest, most = bounds
    assert torch.equal(ends, other)
    assert (longest, most, ends.dtype) == (12, 12, torch.int32)
    return polyfuse.segment_attention(q, k, v, ends, scale=softmax_scale or scale, backend="torch")


STAND_INS = {
    "fla rms_norm_gated": [fla_rms_norm_gated],
    "fla chunk_gated_delta_rule": [fla_chunk_gated_delta_rule],
    "fla conv + fused_recurrent + rms_norm_gated": [fla_causal_conv1d_update, fla_fused_recurrent, fla_rms_norm_gated],
    "vllm silu_and_mul_per_block_quant": [vllm.silu_and_mul_per_block_quant],
    "vllm silu_mul_per_token_group_quant_fp8_colmajor": [silu_mul_per_token_group_quant_fp8_colmajor],
    "vllm persistent_masked_m_silu_mul_quant": [persistent_masked_m_silu_mul_quant],
    "vllm persistent_masked_m_silu_mul_quant, its Triton kernel": [by_triton_without_cuda],
    "vllm per_token_group_quant_fp8": [per_token_group_quant_fp8],
    "vllm rms_norm_per_block_quant": [rms_norm_per_block_quant],
    "vllm rmsnorm_fn": [vllm.rmsnorm_fn],
    "vllm chunk_gated_delta_rule": [vllm.chunk_gated_delta_rule],
    "vllm fused_post_conv_prep": [vllm.fused_post_conv_prep],
    "vllm causal_conv1d_fn + fused_post_conv_prep": [
        causal_conv1d_fn, vllm.fused_post_conv_prep, compute_causal_conv1d_metadata
    ],
    "vllm conv + packed_decode + rmsnorm_fn": [causal_conv1d_update, packed_decode, vllm.rmsnorm_fn],
    "vllm triton_pos_embed_interpolate": [vllm.triton_pos_embed_interpolate],
    "sglang silu_and_mul_masked_post_quant": [sglang.silu_and_mul_masked_post_quant_fwd],
    "sglang per_token_group_quant_fp8": [sglang_per_token_group_quant_fp8],
    "sgl_per_token_group_quant_8bit": [sgl_per_token_group_quant_8bit],
    "liger rms_norm + silu_mul": [liger_rms_norm, lambda a, b: F.silu(a) * b],
    "flash_attn_varlen_func": [attention],
    "torch varlen_attn": [attention],
}  # fmt: skip
ROUNDING = {
    "fla conv + fused_recurrent + rms_norm_gated",
    "liger rms_norm + silu_mul",
    "sglang silu_and_mul_masked_post_quant",
    "vllm causal_conv1d_fn + fused_post_conv_prep",
    "vllm conv + packed_decode + rmsnorm_fn",
    "vllm rms_norm_per_block_quant",
    "vllm silu_mul_per_token_group_quant_fp8_colmajor",
}


def case_of(peer: Peer) -> Case:
    return MASKED if "num_rows" in peer.needs else CASES[peer.op]


def judged(peer: Peer, of: Case, functions):
    values = make_inputs(OPS[peer.op], of)
    once = peer.prepare(*functions, SimpleNamespace(**place(values, "torch", "cpu")))
    return Truth(peer.op, values).judge(once.results(once.run()), peer.tolerance, peer.reason)


def test_every_peer_has_a_stand_in():
    assert set(STAND_INS) == set(PEERS)
    for name, functions in STAND_INS.items():
        assert len(functions) == len(PEERS[name].places)


@pytest.mark.parametrize("name", PEERS)
def test_a_call_gives_the_ops_results(name):
    found = judged(PEERS[name], case_of(PEERS[name]), STAND_INS[name])
    assert found.status == ("differs" if name in ROUNDING else "right"), found.note


def test_the_platform_is_as_it_was_after_a_call():
    peer, before = PEERS["vllm persistent_masked_m_silu_mul_quant, its Triton kernel"], current_platform
    judged(peer, MASKED, [by_triton_without_cuda])
    assert current_platform is before
    assert before.is_cuda()


@pytest.mark.parametrize("name", ["fla chunk_gated_delta_rule", "vllm chunk_gated_delta_rule"])
def test_packed_sequences_of_the_delta_rule(name):
    of = case("gated_delta_rule", {"L": 3, "H": 2, "HV": 4, "K": 64, "V": 32, "N": 4, "S": 3},
              present=("initial_state", "cu_seqlens"),
              fill={"q": "unit", "k": "unit", "g": "decay", "beta": "gate", "cu_seqlens": "arange"})  # fmt: skip
    assert judged(PEERS[name], of, STAND_INS[name]).status == "right"


def test_sequences_with_states_before_a_conv():
    name = "vllm causal_conv1d_fn + fused_post_conv_prep"
    of = case("gdn_conv_prep", {"L": 4, "HV": 4, "W": 4, "N": 5, "S": 4}, HEADS | {"output_final_state": True},
              present=("initial_state", "cu_seqlens", "bias"), fill={"cu_seqlens": "arange"})  # fmt: skip
    assert judged(PEERS[name], of, STAND_INS[name]).status == "differs"


@pytest.mark.parametrize("name", PEERS)
def test_each_peer_has_a_bench_case_on_a_gpu(name):
    peer = PEERS[name]
    calls = [found.call() for found in bench_cases([peer.op])]
    assert any(peer.refusal(call, "cuda") is None for call in calls)
    assert all(peer.refusal(call, "cpu") is not None for call in calls)


@pytest.mark.parametrize(("of", "op"), [(MASKED, "silu_mul_block_quant"), *((c, op) for op, c in CASES.items())])
def test_of_a_large_call_the_first_rows_are_checked(of, op, monkeypatch):
    """Large is more than two rows here, or more than one expert; what is named by rows or slots stays whole."""
    monkeypatch.setattr(check, "ROWS", 2)
    monkeypatch.setattr(check, "EXPERTS", 1)
    values = make_inputs(OPS[op], of)
    arrays = place(values, "torch", "cpu")
    results = as_tuple(getattr(polyfuse, op)(**arrays, backend="torch"))
    truth = Truth(op, values)
    assert truth.cut == (op not in ("pos_embed_interpolate", "segment_attention"))
    updated = [arrays[name] for name in OPS[op].updated if arrays[name] is not None]
    assert truth.judge([*results, *updated], {}).status == "right"
    wrong = [results[0] + 1 if results[0].dtype.itemsize > 1 else -results[0].float(), *results[1:], *updated]
    assert truth.judge(wrong, {}).status == "wrong"


def test_where_a_function_is_looked_for(monkeypatch):
    module = ModuleType("newer_home")
    module.function = len
    monkeypatch.setitem(sys.modules, "newer_home", module)
    one = Peer("block_quant", "p", (("no_such_package:f", "newer_home:function"),), lambda: None)
    assert one.functions() == [len]
    with pytest.raises(Unsupported, match=r"^no_such_package:f: ModuleNotFoundError: .*; newer_home:g: AttributeError"):
        Peer("block_quant", "p", (("no_such_package:f", "newer_home:g"),), lambda: None).functions()

"""Graph runtimes: the eager stand-in everywhere, CUDA graphs where there is a GPU."""

import threading
from typing import Any

import pytest
import torch

from polyfuse.runtime.encoder.capture import CudaGraphs, EagerReplay, graph_runtime, register_graph_runtime
from polyfuse.runtime.encoder.manager import EncoderGraphManager

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_replay_without_graphs_is_a_call() -> None:
    runtime, calls = EagerReplay(CPU), []
    replay = runtime.capture(lambda: calls.append(1))
    assert len(calls) == 1
    replay()
    assert len(calls) == 2
    assert runtime.pool_bytes() == 0
    assert runtime.seconds(lambda: calls.append(1), rounds=4) >= 0
    assert len(calls) == 6


def test_an_accelerator_brings_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graphs(EagerReplay):
        captures = True

    monkeypatch.setattr("polyfuse.runtime.encoder.capture._RUNTIMES", {})
    assert type(graph_runtime(torch.device("xpu"))) is EagerReplay
    register_graph_runtime("xpu", Graphs)
    assert isinstance(graph_runtime(torch.device("xpu", 1)), Graphs)


@gpu
def test_a_cuda_graph_follows_its_inputs_and_shares_one_pool() -> None:
    runtime = graph_runtime(torch.device("cuda"))
    assert isinstance(runtime, CudaGraphs)
    source, target = torch.zeros(2**20, device="cuda"), torch.empty(2**20, device="cuda")

    def step(rows: int) -> Any:
        def run() -> None:
            target[:rows].copy_(source[:rows] * 2 + 1)

        return run

    replays = [runtime.capture(step(2**20))]
    alone = runtime.pool_bytes()
    replays += [runtime.capture(step(2**20 >> n)) for n in range(1, 8)]
    assert 0 < runtime.pool_bytes() <= 1.15 * alone
    source.fill_(3.0)
    target.zero_()
    replays[-1]()
    assert target.sum().item() == 7 * 2**13
    replays[0]()
    assert target.sum().item() == 7 * 2**20
    runtime.reset()
    assert runtime.pool_bytes() == 0


@gpu
def test_a_step_that_raises_leaves_the_runtime_usable() -> None:
    runtime = CudaGraphs(torch.device("cuda"))
    x = torch.ones(4, device="cuda")
    calls = []

    def synchronises() -> None:
        calls.append(1)
        if len(calls) > 2:  # warmed up: now it is captured
            x.sum().item()

    with pytest.raises(RuntimeError, match="captur"):
        runtime.capture(synchronises)
    assert torch.rand(4, device="cuda").isfinite().all()

    def double() -> None:
        x.mul_(2)

    replay = runtime.capture(double)
    before = x.clone()
    replay()
    assert torch.equal(x, 2 * before)


@pytest.fixture(scope="module")
def tower() -> Any:
    transformers = pytest.importorskip("transformers")
    cls = transformers.Qwen3VLVisionModel
    config = cls.config_class(depth=3, deepstack_visual_indexes=[0, 1])
    torch.manual_seed(0)
    with torch.device("cuda"):
        return cls._from_config(config, dtype=torch.bfloat16).eval()


def batch(*grids: tuple[int, int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    grid = torch.tensor(grids)
    rows = int(grid.prod(-1).sum())
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(rows, 1536, device="cuda", dtype=torch.bfloat16, generator=generator), grid


def tensors(output: Any) -> list[torch.Tensor]:
    return [output.last_hidden_state, output.pooler_output, *output.deepstack_features]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


BATCHES = [
    batch((1, 16, 16)),
    batch((1, 20, 12), (1, 8, 8)),
    batch((2, 16, 8)),
    batch((1, 4, 4), (1, 4, 4), (1, 30, 2), (1, 6, 6), seed=3),
] if torch.cuda.is_available() else []  # fmt: skip


@gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Inductor imports
@pytest.mark.parametrize("compiled", [False, True], ids=["eager_blocks", "compiled_blocks"])
def test_replays_equal_the_same_forward_without_a_graph(tower: Any, compiled: bool) -> None:
    """To the bit: at exact size, and with padding that holds NaN."""
    from polyfuse.integrations.transformers import make_encoder

    encoder = make_encoder(tower, compiled)
    graphs = EncoderGraphManager(encoder, budgets=[64, 128, 256], policy="greedy")
    calls = EncoderGraphManager(
        encoder, runtime=EagerReplay(torch.device("cuda")), budgets=[64, 128, 256], policy="greedy"
    )
    for pixels, grid in BATCHES:
        with torch.no_grad():
            want = calls.execute(pixels, grid)
            graphs.capture()
            graphs._inputs["pixels"].fill_(float("nan"))
            first = graphs.execute(pixels, grid)
            graphs.execute(*batch((1, 24, 24), seed=9))  # another replay must not reach what was returned
            assert same(first, want)
            assert same(graphs.execute(pixels, grid.cuda()), want)
    assert graphs.stats.eager_items == 0
    assert graphs.stats.capture_failures == 0


@gpu
def test_a_graph_equals_the_untouched_model_of_the_same_attention(tower: Any) -> None:
    """To the bit where nothing else differs: coordinates that are exact in float32, patch embedding by one product."""
    import transformers

    import polyfuse
    from polyfuse.integrations.transformers import make_encoder

    def flash(module: Any, query: Any, key: Any, value: Any, scaling: float, **kwargs: Any) -> Any:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        lengths = {"cu_seqlens": kwargs["cu_seq_lens_q"], "max_seqlen": kwargs["max_length_q"]}
        return polyfuse.segment_attention(q, k, v, scale=scaling, **lengths)[None], None

    transformers.AttentionInterface.register("polyfuse_test_flash", flash)
    tower.config._attn_implementation = "polyfuse_test_flash"
    proj = tower.patch_embed.proj
    tower.patch_embed.forward = lambda x: torch.nn.functional.linear(x, proj.weight.flatten(1), proj.bias)
    grid = torch.tensor([[1, 48, 48]])  # as the table: every coordinate is an integer
    pixels, _ = batch((1, 48, 48))
    try:
        with torch.no_grad():
            want = tower(pixels, grid.cuda())
            got = EncoderGraphManager(make_encoder(tower), budgets=[576]).execute(pixels, grid)
    finally:
        tower.config._attn_implementation = "sdpa"
        del tower.patch_embed.forward
    assert same(got, want)


@gpu
def test_threads_on_streams_of_their_own(tower: Any) -> None:
    from polyfuse.integrations.transformers import make_encoder

    manager = EncoderGraphManager(make_encoder(tower), budgets=[64, 128, 256])
    with torch.no_grad():
        wanted = [manager.execute(*given) for given in BATCHES]
    torch.cuda.synchronize()
    wrong: list[str] = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
                for _ in range(25):
                    if not same(manager.execute(*BATCHES[index]), wanted[index]):
                        wrong.append(f"batch {index}")
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(BATCHES))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@gpu
def test_pool_is_that_of_the_largest_budget(tower: Any) -> None:
    from polyfuse.integrations.transformers import make_encoder

    encoder = make_encoder(tower)
    alone = EncoderGraphManager(encoder, budgets=[1024])
    alone.capture()
    many = EncoderGraphManager(encoder, budgets=[64, 128, 256, 384, 512, 640, 768, 896, 1024])
    many.capture()
    assert 0 < many.stats.pool_bytes <= 1.15 * alone.stats.pool_bytes
    bounded = EncoderGraphManager(encoder, budgets=[128, 1024], memory_bytes=alone.stats.pool_bytes - 1)
    with pytest.warns(RuntimeWarning, match="budget of 1024 tokens: the pool takes"):
        bounded.capture()
    assert set(bounded.stats.costs) == {128}
    assert bounded.stats.pool_bytes < alone.stats.pool_bytes


@gpu
def test_out_of_memory_during_capture_falls_back(tower: Any) -> None:
    from polyfuse.integrations.transformers import make_encoder

    encoder: Any = make_encoder(tower)
    forward = encoder.forward

    def hungry(inputs: Any, capacity: Any) -> Any:
        if capacity.tokens == 128 and torch.cuda.is_current_stream_capturing():
            torch.empty(2**50, device="cuda")
        return forward(inputs, capacity)

    encoder.forward = hungry
    manager = EncoderGraphManager(encoder, budgets=[64, 128])
    with pytest.warns(RuntimeWarning, match="no graph for the budget of 128 tokens: OutOfMemoryError"):
        manager.capture()
    with torch.no_grad():
        manager.execute(*batch((1, 20, 20)))
        manager.execute(*batch((1, 8, 8)))
    assert (manager.stats.capture_failures, manager.stats.eager_items, set(manager.stats.costs)) == (1, 1, {64})

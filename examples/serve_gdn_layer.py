"""Continuous batching of one Gated DeltaNet layer over pools of states, checked against each request run alone.

The layer keeps a state of fixed size for each request, however many tokens that has: the last inputs of its conv, and a
matrix for each value head. An engine allocates pools of both once, and a running request owns one slot of each:

    admit     takes a slot from the free list. It still holds what its last owner left there, and is not cleared: the
              request's first prefill says has_initial_state=False, and so begins from zeros
    prefill   takes chunks of several prompts, one behind the other, in one call. cu_seqlens says where each begins,
              state_indices which slot the ops read and write in place
    decode    takes one token of each of many requests in one call. Its number of rows is fixed, as in a CUDA graph:
              rows that no request needs have the index -1, may hold anything, and touch no slot
    preempt   takes the slot of a request. Its state is swapped out, and later copied into whichever slot it gets then;
              or it is dropped, and all tokens so far are prefilled once more

A step does both kinds of work, for requests that may join, leave or sit it out. Two requests must never own one slot:
the ops cannot look for it without reading indices back to the host. So the engine does, before each step.

Each output row must have the bits that it has where its request runs alone, on pools of its own, by the same calls of
as many rows. Each generated row makes the next input, so that an error would grow. Two things decide on the bits:

    splits        A prompt may be split anywhere. But the delta rule takes chunks of 64 rows from the first row of a
                  call on: it rounds otherwise where a prompt is split elsewhere, and where a row is decoded. Only at
                  multiples of 64, with a pool in float32, do splits change no bit. Here they are anywhere, and the
                  request that runs alone has the same.
    projections   The other ops give a row the same bits whatever is beside it. A GEMM, also that of `gdn_in_proj`, is
                  chosen by its number of rows. So `product` adds in an order of its own, which is slow.

    python examples/serve_gdn_layer.py --schedules 1000 --device cuda --dtype bfloat16 --seed 0
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import polyfuse

Pools = tuple[torch.Tensor, torch.Tensor]  # of the conv [slots, C, W - 1], and of the delta rule [slots, HV, K, V]


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T by elementwise operations alone, which give a row [columns] the same bits in any batch."""
    terms = x.float()[:, None] * weight.float()
    columns = terms.shape[-1]
    while columns > 1:
        half = (columns + 1) // 2
        terms[..., : columns - half] += terms[..., half:columns]
        columns = half
    return terms[..., 0].to(x.dtype)


def next_input(row: torch.Tensor) -> torch.Tensor:
    """The input that follows an output row: a stand-in for the sampling of a token and its embedding."""
    return 2 * row / (1 + row.abs())


class Layer:
    """A small Gated DeltaNet layer with random weights, from hidden states [rows, hidden] to the same."""

    hidden, heads, heads_v, conv_width = 32, 2, 4, 4

    def __init__(self, head_dim: int = 16, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

        self.head_dim, self.values = head_dim, self.heads_v * head_dim
        self.channels = 2 * self.heads * head_dim + self.values
        self.in_proj = weight(self.channels + self.values + 2 * self.heads_v, self.hidden, scale=self.hidden**-0.5)
        self.conv_weight = weight(self.channels, self.conv_width)
        self.A_log, self.dt_bias = weight(self.heads_v) - 3, weight(self.heads_v)  # a slow decay
        self.norm_weight = 1 + weight(head_dim, scale=0.1)
        self.out_proj = weight(self.hidden, self.values, scale=2 * self.values**-0.5)
        self.sizes: dict[str, Any] = {"num_k_heads": self.heads, "head_k_dim": head_dim, "head_v_dim": head_dim}

    def new_pools(self, slots: int, fill: float) -> Pools:
        """A conv pool in the dtype of what it holds, and a pool of the delta rule in float32, in which that sums."""
        like, matrices = self.in_proj, (self.heads_v, self.head_dim, self.head_dim)
        conv_pool = like.new_full((slots, self.channels, self.conv_width - 1), fill)
        return conv_pool, like.new_full((slots, *matrices), fill, dtype=torch.float32)

    def prefill(self, hidden: torch.Tensor, pools: Pools, **sequences: Any) -> torch.Tensor:
        """Rows of a sequence, or of several: `sequences` are the arguments of both ops that tell these apart."""
        x, z, a, b = self._project(hidden)
        gates, named = (a, b, self.A_log, self.dt_bias), {**sequences, **self.sizes}
        *inputs, _ = polyfuse.gdn_conv_prep(x, self.conv_weight, *gates, state_pool=pools[0], **named)
        o, _ = polyfuse.gated_delta_rule(*inputs, state_pool=pools[1], **sequences)
        y = polyfuse.gated_rms_norm(o, z.unflatten(1, (self.heads_v, self.head_dim)), self.norm_weight)
        return product(y.flatten(1), self.out_proj)

    def decode(self, hidden: torch.Tensor, pools: Pools, state_indices: torch.Tensor | None = None) -> torch.Tensor:
        """One row of each sequence [batch, hidden]."""
        weights = self.conv_weight, self.A_log, self.dt_bias, self.norm_weight
        y = polyfuse.gdn_decode(*self._project(hidden), *weights, *pools, state_indices=state_indices, **self.sizes)
        return product(y, self.out_proj)

    def _project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """[q | k | v], z, a and b of hidden states, each a view of one projection."""
        x, z, ab = product(hidden, self.in_proj).split((self.channels, self.values, 2 * self.heads_v), dim=1)
        a, b = ab.chunk(2, dim=1)
        return x, z, a, b


@dataclass(eq=False)
class Request:
    """What one request has seen and made, wherever its state is."""

    prompt: list[torch.Tensor]  # rows [hidden]
    wanted: int  # rows to generate
    generated: list[torch.Tensor] = field(default_factory=list)
    seen: int = 0  # the inputs, of the prompt and then of the generated ones, that its state has seen
    slot: int = -1
    swapped: Pools | None = None
    calls: list[tuple[str, int]] = field(default_factory=list)  # the kind and the rows of each
    rows: list[torch.Tensor] = field(default_factory=list)  # every output row in the order it was computed

    @property
    def left(self) -> int:
        """How many inputs its state has not seen yet."""
        return len(self.prompt) + len(self.generated) - self.seen

    def following(self, count: int) -> list[torch.Tensor]:
        """The next inputs for its state to see."""
        return (self.prompt + self.generated)[self.seen : self.seen + count]

    def advance(self, kind: str, rows: torch.Tensor) -> None:
        """Note what a call made of the following inputs. A row without an input after it generates one."""
        self.calls.append((kind, len(rows)))
        self.rows.extend(rows)
        self.seen += len(rows)
        if not self.left:
            self.generated.append(next_input(rows[-1]))


class Engine:
    """Runs requests on a layer, as many at a time as there are slots. A decode always has `batch` rows."""

    prefill_rows = 16  # a prefill is padded to a multiple of so many

    def __init__(self, layer: Layer, slots: int, batch: int) -> None:
        self.layer, self.batch = layer, batch
        self.pools = layer.new_pools(slots, float("nan"))  # whoever reads a slot that is not its own will show it
        self.free = list(range(slots))
        self.running: list[Request] = []

    def admit(self, request: Request) -> None:
        """Give a request a slot of the free ones, with the state that was swapped out if there is one."""
        request.slot = self.free.pop()
        self.running.append(request)
        if request.swapped is not None:
            for pool, state in zip(self.pools, request.swapped, strict=True):
                pool[request.slot] = state
            request.swapped = None

    def preempt(self, request: Request, swap: bool) -> None:
        """Take a request's slot away. Its state is swapped out, or has to see all inputs again, generated ones too."""
        if swap and request.seen:
            conv, recurrent = (pool[request.slot].clone() for pool in self.pools)
            request.swapped = conv, recurrent
        else:
            request.calls.append(("forget", 0))
            request.seen = 0
        self._release(request)

    def step(self, prefills: Sequence[tuple[Request, int]], decodes: Sequence[Request]) -> None:
        """Run so many rows of some requests, and one row of others, of which no slot has more than one."""
        self._check([request for request, _ in prefills] + list(decodes))
        if prefills:
            self._prefill(prefills)
        if decodes:
            self._decode(decodes)
        for request in [request for request in self.running if len(request.generated) == request.wanted]:
            self._release(request)

    def _prefill(self, work: Sequence[tuple[Request, int]]) -> None:
        requests, counts = zip(*work, strict=True)
        rows = [row for request, count in work for row in request.following(count)]
        padding = -len(rows) % self.prefill_rows  # one more sequence, which may have no rows
        ends = torch.tensor([0, *counts, padding], device=rows[0].device).cumsum(0)
        indices = self._indices(requests, 1)
        known = torch.tensor([*(request.seen > 0 for request in requests), False], device=ends.device)
        told = {"cu_seqlens": ends, "state_indices": indices, "has_initial_state": known}
        out = self.layer.prefill(self._padded(rows, padding), self.pools, **told)
        for request, part in zip(requests, out[: len(rows)].split(counts), strict=True):
            request.advance("prefill", part)

    def _decode(self, requests: Sequence[Request]) -> None:
        padding = self.batch - len(requests)
        rows = [row for request in requests for row in request.following(1)]
        out = self.layer.decode(self._padded(rows, padding), self.pools, self._indices(requests, padding))
        for request, row in zip(requests, out[: len(requests)].split(1), strict=True):
            request.advance("decode", row)

    def _padded(self, rows: list[torch.Tensor], padding: int) -> torch.Tensor:
        """The rows as one tensor, and behind them some that no other may depend on."""
        return torch.cat([torch.stack(rows), rows[0].new_full((padding, self.layer.hidden), float("nan"))])

    def _indices(self, requests: Sequence[Request], padding: int) -> torch.Tensor:
        """The slots of requests, and behind them -1."""
        slots = [request.slot for request in requests] + [-1] * padding
        return torch.tensor(slots, dtype=torch.int32, device=self.pools[0].device)

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self.free.append(request.slot)
        request.slot = -1

    def _check(self, work: Sequence[Request]) -> None:
        """Raise unless every slot is either free or one request's, and the work is of different running requests."""
        owned = self.free + [request.slot for request in self.running]
        if sorted(owned) != list(range(len(self.pools[0]))):
            raise RuntimeError(f"each slot must be free or one request's, got free {self.free}, all {sorted(owned)}")
        if len({id(request) for request in work}) < len(work) or any(request.slot < 0 for request in work):
            raise RuntimeError("a step takes each request once, and only one that has a slot")


def run_alone(layer: Layer, request: Request) -> list[torch.Tensor]:
    """The rows of a request by the same calls, but without others: its state is the one slot of its own pools."""
    twin, pools = Request(request.prompt, request.wanted), layer.new_pools(1, 0.0)
    for kind, count in request.calls:
        if kind == "forget":
            twin.seen, pools = 0, layer.new_pools(1, 0.0)
            continue
        call = layer.prefill if kind == "prefill" else layer.decode
        twin.advance(kind, call(torch.stack(twin.following(count)), pools))
    return twin.rows


def differing(layer: Layer, request: Request) -> int:
    """How many rows of a request are not, bit for bit, those of the request run alone, or not finite."""
    rows, expected = torch.stack(request.rows), torch.stack(run_alone(layer, request))
    same = (rows.view(torch.uint8) == expected.view(torch.uint8)).all(1) & expected.isfinite().all(1)
    return int((~same).sum())


def run_schedule(layer: Layer, seed: int, longest: int = 150) -> dict[str, int]:
    """Serve random requests, with prompts of up to `longest` rows, by a random schedule; what ran and what differs."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [chance.randint(1, longest) for _ in range(chance.randint(3, 6))]
    prompts = [torch.randn(length, layer.hidden, generator=generator).to(layer.in_proj) for length in lengths]
    requests = [Request(list(prompt), wanted=chance.randint(1, 6)) for prompt in prompts]
    slots = chance.randint(1, 4)
    engine, waiting = Engine(layer, slots, batch=slots + 2), list(requests)
    steps, preempted = 0, Counter[bool]()  # by whether the state was swapped out
    while waiting or engine.running:
        for request in list(engine.running):
            if chance.random() < 0.1:
                swap = chance.random() < 0.5
                preempted[swap] += request.seen > 0
                engine.preempt(request, swap)
                waiting.insert(chance.randint(0, len(waiting)), request)
        while waiting and engine.free and chance.random() < 0.8:
            engine.admit(waiting.pop(0))
        prefills, decodes = [], []
        for request in engine.running:
            if chance.random() < 0.2:
                continue  # its state stays where it is
            if request.seen and request.left == 1:
                decodes.append(request)
            else:
                prefills.append((request, chance.randint(1, min(request.left, 100))))
        engine.step(prefills, decodes)
        steps += 1
    rows, wrong = sum(len(r.rows) for r in requests), sum(differing(layer, r) for r in requests)
    counts = {"steps": steps, "swapped": preempted[True], "recomputed": preempted[False]}
    return {**counts, "rows": rows, "mismatches": wrong}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Serve random schedules, and compare with requests run alone.")
    parser.add_argument("--schedules", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule; others count on from it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--head-dim", type=int, default=16, help="columns of a head")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)  # the tensors are so small that threads wait for one another
    layer, total = Layer(options.head_dim, options.device, getattr(torch, options.dtype)), Counter[str]()
    with torch.inference_mode():
        for seed in range(options.seed, options.seed + options.schedules):
            counts = run_schedule(layer, seed)
            total.update(counts)
            if counts["mismatches"]:
                print(f"seed {seed}: {counts['mismatches']} of {counts['rows']} rows differ")
    print(f"{options.schedules} schedules: {', '.join(f'{count} {name}' for name, count in total.items())}")
    return 1 if total["mismatches"] else 0


if __name__ == "__main__":
    sys.exit(main())

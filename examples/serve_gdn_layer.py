"""Continuous batching of one Gated DeltaNet layer over pools of states, checked against each request run alone.

A transformer's cache grows with every token. A Gated DeltaNet layer keeps a state of fixed size for each request: the
last inputs of its conv, and a matrix for each value head. An engine allocates both once, as pools of slots, and a
request owns one slot of both while it runs:

    admit     takes a slot from the free list. The slot still holds what its last owner left there: nobody clears it.
              The request's first prefill says has_initial_state=False, and so begins from zeros
    prefill   chunks of several prompts lie behind one another in one call, told apart by cu_seqlens. state_indices
              names the slot of each, which the ops read and write in place
    decode    one token of each of many requests in one call. Its number of rows is fixed, as a CUDA graph has it:
              the rows that no request needs have the index -1, may hold anything, and touch no slot
    preempt   takes the slot away. Either the state is swapped out, and copied into whichever slot the request gets
              later; or it is dropped, and all tokens so far are prefilled once more
    release   a finished request gives its slot back to the free list

A step does both kinds of work, for requests that may join, leave or sit it out. Two requests must never own one slot:
the ops do not look for it, as they read no index back to the host. So the engine does, before each step.

Every row of every request is compared, bit for bit, with the request run alone: on pools of its own, by the same
calls of as many rows. What it can be equal to depends on two things:

  * Splits. A prompt may be split anywhere. But the delta rule takes 64 rows together, counted from the first row of a
    call, so that a split elsewhere than at multiples of 64 rounds otherwise, and so does a decode step. The bits of a
    prompt do not depend on its splits where all of them are at multiples of 64 and the pool of S is in float32. Here
    splits are anywhere, and the run alone has the same.
  * Projections. The ops between the projections give each row the same bits whatever is beside it, but a GEMM is
    chosen by its number of rows, that of `gdn_in_proj` too. So `product` adds here in an order of its own.

Each generated row makes the next input of its request, so that one wrong bit would not stay alone.

    python examples/serve_gdn_layer.py --schedules 1000 --device cuda --dtype bfloat16 --seed 0
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

import polyfuse

Pools = tuple[torch.Tensor, torch.Tensor]  # of the conv [slots, C, W - 1], and of the delta rule [slots, HV, K, V]

PREFILL_ROWS = 16  # a prefill is padded to a multiple of so many rows


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T by elementwise operations alone, which give a row [columns] the same bits in any batch."""
    terms = x.float()[:, None] * weight.float()
    while (columns := terms.shape[-1]) > 1:
        if columns % 2:
            raise ValueError(f"product: weight: expected a power of two columns, got {weight.shape[-1]}")
        terms = terms[..., : columns // 2] + terms[..., columns // 2 :]
    return terms[..., 0].to(x.dtype)


def next_input(row: torch.Tensor) -> torch.Tensor:
    """The input that follows an output row: a stand-in for what samples a token and looks up its embedding."""
    return 2 * row / (1 + row.abs())


class Layer:
    """A Gated DeltaNet layer with random weights, from hidden states [rows, hidden] to the same."""

    def __init__(
        self,
        seed: int = 0,
        *,
        hidden: int = 32,
        heads: int = 2,
        heads_v: int = 4,
        width_k: int = 16,
        width_v: int = 16,
        conv_width: int = 4,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(*shape, generator=generator)).to(device, dtype)

        self.hidden, self.heads_v, self.width_v = hidden, heads_v, width_v
        self.channels, self.values = 2 * heads * width_k + heads_v * width_v, heads_v * width_v
        self.in_proj = weight(self.channels + self.values + 2 * heads_v, hidden, scale=hidden**-0.5)
        self.conv_weight = weight(self.channels, conv_width)
        self.A_log, self.dt_bias = weight(heads_v), weight(heads_v)
        self.norm_weight = 1 + weight(width_v, scale=0.1)
        self.out_proj = weight(hidden, self.values, scale=2 * self.values**-0.5)
        self.state_shapes = (self.channels, conv_width - 1), (heads_v, width_k, width_v)
        self.sizes = {"num_k_heads": heads, "head_k_dim": width_k, "head_v_dim": width_v}

    def new_pools(self, slots: int, fill: float) -> Pools:
        """A conv pool in the layer's dtype and a pool for the delta rule in float32, as its state is summed up in."""
        conv, recurrent = self.state_shapes
        return self.in_proj.new_full((slots, *conv), fill), self.in_proj.new_full(
            (slots, *recurrent), fill, dtype=torch.float32
        )

    def prefill(
        self,
        hidden: torch.Tensor,
        pools: Pools,
        cu_seqlens: torch.Tensor | None = None,
        state_indices: torch.Tensor | None = None,
        has_initial_state: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Several rows of each of several sequences, packed [rows, hidden]; updates their slots of the pools."""
        x, z, a, b = self._project(hidden)
        conv_pool, recurrent_pool = pools
        sequences = {
            "cu_seqlens": cu_seqlens,
            "state_indices": state_indices,
            "has_initial_state": has_initial_state,
        }
        gates = a, b, self.A_log, self.dt_bias
        *inputs, _ = polyfuse.gdn_conv_prep(
            x, self.conv_weight, *gates, state_pool=conv_pool, **sequences, **self.sizes
        )
        o, _ = polyfuse.gated_delta_rule(*inputs, state_pool=recurrent_pool, **sequences)
        y = polyfuse.gated_rms_norm(o, z.unflatten(1, (self.heads_v, self.width_v)), self.norm_weight)
        return product(y.flatten(1), self.out_proj)

    def decode(self, hidden: torch.Tensor, pools: Pools, state_indices: torch.Tensor | None = None) -> torch.Tensor:
        """One row of each sequence [batch, hidden]; updates their slots of the pools."""
        weights = self.conv_weight, self.A_log, self.dt_bias, self.norm_weight
        y = polyfuse.gdn_decode(*self._project(hidden), *weights, *pools, state_indices=state_indices, **self.sizes)
        return product(y, self.out_proj)

    def _project(self, hidden: torch.Tensor) -> Sequence[torch.Tensor]:
        """[q | k | v], z, a and b of hidden states, each a view of one projection."""
        widths = self.channels, self.values, self.heads_v, self.heads_v
        return product(hidden, self.in_proj).split(widths, dim=1)


@dataclass(eq=False)
class Request:
    """What one request has seen and made, wherever its state is."""

    prompt: list[torch.Tensor]  # rows [hidden]
    wanted: int  # rows to generate
    inputs: list[torch.Tensor] = field(default_factory=list)  # the prompt, and what was generated so far
    seen: int = 0  # the inputs that its state has seen
    slot: int = -1
    swapped: Pools | None = None
    calls: list[tuple[str, int]] = field(default_factory=list)  # the kind and the rows of each
    rows: list[torch.Tensor] = field(default_factory=list)  # every output row in the order it was computed

    def __post_init__(self) -> None:
        self.inputs = list(self.prompt)

    @property
    def left(self) -> int:
        return len(self.inputs) - self.seen

    @property
    def finished(self) -> bool:
        return len(self.inputs) >= len(self.prompt) + self.wanted

    def following(self, count: int) -> list[torch.Tensor]:
        """The next inputs that the state has to see."""
        return self.inputs[self.seen : self.seen + count]

    def advance(self, kind: str, rows: torch.Tensor) -> None:
        """Note what a call made of the following inputs. A row without an input after it generates one."""
        self.calls.append((kind, len(rows)))
        self.rows.extend(rows)
        self.seen += len(rows)
        if not self.left:
            self.inputs.append(next_input(rows[-1]))

    def forget(self) -> None:
        """The state is lost: it has to see all inputs again, those too that were generated."""
        self.calls.append(("forget", 0))
        self.seen = 0


class Engine:
    """Runs requests on a layer, of which as many have a state at a time as there are slots."""

    def __init__(self, layer: Layer, slots: int, batch: int) -> None:
        """`batch` is the number of rows that a decode always has."""
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
        """Take a request's slot away; its state is swapped out, or to be computed again from its inputs."""
        if swap and request.seen:
            conv, recurrent = (pool[request.slot].clone() for pool in self.pools)
            request.swapped = conv, recurrent
        else:
            request.forget()
        self._release(request)

    def step(self, prefills: Sequence[tuple[Request, int]], decodes: Sequence[Request]) -> None:
        """Run so many rows of some requests, and one row of others, of which no slot has more than one."""
        self._check([request for request, _ in prefills] + list(decodes))
        if prefills:
            self._prefill(prefills)
        if decodes:
            self._decode(decodes)
        for request in [request for request in self.running if request.finished]:
            self._release(request)

    def _prefill(self, work: Sequence[tuple[Request, int]]) -> None:
        rows = [row for request, count in work for row in request.following(count)]
        counts = [count for _, count in work]
        padding = -len(rows) % PREFILL_ROWS  # one more sequence, which may have no rows
        ends = torch.tensor([0, *counts, padding], device=rows[0].device).cumsum(0)
        indices = self._numbers([*(request.slot for request, _ in work), -1])
        known = torch.tensor([*(request.seen > 0 for request, _ in work), False], device=rows[0].device)
        out = self.layer.prefill(self._padded(rows, padding), self.pools, ends.int(), indices, known)
        for (request, _), part in zip(work, out[: len(rows)].split(counts), strict=True):
            request.advance("prefill", part)

    def _decode(self, requests: Sequence[Request]) -> None:
        padding = self.batch - len(requests)
        rows = [row for request in requests for row in request.following(1)]
        indices = self._numbers([*(request.slot for request in requests), *[-1] * padding])
        out = self.layer.decode(self._padded(rows, padding), self.pools, indices)
        for request, row in zip(requests, out[: len(requests)].split(1), strict=True):
            request.advance("decode", row)

    def _padded(self, rows: list[torch.Tensor], padding: int) -> torch.Tensor:
        """The rows as one tensor, and behind them some that no other may depend on."""
        return torch.cat([torch.stack(rows), rows[0].new_full((padding, self.layer.hidden), float("nan"))])

    def _numbers(self, slots: list[int]) -> torch.Tensor:
        return torch.tensor(slots, dtype=torch.int32, device=self.pools[0].device)

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self.free.append(request.slot)
        request.slot = -1

    def _check(self, work: Sequence[Request]) -> None:
        """Raise unless every slot is either free or one request's, and the work is of different running requests."""
        owners = Counter(self.free + [request.slot for request in self.running])
        if wrong := [slot for slot in range(len(self.pools[0])) if owners.pop(slot, 0) != 1] + list(owners):
            raise RuntimeError(f"slots that do not have one owner, or none and a place in the free list: {wrong}")
        if len({id(request) for request in work}) < len(work) or any(request.slot < 0 for request in work):
            raise RuntimeError("a step takes each request once, and only one that has a slot")


@dataclass
class Outcome:
    """What was run and compared."""

    steps: int = 0
    rows: int = 0
    swapped: int = 0
    recomputed: int = 0
    mismatches: int = 0  # rows that differ from those of the request run alone


def run_alone(layer: Layer, request: Request) -> list[torch.Tensor]:
    """The rows of a request by the same calls, but without others: its state is the one slot of its own pools."""
    twin, pools = Request(request.prompt, request.wanted), layer.new_pools(1, 0.0)
    for kind, count in request.calls:
        if kind == "forget":
            twin.forget()
            pools = layer.new_pools(1, 0.0)
            continue
        call = layer.prefill if kind == "prefill" else layer.decode
        twin.advance(kind, call(torch.stack(twin.following(count)), pools))
    return twin.rows


def run_schedule(layer: Layer, seed: int, outcome: Outcome, longest: int = 150) -> None:
    """Serve random requests by a random schedule, then run each alone and compare; adds to the outcome."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def prompt() -> list[torch.Tensor]:
        rows = torch.randn(chance.randint(1, longest), layer.hidden, generator=generator)
        return list(rows.to(layer.in_proj))

    requests = [Request(prompt(), wanted=chance.randint(1, 6)) for _ in range(chance.randint(3, 6))]
    slots = chance.randint(1, 4)
    engine, waiting = Engine(layer, slots, batch=slots + 2), list(requests)
    while waiting or engine.running:
        for request in list(engine.running):
            if chance.random() < 0.1:
                swap = chance.random() < 0.5
                outcome.swapped += swap and request.seen > 0
                outcome.recomputed += not swap and request.seen > 0
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
        outcome.steps += 1
    for request in requests:
        expected = run_alone(layer, request)
        outcome.rows += len(expected)
        outcome.mismatches += sum(not torch.equal(*pair) for pair in zip(request.rows, expected, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Serve random schedules, and compare with requests run alone.")
    parser.add_argument("--schedules", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule; others count on from it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    options = parser.parse_args(arguments)
    layer = Layer(device=options.device, dtype=getattr(torch, options.dtype))
    outcome = Outcome()
    with torch.inference_mode():
        for number in range(options.schedules):
            run_schedule(layer, options.seed + number, outcome)
    counts = ", ".join(f"{count} {name}" for name, count in vars(outcome).items())
    print(f"{options.schedules} schedules: {counts}")
    return 1 if outcome.mismatches else 0


if __name__ == "__main__":
    sys.exit(main())

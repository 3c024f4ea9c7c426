"""One case of `polyfuse bench`: PyTorch's own way, our backends, and the peers, within one budget of time."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import polyfuse
from polyfuse.bench.cases import BenchCase
from polyfuse.bench.measure import Times, live_share, measure, measure_jax
from polyfuse.bench.peers import PACKAGES, Peer
from polyfuse.bench.peers.check import Truth
from polyfuse.bench.rows import Bench, LeftOut, PeerRow, Row
from polyfuse.bench.timing import Budget, Clock
from polyfuse.configs import platform_order
from polyfuse.conformance import make_inputs, place
from polyfuse.dispatch import device_of, examine, from_numpy, registry
from polyfuse.spec import OPS, Unsupported, bind

DISTINCT = 2**20  # numbers of an array of inputs: to make all of a large one takes longer than to measure its calls
PLAIN = {"gdn_in_proj": {"strategy": "sequential"}}  # attributes of what PyTorch does when nobody helps it


class CaseBench:
    """The measurements of one case, which share its budget."""

    def __init__(
        self,
        case: BenchCase,
        backends: Sequence[str],
        device: str,
        compiled: bool,
        peers: bool,
        result: Bench,
        say: Callable[[str], None],
    ) -> None:
        self.case, self.op, self.device, self.compiled = case, case.op, device, compiled
        self.ceiling, self.versions = result.ceiling_gb_s, result.packages
        self.call = case.call()
        self.where = device_of(torch.empty(0, device=device), "torch")
        why_not = {name: self._why_not(name) for name in backends or registry().names()}
        self.backends = [name for name, why in why_not.items() if not why]
        self.declined = {name: why for name, why in why_not.items() if why and backends}  # asked for by name
        self.peers = list(self._peers()) if peers else []
        self._say = say
        self.budget = Budget(result.budget_s)
        self.parts = 1 + compiled + len(self.backends) + len(self.peers)  # that are still to be measured

    def run(self) -> Iterator[Row | PeerRow | LeftOut]:
        """What is found, in the order in which it is measured."""
        for name, why in self.declined.items():
            yield self._left_out(name, why)
        if reason := self._too_long():
            yield self._left_out("all", reason)
            return
        self.say("inputs")
        values = make_inputs(OPS[self.op], self.case.case, most=DISTINCT)
        self.say("eager PyTorch")
        plain = place(values, "torch", self.device) | PLAIN.get(self.op, {})
        eager = self._measure(partial(_ours, self.op, "torch"), plain)
        compile_us = None
        if self.compiled and self.budget.left() < self.budget.seconds / 2:
            self.parts -= 1
            yield self._left_out("torch.compile", "the rest took more than half of the case's budget")
        elif self.compiled:
            compile_us = self._compiled_us(plain)
        rows = []
        for name in self.backends:
            rows.append(self._row(name, values, eager, compile_us))
            yield rows[-1]
        if self.peers:
            ours = self._ours(rows)
            truth = Truth(self.op, values)
            for peer, version in self.peers:
                yield self._peer_row(peer, version, values, truth, ours)

    def say(self, what: str) -> None:
        """Tell what is measured now."""
        self._say(f"{self.op} {self.case.name} of {self.case.model}: {what}")

    def _left_out(self, what: str, reason: str) -> LeftOut:
        return LeftOut(self.op, self.case.model, self.case.name, what, reason)

    def _share(self) -> float:
        """The seconds of the measurement that comes now."""
        share = self.budget.left() / max(self.parts, 1)
        self.parts -= 1
        return share

    def _why_not(self, name: str) -> str:
        """Why a backend does not compute the case here, natively; empty if it does."""
        backend = registry().get(name)
        if backend.family == "numpy":
            return "NumPy arrays are not measured"
        if missing := backend.missing(self.op):
            return missing[1]
        where = device_of(from_numpy(np.zeros(1, np.float32), backend.family, self.device), backend.family)
        candidate, implementation = examine(self.op, name, self.call, backend.family, where, False)
        if implementation is None:
            return candidate.reason
        return "its kernels are interpreted here" if where.kind in implementation.capability.interpreted else ""

    def _peers(self) -> Iterator[tuple[Peer, str]]:
        """The peers that are installed and have something for the case, with their versions."""
        for package in PACKAGES:
            version = self.versions[package.name]
            for peer in package.peers if version else ():
                if peer.op == self.op and peer.refusal(self.call, self.where.kind) is None:
                    yield peer, version or ""

    def _too_long(self) -> str:
        """Why the case does not fit into the budget, by a call of few rows; "" if it does."""
        few = self.case.few_rows()
        if few is None:
            return ""
        self.say("estimate")
        clock, spec = Clock(self.device), OPS[self.op]
        arrays = place(make_inputs(spec, few), "torch", self.device)
        with torch.no_grad():
            once = min(clock.latencies([_ours(self.op, "torch", arrays)] * 3).done)
        small, large = spec.cost(self.case.call(few)), spec.cost(self.call)
        once *= max(large.flops / max(small.flops, 1), large.bytes_read / max(small.bytes_read, 1))
        if once <= self.budget.seconds:
            return ""
        return f"about {once:.0f} s for one call of PyTorch, of a budget of {self.budget.seconds:g} s"

    def _compiled_us(self, arrays: Mapping[str, Any]) -> float:
        """Device microseconds of PyTorch's own way under torch.compile."""
        self.say("torch.compile")
        torch._dynamo.reset()
        function = torch.compile(registry().get("torch").load(self.op).function)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # Dynamo's advice on code that is compiled for comparison only
            function(**arrays)  # compiles, which is no part of a call's time
            return self._measure(lambda given: partial(function, **given), arrays).device_us

    def _measure(self, make: Any, arrays: Mapping[str, Any]) -> Times:
        with torch.no_grad():
            return measure(make, arrays, self.device, self._share())

    def _row(self, name: str, values: Mapping[str, Any], eager: Times, compile_us: float | None) -> Row:
        self.say(name)
        family = registry().get(name).family
        if name == "torch" and self.op not in PLAIN:
            self.parts -= 1
            times = eager
        elif family == "jax":
            arrays = place(values, family, self.device)
            times = measure_jax(partial(getattr(polyfuse, self.op), **arrays, backend=name), self._share())
        else:
            times = self._measure(partial(_ours, self.op, name), place(values, family, self.device))
        cost = OPS[self.op].cost(bind(OPS[self.op], values))
        moved = (cost.bytes_read + cost.bytes_written) * live_share(values)
        return Row(
            self.op,
            self.case.model,
            self.case.name,
            name,
            round(times.device_us, 3),
            round(times.host_us, 2),
            round(moved / times.device_us / 1e3, 1),
            round(moved / times.device_us / 1e3 / self.ceiling, 4),
            round(eager.device_us / times.device_us, 3),
            round(compile_us / times.device_us, 3) if compile_us else None,
            None if times.cold_us is None else round(times.cold_us, 3),
        )

    def _ours(self, rows: Sequence[Row]) -> Row | None:
        """The row of the backend that a call takes if it names none: the first of the platform that was measured."""
        order, _ = platform_order(self.where.kind, "torch", self.op)
        measured = {row.backend: row for row in rows if registry().get(row.backend).family == "torch"}
        return next((measured[name] for name in (*order, *measured) if name in measured), None)

    def _peer_row(self, peer: Peer, version: str, values: Mapping[str, Any], truth: Truth, ours: Row | None) -> PeerRow:
        self.say(f"{peer.name}, against the oracle")
        row = partial(PeerRow, self.op, self.case.model, self.case.name, peer.name, version)
        try:
            functions = peer.functions()
            arrays = place(values, "torch", self.device)
            with torch.no_grad():
                once = peer.prepare(*functions, SimpleNamespace(**arrays))
                verdict = truth.judge(once.results(once.run()), peer.tolerance, peer.reason)
            self.say(peer.name)
            times = self._measure(lambda given: peer.prepare(*functions, SimpleNamespace(**given)).run, arrays)
        except Unsupported as error:
            return row("failed", str(error))
        except Exception as error:  # a package that is not ours: whatever it raises is a line in the table
            return row("failed", f"{type(error).__name__}: {error}".splitlines()[0])
        note = verdict.note if times.captured else "; ".join(filter(None, [verdict.note, "no CUDA graph captures it"]))
        found = row(verdict.status, note, round(times.device_us, 3), round(times.host_us, 2), _rounded(times.cold_us))
        return found if ours is None else _beside(found, ours)


def _beside(peer: PeerRow, ours: Row) -> PeerRow:
    """A peer's row with its ratios to ours."""
    cold = peer.cold_us / ours.cold_us if peer.cold_us and ours.cold_us else None
    warm = (peer.device_us or 0.0) / ours.device_us
    return replace(peer, ours=ours.backend, ratio=round(warm, 3), cold_ratio=_rounded(cold))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _ours(op: str, backend: str, arrays: Mapping[str, Any]) -> Callable[[], Any]:
    """A call of ours."""
    return partial(getattr(polyfuse, op), **arrays, backend=backend)

"""The parts of `polyfuse demo`: a vision tower, a text model that generates, and cases of conformance."""

import statistics
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import skimage.data
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import (
    Qwen2VLImageProcessorPil,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3VLVisionConfig,
    Qwen3VLVisionModel,
)
from transformers import logging as transformers_logging
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

import polyfuse
from polyfuse.bench.timing import Clock
from polyfuse.cli._terminal import activity
from polyfuse.configs import level
from polyfuse.conformance import Case, cases, compare
from polyfuse.conformance.report import Result
from polyfuse.conformance.tasks import Task
from polyfuse.conformance.worker import Setup
from polyfuse.conformance.workers import Limits, Workers, default_count
from polyfuse.dispatch import registry
from polyfuse.integrations.transformers import accelerate
from polyfuse.reference import oracle
from polyfuse.spec import OPS

exact = oracle("pos_embed_interpolate").intervals

PHOTOS = ("astronaut", "coffee", "rocket", "chelsea")  # files of scikit-image itself: no download
SMALL, LARGE = (2**14, 2**15), (2**16, 2**24)  # pixels of a photo: Qwen3-VL's own limits are the large ones
FAST_TOWER: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 64,
    "num_heads": 4,
    "intermediate_size": 128,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0, 1],
}

TEXT_MODEL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
PROMPT, NEW_TOKENS = 24, 16
CASES = 2  # of each op: the first ones that its spec names as core
LEVEL = "quick"

Timed = tuple[float, torch.Tensor]


def run_tower(fast: bool, console: Console, device: str) -> list[str]:
    """Show what `accelerate` does to the output of a Qwen3-VL vision tower with random weights.

    On an accelerator the time is shown too. On a CPU it would say nothing of the kernels: the tower runs once, in
    float32, as many have no bfloat16 instructions, and on small photos. `fast` takes a tower of 3 narrow layers in
    place of the 27 of Qwen3-VL. Returns what is wrong: an embedding that breaks the op's error bound, or an
    accelerated tower that does not use what the op returns.
    """
    tower = build_tower(fast, device)
    pixels, grid = load_photos(SMALL if device == "cpu" else LARGE)
    _print_inputs(tower, grid, console)
    pixels, grid = pixels.to(device), grid.to(device)
    table = tower.pos_embed.weight.detach()
    options: dict[str, Any] = {"merge_size": tower.config.spatial_merge_size, "out_rows": len(pixels)}
    timed = device != "cpu"
    repeats, row_repeats = (3, 5) if timed else (1, 1)
    used: list[torch.Tensor] = []
    clock = Clock(device)

    op = polyfuse.pos_embed_interpolate

    def encode() -> torch.Tensor:
        return tower(pixels, grid).pooler_output

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        used.append(op(*args, **kwargs))
        return used[-1]

    with torch.inference_mode(), activity(console, "the vision tower, untouched") as shown:
        true = exact(table.float().cpu().numpy(), grid.tolist(), merge_size=options["merge_size"])["out"]
        theirs = transformers_rows(tower, grid)
        ours = polyfuse.pos_embed_interpolate(table, grid, out_dtype=torch.float32, **options)
        old_rows = _timed(lambda: transformers_rows(tower, grid).to(table.dtype), clock, row_repeats)
        new_rows = _timed(lambda: polyfuse.pos_embed_interpolate(table, grid, **options), clock, row_repeats)
        if timed:
            warm_up(tower, pixels)
        old = _timed(encode, clock, repeats)
        accelerate(tower)
        shown.update("the vision tower, accelerated")
        with patch.object(polyfuse, "pos_embed_interpolate", noted):
            if timed:
                warm_up(tower, pixels)
            new = _timed(encode, clock, repeats)

    results = Table("", *(("Transformers", "accelerated") if timed else ()), "max |change|", "max |value|", "relative")
    results.add_row("position embeddings", *_row(old_rows, new_rows, timed))
    results.add_row("whole tower", *_row(old, new, timed))
    console.print(results)
    console.print("Position embeddings in float32 against the float64 oracle and the op's error bound:")
    wrong = compare("polyfuse", ours.cpu().numpy(), true, "float32")
    console.print(f"  {wrong or 'polyfuse: every element right'}", markup=False)
    their_wrong = compare("Transformers", theirs.cpu().numpy(), true, "float32")
    console.print(f"  {their_wrong or 'Transformers: every element right'}", markup=False)
    console.print(str(polyfuse.explain("pos_embed_interpolate", table, grid, **options)), markup=False)
    problems = [f"position embeddings: {wrong}"] if wrong else []
    if not (used and torch.equal(used[-1], new_rows[1])):
        problems.append("The accelerated tower did not use the op's embeddings.")
    return problems


def run_text_model(console: Console, device: str) -> list[str]:
    """Let a tiny Qwen3.5 model with random weights generate greedily, untouched and accelerated.

    Returns what is wrong: other tokens, or no op that was called.
    """
    transformers_logging.set_verbosity_error()  # it recommends packages for the untouched model
    torch.manual_seed(0)
    model: Any = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**TEXT_MODEL)).eval()
    model.to(device)
    prompt = torch.arange(PROMPT, device=device)[None]

    def generate() -> tuple[torch.Tensor, torch.Tensor]:
        """The new tokens, and the logits that each was chosen from."""
        done = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return done.sequences[0, PROMPT:], torch.cat(done.logits)

    with activity(console, "a text model"):
        old, old_logits = generate()
        accelerate(model)
        before = polyfuse.call_counts()
        new, new_logits = generate()
    ops = {op: 0 for op, _ in polyfuse.call_counts()}
    for (op, backend), count in polyfuse.call_counts().items():
        ops[op] += count - before.get((op, backend), 0)
    called = {op: count for op, count in ops.items() if count}
    config = model.config
    console.print(
        f"Qwen3.5 model: {config.num_hidden_layers} layers of width {config.hidden_size}, {model.dtype}, random weights"
    )
    console.print(f"  {len(new)} tokens of a greedy generation: {'the same' if torch.equal(old, new) else 'OTHERS'}")
    console.print(
        f"  logits: max |change| {(new_logits - old_logits).abs().max():.1e}, max |value| {old_logits.abs().max():.3g}"
    )
    console.print(f"  fused calls: {', '.join(f'{count} {op}' for op, count in called.items()) or 'none'}")
    problems = [] if torch.equal(old, new) else ["The accelerated text model generates other tokens."]
    return problems if called else [*problems, "The accelerated text model calls no op."]


def run_cases(console: Console, device: str) -> tuple[list[Result], list[str]]:
    """Run the first core cases of every op on every backend that there is: the results, and what is wrong.

    A backend that is not installed, or does not have an op, has results that are skipped. The ops that the table has
    last run first: they take longest, and at the end one worker would wait for the other.
    """
    names = tuple(backend.name for backend in registry().usable())
    tasks = [
        Task(number, op, case, names, device, LEVEL)
        for number, (op, case) in enumerate((op, case) for op in reversed(OPS) for case in _core(op)[:CASES])
    ]
    settings = level(LEVEL)
    workers = Workers(
        Setup((), names), default_count(device), Limits(settings.time_limit, settings.memory_limit), device
    )
    found: list[Result] = []
    with activity(console, "conformance", len(tasks) * len(names)) as shown:
        for _, result in workers.perform(tasks):
            if isinstance(result, Result):
                found.append(result)
                shown.update(f"{result.op} {result.backend}", advance=1)
    table = Table("op", *names, title=f"{CASES} core cases of each op, passed of those that the backend takes")
    for op in OPS:
        table.add_row(op, *(_cell([r for r in found if (r.op, r.backend) == (op, name)]) for name in names))
    console.print(table)
    return found, [f"{r.op} {r.backend} {r.case}: {r.detail}" for r in found if r.status == "failed"]


def conclude(console: Console, device: str, found: list[Result], problems: list[str]) -> int:
    """Say what was shown and what was not, and return the exit status: 1 if something is wrong."""
    for problem in problems:
        console.print(f"[bold red]wrong[/] {escape(problem)}", soft_wrap=True)
    passed = [result for result in found if result.status == "passed"]
    where = f"{len({r.op for r in passed})} ops on {len({r.backend for r in passed})} backends"
    console.print("[bold]Shown[/]" if not problems else "[bold]Shown, but for what is wrong above[/]")
    if not problems:
        console.print("  The vision tower takes the op's position embeddings, each within the oracle's interval.")
        console.print(f"  The Qwen3.5 model generates the same {NEW_TOKENS} tokens on fused ops.")
    console.print(
        f"  {len(passed)} results of {where} lie within the oracle's intervals, and pass the checks of level {LEVEL}."
    )
    console.print("[bold]Not shown[/]")
    if device == "cpu":
        console.print("  Speed: on a CPU the ops are not faster, and Triton and Pallas kernels are interpreted.")
    console.print("  That a backend is conformant: these are few of the cases. The whole run takes far longer:")
    console.print("    polyfuse conformance --report report")
    console.print("  Whether conformance rejects wrong kernels:")
    console.print("    polyfuse conformance --self-test")
    return int(bool(problems))


def _core(op: str) -> list[Case]:
    """The core cases of an op, in the order of its spec."""
    known = {case.name: case for case in cases(op)}
    return [known[name] for name in OPS[op].core]


def _cell(results: list[Result]) -> str:
    """How many of an op's results on a backend passed; a dash if the backend takes none."""
    asked = [result for result in results if result.status != "skipped"]
    passed = sum(result.status == "passed" for result in asked)
    style = "green" if passed == len(asked) else "bold red"
    return f"[{style}]{passed} of {len(asked)}[/]" if asked else "-"


def build_tower(fast: bool, device: str) -> Any:
    """A vision tower with seeded random weights, in bfloat16, but in float32 on a CPU."""
    torch.manual_seed(0)
    config = Qwen3VLVisionConfig(**(FAST_TOWER if fast else {}))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tower: Any = Qwen3VLVisionModel._from_config(config, dtype=dtype).eval()
    return tower.to(device)


def load_photos(pixels: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The photos as a Qwen3-VL processor prepares them: pixels [patches, 1536] and grid_thw [4, 3].

    Each has at least the first and at most the second number of `pixels`.
    """
    processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size=dict(zip(("shortest_edge", "longest_edge"), pixels, strict=True)),
    )
    batch = processor([getattr(skimage.data, name)() for name in PHOTOS], return_tensors="pt")
    return batch["pixel_values"], batch["image_grid_thw"]


def transformers_rows(tower: Any, grid: torch.Tensor) -> torch.Tensor:
    """The position embeddings as an untouched tower computes them, [patches, D] in float32."""
    indices, weights = get_vision_interpolation_indices_and_weights(
        grid,
        num_grid_per_side=tower.num_grid_per_side,
        mode=tower.interpolation_mode,
        align_corners=tower.interpolation_align_corners,
        spatial_merge_size=tower.config.spatial_merge_size,
    )
    return (tower.pos_embed(indices) * weights[:, :, None]).sum(1)


def warm_up(tower: Any, pixels: torch.Tensor) -> None:
    """Run the tower once on a small image."""
    tower(pixels[:64], torch.tensor([[1, 8, 8]], device=pixels.device))


def _timed(run: Callable[[], torch.Tensor], clock: Clock, repeats: int) -> Timed:
    """Median seconds of a run, and the last result."""
    results = []
    times = clock.latencies([lambda: results.append(run())] * repeats)
    return statistics.median(times.done), results[-1]


def _change(old: torch.Tensor, new: torch.Tensor) -> float:
    """The norm of the difference over the norm of the old."""
    return float((new.double() - old.double()).norm() / old.double().norm())


def _row(old: Timed, new: Timed, timed: bool) -> tuple[str, ...]:
    difference = (new[1].double() - old[1].double()).abs().max()
    largest = old[1].double().abs().max()
    times = [f"{seconds * 1e3:,.2f} ms" for seconds, _ in (old, new)] if timed else []
    return (*times, f"{difference:.2e}", f"{largest:.3g}", f"{_change(old[1], new[1]):.1e}")


def _print_inputs(tower: Any, grid: torch.Tensor, console: Console) -> None:
    photos = Table("photo", "grid (t, h, w)", "patches")
    for name, (t, h, w) in zip(PHOTOS, grid.tolist(), strict=True):
        photos.add_row(name, f"[{t},{h},{w}]", str(t * h * w))
    console.print(photos)
    config = tower.config
    console.print(
        f"Vision tower: {config.depth} layers of width {config.hidden_size}, {tower.dtype}, random weights, "
        f"on {tower.device}"
    )

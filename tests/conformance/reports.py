"""Reports to look at, made without running anything."""

from polyfuse.conformance import Report, Result
from polyfuse.conformance.report import BackendFacts
from polyfuse.dispatch import Support

WORDS = {"p": "passed", "f": "failed", "s": "skipped", "w": "waived"}
# Control characters, markup of every format, half a character, a character past 16 bits, text that runs backwards.
NASTY = (
    "\x00\x1b[31m <script>alert('x')</script> \"]]>\" &amp; | `*_ \ud800 \U0001f9ea \u202edesrever \ufffe {{ 7*7 }} é"
)


def made(statuses="p", core=True, state="complete", op="a", backend="mine", **fields):
    """A report on one op of one backend, its first case core, a letter for each result's status."""
    report = Report("cpu (x86_64)", "quick", 0, **{"commit": "abc", **fields})
    for number, letter in enumerate(statuses):
        report.results.append(Result(op, backend, f"case{number}", WORDS[letter], core=core and number == 0))
    if state != "running":
        report.finish(state)
    return report


def varied(nasty=NASTY):
    """A report with each status, ending and reason in it, and `nasty` wherever a backend or an error has a say."""
    report = Report(
        "cuda (NVIDIA H200)",
        "standard",
        0,
        proves="Every dtype, pairwise.",
        command="polyfuse conformance --plugin mypackage:BACKEND --report report",
        commit="0123456789ab",
        chip={"name": "NVIDIA H200", "driver": "570.1", "cuda": "12.8", "arch": "sm_90"},
        backends={
            "mine": BackendFacts(
                "torch",
                "registered",
                "mine",
                "1.2",
                {
                    "a": Support(
                        "a", "mine", "torch", None, ("*",), ("cpu",), True, (f"x in {nasty}",), ("ends",), ("cuda",)
                    )
                },
                {"a/waived": f"erratum {nasty}"},
            )
        },
        spec_versions={"a": 2, "b": 1},
        checks={"values": "Every element lies in the oracle's interval.", "inputs": "No input is written."},
    )
    margins = {"y": {"share": 0.25, "at": [3, 1]}, nasty: {"share": 0.0, "at": None}}
    beyond = {"y": {"share": 4.0, "at": [2, 0]}, "scale": {"share": float("inf"), "at": []}}
    wrong = f"y: [2, 0]: expected 1.0 to 1.5, got 2.0\nscale: {nasty}"
    report.results += [
        Result("a", "mine", "right", "passed", 0.012, margins=margins, core=True),
        Result("a", "mine", f"case {nasty}", "passed", 1.5),
        Result("a", "mine", "wrong", "failed", 0.5, wrong, ("values", "inputs"), margins=beyond),
        Result("a", "mine", "hangs", "failed", 30, f"no answer {nasty}", ending="timed_out"),
        Result("a", "mine", "waived", "waived", 0.1, f"erratum ({nasty})", ("values",)),
        Result("b", "mine", "small", "passed", 0.1, margins={"y": {"share": 0.003, "at": [1]}}, core=True),
        Result("b", "mine", "float16", "skipped", detail=f"unsupported: {nasty}", reason="unclaimed"),
        Result("b", "mine", "huge", "skipped", detail="more elements than the level runs", reason="too_large"),
        Result("b", "mine", "third", "skipped", detail="the level leaves it out", reason="left_out"),
        Result("a", "other", "right", "skipped", detail="does not implement a", reason="unavailable", core=True),
        Result("b", "other", "small", "passed", 0.2, margins={"y": {"share": 0.9, "at": [7]}}, core=True),
    ]
    report.planned = len(report.results)
    report.finish()
    return report

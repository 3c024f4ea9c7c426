"""Cases that the tests of both torch backends run beside those of the specs."""

from polyfuse.conformance import Case

BFLOAT16 = {"T": "bfloat16"}
SILU_MUL_BLOCK_QUANT = [
    Case("width_768", {"...": (7,), "D": 768}, {"group_size": 128}, BFLOAT16),
    Case("width_2048", {"...": (3,), "D": 2048}, {"group_size": 64}, BFLOAT16),
    Case("width_12288", {"...": (1,), "D": 12288}, {"scale_format": "ue8m0_packed"}, BFLOAT16),
    *(
        Case(f"{fill}-{option}", {"...": (12,), "D": 96}, {"group_size": 32, option: value}, BFLOAT16, fill={"x": fill})
        for fill in ("nan_some", "inf_some", "large", "wide_line")
        for option, value in (("limit", 0.75), ("materialize", True), ("scale_ub", 0.01))
    ),
]
# Images that no table position can be computed for, as (t, h, w) of a grid with merge_size 2.
UNUSABLE_IMAGES = [
    (2**32, 2**16, 2**16),  # 2**64 rows, which is 0 in int64
    (1, 2**31, 2),
    (2**62, 2, 2),
    (0, 2, 2),
    (1, 4, 3),
]

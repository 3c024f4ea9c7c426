"""Names of models and cases as a reader knows them: "Qwen3-Next-80B-A3B, 32k tokens"."""

import re
from functools import cache

from polyfuse.configs import model_configs

WORDS = {
    "mxfp8": "MXFP8",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "host_grid": "grid on the host",
    "images_32k": "images, 32k",
}


@cache
def model_label(name: str) -> str:
    """The model of a file of configs/models, without its sizes; the name itself if there is no such file."""
    config = model_configs().get(name)
    return config.model.partition(" (")[0] if config else name


def case_dtype(model: str, op: str, case: str) -> str:
    """The dtype of a case's activations, from its model's file; empty if that has no such case."""
    cases = config.bench.get(op, []) if (config := model_configs().get(model)) else []
    dtypes = next((found.dtypes for found in cases if found.name == case), {})
    return next((dtypes[name] for name in ("T", "x", "table") if name in dtypes), "")


def case_label(case: str) -> str:
    """A case's name in words: `T16384_D768` is "16k tokens, 768 wide"."""
    for code, words in WORDS.items():
        case = re.sub(rf"(?<![a-z]){code}", words.replace(" ", "~"), case)
    texts: list[str] = []
    for part in case.split("_"):
        match = re.fullmatch(r"(E|T|L|B|D|g)(\d+)", part)
        if match:
            texts.append(_sized(match[1], int(match[2])))
        elif re.fullmatch(r"\d+x\d+", part):
            texts.append(f"{part} patches")
        elif texts and not re.search(r"tokens?$|experts?$|sequences?$|wide$|patches$|^groups", texts[-1]):
            texts[-1] += f" {part}"
        else:
            texts.append(part)
    return ", ".join(texts).replace("~", " ")


def _sized(code: str, count: int) -> str:
    if code == "D":
        return f"{count:,} wide"
    if code == "g":
        return f"groups of {count}"
    return counted(count, {"B": "sequence", "E": "expert"}.get(code, "token"))


def counted(count: int, noun: str) -> str:
    """A number of things, thousands of 1024 where it is a multiple: "16k tokens", "1 token"."""
    number = f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else f"{count:,}"
    return f"{number} {noun}{'' if count == 1 else 's'}"

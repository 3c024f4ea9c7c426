"""What Transformers logs of its own slow functions: the line that docs/faq.md shows, and none from a fused layer."""

import logging
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers.utils import logging as transformers_logging

from polyfuse.integrations.transformers import accelerate, report
from tests.integrations.transformers.gated_delta_net_models import build, tokens

FAQ = Path(__file__).parents[3] / "docs/faq.md"

INSTALLED = [name for name in ("fla", "causal_conv1d") if find_spec(name)]

pytestmark = pytest.mark.skipif(bool(INSTALLED), reason=f"Transformers takes {', '.join(INSTALLED)} and logs nothing")


@pytest.fixture
def logged():
    """The lines that Transformers logs from here on, each with the prefix that it prints."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    logging.Logger.warning_once.cache_clear()  # each line is logged once in a process
    logger, lines = transformers_logging.get_logger("transformers"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"[transformers] {record.getMessage()}")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    transformers_logging.set_verbosity(verbosity)


def functions(lines):
    return [line.split("`")[1] for line in lines if "is falling back to its reference PyTorch implementation" in line]


@torch.no_grad()
def test_an_untouched_model_logs_what_the_page_shows(logged):
    model = build()
    model(tokens(1, 5))
    assert functions(logged) == ["causal_conv1d_fn", "chunk_gated_delta_rule"]
    model.generate(tokens(1, 5), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert functions(logged)[2:] == ["causal_conv1d_update", "fused_recurrent_gated_delta_rule"]
    page = FAQ.read_text(encoding="utf-8")
    assert logged[1] in page.splitlines()
    assert all(f"`{name}`" in page for name in functions(logged))


def test_an_accelerated_one_logs_it_only_where_a_layer_takes_its_own_path(logged):
    model = accelerate(build())
    with torch.no_grad():
        model(tokens(1, 5))
        model.generate(tokens(1, 5), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert functions(logged) == []
    model(tokens(1, 5))
    assert functions(logged) == ["causal_conv1d_fn", "chunk_gated_delta_rule"]
    assert all(part.unfused_calls == {"gradients are recorded": 1} for part in report(model).parts)

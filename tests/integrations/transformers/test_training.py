"""Training around an accelerated model: Trainer with evaluations, and a loop that generates between weight updates."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments

from polyfuse.integrations.transformers import accelerate, report
from tests.integrations.transformers.gated_delta_net_models import BOUND, build, tokens

ROWS, LENGTH, EPOCHS = 16, 12, 3


def losses(model: Any, folder: Path) -> list[tuple[str, float]]:
    """The losses that a Trainer reports: of every step of training, and of an evaluation after each epoch."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(ROWS, LENGTH)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        eval_strategy="epoch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:8])
    trainer.train()
    history = trainer.state.log_history
    return [(key, entry[key]) for entry in history for key in ("loss", "eval_loss") if key in entry]


@pytest.mark.filterwarnings("default")  # of Trainer and of the data loader
@pytest.mark.parametrize("family", [pytest.param("Qwen3Next", marks=pytest.mark.slow), "Qwen3_5"])
def test_a_trainer_reports_the_losses_of_the_model_as_it_is(family: str, tmp_path: Path) -> None:
    model = build(family)
    twin = accelerate(copy.deepcopy(model))
    wanted, got = losses(model, tmp_path / "a"), losses(twin, tmp_path / "b")
    assert [key for key, _ in wanted] == [key for key, _ in got]
    assert sum(key == "eval_loss" for key, _ in got) == EPOCHS
    for (key, old), (_, new) in zip(wanted, got, strict=True):
        assert new == (old if key == "loss" else pytest.approx(old, rel=10 * BOUND))
    evaluated = [loss for key, loss in wanted if key == "eval_loss"]
    assert evaluated[0] - evaluated[-1] > 0.05
    for part in report(twin).parts:
        assert part.fused_calls == EPOCHS
        assert part.unfused_calls == {"gradients are recorded": EPOCHS * ROWS // 8}


Synchronise = Callable[[Any, Any], None]


def copy_data(source: Any, target: Any) -> None:
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.data.copy_(new.data)


def load(source: Any, target: Any) -> None:
    target.load_state_dict(source.state_dict())


def share_data(source: Any, target: Any) -> None:
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.data = new.data.clone()


def rollouts(policy: Any, actor: Any, synchronise: Synchronise) -> list[torch.Tensor]:
    """The actor's greedy answers over four updates of the policy, which is trained on them."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, fused=True)
    answers, prompts = [], tokens(4, 6)
    for _ in range(4):
        synchronise(policy, actor)
        answers.append(actor.generate(prompts, max_new_tokens=8, do_sample=False, pad_token_id=0))
        policy.train()
        policy(answers[-1], labels=answers[-1].flip(1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return answers


@pytest.mark.parametrize("synchronise", [copy_data, load, share_data], ids=lambda function: function.__name__)
@pytest.mark.parametrize("family", [pytest.param("Qwen3Next", marks=pytest.mark.slow), "Qwen3_5"])
def test_answers_between_weight_updates_are_the_untouched_models(family: str, synchronise: Synchronise) -> None:
    model = build(family)
    wanted = rollouts(copy.deepcopy(model), copy.deepcopy(model), synchronise)
    got = rollouts(copy.deepcopy(model), accelerate(copy.deepcopy(model)), synchronise)
    assert not torch.equal(wanted[0], wanted[-1])
    assert all(torch.equal(old, new) for old, new in zip(wanted, got, strict=True))

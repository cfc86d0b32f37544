from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mmalign.rewards.vqascore import VqaScoreReward
from mmalign.types import InputError, Question, Reward

from reward_zoo import as_images, eight_bit  # isort: skip
from vlm_models import save_llava  # isort: skip

PROMPTS = ["a red circle", "blue {} square", "a picture"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder)
    return folder


def test_equals_transformers(llava: Path) -> None:
    reward = VqaScoreReward(str(llava), batch_size=2)
    images = eight_bit(3, 3, 28, 28)
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    processor = AutoProcessor.from_pretrained(llava)
    vocabulary = processor.tokenizer.get_vocab().values()
    said = [i for i in vocabulary if processor.tokenizer.decode([i]).strip().lower() == "yes"]
    expected = []
    for image, prompt in zip(as_images(images), PROMPTS, strict=True):
        question = f'Does this figure show "{prompt}"? Please answer yes or no.'
        text = processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": question}],
                }
            ],
            add_generation_prompt=True,
        )
        inputs = processor(text=text, images=image, return_tensors="pt")
        with torch.no_grad():
            shares = model(**inputs).logits[0, -1].softmax(-1)
        expected.append(shares[said].sum())
    scores = reward(images, PROMPTS)
    assert isinstance(reward, Reward)
    assert scores.min() > 0
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-5, atol=0)


class Adapter:
    """Says what it was asked and answers with given probabilities."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def yes_no(self, questions: Sequence[Question], batch_size: int) -> list[tuple[float, float]]:
        self.asked += [question.prompt for question in questions]
        return [(0.6, 0.2)] * len(questions)


def test_any_adapter_template_and_relative_probability() -> None:
    adapter = Adapter()
    reward = VqaScoreReward(adapter, template="Is it {}?", relative=True)  # type: ignore[arg-type]
    torch.testing.assert_close(reward(torch.rand(1, 3, 4, 4), ["a {} b"]), torch.tensor([0.75]))
    assert adapter.asked == ["Is it a {} b?"]
    reward.relative = False
    torch.testing.assert_close(reward(torch.rand(1, 3, 4, 4), ["x"]), torch.tensor([0.6]))


def test_bad_options() -> None:
    with pytest.raises(InputError, match=r"must have one \{\}"):
        VqaScoreReward("model", template="Is it so?")
    with pytest.raises(InputError, match="no such folder"):
        VqaScoreReward("/nowhere/llava")

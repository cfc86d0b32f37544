"""What vision-language models answer, against plain generation and plain logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from vlm_questions import FAMILIES, picture, reference

from mmalign.adapters._vlm import VlmFamily
from mmalign.config import GenerationConfig
from mmalign.types import (
    ImageFeatures,
    ImageInputs,
    InputError,
    Question,
)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_are_those_of_plain_generation(
    name: str, vlm_adapter: Callable[[str], VlmFamily]
) -> None:
    adapter = vlm_adapter(name)
    questions = [
        Question("What is in the picture?", (picture(0),)),
        Question("No?", (picture(1), reference(2))),
        Question("What?"),
    ]
    config = GenerationConfig(max_new_tokens=8, batch_size=3)
    together = adapter.generate(questions, config)
    for question, answer in zip(questions, together, strict=True):
        images = [i if isinstance(i, Image.Image) else picture(2) for i in question.images]
        text = adapter.chat.text(question.prompt, len(images))
        inputs = adapter.chat.processor(text=[text], images=images or None, return_tensors="pt")
        output = adapter.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        assert answer == adapter.chat.tokenizer.decode(new, skip_special_tokens=True).strip()
    if name.startswith("llava"):  # random Qwen models of this size repeat one token
        assert together[0] != together[1]


def test_drawn_answers_do_not_depend_on_their_batch(
    vlm_adapter: Callable[[str], VlmFamily],
) -> None:
    adapter = vlm_adapter("llava")
    same, other = Question("What is it?", (picture(0),)), Question("A circle?", (picture(1),))
    config = GenerationConfig(max_new_tokens=6, temperature=1.0, top_p=0.9, seed=3)
    alone = adapter.generate([same, same], config)
    config.batch_size = 2
    assert adapter.generate([other, same, other, same], config)[1::2] == alone
    assert alone[0] != alone[1]
    config.seed = 4
    assert adapter.generate([same, same], config) != alone


def test_draws_have_the_probabilities_of_the_model(vlm_adapter: Callable[[str], VlmFamily]) -> None:
    adapter = vlm_adapter("llava")
    question = Question("What is it?", (picture(0),))
    config = GenerationConfig(max_new_tokens=1, temperature=2.0, batch_size=100, seed=1)
    answers = adapter.generate([question] * 400, config)
    text = adapter.chat.text(question.prompt, 1)
    inputs = adapter.chat.processor(text=[text], images=[picture(0)], return_tensors="pt")
    with torch.no_grad():
        shares = (adapter.model(**inputs).logits[0, -1] / 2).softmax(0)
    token = int(shares.argmax())
    word = adapter.chat.tokenizer.decode([token]).strip()
    expected = sum(
        float(shares[i])
        for i in range(len(shares))
        if adapter.chat.tokenizer.decode([i], skip_special_tokens=True).strip() == word
    )
    spread = (expected * (1 - expected) / 400) ** 0.5
    assert answers.count(word) / 400 == pytest.approx(expected, abs=4 * spread)


def test_yes_and_no_are_the_first_token(vlm_adapter: Callable[[str], VlmFamily]) -> None:
    for name in ("llava", "qwen2_vl"):
        adapter = vlm_adapter(name)
        questions = [Question("Is it a circle?", (picture(0),)), Question("Is it?")]
        found = adapter.yes_no(questions, batch_size=2)
        for question, (yes, no) in zip(questions, found, strict=True):
            images = list(question.images)
            text = adapter.chat.text(question.prompt, len(images))
            inputs = adapter.chat.processor(text=[text], images=images or None, return_tensors="pt")
            with torch.no_grad():
                shares = adapter.model(**inputs).logits[0, -1].softmax(0)
            words = adapter.chat.tokenizer.get_vocab()
            wanted = [words[w] for w in ("Yes", "yes", "ĠYes", "Ġyes") if w in words]
            assert len(wanted) >= 2
            assert yes == pytest.approx(float(shares[wanted].sum()), abs=1e-6)
            assert 0 < no < 1


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_is_encoded_once_for_all_questions_about_it(
    name: str, vlm_adapter: Callable[[str], VlmFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = vlm_adapter(name)
    one, other = picture(0), reference(1)
    prompts = ["Is it a circle?", "Is it?", "Is there a blue square in the picture?", "Yes?"]
    questions = [Question(p, images) for p in prompts for images in ((one,), (other,), ())]
    questions += [Question("Is it red?", (one, other)), Question("Is it?", (one, other))]
    apart = [adapter.yes_no([question], batch_size=1)[0] for question in questions]
    encoded: list[object] = []
    encode = VlmFamily.encode_images

    def counted(self: VlmFamily, images: ImageInputs) -> ImageFeatures:
        encoded.append(images)
        return encode(self, images)

    monkeypatch.setattr(VlmFamily, "encode_images", counted)
    for batch_size in (3, 5):
        encoded.clear()
        found = adapter.yes_no(questions, batch_size)
        assert len(encoded) == 3
        assert found == [pytest.approx(pair, abs=1e-6) for pair in apart]
    assert len({round(yes, 5) for yes, _ in apart}) > len(apart) // 2
    forged = Question(f"What is {adapter.chat.image_token}", (one,))
    with pytest.raises(InputError, match="the question has control tokens"):
        adapter.yes_no([questions[0], forged], 2)

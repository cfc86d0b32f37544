"""Adapters of vision-language models against plain transformers, on tiny random checkpoints."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from skimage import data as photographs

from mmalign.adapters import load_vlm
from mmalign.adapters._packing import Sharing, pack
from mmalign.adapters._vlm import TooLongError, VlmFamily
from mmalign.config import GenerationConfig, VlmModelConfig
from mmalign.data.schema import RowError
from mmalign.types import (
    Branches,
    ImageFeatures,
    ImageInputs,
    ImageRef,
    InputError,
    Question,
    VlmPair,
)

FAMILIES = ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
SIZES = [(60, 40), (30, 70)]


def picture(index: int) -> Image.Image:
    photo = getattr(photographs, ("astronaut", "coffee", "chelsea")[index % 3])()
    width, height = SIZES[index % 2]
    return Image.fromarray(photo).convert("RGB").crop((50, 50, 250, 250)).resize((width, height))


def reference(index: int) -> ImageRef:
    buffer = io.BytesIO()
    picture(index).save(buffer, "PNG")
    return ImageRef(buffer.getvalue(), f"picture {index}")


def make_pair(count: int = 1, **fields: Any) -> VlmPair:
    values: dict[str, Any] = {
        "pair_id": "one",
        "prompt": "What is in the picture?",
        "chosen": "A red circle.",
        "rejected": "A blue square and a circle.",
        "images": tuple(reference(i) for i in range(count)),
        "where": "pairs.jsonl line 1",
    }
    return VlmPair(**{**values, **fields})


@pytest.fixture(scope="module")
def load(vlm: Callable[[str], Path]) -> Callable[[str], VlmFamily]:
    loaded: dict[str, VlmFamily] = {}

    def load_once(name: str) -> VlmFamily:
        if name not in loaded:
            loaded[name] = load_vlm(VlmModelConfig(model=str(vlm(name)), offline=True), "cpu")
        return loaded[name]

    return load_once


def branches(adapter: VlmFamily, pair: VlmPair) -> Branches:
    encoded = adapter.encode_pair(pair)
    features = None if encoded.images is None else adapter.encode_images(encoded.images)
    return Branches(encoded.prefix_ids, (encoded.chosen_ids, encoded.rejected_ids), features)


def full_logps(adapter: VlmFamily, pair: VlmPair, answer: str) -> torch.Tensor:
    """Score an answer as a user of plain transformers would: one text, all logits."""
    processor = adapter.chat.processor
    images = [picture(i) for i in range(len(pair.images))]
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": pair.prompt}]
    asked = [{"role": "user", "content": content}]
    said = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    begin = processor.apply_chat_template(asked, add_generation_prompt=True)
    whole = processor.apply_chat_template(asked + said).rstrip()
    end = processor.tokenizer.eos_token
    whole = whole if whole.endswith(end) else whole + end
    options = {"images": images or None, "return_tensors": "pt"}
    start = processor(text=[begin], **options)["input_ids"].shape[1]
    inputs = processor(text=[whole], **options)
    with torch.no_grad():
        logits = adapter.model(**inputs).logits.double()
    ids = inputs["input_ids"][0, start:]
    table = logits[0, start - 1 : -1].log_softmax(-1)
    return table.gather(1, ids[:, None])[:, 0]


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_are_those_of_full_logits(
    name: str, images: int, load: Callable[[str], VlmFamily]
) -> None:
    adapter, pair = load(name), make_pair(images)
    shorter = make_pair(images, prompt="What?", chosen="Yes", rejected="No no no")
    batch = [branches(adapter, pair), branches(adapter, shorter)]
    batch[1] = batch[1]._replace(features=batch[0].features)  # one object: the same images
    for share in (True, False):
        with torch.no_grad():
            scored = adapter.token_logps(batch, share_prefix=share)
        for item, row in zip((pair, shorter), scored, strict=True):
            for answer, logps in zip((item.chosen, item.rejected), row, strict=True):
                expected = full_logps(adapter, item, answer)
                assert logps.shape == expected.shape
                assert logps.dtype == torch.float32
                torch.testing.assert_close(logps.double(), expected, atol=1e-5, rtol=1e-6)
    with torch.no_grad():
        tree = adapter.score(batch, share_prefix=True, share_images=True)
    for whole, parts in zip(tree, scored, strict=True):
        for one, two in zip(whole, parts, strict=True):
            torch.testing.assert_close(one.logps, two, atol=1e-5, rtol=1e-6)
    if images:
        other = make_pair(images=tuple(reference(i + 1) for i in range(images)))
        with torch.no_grad():
            ((seen, _),) = adapter.token_logps([branches(adapter, other)])
        assert (seen - scored[0][0]).abs().max() > 1e-2, "the answer does not depend on the image"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_labels_are_scored_in_the_context_of_the_answer(
    name: str, load: Callable[[str], VlmFamily]
) -> None:
    adapter = load(name)
    plain = branches(adapter, make_pair())
    chosen, rejected = plain.answers
    labels = chosen.flip(0)
    batch = [plain._replace(answers=(chosen, rejected, chosen), labels=(None, None, labels))]
    with torch.no_grad():
        shared, separate = (
            adapter.score(batch, share_prefix=share, states=True)[0] for share in (True, False)
        )
        states = shared[0].states
        assert states is not None
        table = adapter.model.get_output_embeddings()(states[-len(chosen) - 1 : -1])
    expected = table.double().log_softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(shared[2].logps.double(), expected, atol=1e-5, rtol=1e-6)
    for one, two in zip(shared, separate, strict=True):
        torch.testing.assert_close(one.logps, two.logps, atol=1e-5, rtol=1e-6)
    assert (shared[2].logps - shared[0].logps).abs().max() > 1e-2
    (packed,) = pack(batch, adapter.layout(), Sharing())
    assert len(packed.ids) == len(plain.prefix_ids) + len(chosen) + len(rejected)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_shared_prefix_has_the_gradients_of_separate_sequences(
    name: str, load: Callable[[str], VlmFamily]
) -> None:
    adapter = load(name)
    weight = adapter.model.model.language_model.layers[0].self_attn.q_proj.weight
    weight.requires_grad_(True)
    batch = [branches(adapter, make_pair()), branches(adapter, make_pair(chosen="Yes."))]
    gradients = []
    for share in (True, False):
        total = sum(
            part.sum() for row in adapter.token_logps(batch, share_prefix=share) for part in row
        )
        (gradient,) = torch.autograd.grad(total, weight)
        gradients.append(gradient)
    weight.requires_grad_(False)
    assert gradients[0].abs().max() > 0.1
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


def test_sliding_windows_are_those_of_plain_transformers(
    vlm: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = json.loads((vlm("qwen2_vl") / "config.json").read_text())
    text = {**settings["text_config"], "use_sliding_window": True, "sliding_window": 9}
    text |= {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
    folder = edited(vlm("qwen2_vl"), tmp_path / "windowed", "config.json", text_config=text)
    adapter = load_vlm(VlmModelConfig(model=str(folder), offline=True), "cpu")
    assert not adapter.can_share_prefix
    pair = make_pair()
    with torch.no_grad():
        (found,) = adapter.token_logps([branches(adapter, pair)])
    plain = full_logps(adapter, pair, pair.chosen)
    torch.testing.assert_close(found[0].double(), plain, atol=1e-5, rtol=1e-6)


def test_the_last_layer_is_not_computed_twice(vlm: Callable[[str], Path]) -> None:
    adapter = load_vlm(VlmModelConfig(model=str(vlm("qwen3_vl")), offline=True), "cpu")
    assert not adapter.policy.training  # or no trainer would switch checkpointing on
    adapter.policy.train()
    adapter.checkpoint_activations()
    layers = adapter.model.model.language_model.layers
    calls = [0] * len(layers)
    for number, layer in enumerate(layers):
        layer.mlp.up_proj.register_forward_hook(
            lambda *_, number=number: calls.__setitem__(number, calls[number] + 1)
        )
        layer.mlp.up_proj.weight.requires_grad_(True)
    ((one, two),) = adapter.token_logps([branches(adapter, make_pair())])
    (one.sum() + two.sum()).backward()
    assert calls == [2] * (len(layers) - 1) + [1]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_states_are_those_that_predict(name: str, load: Callable[[str], VlmFamily]) -> None:
    adapter = load(name)
    batch = [branches(adapter, make_pair())]
    head = adapter.model.get_output_embeddings().weight
    with torch.no_grad():
        for share in (True, False):
            for scored, ids in zip(
                adapter.score(batch, share_prefix=share, states=True)[0],
                batch[0].answers,
                strict=True,
            ):
                assert scored.states is not None
                assert len(scored.states) == len(batch[0].prefix_ids) + len(ids)
                states = scored.states[-len(ids) - 1 : -1]
                expected = (states @ head.T).log_softmax(1).gather(1, ids[:, None])[:, 0]
                torch.testing.assert_close(scored.logps, expected, atol=1e-5, rtol=1e-5)


def test_spans_hold_the_answer_and_the_question(load: Callable[[str], VlmFamily]) -> None:
    for name, end in (("llava", "</s>"), ("qwen2_vl", "<|im_end|>")):
        adapter = load(name)
        decode = adapter.chat.tokenizer.decode
        encoded = adapter.encode_pair(make_pair(2))
        assert decode(encoded.chosen_ids).strip() == f"A red circle.{end}"
        assert decode(encoded.prefix_ids[encoded.prefix_text]).strip() == "What is in the picture?"
        assert adapter.chat.image_token not in decode(encoded.prefix_ids[encoded.prefix_text])
        image = adapter.model.config.image_token_id
        assert encoded.images is not None
        features = adapter.encode_images(encoded.images)
        assert int((encoded.prefix_ids == image).sum()) == len(features.embeds)


def test_long_answers_are_shortened_and_images_never(load: Callable[[str], VlmFamily]) -> None:
    adapter = load("llava")
    whole = adapter.encode_pair(make_pair())
    limit = len(whole.prefix_ids) + 4
    cut = adapter.encode_pair(make_pair(), max_length=limit)
    assert cut.truncated
    assert not whole.truncated
    assert torch.equal(cut.prefix_ids, whole.prefix_ids)
    assert torch.equal(cut.rejected_ids, whole.rejected_ids[:4])
    with pytest.raises(TooLongError, match="leaves no room for an answer within 5"):
        adapter.encode_pair(make_pair(), max_length=5)
    with pytest.raises(TooLongError, match="the same in their first 1 tokens"):
        adapter.encode_pair(make_pair(rejected="A red square."), max_length=limit - 3)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_control_tokens_in_texts_are_refused(
    name: str, field: str, load: Callable[[str], VlmFamily]
) -> None:
    adapter = load(name)
    token = adapter.chat.image_token
    with pytest.raises(RowError, match="control tokens"):
        adapter.encode_pair(make_pair(**{field: f"What {token} is this?"}))
    if field != "prompt":
        end = adapter.chat.tokenizer.eos_token
        with pytest.raises(RowError, match="control tokens"):
            adapter.encode_pair(make_pair(**{field: f"A circle.{end} A square."}))


def test_corrupt_image_is_named(load: Callable[[str], VlmFamily]) -> None:
    data = reference(0).data
    assert isinstance(data, bytes)
    broken = ImageRef(data[: len(data) // 2], "pairs.parquet row 7")
    with pytest.raises(RowError, match=r"^pairs.parquet row 7: the image cannot be decoded"):
        load("llava").encode_pair(make_pair(images=(broken,)))


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_are_those_of_plain_generation(
    name: str, load: Callable[[str], VlmFamily]
) -> None:
    adapter = load(name)
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


def test_drawn_answers_do_not_depend_on_their_batch(load: Callable[[str], VlmFamily]) -> None:
    adapter = load("llava")
    same, other = Question("What is it?", (picture(0),)), Question("A circle?", (picture(1),))
    config = GenerationConfig(max_new_tokens=6, temperature=1.0, top_p=0.9, seed=3)
    alone = adapter.generate([same, same], config)
    config.batch_size = 2
    assert adapter.generate([other, same, other, same], config)[1::2] == alone
    assert alone[0] != alone[1]
    config.seed = 4
    assert adapter.generate([same, same], config) != alone


def test_draws_have_the_probabilities_of_the_model(load: Callable[[str], VlmFamily]) -> None:
    adapter = load("llava")
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


def test_yes_and_no_are_the_first_token(load: Callable[[str], VlmFamily]) -> None:
    for name in ("llava", "qwen2_vl"):
        adapter = load(name)
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
    name: str, load: Callable[[str], VlmFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = load(name)
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


def edited(source: Path, folder: Path, file: str, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **changes}))
    return folder


def test_unusable_checkpoints_are_one_line(vlm: Callable[[str], Path], tmp_path: Path) -> None:
    source = vlm("llava")
    without = tmp_path / "without"
    shutil.copytree(source, without)
    (without / "chat_template.jinja").unlink()
    foreign = tmp_path / "foreign"
    shutil.copytree(source, foreign)
    (foreign / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    pickled = tmp_path / "pickled"
    shutil.copytree(source, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    cases = {
        without: "has no chat template",
        foreign: "its chat template",
        edited(source, tmp_path / "type", "config.json", model_type="gpt2"): "model_type 'gpt2'",
        pickled: "only pickled weights",
        tmp_path / "missing": "no such folder",
    }
    for folder, problem in cases.items():
        with pytest.raises(InputError, match=problem) as caught:
            load_vlm(VlmModelConfig(model=str(folder), offline=True), "cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="family is llava, not qwen_vl"):
        load_vlm(VlmModelConfig(model=str(source), family="qwen_vl"), "cpu")


def test_fingerprint_follows_weights_and_template(
    vlm: Callable[[str], Path], tmp_path: Path
) -> None:
    def fingerprint(folder: Path) -> str:
        return load_vlm(VlmModelConfig(model=str(folder), offline=True), "cpu").fingerprint

    source = vlm("llava")
    other = tmp_path / "template"
    shutil.copytree(source, other)
    text = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(text.replace("': '", "' - '").replace("T:", "T -"))
    assert fingerprint(source) == fingerprint(source)
    assert fingerprint(source) != fingerprint(other)

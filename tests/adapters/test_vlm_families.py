"""Log-probabilities of answers against plain transformers, on tiny random checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vlm_models import edited
from vlm_questions import FAMILIES, make_pair, picture, reference

from mmalign.adapters import load_vlm
from mmalign.adapters._packing import Sharing, pack
from mmalign.adapters._vlm import VlmFamily
from mmalign.config import VlmModelConfig
from mmalign.types import (
    Branches,
    VlmPair,
)


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
    name: str, images: int, vlm_adapter: Callable[[str], VlmFamily]
) -> None:
    adapter, pair = vlm_adapter(name), make_pair(images)
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
    name: str, vlm_adapter: Callable[[str], VlmFamily]
) -> None:
    adapter = vlm_adapter(name)
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
    name: str, vlm_adapter: Callable[[str], VlmFamily]
) -> None:
    adapter = vlm_adapter(name)
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
def test_states_are_those_that_predict(name: str, vlm_adapter: Callable[[str], VlmFamily]) -> None:
    adapter = vlm_adapter(name)
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

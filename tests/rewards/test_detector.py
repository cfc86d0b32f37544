from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    SwinConfig,
)

from mmalign.rewards._detector import Detector
from mmalign.types import InputError

from reward_zoo import TOKENIZER, as_images, eight_bit, save_clip  # isort: skip

CLASSES = ("person", "sofa", "dog")


def shaken(model: torch.nn.Module, std: float) -> torch.nn.Module:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mask2former")
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            **{"image_size": 64, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4},
            **{"window_size": 2, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        ),
        **{"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_queries": 6},
        **{"encoder_feedforward_dim": 16, "encoder_layers": 1, "decoder_layers": 2},
        **{"num_attention_heads": 2, "dim_feedforward": 16},
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
    shaken(Mask2FormerForUniversalSegmentation(config), 0.2).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def owl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("owl")
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config = Owlv2Config(
        text_config={
            **tower,
            "num_hidden_layers": 1,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 16,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**tower, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    shaken(Owlv2ForObjectDetection(config), 0.3).save_pretrained(folder)
    tokenizer.model_max_length = 16
    processor = Owlv2ImageProcessor(size={"height": 32, "width": 32})
    Owlv2Processor(processor, tokenizer).save_pretrained(folder)
    return folder


def test_masks_and_their_boxes_equal_transformers(mask2former: Path) -> None:
    images = as_images(eight_bit(2, 3, 40, 56))
    names = ["person", "couch", "dog"]
    found = Detector(str(mask2former), "float32", "cpu")(images, names, 0.05)
    processor = AutoImageProcessor.from_pretrained(mask2former)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former).eval()
    total = 0
    for image, ours in zip(images, found, strict=True):
        with torch.no_grad():
            outputs = model(**processor(images=image, return_tensors="pt"))
        theirs = processor.post_process_instance_segmentation(
            outputs, 0.05, target_sizes=[(40, 56)], return_binary_maps=True
        )[0]
        for name, label in zip(names, range(3), strict=True):
            rows = [i for i, s in enumerate(theirs["segments_info"]) if s["label_id"] == label]
            total += len(rows)
            assert len(ours[name]) == len(rows)
            for one, row in zip(ours[name], rows, strict=True):
                mask = theirs["segmentation"][row].bool()
                assert one.mask is not None
                assert torch.equal(one.mask, mask)
                columns, lines = mask.any(0).nonzero(), mask.any(1).nonzero()
                assert one.box == (
                    *(columns.min(), lines.min()),
                    *(columns.max() + 1, lines.max() + 1),
                )
    assert total > 0
    assert Detector(str(mask2former), "float32", "cpu")(images, names, 1.1)[0]["dog"] == []


def test_words_are_asked_of_owl(owl: Path) -> None:
    images = as_images(eight_bit(2, 3, 32, 48))
    names = ["red circle", "blue square"]
    detector = Detector(str(owl), "float32", "cpu")
    detector.check_classes(["anything"])
    found = detector(images, names, 0.1)
    processor = AutoProcessor.from_pretrained(owl)
    model = Owlv2ForObjectDetection.from_pretrained(owl).eval()
    total = 0
    for image, ours in zip(images, found, strict=True):
        texts = [[f"a photo of a {name}" for name in names]]
        with torch.no_grad():
            outputs = model(**processor(text=texts, images=image, return_tensors="pt"))
        theirs = processor.post_process_grounded_object_detection(
            outputs, threshold=0.1, target_sizes=[(32, 48)]
        )[0]
        for label, name in enumerate(names):
            rows = (theirs["labels"] == label).nonzero().flatten().tolist()
            total += len(rows)
            assert [one.score for one in ours[name]] == pytest.approx(
                theirs["scores"][rows].tolist(), abs=1e-4
            )
            assert [one.box for one in ours[name]] == [
                pytest.approx(theirs["boxes"][row].tolist(), abs=1e-2) for row in rows
            ]
    assert total > 0


def test_classes_of_a_fixed_detector(mask2former: Path) -> None:
    detector = Detector(str(mask2former), "float32", "cpu")
    detector.check_classes(["couch", "dog"])
    with pytest.raises(InputError, match="has no class 'cat'"):
        detector.check_classes(["dog", "cat"])


def test_model_that_detects_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model_type 'clip' is no detector"):
        Detector(str(save_clip(tmp_path)), "float32", "cpu")

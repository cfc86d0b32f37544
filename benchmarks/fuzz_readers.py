"""Fuzz everything that reads what strangers wrote.

    python benchmarks/fuzz_readers.py [--seconds 600] [--only NAME] [--folder runs/fuzz]

Each target takes bytes, puts them where its reader looks, and reads. It may succeed or raise
`InputError` with one line; anything else is a finding. Targets take turns, each in a process of its
own, and what one came to is kept, so an interrupted campaign continues. Needs `atheris`, which is
not among the project's dependencies. `tests/test_fuzz.py` runs the same targets with hypothesis, on
JSON that is nearly right.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from mmalign.types import InputError

Target = Callable[[Path, bytes], object]
TARGETS: dict[str, Target] = {}
SEEDS: dict[str, list[bytes]] = {}
ANSWER: dict[str, Any] = {"question": "Is there a cat?", "answer": "no", "image_id": 3}
PAIR: dict[str, Any] = {
    "prompt": "red",
    "chosen_file_name": "a.png",
    "rejected_file_name": "b.png",
    "score_chosen": 1.5,
    "margin": None,
}
TEXTS: dict[str, Any] = {"prompt": "What?", "chosen": "red", "rejected": "blue", "image": "a.png"}
TURNS: dict[str, Any] = {
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "r"}],
    "rejected": {"from": "gpt", "value": "blue"},
    "image": "a.png",
}
SWIFT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}],
    "rejected_response": "blue",
    "images": ["a.png"],
}
TRL: dict[str, Any] = {
    "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
    "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "red"}]}],
    "rejected": [{"role": "assistant", "content": "blue"}],
    "images": ["a.png"],
}
RLHF_V: dict[str, Any] = {"text": json.dumps(TEXTS), "image": "a.png"}
HPD: dict[str, Any] = {
    "prompt": "red",
    "image_path": ["a.png", "b.png"],
    "human_preference": [1, 0],
}


def target(*seeds: bytes | dict[str, Any] | list[Any]) -> Callable[[Target], Target]:
    """Add a target, with inputs that it reads to the end."""

    def add(function: Target) -> Target:
        name = function.__name__
        TARGETS[name] = function
        SEEDS[name] = [s if isinstance(s, bytes) else json.dumps(s).encode() for s in seeds]
        return function

    return add


def check(name: str, folder: Path, data: bytes) -> bool:
    """Run a target; tells whether it read the bytes. Findings leave as the exception they are."""
    try:
        TARGETS[name](folder, data)
    except InputError as error:
        said = str(error)
    else:
        return True
    assert "\n" not in said, f"more than one line: {said}"
    return False


def prepare(folder: Path) -> None:
    """Put two images into the folder."""
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (4, 4), color).save(folder / name)


def _images(folder: Path, path: Path, format: str = "auto") -> None:
    from mmalign.data.detect import open_source
    from mmalign.data.readers import scan

    found = scan(open_source(str(path), format), max_pixels=10_000, full=True)
    for pair in found.pairs:
        assert pair.prompt


def _answers(path: Path) -> None:
    from mmalign.data.vlm_readers import scan_vlm
    from mmalign.data.vlm_source import open_vlm_source

    found = scan_vlm(open_vlm_source(str(path)), max_pixels=10_000, max_images=8, full=True)
    for pair in found.pairs:
        assert pair.chosen
        assert pair.rejected


@target(PAIR)
def image_pairs_jsonl(folder: Path, data: bytes) -> None:
    """Read `metadata.jsonl`."""
    (folder / "metadata.jsonl").write_bytes(data)
    _images(folder, folder / "metadata.jsonl")


@target([HPD])
def image_pairs_hpd(folder: Path, data: bytes) -> None:
    """Read HPDv2's `train.json`."""
    (folder / "train.json").write_bytes(data)
    _images(folder, folder / "train.json")


def _parquet(record: dict[str, Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist([record]), buffer)
    return buffer.getvalue()


def _png() -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (2, 2), "red").save(buffer, "PNG")
    return buffer.getvalue()


@target(
    _parquet({"prompt": "red", "chosen": _png(), "rejected": "b.png"}),
    _parquet({"caption": "r", "jpg_0": _png(), "jpg_1": b"x", "label_0": 1.0, "label_1": 0.0}),
)
def image_pairs_parquet(folder: Path, data: bytes) -> None:
    """Read canonical columns and Pick-a-Pic."""
    (folder / "pairs.parquet").write_bytes(data)
    _images(folder, folder / "pairs.parquet")


def _tar() -> bytes:
    import tarfile

    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in (
            ("k.json", b'{"prompt": "red"}'),
            ("k.chosen.png", _png()),
            ("k.rejected.png", _png()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    return buffer.getvalue()


@target(_tar())
def image_pairs_tar(folder: Path, data: bytes) -> None:
    """Read a webdataset shard."""
    (folder / "pairs.tar").write_bytes(data)
    _images(folder, folder / "pairs.tar")


@target({"file_name": "1", "prompt": "red", "margin": 0.5})
def image_pairs_folders(folder: Path, data: bytes) -> None:
    """Read folders of winners and losers with a table of prompts."""
    root = folder / "folders"
    for side, name in (("w", "a.png"), ("l", "b.png")):
        (root / side).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, root / side / "1.png")
    (root / "prompts.jsonl").write_bytes(data)
    _images(root, root)


@target(_png())
def image(folder: Path, data: bytes) -> None:
    """Decode an image."""
    from mmalign.data.images import image_suffix, open_image
    from mmalign.types import ImageRef

    assert open_image(ImageRef(data, "here"), max_pixels=10_000).mode == "RGB"
    assert image_suffix(ImageRef(data, "here"), 10_000)


@target(TEXTS, TURNS, SWIFT, TRL, RLHF_V)
def answer_pairs_jsonl(folder: Path, data: bytes) -> None:
    """Read preferences between answers as JSON lines."""
    (folder / "answers.jsonl").write_bytes(data)
    _answers(folder / "answers.jsonl")


@target([TEXTS], [TURNS], [SWIFT])
def answer_pairs_json(folder: Path, data: bytes) -> None:
    """The same as a JSON list."""
    (folder / "answers.json").write_bytes(data)
    _answers(folder / "answers.json")


@target(_parquet(TEXTS), _parquet({**RLHF_V, "image": {"bytes": _png(), "path": None}}))
def answer_pairs_parquet(folder: Path, data: bytes) -> None:
    """The same as parquet."""
    (folder / "answers.parquet").write_bytes(data)
    _answers(folder / "answers.parquet")


@target(b"red\nblue\n")
def prompts_text(folder: Path, data: bytes) -> None:
    """Read a text file of prompts."""
    from mmalign.data.prompts import read_prompts

    (folder / "prompts.txt").write_bytes(data)
    assert all(read_prompts(folder / "prompts.txt"))


@target({"prompt": "red"})
def prompts_jsonl(folder: Path, data: bytes) -> None:
    """Read JSON lines of prompts."""
    from mmalign.data.prompts import read_prompts

    (folder / "prompts.jsonl").write_bytes(data)
    assert all(read_prompts(folder / "prompts.jsonl"))


@target(
    b"model: x\nprompts: prompts.txt\nlora: {rank: 2}\nlearning_rate: 1e-4\n",
    b"rewards: [{name: clip, weight: 1}]\nprompts: prompts.txt\n",
)
def config_yaml(folder: Path, data: bytes) -> None:
    """Read a configuration."""
    from mmalign.config import D3poConfig
    from mmalign.options import parse_options
    from mmalign.preflight import check_config

    (folder / "config.yaml").write_bytes(data)
    (folder / "prompts.txt").write_text("red\n")
    config = parse_options(D3poConfig, [f"--config={folder / 'config.yaml'}"], command="train")
    config.output_dir, config.prompts = str(folder / "out"), str(folder / "prompts.txt")
    check_config(config)


@target({"image": "x.jpg", "question_id": 1, "text": "Is there a cat?", "label": "yes"})
def pope_labels(folder: Path, data: bytes) -> None:
    """Read POPE's labels."""
    from mmalign.hallucination.pope import read_questions

    (folder / "pope.json").write_bytes(data)
    read_questions(folder / "pope.json")


@target({**ANSWER, "question_id": 1})
def pope_answers(folder: Path, data: bytes) -> None:
    """Read answers to POPE and score them."""
    from mmalign.hallucination import pope

    labels = {"image": "x.jpg", "question_id": 1, "text": "Is there a cat?", "label": "yes"}
    (folder / "labels.json").write_text(json.dumps(labels))
    (folder / "said.jsonl").write_bytes(data)
    questions = pope.read_questions(folder / "labels.json")
    pope.read_answers(folder / "said.jsonl", questions, folder / "labels.json", "skip")


@target({"image_id": 3, "caption": "A cat on a mat."}, [{"image_id": 3, "caption": "Dogs."}])
def chair_captions(folder: Path, data: bytes) -> None:
    """Read captions."""
    from mmalign.hallucination.captions import read_captions

    (folder / "captions.json").write_bytes(data)
    read_captions(folder / "captions.json")


@target({"image_id": 3, "objects": ["cat"]})
def chair_labels(folder: Path, data: bytes) -> None:
    """Read labels of objects."""
    from mmalign.hallucination.objects import read_labels
    from mmalign.hallucination.vocabulary import coco_vocabulary

    (folder / "labels.jsonl").write_bytes(data)
    read_labels(folder / "labels.jsonl", coco_vocabulary())


@target(
    {
        "question": "What?",
        "gt_answer": "A cat.",
        "model_answer": "A cat.",
        "image_id": "a",
        "question_type": "attribute",
        "question_topic": "animal",
        "image_content": ["cat"],
    }
)
def mmhal_answers(folder: Path, data: bytes) -> None:
    """Read answers to MMHal-Bench."""
    from mmalign.hallucination.mmhal import read_items

    (folder / "mmhal.json").write_bytes(data)
    read_items(folder / "mmhal.json", None)


@target({"id": 1, "truth": ["cat"], "hallu": ["kitten"], "type": "generative"})
def amber_annotations(folder: Path, data: bytes) -> None:
    """Read AMBER's annotations."""
    from mmalign.hallucination.amber import read_amber

    place = folder / "amber"
    place.mkdir(exist_ok=True)
    (place / "relation.json").write_text('{"cat": ["kitten"], "kitten": ["cat"]}')
    (place / "safe_words.txt").write_text("photo\n")
    (place / "annotations.json").write_bytes(data)
    read_amber(place)


@target(b'["cat", "dog"]', b"Rating: 3", b"1. a\n2. b\n")
def judge_replies(folder: Path, data: bytes) -> None:
    """Read what a language model replied to a judge's question."""
    from mmalign.hallucination.answers import pope_official, read_yes_no
    from mmalign.hallucination.mmhal import parse_fixed, parse_rating
    from mmalign.hallucination.objhal import parse_objects
    from mmalign.topics.facts import read_list, read_numbered

    text = data.decode("utf-8", "replace")
    pope_official(text)
    read_yes_no(text)
    parse_fixed(text)
    read_list(text, 5)
    read_numbered(text, 2)
    for parse in (parse_objects, lambda reply: parse_rating(reply, "fixed")):
        with suppress(ValueError):  # what the caller turns into a question that is asked again
            parse(text)


@target({"choices": [{"message": {"content": "Yes"}}]})
def endpoint_text(folder: Path, data: bytes) -> None:
    """Read a server's chat completion."""
    _endpoint(data).generate([_question()], _generation())


@target(
    {
        "choices": [
            {"logprobs": {"content": [{"top_logprobs": [{"token": "Yes", "logprob": -0.1}]}]}}
        ]
    }
)
def endpoint_logprobs(folder: Path, data: bytes) -> None:
    """Read a server's probabilities of yes and no."""
    for yes, no in _endpoint(data).yes_no([_question()], 1):
        assert 0 <= yes <= 1
        assert 0 <= no <= 1


def _endpoint(reply: bytes) -> Any:
    from mmalign.chat import ChatEndpoint
    from mmalign.config import EndpointConfig

    endpoint = ChatEndpoint(EndpointConfig(url="http://127.0.0.1:9/v1", model_name="m"))
    endpoint._client.post = lambda body: reply  # type: ignore[method-assign]
    return endpoint


def _question() -> Any:
    from mmalign.types import Question

    return Question("Is there a cat?", ())


def _generation() -> Any:
    from mmalign.config import GenerationConfig

    return GenerationConfig()


@target({"rewards": [0.5, 1]})
def scorer_reply(folder: Path, data: bytes) -> None:
    """Read a program's or server's scores."""
    import torch

    from mmalign.rewards.http import HttpReward
    from mmalign.scoring import score_samples

    reward: Any = HttpReward("http://127.0.0.1:9/")
    reward._ask = lambda request: data
    assert score_samples(reward, torch.zeros(2, 3, 4, 4), ["a", "b"]).isfinite().all()


def _checkpoint(folder: Path) -> Path:
    import torch

    from mmalign.checkpoint import save_checkpoint

    place = folder / "checkpoints" / "checkpoint-2"
    if not place.exists():
        tensors = {"model": {"w": torch.ones(2)}, "training": {"m": torch.ones(2)}}
        save_checkpoint(place.parent, 2, tensors, {"run": {}, "training": {"dict": []}}, 1)
    return place


MANIFEST = {
    "format": 1,
    "step": 2,
    "files": {"state.json": {"bytes": 3, "sha256": "00"}, "a.safetensors": {"bytes": 1}},
}
CORRUPT = ("checkpoint_manifest", "label_database")
"""Targets whose seeds are not read to the end: they must not be whole."""


@target(MANIFEST)
def checkpoint_manifest(folder: Path, data: bytes) -> None:
    """Load a checkpoint whose manifest somebody else wrote."""
    from mmalign.checkpoint import latest_checkpoint, load_checkpoint

    place = _checkpoint(folder)
    (place / "manifest.json").write_bytes(data)
    with suppress(InputError):
        load_checkpoint(place)
    latest_checkpoint(place.parent)


def _sealed(place: Path, name: str, data: bytes) -> None:
    """Write a file of a checkpoint and make the manifest fit."""
    (place / name).write_bytes(data)
    files = {
        file.name: {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in place.iterdir()
        if file.name != "manifest.json"
    }
    manifest = {"format": 1, "step": 2, "files": files}
    (place / "manifest.json").write_text(json.dumps(manifest))


@target({"run": {}, "training": {"dict": [["optimizer", {"dict": []}]]}})
def checkpoint_state(folder: Path, data: bytes) -> None:
    """Load a checkpoint whose state somebody else wrote, with a manifest that fits."""
    from mmalign.checkpoint import load_checkpoint

    place = _checkpoint(folder)
    _sealed(place, "state.json", data)
    assert isinstance(load_checkpoint(place).state, dict)


def _safetensors(tensors: dict[str, Any], metadata: dict[str, str]) -> bytes:
    import torch
    from safetensors.torch import save

    return save({name: torch.tensor(v) for name, v in tensors.items()}, metadata)


@target(_safetensors({"w": [1.0, 2.0]}, {"format": "pt"}))
def checkpoint_tensors(folder: Path, data: bytes) -> None:
    """Load a checkpoint whose tensors somebody else wrote, with a manifest that fits."""
    from mmalign.checkpoint import load_checkpoint

    place = _checkpoint(folder)
    _sealed(place, "model.safetensors", data)
    load_checkpoint(place)


LORA = {"unet.a.lora_A.weight": [[1.0, 2.0]], "unet.a.lora_B.weight": [[1.0]]}
SETTINGS = {"unet.r": 1, "unet.lora_alpha": 2.0, "unet.rank_pattern": {"a": 2}}


@target(_safetensors(LORA, {"lora_adapter_metadata": json.dumps(SETTINGS)}))
def lora_file(folder: Path, data: bytes) -> None:
    """Read an adapter's file."""
    from mmalign.lora import read_lora

    (folder / "lora.safetensors").write_bytes(data)
    read_lora(folder / "lora.safetensors")


@target(SETTINGS)
def lora_metadata(folder: Path, data: bytes) -> None:
    """Read an adapter's metadata, inside a sound file."""
    from mmalign.lora import read_lora

    metadata = {"lora_adapter_metadata": data.decode("utf-8", "replace")}
    (folder / "lora.safetensors").write_bytes(_safetensors(LORA, metadata))
    for value in read_lora(folder / "lora.safetensors").settings.values():
        assert isinstance(value, int | float | dict)


@target({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"a": 1.5}})
def vlm_lora_settings(folder: Path, data: bytes) -> None:
    """Read `adapter_config.json` of PEFT."""
    from mmalign.vlm_lora import read_vlm_lora

    place = folder / "peft"
    place.mkdir(exist_ok=True)
    tensors = {"base_model.model.a.lora_A.weight": [[1.0]]}
    (place / "adapter_model.safetensors").write_bytes(_safetensors(tensors, {"format": "pt"}))
    (place / "adapter_config.json").write_bytes(data)
    read_vlm_lora(place)


@target(b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n')
def metrics_log(folder: Path, data: bytes) -> None:
    """Read and continue a log."""
    from mmalign.metrics_log import MetricsLog, read_metrics

    (folder / "metrics.jsonl").write_bytes(data)
    read_metrics(folder / "metrics.jsonl")
    MetricsLog(folder / "metrics.jsonl", keep_until=1).close()


@target({"id": "q", "image": "a.png", "prompt": "What?"})
def topic_questions(folder: Path, data: bytes) -> None:
    """Read the questions of topic overwriting."""
    from mmalign.config import TopicOverwriteConfig
    from mmalign.topics.questions import read_questions

    (folder / "questions.jsonl").write_bytes(data)
    read_questions(TopicOverwriteConfig(questions=str(folder / "questions.jsonl")))


@target(b"SQLite format 3\0" + struct.pack(">H", 4096) + b"\0" * 4078)
def label_database(folder: Path, data: bytes) -> None:
    """Open a database of labels."""
    from mmalign.data.labels import Labels

    for name in ("labels.sqlite", "labels.sqlite-wal", "labels.sqlite-shm"):
        (folder / name).unlink(missing_ok=True)
    (folder / "labels.sqlite").write_bytes(data)
    labels = Labels(folder / "labels.sqlite")
    try:
        labels.images()
        labels.tallies()
    finally:
        labels.close()


def main() -> int:
    """Fuzz every target for its share of the time; 1 when there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="of all targets together")
    parser.add_argument("--only", help="one target, in this process")
    parser.add_argument("--folder", type=Path, default=Path("runs/fuzz"))
    arguments = parser.parse_args()
    if arguments.only:
        _fuzz(arguments.only, arguments.folder.resolve(), arguments.seconds)
        return 0
    share = max(1, arguments.seconds // len(TARGETS))
    rows = [_one(name, arguments.folder.resolve(), share) for name in TARGETS]
    total = sum(row["executions"] for row in rows)
    findings = [row["target"] for row in rows if row["finding"]]
    print(f"{len(rows)} targets, {total} executions, findings: {findings or 'none'}")
    return int(bool(findings))


def _one(name: str, folder: Path, seconds: int) -> dict[str, Any]:
    """Fuzz one target in a process of its own, and keep what came of it."""
    place = folder / name
    if (place / "outcome.json").exists():
        known: dict[str, Any] = json.loads((place / "outcome.json").read_text())
        return known
    (place / "corpus").mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[name]):
        (place / "corpus" / f"seed-{number}").write_bytes(seed)
    command = [sys.executable, __file__, "--only", name, f"--seconds={seconds}"]
    said = subprocess.run(
        [*command, f"--folder={folder}"], capture_output=True, text=True, check=False
    )
    lines = said.stderr.splitlines()
    done = [line for line in lines if "stat::number_of_executed_units" in line or "Done " in line]
    counts = [int(word) for line in done for word in line.split() if word.isdigit()]
    finding = said.returncode != 0
    if finding:
        (place / "finding.txt").write_text(said.stdout + said.stderr)
    executions = max(counts, default=0)
    row = {"target": name, "executions": executions, "seconds": seconds, "finding": finding}
    (place / "outcome.json").write_text(json.dumps(row))
    print(row, flush=True)
    return row


def _fuzz(name: str, folder: Path, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["mmalign"]):
        for seed in SEEDS[name]:
            with tempfile.TemporaryDirectory() as scratch:
                prepare(Path(scratch))
                read = check(name, Path(scratch), seed)
                assert read or name in CORRUPT, f"{name} does not read its own seed"
    scratch = tempfile.mkdtemp()
    prepare(Path(scratch))
    place = folder / name
    options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-max_len=65536"]
    options += [f"-artifact_prefix={place}/", "-rss_limit_mb=4096", "-timeout=30"]

    def once(data: bytes) -> None:
        check(name, Path(scratch), data)

    atheris.Setup([sys.argv[0], *options, str(place / "corpus")], once)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())

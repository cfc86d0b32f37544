"""The hallucination benchmarks from the command line: files in, numbers, page and messages out."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mmalign import cli, endpoint
from mmalign.types import Question

SHARED = Path(__file__).parents[3] / "shared"
HOSTILE = "<script>alert('x')</script> & \"a\" car\u202e"
LABELS = {"1": ["dog", "person"], "2": ["cat"]}
CAPTIONS = [
    {"image_id": 1, "caption": f"A dog near a man. {HOSTILE}"},
    {"image_id": 2, "caption": "Two cats."},
]
POPE = [
    {
        "question_id": 1,
        "image": "COCO_val2014_000000000001.jpg",
        "text": "Is there a dog in the image?",
        "label": "yes",
    },
    {
        "question_id": 2,
        "image": "COCO_val2014_000000000002.jpg",
        "text": "Is there a car in the image?",
        "label": "no",
    },
]
MMHAL = [
    {"image_content": ["Dog"], "image_src": "https://host/1.jpg", "question": f"{i}: what is it?",
     "gt_answer": "A dog.", "model_answer": said}
    for i, said in enumerate(["A dog.", "A dog and a bus."])
]  # fmt: skip


def write(path: Path, content: Any) -> str:
    lines = path.suffix == ".jsonl"
    text = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with answers and labels of every benchmark."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.0)
    write(tmp_path / "captions.jsonl", CAPTIONS)
    write(tmp_path / "labels.json", LABELS)
    write(tmp_path / "objhal.jsonl", [
        {"image_id": row["image_id"], "question": "Describe it", "answer": row["caption"]}
        for row in CAPTIONS
    ])  # fmt: skip
    write(tmp_path / "pope.jsonl", [{"answer": "Yes"}, {"answer": "NO"}])
    write(tmp_path / "coco_pope_random.json", POPE)
    (tmp_path / "coco_pope_random.json").write_text("\n".join(map(json.dumps, POPE)))
    write(tmp_path / "mmhal.json", MMHAL)
    amber = tmp_path / "amber"
    amber.mkdir()
    write(amber / "annotations.json", [
        {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["car"]},
        {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 3, "type": "discriminative-attribute-state", "truth": "yes"},
    ])  # fmt: skip
    write(amber / "relation.json", {"dog": ["hound"], "car": []})
    (amber / "safe_words.txt").write_text("orange")
    write(amber / "query_all.json", [
        {"id": i, "image": f"AMBER_{i}.jpg", "query": f"Query {i}?"} for i in (1, 2, 3)
    ])  # fmt: skip
    said = enumerate(["a dog, a car", "No.", "Yes"], 1)
    write(tmp_path / "amber.json", [{"id": i, "response": text} for i, text in said])
    return tmp_path


RUNS = {
    "chair": "--responses captions.jsonl --labels labels.json",
    "objhal": "--responses objhal.jsonl --labels labels.json",
    "pope": "--responses pope.jsonl --labels coco_pope_random.json",
    "amber": "--responses amber.json --annotations amber",
    "mmhal": "--responses mmhal.json",
}


def run(name: str, options: str, code: int = 0) -> dict[str, Any]:
    assert cli.main(["evaluate", name, "--output_dir", "out", *options.split()]) == code
    if code:
        return {}
    found: dict[str, Any] = json.loads(Path("out/summary.json").read_text())
    return found


@pytest.mark.parametrize("name", RUNS)
def test_every_benchmark_writes_its_results(files: Path, name: str) -> None:
    summary = run(name, RUNS[name])
    assert summary["method"] == f"evaluate {name}"
    assert summary["before"] == summary["after"] == {}
    assert summary["win_rate"] is None
    metrics, ci95 = summary["metrics"], summary["ci95"]
    assert {"length", "yes_rate", "no_rate", "coverage"} <= set(metrics)
    assert metrics["length"] > 0
    assert ci95
    for key, (low, high) in ci95.items():
        assert low <= high, key
    cases = (files / "out/cases.jsonl").read_text().splitlines()
    assert len(cases) == {"amber": 3}.get(name, 2)
    assert "<h1>" in (files / "out/report.html").read_text()


def test_answers_are_scored_without_torch(files: Path) -> None:
    program = (
        "import sys\nfrom mmalign.cli import main\n"
        f"for name, options in {RUNS!r}.items():\n"
        "    assert main(['evaluate', name, '--output_dir', 'out', *options.split()]) == 0\n"
        "assert not {'torch', 'transformers', 'diffusers', 'datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_official_names_in_lower_case(files: Path) -> None:
    expected = {
        "chair": {"chairs": 0.5, "chairi": 1 / 4, "recall": 1.0},
        "objhal": {"chairs_refine": 0.5, "chairi": 1 / 4, "obj_rec": 1.0, "avg_word_len": 5.5},
        "pope": {"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes_ratio": 1},
        "amber": {"chair": 50.0, "cover": 99.9, "hal": 100.0, "cog": 99.9, "existence_recall": 0.0},
        "mmhal": {"average_score": 3.5, "hallucination_rate": 0.5, "informativeness": 200 / 3},
    }
    for name, metrics in expected.items():
        found = run(name, RUNS[name])["metrics"]
        assert {key: found[key] for key in metrics} == pytest.approx(metrics), name


def test_strict_fixed_reads_what_was_said(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run("pope", RUNS["pope"])["metrics"]["accuracy"] == 0.5
    assert "1 of 2 answers read differently with strict fixed" in caplog.text
    assert run("pope", f"{RUNS['pope']} --strict fixed")["metrics"]["accuracy"] == 1
    fixed = run("amber", f"{RUNS['amber']} --strict fixed")["metrics"]
    assert fixed["existence_recall"] == pytest.approx(99.9)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared with the benchmark's files")
def test_all_splits_of_pope(files: Path) -> None:
    answers = f"{SHARED}/golden/pope_answers_{{split}}.jsonl"
    summary = run(
        "pope",
        f"--responses {answers} --annotations {SHARED}/benchmarks/pope --split all --resamples 50",
    )
    metrics = summary["metrics"]
    f1s = {"random": 0.7193944139911251, "popular": 0.7216279676493608}
    f1s["adversarial"] = 0.7318727177882107
    assert {split: metrics[f"{split}_f1"] for split in f1s} == f1s
    assert metrics["f1"] == pytest.approx(sum(f1s.values()) / 3)
    assert metrics["random_tp"] == 1378
    assert "tp" not in metrics
    low, high = summary["ci95"]["f1"]
    assert low < metrics["f1"] < high


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared with the benchmark's files")
def test_real_files_of_amber(files: Path) -> None:
    folder = f"{SHARED}/benchmarks/amber"
    answers = f"{SHARED}/golden/amber_responses.json"
    options = f"--responses {answers} --annotations {folder} --resamples 50"
    metrics = run("amber", options)["metrics"]
    expected = {
        "chair": 16.3,
        "cover": 58.2,
        "hal": 51.2,
        "cog": 13.7,
        "accuracy": 29.7,
        "f1": 41.4,
    }
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["coverage"] == pytest.approx(0.582, abs=1e-3)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_page_shows_worst_cases_and_runs_nothing(files: Path) -> None:
    pictures = files / "pictures"
    pictures.mkdir()
    Image.new("RGB", (900, 600), "red").save(pictures / "COCO_val2014_000000000001.png")
    (pictures / "2.png").write_bytes(b"no image")
    run("chair", f"{RUNS['chair']} --images pictures")
    text = (files / "out/report.html").read_text()
    page = Page(text)
    names = [name for name, _ in page.tags]
    assert "script" not in names
    assert "&lt;script&gt;" in text
    assert '<mark class="bad">car</mark>' in text
    assert '<mark class="good">dog</mark>' in text
    (image,) = [attrs for name, attrs in page.tags if name == "img"]
    assert str(image["src"]).startswith("data:image/jpeg;base64,")
    links = [value for _, attrs in page.tags for key, value in attrs.items() if key == "href"]
    assert links == []
    assert "default-src 'none'" in text


@pytest.mark.parametrize("name", RUNS)
def test_text_that_no_file_can_hold(files: Path, name: str) -> None:
    """JSON can hold half a surrogate pair, and so can a model's answer."""
    path = files / RUNS[name].split()[1]
    path.write_text(path.read_text().replace("dog", "dog \\ud800").replace("Yes", "Yes \\udfff"))
    assert "\\ud" in path.read_text()
    assert run(name, RUNS[name])["metrics"]["length"] > 0


def test_page_without_mistakes(files: Path) -> None:
    write(files / "captions.jsonl", [{"image_id": i, "caption": "Nothing"} for i in (1, 2)])
    summary = run("chair", RUNS["chair"])
    assert summary["metrics"]["chairi"] is None  # no object was mentioned
    assert "Not one answer is wrong" in (files / "out/report.html").read_text()


Edit = Callable[[Path], object]


def lines(path: Path, *rows: Any) -> None:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


BAD: list[tuple[str, str, Edit | None, str]] = [
    ("chair", "--labels labels.json", None, "responses: give --responses FILE, or --model DIR"),
    ("chair", "--responses captions.jsonl", None, "labels: give --labels FILE"),
    ("chair", "--responses no.jsonl", None, "responses: no such file or folder: no.jsonl"),
    ("chair", RUNS["chair"] + " --annotations .", None, "give --labels or --annotations, not both"),
    ("chair", "--responses captions.jsonl --annotations .", None, "has no instances_*.json"),
    (
        "chair",
        RUNS["chair"],
        lambda d: lines(d / "captions.jsonl", CAPTIONS[0], "{"),
        "captions.jsonl line 2 is not JSON",
    ),
    (
        "chair",
        RUNS["chair"],
        lambda d: lines(d / "captions.jsonl", CAPTIONS[0]),
        "captions.jsonl: no answer for 1 of 2 ids (2)",
    ),
    (
        "chair",
        RUNS["chair"],
        lambda d: lines(d / "captions.jsonl", *CAPTIONS, CAPTIONS[0]),
        "line 3: id 1 comes again",
    ),
    (
        "chair",
        RUNS["chair"],
        lambda d: lines(d / "captions.jsonl", {"caption": "x"}),
        "line 1: no 'image_id'",
    ),
    (
        "chair",
        RUNS["chair"],
        lambda d: lines(d / "labels.json", {"1": ["yeti"]}),
        "labels.json image 1: object 'yeti'",
    ),
    (
        "objhal",
        RUNS["objhal"],
        lambda d: lines(d / "objhal.jsonl", {"image_id": 7, "answer": "x"}),
        "no answer for 2 of 2",
    ),
    ("objhal", RUNS["objhal"] + " --judge.url http://x", None, "judge_by is not endpoint"),
    ("objhal", RUNS["objhal"] + " --judge_by endpoint", None, "url and model_name are required"),
    (
        "pope",
        "--responses pope.jsonl --annotations . --split easy",
        None,
        "split: unknown 'easy'; one of random",
    ),
    (
        "pope",
        "--responses pope.jsonl --annotations . --split popular",
        None,
        "must have one *pope*popular*.json, has none",
    ),
    ("pope", "--responses pope.jsonl --annotations .", None, "--split NAME"),
    (
        "pope",
        RUNS["pope"],
        lambda d: lines(d / "pope.jsonl", {"answer": "no"}),
        "has 1 answers for the 2 questions",
    ),
    (
        "pope",
        RUNS["pope"],
        lambda d: lines(d / "pope.jsonl", *[{"question_id": 1, "answer": ""}] * 2),
        "line 2: id 1 comes again",
    ),
    (
        "amber",
        RUNS["amber"],
        lambda d: lines(d / "amber.json", *[{"id": 1, "response": ""}] * 2),
        "line 2: id 1 comes again",
    ),
    (
        "amber",
        RUNS["amber"],
        lambda d: lines(d / "amber.json", {"id": 9, "response": ""}),
        "line 1: id 9 is not in",
    ),
    (
        "amber",
        RUNS["amber"] + " --evaluation_type a",
        lambda d: lines(d / "amber.json", {"id": 1, "response": ""}),
        "no answer for 2 of 3 ids (2, 3)",
    ),
    ("amber", RUNS["amber"], lambda d: (d / "amber/relation.json").unlink(), "relation.json"),
    ("amber", RUNS["amber"] + " --matching spacy", None, "spaCy is not installed"),
    ("amber", "--responses amber.json", None, "annotations: give --annotations DIR"),
    (
        "mmhal",
        RUNS["mmhal"],
        lambda d: lines(d / "mmhal.json", MMHAL[0], MMHAL[0]),
        "line 2: the question comes again",
    ),
    ("mmhal", RUNS["mmhal"] + " --judge_by reviews", None, "belong together"),
    ("mmhal", RUNS["mmhal"] + " --model m", None, "give --responses or --model, not both"),
    ("mmhal", RUNS["mmhal"] + " --resamples 0", None, "resamples: must be at least 1"),
]


@pytest.mark.parametrize(("name", "options", "edit", "message"), BAD)
def test_bad_input_is_one_line(
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: str,
    edit: Edit | None,
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    if edit is not None:
        edit(files)
    run(name, options, code=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (files / "out/summary.json").exists()


def test_missing_answers_may_be_left_out(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines(files / "captions.jsonl", CAPTIONS[1])
    assert run("chair", RUNS["chair"] + " --on_missing skip")["metrics"]["chairs"] == 0
    assert "1 of 2 ids have no answer" in caplog.text
    assert "1 of 2 ids have no answer" in (files / "out/report.html").read_text()


Reply = Callable[[dict[str, Any]], tuple[int, Any]]


@contextmanager
def server(reply: Reply) -> Iterator[Any]:
    """Run an OpenAI-compatible server in a thread; `calls` of what is yielded has every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            running.calls.append((self.path, self.headers.get("Authorization"), request))
            status, content = reply(request)
            if isinstance(content, str):
                content = {"choices": [{"message": {"role": "assistant", "content": content}}]}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(
                content if isinstance(content, bytes) else json.dumps(content).encode()
            )

        def log_message(self, *_: object) -> None: ...

    running: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.calls, running.url = [], f"http://127.0.0.1:{running.server_address[1]}/v1"
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield running
    finally:
        running.shutdown()
        running.server_close()


def judged(url: str, **options: object) -> str:
    settings = {"url": url, "model_name": "judge", "retries": 1, **options}
    return " --judge_by endpoint " + " ".join(f"--judge.{k} {v}" for k, v in settings.items())


def test_objects_listed_by_a_language_model(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")

    def reply(request: dict[str, Any]) -> tuple[int, str]:
        return 200, '```json\n["dog", "bus"]\n```'

    with server(reply) as running:
        options = RUNS["objhal"] + judged(running.url, api_key_env="JUDGE_KEY")
        metrics = run("objhal", options)["metrics"]
        assert metrics["chairi"] == 0.5
        assert metrics["coco_sentence_num"] == 1  # "Two cats." is too short to be sent
        ((path, key, request),) = running.calls
        assert (path, key) == ("/v1/chat/completions", "Bearer secret")
        assert request["temperature"] == 0
        assert "A dog near a man." in request["messages"][0]["content"]
        run("objhal", options)
        assert len(running.calls) == 1  # the reply was kept
    for file in (files / "out").iterdir():
        assert "secret" not in file.read_text()


def test_ratings_by_a_language_model(files: Path) -> None:
    def reply(request: dict[str, Any]) -> tuple[int, str]:
        good = "The model's answer: A dog." in request["messages"][0]["content"]
        return 200, f"Reason.\n**Rating:** {5 if good and 'bus' not in str(request) else 1}"

    with server(reply) as running:
        options = RUNS["mmhal"] + judged(running.url)
        official = run("mmhal", options)["metrics"]
        fixed = run("mmhal", options + " --strict fixed")["metrics"]
        assert len(running.calls) == 2
    assert official["average_score"] == 0  # "**Rating:** 5" is read as 0
    assert fixed["average_score"] == 3
    assert fixed["hallucination_rate"] == 0.5


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (500, "x", "answers 500"),
        (401, "x", "answers 401"),
        (200, b"<html>down</html>", "its reply is an HTML page, not JSON"),
        (200, {"choices": []}, "its reply has no choices"),
        (200, {"choices": [{"message": {"content": None}}]}, "has no text"),
        (200, "I would rather not say.", "has no 'Rating: N'"),
    ],
)
def test_judge_that_replies_garbage(
    files: Path, capsys: pytest.CaptureFixture[str], status: int, content: Any, message: str
) -> None:
    with server(lambda _: (status, content)) as running:
        run("mmhal", RUNS["mmhal"] + judged(running.url), code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: mmhal.json entry ")
    assert message in error


def test_judge_that_is_down(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    run("objhal", RUNS["objhal"] + judged(url, retries=0), code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: objhal.jsonl line 1: endpoint judge: http://127.0.0.1:")
    assert "cannot be reached" in error


def test_saved_reviews(files: Path) -> None:
    official = [{"choices": [{"message": {"content": f"Rating: {s}"}}]} for s in (6, 2)]
    write(files / "reviews.json", official)
    metrics = run("mmhal", RUNS["mmhal"] + " --judge_by reviews --reviews reviews.json")["metrics"]
    assert metrics["average_score"] == 4
    assert metrics["informativeness"] == pytest.approx(5 / 2 / 3 * 100)


class FakeVlm:
    """Answers with the question and the size of the image, and remembers how it was asked."""

    fingerprint = "fake"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.most = sys.maxsize

    def generate(self, questions: Sequence[Question], config: Any) -> list[str]:
        if len(self.asked) >= self.most:
            raise KeyboardInterrupt
        self.asked += [question.prompt for question in questions]
        assert config.max_new_tokens == 7
        sizes = [Image.open(question.images[0].data).size for question in questions]  # type: ignore[union-attr,arg-type]
        return [f"{q.prompt} dog {w}x{h}" for q, (w, h) in zip(questions, sizes, strict=True)]


@pytest.fixture
def model(files: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVlm:
    """A folder of images, and a model in place of the one `--model fake` would load."""
    pictures = files / "pictures"
    pictures.mkdir()
    for number, name in enumerate(("COCO_val2014_000000000001", "COCO_val2014_000000000002")):
        Image.new("RGB", (4 + number, 5)).save(pictures / f"{name}.jpg")
    for number in (1, 2, 3):
        Image.new("RGB", (8, number)).save(pictures / f"AMBER_{number}.jpg")
    fake = FakeVlm()

    def load_vlm(config: Any, device: str) -> FakeVlm:
        assert (config.model, device) == ("fake", "cpu")
        return fake

    monkeypatch.setitem(sys.modules, "mmalign.adapters", SimpleNamespace(load_vlm=load_vlm))
    return fake


MODEL = "--model fake --images pictures --device cpu --generation.max_new_tokens 7"


def responses() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/responses.jsonl").read_text().splitlines()]


def test_model_answers_in_the_official_form(files: Path, model: FakeVlm) -> None:
    run("chair", f"{MODEL} --labels labels.json --prompt Look!")
    assert responses()[1] == {"image_id": 2, "question": "Look!", "caption": "Look! dog 5x5"}
    run("pope", f"{MODEL} --labels coco_pope_random.json")
    assert responses()[0] == {
        "question_id": 1,
        "question": POPE[0]["text"],
        "answer": f"{POPE[0]['text']} Please answer yes or no. dog 4x5",
    }
    run("amber", f"{MODEL} --annotations amber --evaluation_type g")
    assert responses() == [{"id": 1, "response": "Query 1? dog 8x1"}]
    write(files / "questions.jsonl", [{"image_id": i, "question": f"Q{i}"} for i in (1, 2)])
    run("objhal", f"{MODEL} --labels labels.json --questions questions.jsonl")
    assert responses()[0] == {"image_id": 1, "question": "Q1", "answer": "Q1 dog 4x5"}
    template = [{k: v for k, v in row.items() if k != "model_answer"} for row in MMHAL]
    write(files / "template.json", [row | {"image_src": "a/AMBER_1.jpg"} for row in template])
    run("mmhal", f"{MODEL} --labels template.json")
    assert responses()[1]["model_answer"] == "1: what is it? dog 8x1"


def test_answers_of_a_model_score_the_same_again(files: Path, model: FakeVlm) -> None:
    first = run("chair", f"{MODEL} --labels labels.json")["metrics"]
    Path("out/responses.jsonl").rename("again.jsonl")
    assert run("chair", "--responses again.jsonl --labels labels.json")["metrics"] == first


def test_interrupted_answers_go_on(files: Path, model: FakeVlm) -> None:
    labels = [POPE[0] | {"question_id": i, "text": f"Is there a {i}?"} for i in range(9)]
    (files / "labels.jsonl").write_text("\n".join(map(json.dumps, labels)))
    options = f"{MODEL} --labels labels.jsonl --generation.batch_size 1"
    model.most = 4
    run("pope", options, code=130)
    assert len(model.asked) == 4
    with Path("out/model_answers.jsonl").open("a") as stream:
        stream.write('{"request": "cut o')
    model.most = sys.maxsize
    run("pope", options)
    assert len(model.asked) == len(set(model.asked)) == 9  # nobody was asked twice
    assert [row["question_id"] for row in responses()] == list(range(9))
    assert all(row["question"] in row["answer"] for row in responses())
    run("pope", options.replace("batch_size 1", "seed 1 --generation.batch_size 1"))
    assert len(model.asked) == 18  # other settings, other answers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model fake --labels labels.json", "images: give --images DIR"),
        (f"{MODEL} --labels labels3.json", "labels3.json: no image '3' in pictures"),
        ("--model fake --images amber --labels labels.json", "images: amber has no images"),
        ("--model fake --images pope.jsonl --labels labels.json", "pope.jsonl is not a folder"),
    ],
)
def test_images_that_are_missing(
    files: Path, model: FakeVlm, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    write(files / "labels3.json", LABELS | {"3": ["cat"]})
    run("chair", options, code=2)
    assert message in capsys.readouterr().err


def test_images_that_are_links_out_of_the_folder(
    files: Path, model: FakeVlm, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = files / "pictures" / "COCO_val2014_000000000001.jpg"
    picture.rename(files / "elsewhere.jpg")
    picture.symlink_to(files / "elsewhere.jpg")
    run("chair", f"{MODEL} --labels labels.json", code=2)
    assert "is a link out of pictures" in capsys.readouterr().err
    assert not model.asked


def test_answers_that_say_nothing_are_pointed_out(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = ["", "What a nice day."]
    write(
        files / "silent.jsonl", [{**r, "caption": s} for r, s in zip(CAPTIONS, said, strict=True)]
    )
    run("chair", "--responses silent.jsonl --labels labels.json")
    page = (files / "out/report.html").read_text()
    for warning in (
        "none of 2 answers names an object of the vocabulary: nothing is judged",
        "1 of 2 answers are empty",
    ):
        assert warning in caplog.messages
        assert warning in page
    caplog.clear()
    run("chair", RUNS["chair"])
    assert not caplog.messages

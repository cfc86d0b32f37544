"""Rows 10 and 11: pickles, and code in a model's repository."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch

from .harness import Said, Tally, case, mmalign
from .toys import TOYS

NEVER = "its code never runs; refused in one line"


class Exploit:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        """Name the file."""
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        """Say what unpickling calls."""
        return (Path.touch, (self.marker,))


def _pickled(folder: Path, file: Path, *, plain: bool = False) -> Path:
    """Write a malicious pickle to `file`, in torch's format or plain; returns its marker."""
    marker = folder / "pwned"
    if plain:
        file.write_bytes(pickle.dumps(Exploit(marker)))
    else:
        torch.save(Exploit(marker), file)
    return marker


def _never_ran(marker: Path, said: Said, tally: Tally, *words: str) -> None:
    ran = marker.exists()
    tally.point(not ran and said.refuses(*words), f"{'IT RAN; ' if ran else ''}{said.error}")
    if said.refuses(*words):
        tally.answers.append(said.error.removeprefix("error: "))


@case(10, "proof that the pickle works", "unpickling it creates the file")
def exploit_works(folder: Path, tally: Tally) -> None:
    """A test that could not fail would prove nothing."""
    marker = _pickled(folder, folder / "a.pkl", plain=True)
    pickle.loads((folder / "a.pkl").read_bytes())
    tally.point(marker.exists(), "the exploit does not work")
    marker.unlink()
    _pickled(folder, folder / "a.pt")
    torch.load(folder / "a.pt", weights_only=False)
    tally.point(marker.exists(), "the exploit does not work in torch's format")


def _generate(model: Path, folder: Path, *more: str) -> Said:
    argv = ["generate", f"--model={model}", "--prompt=red", "--device=cpu", "--offline"]
    return mmalign(*argv, f"--output={folder / 'out'}", *more)


@case(10, "weights of a model (.bin, .pt, .ckpt)", NEVER)
def pickled_model(folder: Path, tally: Tally) -> None:
    """Replace each component's weights, for diffusers and for transformers."""
    for number, (component, name) in enumerate(
        (
            ("unet", "diffusion_pytorch_model.bin"),
            ("vae", "diffusion_pytorch_model.bin"),
            ("text_encoder", "pytorch_model.bin"),
        )
    ):
        model = folder / str(number)
        shutil.copytree(TOYS.sd, model)
        for file in (model / component).glob("*.safetensors"):
            file.unlink()
        marker = _pickled(folder, model / component / name)
        _never_ran(marker, _generate(model, folder), tally, "pickled")
    model = folder / "vlm"
    shutil.copytree(TOYS.llava, model)
    for file in model.glob("*.safetensors"):
        file.unlink()
    marker = _pickled(folder, model / "pytorch_model.bin")
    said = mmalign(*TOYS.train("vlm-dpo", folder / "run", f"--model={model}"))
    _never_ran(marker, said, tally, "pickled")


@case(10, "pickles beside sound weights", "its code never runs; the sound weights are used")
def pickle_beside(folder: Path, tally: Tally) -> None:
    """A repository may hold both."""
    model = folder / "model"
    shutil.copytree(TOYS.sd, model)
    marker = _pickled(folder, model / "unet" / "diffusion_pytorch_model.bin")
    said = _generate(model, folder)
    tally.point(said.code == 0 and not marker.exists(), said.error)


@case(10, "single file .ckpt and .safetensors that is a pickle", NEVER, quick=True)
def pickled_file(folder: Path, tally: Tally) -> None:
    """A model as one file, and a pickle with a better name."""
    marker = _pickled(folder, folder / "model.ckpt")
    _never_ran(marker, _generate(folder / "model.ckpt", folder), tally)
    model = folder / "renamed"
    shutil.copytree(TOYS.sd, model)
    (file,) = (model / "unet").glob("*.safetensors")
    _pickled(folder, file)
    _never_ran(marker, _generate(model, folder), tally, "cannot be loaded")


@case(10, "adapters (.bin, .pt, .safetensors)", NEVER)
def pickled_adapter(folder: Path, tally: Tally) -> None:
    """For generate, export and init_from, and for vision-language models."""
    for name in ("a.bin", "a.pt", "a.safetensors", "adapter_model.bin"):
        place = folder / name.replace(".", "-")
        place.mkdir()
        marker = _pickled(folder, place / name, plain=name == "a.pt")
        for adapter in (place / name, place):
            _never_ran(marker, _generate(TOYS.sd, folder, f"--adapter={adapter}"), tally)
        export = ["export", f"--model={TOYS.sd}", f"--adapter={place / name}", "--format=kohya"]
        said = mmalign(*export, f"--output={folder / 'out.safetensors'}")
        _never_ran(marker, said, tally)
        said = mmalign(*TOYS.train("vlm-dpo", folder / "v", f"--adapter={place}"))
        _never_ran(marker, said, tally)


@case(10, "checkpoint: optimizer, weights, random state", NEVER)
def pickled_checkpoint(folder: Path, tally: Tally) -> None:
    """Pickles in the place of a checkpoint's files, with a manifest that fits, and beside them."""
    import hashlib

    base = folder / "base"
    mmalign(*TOYS.train("mapo", base, "--max_steps=2"))
    for name in ("model.safetensors", "training.safetensors", "state.json"):
        output = folder / name.partition(".")[0]
        shutil.copytree(base, output)
        path = output / "checkpoints" / "checkpoint-2"
        marker = _pickled(folder, path / name, plain=True)
        data = (path / name).read_bytes()
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (path / "manifest.json").write_text(json.dumps(manifest))
        _never_ran(marker, mmalign(*TOYS.train("mapo", output)), tally, "checkpoint-2")
    path = base / "checkpoints" / "checkpoint-2"
    for name in (
        "random_states_0.pkl",
        "optimizer.bin",
        "scheduler.bin",
        "custom_checkpoint_0.pkl",
    ):
        marker = _pickled(folder, path / name, plain=name.endswith("pkl"))
    said = mmalign(*TOYS.train("mapo", base))
    tally.point(said.code == 0 and not marker.exists(), said.error)


@case(10, "reward head and reward model", NEVER)
def pickled_reward(folder: Path, tally: Tally) -> None:
    """The aesthetic head as .pth, the CLIP weights as .bin."""
    marker = _pickled(folder, folder / "head.pth")
    images = folder / "images"
    images.mkdir()
    (images / "a.png").write_bytes((TOYS.vlm_pairs.parent / "red.png").read_bytes())
    (folder / "prompts.txt").write_text("red\n")
    score = ["score", f"--images={images}", f"--prompts={folder / 'prompts.txt'}"]
    clip = folder / "clip"
    from mmalign.config import as_path

    shutil.copytree(as_path("pkg://mmalign.shapes/models/clip"), clip)
    options = json.dumps({"aesthetic": {"head": str(folder / "head.pth"), "model": str(clip)}})
    said = mmalign(*score, "--reward=aesthetic", f"--options={options}")
    _never_ran(marker, said, tally, "pickled objects")
    for file in clip.glob("*.safetensors"):
        file.unlink()
    _pickled(folder, clip / "open_clip_pytorch_model.bin")
    options = json.dumps({"clip": {"model": str(clip)}})
    _never_ran(marker, mmalign(*score, "--reward=clip", f"--options={options}"), tally)


@case(10, "caches of latents, references and scores", "its code never runs; made anew or refused")
def pickled_caches(folder: Path, tally: Tally) -> None:
    """Replace every file of every cache of a run by a pickle, and run again."""
    for method in ("mapo", "vlm-dpo"):
        cache, marker = folder / f"{method}-cache", folder / "pwned"
        option = f"--{'cache_dir' if method == 'vlm-dpo' else 'pairs.cache_dir'}={cache}"
        said = mmalign(*TOYS.train(method, folder / f"{method}-1", option))
        assert said.code == 0, said.error
        files = [file for file in cache.rglob("*") if file.is_file()]
        assert files
        for file in files:
            _pickled(folder, file, plain=True)
        said = mmalign(*TOYS.train(method, folder / f"{method}-2", option))
        ok = not marker.exists() and (said.code == 0 or said.refuses())
        tally.point(ok, f"{method}, {len(files)} files: {said.error}")
        answer = "made anew" if said.code == 0 else "refused"
        tally.answers.append(f"{method}: {answer}")
    output = folder / "pairs"
    build = [
        *("pairs", "build", f"--model={TOYS.sd}", f"--prompts={TOYS.prompts}", "--device=cpu"),
        *(f"--output={output}", "--sampling.num_inference_steps=2", "--candidates_per_prompt=2"),
        '--rewards=[{"name": "brightness"}]',
    ]
    assert mmalign(*build).code == 0
    scores = [f for f in output.rglob("*") if f.is_file() and f.suffix not in (".png", ".json")]
    for file in scores:
        _pickled(folder, file, plain=True)
    said = mmalign(*build)
    ok = not (folder / "pwned").exists() and (said.code == 0 or said.refuses())
    tally.point(ok, f"scores: {said.error}")


@case(11, "model_index.json that names foreign classes", "not imported; refused in one line")
def foreign_classes(folder: Path, tally: Tally) -> None:
    """Components from modules that a pipeline has no business with, and code of its own."""
    marker = folder / "pwned"
    for number, (component, names) in enumerate(
        (("unet", ["os", "system"]), ("extra", ["evil", "Evil"]), ("scheduler", ["evil", "Evil"]))
    ):
        model = folder / str(number)
        shutil.copytree(TOYS.sd, model)
        _evil(model / "evil.py", marker)
        _evil(model / "pipeline.py", marker)
        file = model / "model_index.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), component: names}))
        _never_ran(marker, _generate(model, folder), tally, f"as {component}")
    model = folder / "custom"
    shutil.copytree(TOYS.sd, model)
    _evil(model / "pipeline.py", marker)
    file = model / "model_index.json"
    content = {**json.loads(file.read_text()), "_class_name": ["pipeline", "Evil"]}
    file.write_text(json.dumps(content))
    _never_ran(marker, _generate(model, folder), tally)


def _evil(file: Path, marker: Path) -> None:
    file.write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: ...\n")


@case(11, "auto_map of a vision-language model", "its code never runs")
def auto_map(folder: Path, tally: Tally) -> None:
    """Every auto class of config, tokenizer and processor points at code in the repository."""
    marker = folder / "pwned"
    model = folder / "model"
    shutil.copytree(TOYS.llava, model)
    _evil(model / "evil.py", marker)
    classes = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
    classes = (*classes, "AutoModelForImageTextToText", "AutoModelForCausalLM")
    for file in model.glob("*.json"):
        content = json.loads(file.read_text())
        if isinstance(content, dict) and "config" in file.name:
            file.write_text(
                json.dumps({**content, "auto_map": dict.fromkeys(classes, "evil.Evil")})
            )
    said = mmalign(*TOYS.train("vlm-dpo", folder / "run", f"--model={model}"))
    ok = not marker.exists() and (said.code == 0 or said.refuses())
    answer = "ignored: trained with the library's own classes" if said.code == 0 else said.error
    tally.point(ok, answer)
    tally.answers.append(answer)
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**content, "model_type": "evil"}))
    said = mmalign(*TOYS.train("vlm-dpo", folder / "run-2", f"--model={model}"))
    _never_ran(marker, said, tally, "unknown model_type 'evil'")


@case(11, "chat template that reaches for Python", "its code never runs; refused in one line")
def template(folder: Path, tally: Tally) -> None:
    """A Jinja template that walks to the builtins."""
    marker = folder / "pwned"
    model = folder / "model"
    shutil.copytree(TOYS.llava, model)
    walk = "''.__class__.__mro__[1].__subclasses__()"
    call = f"cycler.__init__.__globals__.os.system('touch {marker}')"
    for text in (f"{{{{ {walk} }}}}", f"{{{{ {call} }}}}"):
        (model / "chat_template.jinja").write_text(text)
        said = mmalign(*TOYS.train("vlm-dpo", folder / "run", f"--model={model}"))
        _never_ran(marker, said, tally)


@case(11, "option trust_remote_code", "no such option", quick=True)
def no_option(folder: Path, tally: Tally) -> None:
    """There is no way to ask for it."""
    for method in ("mapo", "vlm-dpo"):
        said = mmalign(*TOYS.train(method, folder / "run", "--trust_remote_code=true"))
        tally.refused(said, "trust_remote_code")
        file = folder / "config.yaml"
        file.write_text("trust_remote_code: true\n")
        said = mmalign("train", method, f"--config={file}")
        tally.refused(said, "trust_remote_code")


@case(11, "code in a configuration file", "YAML makes plain values only", quick=True)
def yaml_code(folder: Path, tally: Tally) -> None:
    """A YAML tag that would call a function."""
    marker, file = folder / "pwned", folder / "config.yaml"
    file.write_text(f"model: !!python/object/apply:os.system ['touch {marker}']\n")
    said = mmalign("train", "mapo", f"--config={file}")
    _never_ran(marker, said, tally, "config.yaml")

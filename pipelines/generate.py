"""Sample images for prompts, from a model alone or with an adapter on top."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from mmalign.adapters import load_adapter
from mmalign.data.folders import METADATA
from mmalign.data.images import save_png
from mmalign.data.prompts import read_prompts
from mmalign.pipelines._evaluation import resolve_device
from mmalign.randomness import derive_seed
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import GenerateConfig


@dataclass(frozen=True)
class Picture:
    """One image to sample; `index` counts the images of its prompt."""

    file_name: str
    prompt: str
    index: int
    seed: int


def run(config: GenerateConfig) -> None:
    """Write one PNG per image, and `metadata.jsonl` with `file_name`, `prompt`, `index`, `seed`.

    Raises:
        InputError: prompts, model, adapter or sampling options are unusable, or the folder already
            holds images or cannot be written.
    """
    pictures = plan_pictures(config)
    folder = Path(config.output)
    metadata = folder / METADATA
    if metadata.exists():
        raise InputError(f"{folder}: already holds images; choose another --output")
    device = resolve_device(config.device)
    adapter = load_adapter(config, device=device, for_training=False)
    size = max(config.sampling.batch_size, 1)
    with tqdm(total=len(pictures), desc="generate", unit="image") as bar:
        for start in range(0, len(pictures), size):
            batch = pictures[start : start + size]
            prompts = [picture.prompt for picture in batch]
            images = adapter.sample(prompts, [picture.seed for picture in batch], config.sampling)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                for picture, image in zip(batch, images, strict=True):
                    save_png(image, folder / picture.file_name)
                with metadata.open("a", encoding="utf-8") as file:
                    file.writelines(_line(picture) for picture in batch)
            except OSError as error:
                raise InputError(f"{folder}: cannot be written: {error.strerror}") from error
            bar.update(len(batch))
    tqdm.write(f"{len(pictures)} images: {folder}")


def plan_pictures(config: GenerateConfig) -> list[Picture]:
    """List the images to sample, prompt by prompt.

    An image's seed is keyed by (seed, prompt, index), so it does not depend on other prompts; a
    prompt that occurs again goes on counting.

    Raises:
        InputError: there are no prompts, or no images per prompt.
    """
    if (config.prompts is None) == (not config.prompt):
        raise InputError("give either --prompts (a file) or --prompt")
    if config.images_per_prompt < 1:
        raise InputError(f"images_per_prompt: must be at least 1, got {config.images_per_prompt}")
    prompts = config.prompt
    if config.prompts is not None:
        prompts = read_prompts(Path(config.prompts))
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise InputError(f"{config.prompts or '--prompt'}: there is no prompt, or an empty one")
    used: dict[str, int] = {}
    pictures = []
    for row, prompt in enumerate(prompts):
        first = used.get(prompt, 0)
        used[prompt] = first + config.images_per_prompt
        for index in range(first, used[prompt]):
            seed = derive_seed(config.sampling.seed, prompt, index)
            name = f"{row:05d}-{index - first:02d}.png"
            pictures.append(Picture(name, prompt, index, seed))
    return pictures


def _line(picture: Picture) -> str:
    return json.dumps(asdict(picture), ensure_ascii=False) + "\n"

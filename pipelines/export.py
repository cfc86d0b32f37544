"""Export an adapter for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import ExportConfig


def run(config: ExportConfig) -> None:
    """Write a kohya file, or a complete checkpoint with the adapter folded in.

    `adapter_scale` belongs to a merged checkpoint; a kohya file is scaled where it is used.

    Raises:
        InputError: adapter or model cannot be used, or the output exists or cannot be written.
    """
    if config.adapter is None:
        raise InputError("adapter is missing: give the folder or file to export with --adapter")
    output = Path(config.output)
    if config.format == "kohya" and output.suffix != ".safetensors":
        output = output.with_name(output.name + ".safetensors")
    if output.exists():
        raise InputError(f"{output}: exists; choose another --output")
    if config.format == "kohya":
        _kohya(config.adapter, output)
    else:
        _merged(config, output)
    tqdm.write(f"exported: {output}")


def _kohya(adapter: str, output: Path) -> None:
    from mmalign.lora_export import export_kohya

    export_kohya(adapter, output)


def _merged(config: ExportConfig, output: Path) -> None:
    from mmalign.adapters import load_adapter, no_file_bars
    from mmalign.lora_export import export_merged

    adapter = load_adapter(config, device="cpu", for_training=False)
    with no_file_bars():
        export_merged(adapter, output)

"""Adapters on disk: written as mlx-lm or PEFT reads them, and read back from either.

An adapter is a folder of one file of weights and one of settings. What only qlab knows stands in a
block ``qlab`` of the settings (mlx-lm) or of the weights' header (PEFT), where the others pass it
over. ``Adapter.save`` and ``Adapter.load`` call it. Runs on the MLX thread. Knows no base weights,
only what layers there are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from math import isclose
from pathlib import Path
from typing import Any

import mlx.core as mx

from qlab.core.config.legal import check_choice
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import ModelSpec
from qlab.core.saved import Saved
from qlab.engine.adapt.mlx_layout import SETTINGS_FILE, Arrays, LoadedAdapter, from_mlx, to_mlx
from qlab.engine.adapt.parameters import checked, expected
from qlab.engine.adapt.peft import to_peft
from qlab.engine.adapt.peft_read import from_peft
from qlab.engine.adapt.targets import SettingError, why_not_mlx
from qlab.engine.io.loaded import check_safetensors
from qlab.engine.io.source import read_settings
from qlab.errors import ConfigError, LoadError, QlabError, nearest
from qlab.runtime.atomic import write_folder
from qlab.runtime.paths import users_path

FORMATS = ("mlx", "peft")
_WEIGHTS = {"mlx": "adapters.safetensors", "peft": "adapter_model.safetensors"}
_OTHER_WEIGHTS = (".bin", ".safetensors", ".pt", ".npz")
_PICKLED = (".bin", ".pt")
# what a folder may hold and still be replaced
_OURS = {*_WEIGHTS.values(), SETTINGS_FILE, "README.md"}
_SHOWN = 3  # files that a message names


def save_adapter(
    path: Path,
    parameters: Mapping[str, mx.array],
    lora: LoRAConfig,
    spec: ModelSpec,
    base_name: str,
    *,
    format: str = "mlx",
    model_type: str | None = None,
    unsaved: tuple[str, str] = ("", ""),
) -> Saved:
    """Write an adapter folder, whole or not at all.

    Args:
        path: of the folder. An existing one is replaced if it is empty or holds an adapter and
            nothing else.
        parameters: trainable arrays by path, such as ``model.layers.0.self_attn.q_proj.lora_a``.
        lora: what they are.
        spec: the base's layers.
        base_name: hub id or folder of the base, written into the settings.
        format: ``mlx`` (``mlx_lm.load(base, adapter_path=path)``) or ``peft``.
        model_type: of the base's config.json; with it the answer says whether PEFT's names are
            known to fit.
        unsaved: if the base is not what stands at ``base_name``: what it is, and the Python that
            writes it to a folder. The answer and a README then say so.

    Returns:
        Where it is and which programs open it; prints as a sentence.

    Raises:
        ConfigError: no such format, not the adapter's parameters, or something that the format
            cannot say.
        WeightsError: a number is NaN or infinite.
        SaveError: the place cannot be written; what stood there is untouched.
    """
    check_choice("format", format, FORMATS)
    arrays = checked(parameters, expected(spec, lora))
    trained_on, base_code = unsaved
    block = _qlab_block(lora, spec, base_name, trained_on)
    if format == "mlx":
        settings, note = to_mlx(lora, spec, base_name, trained_on)
        settings["qlab"] = block
        header = {"format": "mlx"}
    else:
        settings, arrays, note = to_peft(arrays, lora, spec, base_name, model_type)
        # PEFT warns of settings that it does not know, so the block stands beside the arrays
        header = {"format": "pt", "qlab": json.dumps(block)}
        note += _about_base(trained_on)

    def fill(folder: Path) -> None:
        mx.save_safetensors(str(folder / _WEIGHTS[format]), arrays, header)
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2))
        if base_code:
            readme = _readme(base_name, note, base_code)
            (folder / "README.md").write_text(readme, encoding="utf-8")

    written = write_folder(path, fill, _OURS)
    return Saved(note, path=written, opens_in=_opens_in(format, lora, spec))


def _qlab_block(
    lora: LoRAConfig, spec: ModelSpec, base_name: str, trained_on: str
) -> dict[str, Any]:
    """Return what only qlab knows about an adapter, as it stands in the file."""
    return {
        "adapter": asdict(lora),
        "base": base_name,
        "model": spec.name,
        "trained_on": trained_on,
    }


def _about_base(trained_on: str) -> str:
    """Say what to do about a base that PEFT cannot open; empty if it can."""
    if not trained_on:
        return ""
    return (
        f" It was trained on {trained_on}; "
        "a.fuse(rest=16).save('model') writes what was trained as one model."
    )


def _readme(base_name: str, note: str, base_code: str) -> str:
    return (
        f"# An adapter of {base_name}\n\n{note}\n\n"
        "These lines make the base again, in the folder `base`:\n\n"
        f"```python\n{base_code}\n```\n"
    )


def _opens_in(format: str, lora: LoRAConfig, spec: ModelSpec) -> tuple[str, ...]:
    """Return the programs that open an adapter of this format as it is."""
    if format == "peft":
        return ("peft", "qlab")
    return ("qlab",) if why_not_mlx(lora, spec) else ("mlx-lm", "qlab")


def load_adapter(path: Path, spec: ModelSpec) -> LoadedAdapter:
    """Read an adapter folder of qlab, mlx-lm or PEFT for a base.

    Args:
        path: of the folder.
        spec: the base's layers.

    Returns:
        What the adapter is, its arrays by path (evaluated), and what to know about it.

    Raises:
        LoadError: a file is missing, cut short or unreadable, an array is missing, unknown, of the
            wrong shape or no number, or the settings ask for what qlab does not have; names file
            and key.
    """
    path = users_path(path)
    _check_folder(path)
    settings = read_settings(path / SETTINGS_FILE, "an adapter")
    is_peft = "peft_type" in settings
    file = path / _WEIGHTS["peft" if is_peft else "mlx"]
    arrays, header = _arrays(file, path)
    block = header if is_peft else settings.get("qlab")
    try:
        read = from_peft if is_peft else from_mlx
        adapter = read(settings, arrays, spec)
        adapter = adapter._replace(config=_known_to_qlab(adapter.config, block, spec))
        adapter = _in_one_dtype(adapter)
        arrays = checked(adapter.arrays, expected(spec, adapter.config))
    except (SettingError, re.error) as error:
        raise LoadError(f"{path / SETTINGS_FILE}: {error}") from None
    except QlabError as error:
        raise LoadError(f"{file} is no adapter for {spec.name!r}: {error}") from None
    notes = adapter.notes
    base = block.get("trained_on") if isinstance(block, dict) else ""
    if base:
        notes = (*notes, f"It was trained on {base}.")
    return LoadedAdapter(adapter.config, arrays, notes)


def _check_folder(path: Path) -> None:
    if path.is_dir():
        return
    beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    what = "is a file" if path.exists() else "does not exist"
    raise LoadError(f"{path} {what}; an adapter is a folder.{nearest(path.name, beside)}")


def _arrays(file: Path, folder: Path) -> tuple[Arrays, Any]:
    """Return the arrays of a file, and the block ``qlab`` of its header."""
    if not file.is_file():
        raise LoadError(f"{folder} has no {file.name}.{_other_weights(folder)}")
    check_safetensors(file)
    try:
        loaded: Any = mx.load(str(file), return_metadata=True)
        arrays, header = loaded
        return arrays, json.loads(header.get("qlab", "null"))
    except (RuntimeError, ValueError) as error:
        raise LoadError(f"{file} could not be read: {error}") from None


def _other_weights(folder: Path) -> str:
    """Say which weights a folder holds instead, and why pickled ones are not opened."""
    names = sorted(file.name for file in folder.iterdir() if file.suffix in _OTHER_WEIGHTS)
    if not names:
        return ""
    hint = f" It holds {', '.join(names[:_SHOWN])}."
    if any(name.endswith(_PICKLED) for name in names):
        hint += " Pickled weights can run code, and are not opened; save them again as safetensors."
    return hint


def _known_to_qlab(lora: LoRAConfig, block: Any, spec: ModelSpec) -> LoRAConfig:
    """Return what qlab wrote about the adapter, if it says the same as the rest of the file.

    Args:
        lora: what the rest of the file says.
        block: what qlab wrote, or anything else where the file is of another program.
        spec: the base's layers.
    """
    facts = block.get("adapter") if isinstance(block, dict) else None
    if not isinstance(facts, dict):
        return lora
    unknown = sorted(facts.keys() - {field.name for field in fields(LoRAConfig)})
    if unknown:
        raise SettingError(f"the block qlab has {unknown[0]!r}, which is unknown to this version.")
    written = LoRAConfig(**facts)
    is_same = (
        written.kind == lora.kind
        and written.rank == lora.rank
        and isclose(written.scale, lora.scale, rel_tol=1e-6)
    )
    if not is_same or written.targets(spec) != lora.targets(spec):
        raise SettingError(
            "the block qlab says another adapter than the rest; remove the block to go by the rest."
        )
    return written


def _in_one_dtype(adapter: LoadedAdapter) -> LoadedAdapter:
    """Bring all arrays to one dtype that an adapter may have."""
    for key, array in adapter.arrays.items():
        if not mx.issubdtype(array.dtype, mx.floating):
            raise ConfigError(f"{key!r} is {array.dtype}, not a floating-point number.")
    dtypes = {array.dtype for array in adapter.arrays.values()}
    if dtypes == {mx.bfloat16}:
        return adapter._replace(config=replace(adapter.config, dtype="bfloat16"))
    wide = adapter._replace(config=replace(adapter.config, dtype="float32"))
    if dtypes <= {mx.float32}:
        return wide
    names = " and ".join(sorted(str(dtype).removeprefix("mlx.core.") for dtype in dtypes))
    arrays = {key: array.astype(mx.float32) for key, array in adapter.arrays.items()}
    return wide._replace(arrays=arrays, notes=(*adapter.notes, f"{names} became float32."))

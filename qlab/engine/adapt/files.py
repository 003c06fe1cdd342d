"""Adapters on disk.

Written as mlx-lm or PEFT reads them, and read back from either, whole or not at all.

An adapter is a folder of one file of weights and one of settings. What only qlab knows stands in a
block ``qlab`` of the settings (mlx-lm) or of the weights' header (PEFT), where the others pass it
over. Runs on the MLX thread. Knows no base weights: only what layers there are.
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

from qlab import registry
from qlab.core.config.legal import check_choice, is_whole
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import ModelSpec
from qlab.core.saved import Saved
from qlab.engine.adapt import peft as peft_files
from qlab.engine.adapt.parameters import checked, expected
from qlab.engine.adapt.targets import (
    SettingError,
    layers_of,
    mlx_targets,
    mlx_targets_of,
    shortest_keys,
    why_not_mlx,
)
from qlab.engine.io.loaded import check_safetensors
from qlab.engine.io.source import read_settings
from qlab.errors import ConfigError, LoadError, QlabError, nearest
from qlab.runtime.atomic import write_folder

Arrays = dict[str, mx.array]
FORMATS = ("mlx", "peft")
_WEIGHTS = {"mlx": "adapters.safetensors", "peft": "adapter_model.safetensors"}
_SETTINGS = "adapter_config.json"
_OURS = {*_WEIGHTS.values(), _SETTINGS, "README.md"}  # what a folder may hold and still be replaced
_LORA_PARAMETERS = {"rank", "scale", "dropout", "keys"}
_SHOWN = 3


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
        base_name: hub id or folder of the base, for whoever opens the adapter.
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
    if format == "mlx":
        config, note = _mlx_config(lora, spec, base_name, unsaved[0])
    else:
        config, arrays, note = peft_files.to_peft(arrays, lora, spec, base_name, model_type)
        if unsaved[0]:
            note += f" It was trained on {unsaved[0]}; a.fuse(rest=16).save('model') writes what was trained as one model."
    block = {
        "adapter": asdict(lora),
        "base": base_name,
        "model": spec.name,
        "trained_on": unsaved[0],
    }
    # PEFT warns of settings that it does not know, so there the block stands beside the arrays
    inside = {"format": "pt", "qlab": json.dumps(block)} if format == "peft" else {"format": "mlx"}
    text = json.dumps(config if format == "peft" else {**config, "qlab": block}, indent=2)

    def fill(folder: Path) -> None:
        mx.save_safetensors(str(folder / _WEIGHTS[format]), arrays, inside)
        (folder / _SETTINGS).write_text(text)
        if unsaved[1]:
            again = f"These lines make the base again, in the folder `base`:\n\n```python\n{unsaved[1]}\n```\n"
            (folder / "README.md").write_text(
                f"# An adapter of {base_name}\n\n{note}\n\n{again}", encoding="utf-8"
            )

    written = write_folder(path, fill, _OURS)
    return Saved(note, path=written, opens_in=_opens_in(format, lora, spec))


def _opens_in(format: str, lora: LoRAConfig, spec: ModelSpec) -> tuple[str, ...]:
    """Programs that open an adapter of this format as it is."""
    if format == "peft":
        return ("peft", "qlab")
    return ("qlab",) if why_not_mlx(lora, spec) else ("mlx-lm", "qlab")


# --- mlx-lm's layout ------------------------------------------------------------------------------


def _mlx_config(
    lora: LoRAConfig, spec: ModelSpec, base_name: str, unsaved: str
) -> tuple[dict[str, Any], str]:
    num_layers, keys = mlx_targets(lora, spec)
    settings = {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout, "keys": keys}
    config = {
        "fine_tune_type": lora.kind,
        "model": base_name,
        "num_layers": num_layers,
        "lora_parameters": settings,
    }
    obstacle = why_not_mlx(lora, spec)
    if obstacle:
        return (
            config,
            f"Saved in mlx-lm's layout, but stock mlx-lm cannot open it: {obstacle}. qlab can.",
        )
    if unsaved:
        opened = "a.base.save('base') writes it, and mlx_lm.load('base', adapter_path=…) opens what was trained"
        return (
            config,
            f"Saved in mlx-lm's layout. It was trained on {unsaved}, which is in no folder yet: {opened}.",
        )
    return (
        config,
        f"Saved in mlx-lm's layout; mlx_lm.load({base_name!r}, adapter_path=…) and qlab open it.",
    )


# --- reading --------------------------------------------------------------------------------------


def load_adapter(path: Path, spec: ModelSpec) -> tuple[LoRAConfig, Arrays, tuple[str, ...]]:
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
    path = Path(path).expanduser()
    if not path.is_dir():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        what = "is a file" if path.exists() else "does not exist"
        raise LoadError(f"{path} {what}; an adapter is a folder.{nearest(path.name, beside)}")
    config = read_settings(path / _SETTINGS, "an adapter")
    kind = "peft" if "peft_type" in config else "mlx"
    file = path / _WEIGHTS[kind]
    arrays, block = _arrays(file, path)
    block = block if kind == "peft" else config.get("qlab")
    try:
        lora, found, notes = (peft_files.from_peft if kind == "peft" else _from_mlx)(
            config, arrays, spec
        )
        lora, found, more = _same_dtype(_own(lora, block, spec), found)
        base = block.get("trained_on") if isinstance(block, dict) else ""
        return (
            lora,
            checked(found, expected(spec, lora)),
            (*notes, *more, *([f"It was trained on {base}."] if base else [])),
        )
    except (SettingError, re.error) as error:
        raise LoadError(f"{path / _SETTINGS}: {error}") from None
    except QlabError as error:
        raise LoadError(f"{file} is no adapter for {spec.name!r}: {error}") from None


def _arrays(file: Path, folder: Path) -> tuple[Arrays, Any]:
    """Return the arrays of a file, and the block ``qlab`` of its header."""
    if not file.is_file():
        held = sorted(
            x.name for x in folder.iterdir() if x.suffix in (".bin", ".safetensors", ".pt", ".npz")
        )
        hint = f" It holds {', '.join(held[:_SHOWN])}." if held else ""
        if any(name.endswith((".bin", ".pt")) for name in held):
            hint += (
                " Pickled weights can run code, and are not opened; save them again as safetensors."
            )
        raise LoadError(f"{folder} has no {file.name}.{hint}")
    check_safetensors(file)
    try:
        arrays, header = mx.load(str(file), return_metadata=True)
        return arrays, json.loads(header.get("qlab", "null"))
    except (RuntimeError, ValueError) as error:
        raise LoadError(f"{file} could not be read: {error}") from None


def _from_mlx(
    config: dict[str, Any], arrays: Arrays, spec: ModelSpec
) -> tuple[LoRAConfig, Arrays, tuple[str, ...]]:
    kind = config.get("fine_tune_type", "lora")
    kinds = registry.shelf("adapters")
    if kind not in kinds:
        why = (
            "holds whole layers, not an adapter; qlab trains adapters"
            if kind == "full"
            else f"is not {', '.join(kinds)}"
        )
        raise SettingError(f"fine_tune_type {kind!r} {why}.{nearest(str(kind), kinds)}")
    settings = config.get("lora_parameters")
    if not isinstance(settings, dict) or not {"rank", "scale"} <= settings.keys():
        raise SettingError("lora_parameters must give rank and scale.")
    if unknown := sorted(settings.keys() - _LORA_PARAMETERS):
        raise SettingError(
            f"lora_parameters has {unknown[0]!r}, which is unknown; it may have rank, scale, dropout, keys."
        )
    num_layers = config.get("num_layers", -1)
    keys = settings.get("keys")
    if not is_whole(num_layers):
        raise SettingError(f"num_layers={num_layers!r} is not a number of blocks.")
    if keys is not None and (
        not isinstance(keys, list) or not all(isinstance(key, str) for key in keys)
    ):
        raise SettingError(f"keys={keys!r} is not a list of names.")
    paths = layers_of(arrays, set(kinds[kind].shapes((1, 1), 1)), spec)
    named = mlx_targets_of(num_layers, keys, spec)
    if named != set(paths):
        gone = sorted(named - set(paths))
        more = sorted(set(paths) - named)
        what = f"no arrays of {gone[0]!r}" if gone else f"arrays of {more[0]!r}"
        raise ConfigError(
            f"it has {what}, which num_layers and keys in {_SETTINGS} {'adapt' if gone else 'do not adapt'}."
        )
    dropout = settings.get("dropout", 0.0)
    lora = shortest_keys(
        LoRAConfig(rank=settings["rank"], scale=settings["scale"], dropout=dropout, kind=kind),
        paths,
        spec,
    )
    return lora, arrays, ()


def _own(lora: LoRAConfig, block: Any, spec: ModelSpec) -> LoRAConfig:
    """Return what qlab wrote about the adapter, if it says the same as the rest of the file."""
    facts = block.get("adapter") if isinstance(block, dict) else None
    if not isinstance(facts, dict):
        return lora
    if unknown := sorted(facts.keys() - {f.name for f in fields(LoRAConfig)}):
        raise SettingError(f"the block qlab has {unknown[0]!r}, which is unknown to this version.")
    made = LoRAConfig(**facts)
    same = (
        made.kind == lora.kind
        and made.rank == lora.rank
        and isclose(made.scale, lora.scale, rel_tol=1e-6)
    )
    if not same or made.targets(spec) != lora.targets(spec):
        raise SettingError(
            "the block qlab says another adapter than the rest; remove the block to go by the rest."
        )
    return made


def _same_dtype(lora: LoRAConfig, arrays: Arrays) -> tuple[LoRAConfig, Arrays, tuple[str, ...]]:
    """Bring all arrays to one dtype that an adapter may have."""
    dtypes = {array.dtype for array in arrays.values()}
    if not all(mx.issubdtype(dtype, mx.floating) for dtype in dtypes):
        key = next(
            key for key, array in arrays.items() if not mx.issubdtype(array.dtype, mx.floating)
        )
        raise ConfigError(f"{key!r} is {arrays[key].dtype}, not a floating-point number.")
    if dtypes <= {mx.float32} or dtypes <= {mx.bfloat16}:
        return replace(lora, dtype="bfloat16" if mx.bfloat16 in dtypes else "float32"), arrays, ()
    held = " and ".join(sorted(str(dtype).removeprefix("mlx.core.") for dtype in dtypes))
    return (
        replace(lora, dtype="float32"),
        {k: a.astype(mx.float32) for k, a in arrays.items()},
        (f"{held} became float32.",),
    )

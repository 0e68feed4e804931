"""Cutting checkpoint files of any kind."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from layerdrop_fast.prune.checkpoint_folders import prune_folder
from layerdrop_fast.prune.new_output import check_new
from layerdrop_fast.prune.pruned import Choose, Metadata, Pruned
from layerdrop_fast.prune.safetensors_files import prune_safetensors_file
from layerdrop_fast.prune.torch_files import prune_torch_file

SAFETENSORS = (".safetensors",)
SHARD = re.compile(r"-\d+-of-(?!0*1\.)\d+\.\w+$")  # one of several
TORCH = (".pt", ".pth", ".bin", ".ckpt")


def prune_checkpoint(
    source: Path | str,
    out: Path | str,
    choose: Choose,
    *,
    progress: bool = False,
    optimizer: bool = True,
    metadata: Metadata | None = None,
) -> Pruned:
    """Writes a checkpoint of a network cut to fewer layers.

    ``source`` is a safetensors file; a folder as transformers saves it, with ``config.json`` and
    ``model.safetensors`` or ``pytorch_model.bin``, in shards or not; or a file of ``torch.save`` with state dicts in
    it, of which all are cut (the model's, an EMA's), and the optimizers' and the options that say how many layers there
    are, wherever they stand. Such files are read with ``weights_only=True``: nothing in them is executed. ``out`` is a
    file or folder of the same kind.

    Of a folder, tokenizers, other settings and code are copied; weights of another kind, the state of a training and
    folders within it are not, and are named in ``left_out``.

    Tensors without names of layers, such as an EMA's in a list, and settings whose meaning is not known, are left as
    they are, and named in ``left_as_is`` of what is returned.

    An optimizer is cut by the names of its parameters. One without names must have a single group and the parameters of
    the model in the model's order; buffers with well-known names are left out of account.

    Args:
        choose: {prefix: layers to keep}; or a function that gets the lists of layers that the checkpoint has,
            {prefix: number of layers}, and returns that.
        progress: show how many shards are done.
        optimizer: False leaves the optimizers in a file of ``torch.save`` out. Folders' always are.
        metadata: a function of the ``Pruned`` and of the tensors that are written, {name: tensor}, that returns what
            the header of a safetensors file is to say beside its "format", {name: text}. Files of ``torch.save`` and
            shards have no such header.

    Raises:
        ValueError: as ``prune_state_dict`` and ``prune_config``; a source of another kind or broken; an ``out`` of
            another kind or that exists; shards outside of the folder, or with other tensors than their index says;
            state dicts or optimizers of which it is not clear what belongs to which layer. OSError: a file cannot be
            read or written. ``source`` is never written, and ``out`` is there whole or not at all.
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is no folder, expected one to write {out.name} in")
    if source.name.endswith(".index.json") or SHARD.search(source.name):
        raise ValueError(f"{source} is a part of a checkpoint, expected the whole: its folder {source.parent}")
    check_new(out)
    try:
        return _pruned(source, out, choose, progress, optimizer, metadata)
    except RecursionError as error:
        raise ValueError(
            f"{source} holds values within values without an end, expected few levels of dicts and lists"
        ) from error


def _pruned(
    source: Path, out: Path, choose: Choose, progress: bool, optimizer: bool, metadata: Metadata | None
) -> Pruned:
    """``prune_checkpoint`` once there is a source and room for ``out``."""
    if source.is_dir():
        if source.resolve() in out.resolve().parents:
            raise ValueError(f"{out} is inside of {source}, expected another place: the source is left as it is")
        if out.suffix in (*SAFETENSORS, *TORCH):
            raise ValueError(f"{out} is named like a file, expected the name of a folder, as {source} is one")
        return prune_folder(source, out, choose, progress, metadata)
    suffixes = next((kind for kind in (SAFETENSORS, TORCH) if source.suffix in kind), None)
    if suffixes is None:
        raise ValueError(f"{source} is none of a folder, {', '.join((*SAFETENSORS, *TORCH))}")
    if out.suffix not in suffixes:
        raise ValueError(f"{out} is of another kind than {source}, expected {' or '.join(suffixes)}")
    if suffixes is SAFETENSORS:
        return prune_safetensors_file(source, out, choose, metadata)
    return prune_torch_file(source, out, choose, optimizer)

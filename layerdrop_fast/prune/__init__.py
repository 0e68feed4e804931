"""Cutting a trained network to a smaller depth."""

from layerdrop_fast.prune.checkpoint_files import prune_checkpoint
from layerdrop_fast.prune.config import prune_config
from layerdrop_fast.prune.data_driven import DataDriven
from layerdrop_fast.prune.every_other import every_other
from layerdrop_fast.prune.extract import extract
from layerdrop_fast.prune.importance import Importance, layer_importance
from layerdrop_fast.prune.parts import prune_ffn_chunks, prune_heads
from layerdrop_fast.prune.plots import plot_curves, plot_importance
from layerdrop_fast.prune.pruning_curve import pruning_curve
from layerdrop_fast.prune.search import Scored, SearchResult, search
from layerdrop_fast.prune.skip_layers import early_exit, skip_layers
from layerdrop_fast.prune.state_dict import layer_lists, prune_optimizer_state_dict, prune_state_dict

__all__ = [
    "DataDriven",
    "Importance",
    "Scored",
    "SearchResult",
    "early_exit",
    "every_other",
    "extract",
    "layer_importance",
    "layer_lists",
    "plot_curves",
    "plot_importance",
    "prune_checkpoint",
    "prune_config",
    "prune_ffn_chunks",
    "prune_heads",
    "prune_optimizer_state_dict",
    "prune_state_dict",
    "pruning_curve",
    "search",
    "skip_layers",
]

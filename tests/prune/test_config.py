"""prune_config, on configs as transformers and fairseq have them."""

import pytest

from layerdrop_fast.prune import prune_config
from layerdrop_fast.prune.config import left_as_is

BART = {"encoder_layers": 6, "decoder_layers": 6, "num_hidden_layers": 6, "encoder_layerdrop": 0.2, "d_model": 8}
T5 = {"num_layers": 6, "num_decoder_layers": 6, "d_model": 8}
T5_SHORT = {"num_layers": 6, "is_encoder_decoder": True}
QWEN = {
    "num_hidden_layers": 4,
    "layer_types": ["full", "sliding", "full", "sliding"],
    "max_window_layers": 4,
    "vocab": [1, 2, 3, 4],
}
BERT2BERT = {"encoder": {"num_hidden_layers": 4}, "decoder": {"num_hidden_layers": 4}, "is_encoder_decoder": True}
BOTH = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 4}}


@pytest.mark.parametrize(
    ("config", "prefix", "total", "changed"),
    [
        ({"num_hidden_layers": 12, "hidden_size": 8}, "bert.encoder.layer", 12, {"num_hidden_layers": 2}),
        ({"n_layer": 12}, "transformer.h", 12, {"n_layer": 2}),
        (BART, "model.decoder.layers", 6, {"decoder_layers": 2}),
        (BART, "model.encoder.layers", 6, {"encoder_layers": 2, "num_hidden_layers": 2}),
        (T5, "encoder.block", 6, {"num_layers": 2}),
        (T5, "decoder.block", 6, {"num_decoder_layers": 2}),
        (T5_SHORT, "decoder.block", 6, {"num_decoder_layers": 2}),
        (T5_SHORT, "encoder.block", 6, {"num_layers": 2, "num_decoder_layers": 6}),
        ({**T5_SHORT, "num_decoder_layers": None}, "decoder.block", 6, {"num_decoder_layers": 2}),
        (QWEN, "model.layers", 4, {"num_hidden_layers": 2, "layer_types": ["full", "sliding"]}),
        (BERT2BERT, "encoder.encoder.layer", 4, {"encoder": {"num_hidden_layers": 2}}),
        (BERT2BERT, "decoder.bert.encoder.layer", 4, {"decoder": {"num_hidden_layers": 2}}),
        (BOTH, "text_model.layers", 4, {"text_config": {"num_hidden_layers": 2}}),
        (
            {"text_config": {"num_hidden_layers": 4}, "model_type": "x"},
            "layers",
            4,
            {"text_config": {"num_hidden_layers": 2}},
        ),
    ],
)
def test_the_number_of_layers_is_found(config, prefix, total, changed):
    before = repr(config)
    assert prune_config(config, {prefix: [0, 3]}, {prefix: total}) == {**config, **changed}
    assert repr(config) == before


def test_both_sides_at_once():
    keep = {"encoder.layers": [0], "decoder.layers": [0, 1]}
    small = prune_config(BART, keep, {"encoder.layers": 6, "decoder.layers": 6})
    assert (small["encoder_layers"], small["decoder_layers"], small["num_hidden_layers"]) == (1, 2, 1)


def test_lists_of_the_other_side_stay():
    config = {"encoder_layers": 3, "decoder_layers": 3, "decoder_layer_types": [1, 2, 3], "layer_scales": [4, 5, 6]}
    small = prune_config(config, {"encoder.layers": [0, 2]}, {"encoder.layers": 3})
    assert small == {**config, "encoder_layers": 2, "layer_scales": [4, 6]}


def test_a_count_of_something_else_stays():
    config = {"num_hidden_layers": 4, "depth": 7, "n_layers": 4}
    small = prune_config(config, {"layers": [0, 2]}, {"layers": 4})
    assert small == {"num_hidden_layers": 2, "depth": 7, "n_layers": 2}


def test_only_integers_are_counts():
    config = {"num_hidden_layers": 1, "depth": True, "n_layer": 1.0, "n_layers": "1"}
    small = prune_config(config, {"layers": [0]}, {"layers": 1})
    assert all(type(small[name]) is type(config[name]) and small[name] == config[name] for name in config)
    for other in (4.0, "4", None):
        with pytest.raises(ValueError, match=r"the config says \{\}, expected the 4 layers"):
            prune_config({"num_hidden_layers": other}, {"layers": [0]}, {"layers": 4})


def test_names_that_are_numbers():
    config = {"num_hidden_layers": 2, 3: [1, 2]}
    assert prune_config(config, {"layers": [0]}, {"layers": 2}) == {"num_hidden_layers": 1, 3: [1, 2]}
    with pytest.raises(ValueError, match="in one place of it"):
        prune_config({**config, 7: {"num_hidden_layers": 2}}, {"7.layers": [0]}, {"7.layers": 2})


def test_an_encoder_and_decoder_with_one_number_is_refused():
    with pytest.raises(ValueError, match=r"the config says \{\}, expected the 4 layers of 'decoder.layers'"):
        prune_config(
            {"num_hidden_layers": 4, "is_encoder_decoder": True}, {"decoder.layers": [0]}, {"decoder.layers": 4}
        )


@pytest.mark.parametrize(
    ("config", "prefix"), [({"num_hidden_layers": 11}, "layers"), ({"d_model": 3}, "layers"), (BOTH, "layers")]
)
def test_a_config_of_another_model_is_refused(config, prefix):
    with pytest.raises(ValueError, match="expected the 4 layers of 'layers' in one place"):
        prune_config(config, {prefix: [0]}, {prefix: 4})


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ({"layers": [0, 4]}, ValueError, r"layers to keep of 'layers' are \[0, 4\], expected at least one of 0 to 3"),
        ({"layers": [1, 1]}, ValueError, r"are \[1, 1\]"),
        ({"layers": []}, ValueError, r"are \[\]"),
        ({"other": [0]}, ValueError, r"num_layers has \['layers'\], expected 'other' too"),
        ([0], TypeError, "keep is a list"),
    ],
)
def test_what_cannot_be_kept_is_named(keep, error, message):
    config = {"num_hidden_layers": 4, "layer_types": list("abcd")}
    with pytest.raises(error, match=message):
        prune_config(config, keep, {"layers": 4})
    assert config == {"num_hidden_layers": 4, "layer_types": list("abcd")}


def test_what_else_may_number_layers_is_told():
    others = {"max_window_layers": 4, "mlp_only_layers": [1, 3], "first_k_dense_replace": 1, "full_attn_idxs": [2]}
    silent = {"layer_norm_eps": 1e-5, "layerdrop": 0.1, "tie_layers": False, "no_layers": [], "hidden_size": 8}
    config = {"num_hidden_layers": 6, "layer_types": list("ababab"), **others, **silent, "encoder_layer_list": [1]}
    keep = {"decoder.layers": [0, 2, 4]}
    pruned = prune_config(config, keep, {"decoder.layers": 6})
    assert left_as_is(config, pruned, {"decoder.layers": 6}) == others
    nested = {"text_config": config}
    pruned = prune_config(nested, keep, {"decoder.layers": 6})
    assert left_as_is(nested, pruned, {"decoder.layers": 6}) == {
        f"text_config.{name}": value for name, value in others.items()
    }


def test_numbers_of_all_layers_are_not_one_entry_a_layer():
    config = {"n_layer": 4, "mlp_only_layers": [0, 1, 2, 3], "no_rope_layers": [1, 1, 0, 1], "dense_layers": [0, 1]}
    pruned = prune_config(config, {"h": [2, 3]}, {"h": 4})
    assert pruned == {**config, "n_layer": 2, "no_rope_layers": [0, 1]}
    assert set(left_as_is(config, pruned, {"h": 4})) == {"mlp_only_layers", "dense_layers"}
    flags = {"n_layer": 2, "layer_flags": [True, False]}
    assert prune_config(flags, {"h": [1]}, {"h": 2}) == {"n_layer": 1, "layer_flags": [False]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("intermediate_size", [8, 8, 16, 16]),
        ("attention_types", [[["global", "local"], 2]]),
        ("pruned_heads", {"1": [0, 2]}),
        ("quantization_config", {"modules_to_not_convert": ["lm_head", "model.layers.1.mlp"]}),
        ("quantization_config", {"ignore": [r"re:.*layers\.3\..*"]}),
        ("device_map", {"model.layers.0": 0, "lm_head": 1}),
    ],
)
def test_what_is_of_single_layers_is_told(name, value):
    silent = {"vocab": [1, 2, 3], "id2label": {"0": "a"}, "architectures": ["X4"], "version": "4.51.0", "rates": {}}
    config = {"num_hidden_layers": 4, **silent, "quantization": {"skip": ["lm_head"]}, name: value}
    pruned = prune_config(config, {"model.layers": [0, 3]}, {"model.layers": 4})
    assert pruned == {**config, "num_hidden_layers": 2}
    told = {f"{name}.{inner}": of for inner, of in value.items()} if name == "quantization_config" else {name: value}
    assert left_as_is(config, pruned, {"model.layers": 4}) == told


def test_a_side_that_the_config_does_not_tell_is_refused():
    """The decoder's number is not the encoder's, though both are BERTs."""
    config = {"encoder": {"num_hidden_layers": 4}, "decoder": {"num_hidden_layers": 6}}
    with pytest.raises(ValueError, match=r"the config says \{'decoder.num_hidden_layers': 6\}, expected the 4 layers"):
        prune_config(config, {"decoder.bert.encoder.layer": [0]}, {"decoder.bert.encoder.layer": 4})

"""prune_state_dict and prune_optimizer_state_dict, on the names of fairseq, transformers and torch."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from layerdrop_fast import LayerDropModuleList, LayerDropStack
from layerdrop_fast.prune import extract, layer_lists, prune_optimizer_state_dict, prune_state_dict
from tests.prune.blocks import blocks

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def names(prefix, layers, *parts):
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in parts]


CHECKPOINTS = {
    "fairseq": (
        [
            "encoder.version",
            "encoder.embed_tokens.weight",
            *names("encoder.layers", 6, "self_attn.k_proj.weight", "fc1.bias"),
            "decoder.embed_positions._float_tensor",
            *names("decoder.layers", 6, "encoder_attn.out_proj.weight", "fc2.bias"),
            "decoder.layer_norm.weight",
        ],
        "decoder.layers",
    ),
    "bert": (
        [
            "bert.embeddings.LayerNorm.weight",
            *names("bert.encoder.layer", 12, "attention.self.query.weight"),
            "bert.pooler.dense.weight",
            "cls.predictions.bias",
        ],
        "bert.encoder.layer",
    ),
    "llama": (
        [
            "model.embed_tokens.weight",
            *names("model.layers", 11, "mlp.gate_proj.weight", "input_layernorm.weight"),
            "model.norm.weight",
            "lm_head.weight",
        ],
        "model.layers",
    ),
    "mixture": (
        [f"model.layers.{layer}.experts.{expert}.w" for layer in range(4) for expert in range(12)]
        + ["model.norm.weight"],
        "model.layers",
    ),
    "gpt2": (["wte.weight", *names("h", 12, "attn.c_attn.weight", "ln_1.bias"), "ln_f.weight"], "h"),
    "torch": (names("layers", 6, "linear1.weight", "norm1.weight"), "layers"),
}
CHECKPOINTS["a list itself"] = ([f"{layer}.weight" for layer in range(6)], "")


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_kept_layers_are_renumbered_and_all_else_stays(kind):
    found, prefix = CHECKPOINTS[kind]
    state_dict = {name: object() for name in found}
    before = dict(state_dict)
    keep = [0, 2, 3]
    small = prune_state_dict(state_dict, {prefix: keep})
    assert state_dict == before
    dot = f"{prefix}." if prefix else ""
    outside = [name for name in found if not name.startswith(dot) or not name[len(dot) :][0].isdigit()]
    assert {name: small[name] for name in outside} == {name: state_dict[name] for name in outside}
    rests = {name[len(dot) + 2 :] for name in found if name.startswith(f"{dot}0.")}
    for new, old in enumerate(keep):
        for rest in rests:
            assert small[f"{dot}{new}.{rest}"] is state_dict[f"{dot}{old}.{rest}"]
    assert len(small) == len(outside) + len(keep) * len(rests)


def test_the_lists_of_layers_are_found():
    assert layer_lists(CHECKPOINTS["fairseq"][0]) == {"encoder.layers": 6, "decoder.layers": 6}
    assert layer_lists(CHECKPOINTS["mixture"][0]) == {"model.layers": 4}
    assert layer_lists(CHECKPOINTS["a list itself"][0]) == {"": 6}
    assert layer_lists(["weight", "layer1.weight"]) == {}


@pytest.mark.parametrize(
    "wrap", [lambda layers: LayerDropStack(layers, 0.2, seed=1), lambda layers: LayerDropModuleList(0.2, layers)]
)
def test_the_pruned_weights_load_into_the_extracted_model(wrap):
    model = nn.ModuleDict({"stack": wrap(blocks(7)), "head": nn.Linear(4, 2)}).eval()
    keep = [1, 2, 6]
    small = extract(model, keep)
    for weight in small.parameters():
        nn.init.zeros_(weight)
    prefix = "stack.layers" if isinstance(model["stack"], LayerDropStack) else "stack"
    small.load_state_dict(prune_state_dict(model.state_dict(), {prefix: keep}))
    assert torch.equal(small["stack"](X), extract(model, keep)["stack"](X))


def test_both_sides_at_once():
    state_dict = {name: name for name in CHECKPOINTS["fairseq"][0]}
    small = prune_state_dict(state_dict, {"encoder.layers": [5], "decoder.layers": [0, 1]})
    assert layer_lists(small) == {"encoder.layers": 1, "decoder.layers": 2}
    assert small["encoder.layers.0.fc1.bias"] == "encoder.layers.5.fc1.bias"


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ({"decoder.layers": [0, 6]}, ValueError, r"of 'decoder.layers' are \[0, 6\], expected at least one of 0 to 5"),
        ({"decoder.layers": [1, 0]}, ValueError, r"\[1, 0\], expected at least one of 0 to 5, ascending"),
        ({"decoder.layers": [1, 1]}, ValueError, r"\[1, 1\]"),
        ({"decoder.layers": []}, ValueError, r"\[\]"),
        ({"decoder.layers": [-1]}, ValueError, r"layers to keep of 'decoder.layers' are \[-1\], expected"),
        ({"decoder.layers": [1.5]}, TypeError, "must be an integer"),
        (
            {"decoder": [1]},
            ValueError,
            r"no layers decoder.0, decoder.1, ...; found lists of layers: 'encoder.layers' \(6\)",
        ),
        ({"decoder.layers": 3}, TypeError, "layers to keep of 'decoder.layers' are 3 of type int, expected a list of"),
        ({"decoder.layers": [False, True]}, TypeError, "have False, expected integers, not a mask"),
        ([0, 2], TypeError, r"keep is a list, expected \{prefix: layers to keep\}"),
        ({}, ValueError, "keep is empty"),
        (
            {"encoder.layers": [0], "encoder.layers.0": [0]},
            ValueError,
            "'encoder.layers.0' lies within 'encoder.layers'",
        ),
    ],
)
def test_errors_name_both_sides(keep, error, message):
    with pytest.raises(error, match=message):
        prune_state_dict(dict.fromkeys(CHECKPOINTS["fairseq"][0], 0), keep)


def test_missing_layers_are_named():
    with pytest.raises(ValueError, match=r"layers \[1, 3\] of 'layers' are missing, expected 0 to 4"):
        prune_state_dict({f"layers.{layer}.w": 0 for layer in (0, 2, 4)}, {"layers": [0]})


def test_a_number_out_of_all_proportion_is_told_in_a_line():
    with pytest.raises(ValueError, match=r"layers \[1, 2, 3, 4, .*\] and 29999989 more of 'l' are missing") as raised:
        prune_state_dict({"l.0.w": 0, "l.30000000.w": 0}, {"l": [0]})
    assert len(str(raised.value)) < 200


def test_numbers_are_those_of_one_name_each():
    """Zeros before a number, digits of other scripts: what is not counted as Python counts is no layer."""
    others = {"l.00.w": 1, "l.01.w": 2, "l.\u0661.w": 3, "l.12345678901.w": 4}
    state_dict = {"l.0.w": 5, "l.1.w": 6, **others}
    assert layer_lists(state_dict) == {"l": 2}
    assert prune_state_dict(state_dict, {"l": [1]}) == {"l.0.w": 6, **others}


def test_what_all_layers_share_is_not_dropped():
    """T5's first block holds the position biases of all."""
    state_dict = {f"block.{layer}.w": 0 for layer in range(4)} | {"block.0.bias": 1}
    with pytest.raises(ValueError, match=r"layer 0 of 'block' alone has 'bias', which the others may share"):
        prune_state_dict(state_dict, {"block": [1, 3]})
    assert prune_state_dict(state_dict, {"block": [0, 3]}) == {"block.0.w": 0, "block.1.w": 0, "block.0.bias": 1}


@pytest.mark.parametrize("dense", [0, 1])
def test_a_layer_of_another_kind_may_be_dropped(dense):
    """The only one with a dense feed-forward among experts, as in Qwen3-MoE and DeepSeek."""
    rests = [["norm", "mlp.down"] if layer == dense else ["norm", "experts.0", "experts.1"] for layer in range(6)]
    state_dict = {f"layers.{layer}.{rest}": layer for layer, found in enumerate(rests) for rest in found}
    small = prune_state_dict(state_dict, {"layers": [2, 3, 5]})
    assert [small[f"layers.{layer}.experts.1"] for layer in range(3)] == [2, 3, 5]
    with pytest.raises(ValueError, match="layer 4 of 'layers' alone has 'bias'"):
        prune_state_dict({**state_dict, "layers.4.bias": 4}, {"layers": [2, 3, 5]})


def test_two_layers_of_which_one_has_what_both_share():
    state_dict = {"block.0.w": 0, "block.1.w": 0, "block.0.bias": 1}
    with pytest.raises(ValueError, match=r"layer 0 of 'block' alone has 'bias'"):
        prune_state_dict(state_dict, {"block": [1]})
    assert prune_state_dict(state_dict, {"block": [0]}) == {"block.0.w": 0, "block.0.bias": 1}


def trained(named):
    model = nn.ModuleDict({"layers": LayerDropModuleList(0.0, blocks(5)), "head": nn.Linear(4, 2)})
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() > 1]
    others = [(name, p) for name, p in model.named_parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    if not named:
        groups = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model["head"](model["layers"](X)).square().mean().backward()
        optimizer.step()
    return model, optimizer, [name for name, _ in (*matrices, *others)]


@pytest.mark.parametrize("named", [True, False])
def test_the_optimizers_state_goes_with_its_weights(named):
    model, optimizer, order = trained(named)
    keep = {"layers": [1, 4]}
    small = extract(model, keep)
    params = dict(small.named_parameters())
    whole = optimizer.state_dict()
    state = prune_optimizer_state_dict(whole, keep, None if named else order)
    assert len(whole["state"]) == 12
    new = [name for name in order if name in params]
    matrices = [(name, params[name]) for name in new if params[name].dim() > 1]
    others = [(name, params[name]) for name in new if params[name].dim() < 2]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.5}]
    if not named:
        groups = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
    fresh = torch.optim.AdamW(groups, lr=0.3)
    fresh.load_state_dict(state)
    assert [group["weight_decay"] for group in fresh.param_groups] == [0.01, 0.0]
    olds = {"layers.0": "layers.1", "layers.1": "layers.4"}
    before = dict(model.named_parameters())
    for name, weight in (*matrices, *others):
        prefix = name.rpartition(".linear")[0]
        old = before[name.replace(prefix, olds[prefix])] if prefix in olds else before[name]
        assert torch.equal(weight, old)
        assert torch.equal(fresh.state[weight]["exp_avg"], optimizer.state[old]["exp_avg"])
        assert fresh.state[weight]["step"] == 2


def test_an_optimizer_without_names_asks_for_them():
    _, optimizer, order = trained(named=False)
    with pytest.raises(ValueError, match="has no param_names, expected them, or names"):
        prune_optimizer_state_dict(optimizer.state_dict(), {"layers": [0]})
    with pytest.raises(ValueError, match="got 11 names, expected 12"):
        prune_optimizer_state_dict(optimizer.state_dict(), {"layers": [0]}, order[1:])


def test_an_optimizer_whose_parameters_are_names():
    """Of get_optimizer_state_dict: torch's own set_optimizer_state_dict takes what is left."""
    model, optimizer, _ = trained(named=False)
    whole = get_optimizer_state_dict(model, optimizer)
    keep = {"layers": [1, 4]}
    state = prune_optimizer_state_dict(whole, keep)
    small = extract(model, keep)
    groups = [[p for p in small.parameters() if p.dim() > 1], [p for p in small.parameters() if p.dim() < 2]]
    fresh = torch.optim.AdamW([{"params": group} for group in groups], lr=0.3)
    set_optimizer_state_dict(small, fresh, state)
    olds = {"layers.0": "layers.1", "layers.1": "layers.4", "head": "head"}
    for name, weight in small.named_parameters():
        prefix = name.rpartition(".linear")[0] or "head"
        assert torch.equal(
            fresh.state[weight]["exp_avg"], whole["state"][name.replace(prefix, olds[prefix])]["exp_avg"]
        )


def optimizer_of(names):
    """As of an optimizer in which each parameter's state is its name."""
    group = {"lr": 0.1, "params": list(range(len(names))), "param_names": names}
    return {"state": dict(enumerate(names)), "param_groups": [group]}


@pytest.mark.parametrize("trained", [[1, 2, 3, 4], [3], [0, 1, 2]])
def test_layers_that_are_frozen_are_not_missed(trained):
    whole = optimizer_of([f"layers.{layer}.w" for layer in trained] + ["layers.3.adapter", "head.w"])
    keep = {"layers": [1, 3]}
    small = prune_optimizer_state_dict(whole, keep, model=[f"layers.{layer}.w" for layer in range(5)])
    stay = [f"layers.{layer}.w" for layer in trained if layer in (1, 3)] + ["layers.3.adapter", "head.w"]
    assert list(small["state"].values()) == stay
    assert small["param_groups"][0]["params"] == list(range(len(stay)))
    assert small == prune_optimizer_state_dict(whole, keep)


def test_what_an_optimizer_keeps_is_checked():
    whole = optimizer_of(["layers.2.w", "head.w"])
    with pytest.raises(ValueError, match=r"are \[0, 3\], expected at least one of 0 to 2"):
        prune_optimizer_state_dict(whole, {"layers": [0, 3]})
    with pytest.raises(ValueError, match=r"no layers blocks.0, blocks.1, ...; found lists of layers: 'layers' \(3\)"):
        prune_optimizer_state_dict(whole, {"blocks": [0]})
    with pytest.raises(ValueError, match="keep is empty"):
        prune_optimizer_state_dict(whole, {})
    model = [f"layers.{layer}.w" for layer in range(4)]
    assert prune_optimizer_state_dict(whole, {"layers": [0, 3]}, model=model)["state"] == {0: "head.w"}
    with pytest.raises(ValueError, match=r"are \[0, 4\], expected at least one of 0 to 3"):
        prune_optimizer_state_dict(whole, {"layers": [0, 4]}, model=model)


def test_groups_of_which_nothing_is_left_are_dropped():
    """One group a layer, as for learning rates that fall from layer to layer."""

    def optimizer(layers):
        groups = [{"params": list(layer.parameters())} for layer in layers]
        return torch.optim.SGD([*groups, {"params": []}], lr=0.1, momentum=0.9)

    layers = blocks(3)
    whole = optimizer(layers)
    for place, group in enumerate(whole.param_groups):
        group["lr"] = float(place)
    layers[2](layers[1](layers[0](X))).sum().backward()
    whole.step()
    names = [f"layers.{place}.{name}" for place, layer in enumerate(layers) for name, _ in layer.named_parameters()]
    small = optimizer(blocks(2))
    small.load_state_dict(prune_optimizer_state_dict(whole.state_dict(), {"layers": [0, 2]}, names))
    assert [group["lr"] for group in small.param_groups] == [0, 2, 3]
    assert [len(group["params"]) for group in small.param_groups] == [2, 2, 0]


def test_what_is_no_optimizer_state_is_named():
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).named_parameters())
    with pytest.raises(TypeError, match=r"state_dict is a SGD, expected what optimizer.state_dict\(\) returns"):
        prune_optimizer_state_dict(optimizer, {"layers": [0]})
    with pytest.raises(ValueError, match="got 1 names, expected 2, one a parameter of the optimizer"):
        prune_optimizer_state_dict(optimizer.state_dict(), {"layers": [0]}, ["a"])

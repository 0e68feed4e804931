"""torch's layers, ours and back: the same numbers, the same parameters, or an error that says why."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerdrop_fast import TransformerLayer, TransformerStack, ops, set_step
from layerdrop_fast.reference.dropout import dropout
from tests.nn.transformer import BATCH, HEADS, LENGTH, SOURCE, WIDTH, assert_same, results, tensor

X, MEMORY = tensor(BATCH, LENGTH, WIDTH).requires_grad_(), tensor(BATCH, SOURCE, WIDTH, seed=2).requires_grad_()
KINDS = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": F.silu, "GELU tanh": nn.GELU("tanh"), "ReLU": nn.ReLU()}


def torch_layer(kind="encoder", rate=0.0, **keywords):
    """A layer whose biases and norms differ from 0 and 1, and whose epsilons differ."""
    torch.manual_seed(0)
    settings = {"batch_first": True, "norm_first": True, "activation": "gelu", "dtype": torch.float64} | keywords
    layer = KINDS[kind](WIDTH, HEADS, 20, rate, **settings)
    layer.norm2.eps = 0.1
    for weight in layer.parameters():
        if weight.dim() == 1:
            nn.init.normal_(weight, mean=0.5)
    return layer


def leaves_of(kind):
    return (X,) if kind == "encoder" else (X, MEMORY)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_compute_the_same(kind, norm_first, bias, activation):
    theirs = torch_layer(kind, norm_first=norm_first, bias=bias, activation=ACTIVATIONS[activation])
    ours = TransformerLayer.from_torch(theirs)
    back = ours.to_torch()
    expected = results(theirs, theirs, *leaves_of(kind))
    for converted in (ours, back):
        assert dict(converted.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
        out, gradients = results(converted, converted, *leaves_of(kind))
        torch.testing.assert_close(out, expected[0], rtol=1e-10, atol=1e-10)
        # By name: the two list their parameters in different orders.
        inputs = len(leaves_of(kind))
        named = dict(zip([*range(inputs), *dict(converted.named_parameters())], gradients, strict=True))
        wanted = zip([*range(inputs), *dict(theirs.named_parameters())], expected[1], strict=True)
        for name, gradient in wanted:
            torch.testing.assert_close(named[name], gradient, rtol=1e-9, atol=1e-9)
    assert type(back) is KINDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_shared_and_settings_kept(kind):
    theirs = torch_layer(kind, rate=0.3).eval()
    theirs.dropout.p, theirs.linear1.weight.requires_grad = 0.2, False
    ours = TransformerLayer.from_torch(theirs)
    back = ours.to_torch()
    weights = dict(theirs.named_parameters())
    for converted in (ours, back):
        assert all(weight is weights[name] for name, weight in converted.named_parameters())
        assert not any(module.training for module in converted.modules())
    assert (ours.dropout, ours.activation_dropout, ours.self_attn.dropout) == (0.3, 0.2, 0.3)
    assert (back.dropout1.p, back.dropout.p, back.self_attn.dropout) == (0.3, 0.2, 0.3)
    assert [back.norm1.eps, back.norm2.eps] == [ours.norm1.eps, ours.norm2.eps] == [1e-5, 0.1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_of_torch_loads_as_it_is(kind):
    theirs = torch_layer(kind)
    ours = TransformerLayer(WIDTH, HEADS, 20, 0.0, cross_attention=kind == "decoder", dtype=torch.float64)
    ours.norm2.eps = theirs.norm2.eps
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(*leaves_of(kind)), theirs(*leaves_of(kind)), rtol=1e-10, atol=1e-10)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("kept", [[0], [3], [1, 2], [0, 1, 2, 3]])
def test_any_layers_can_be_next_to_each_other(kept):
    layers = [torch_layer(activation=activation) for activation in ("gelu", "relu", F.silu, nn.GELU("tanh"))]
    for number, layer in enumerate(layers):
        layer.norm1.eps = 10.0 ** -(1 + number)
    stack = TransformerStack.from_layers(layers, schedule=[float(i not in kept) for i in range(4)], seed=0)
    every = nn.ModuleList(layers)

    def in_turn(x):
        for index in kept:
            x = layers[index](x)
        return x

    assert_same(results(stack, every, X), results(in_turn, every, X))


class Masks(nn.Module):
    """Dropout of one site, by the reference."""

    def __init__(self, p, key, site):
        super().__init__()
        self.p, self.key, self.site = p, key, torch.tensor(site, dtype=torch.int32)

    def forward(self, x):
        return dropout(x, None, self.p, self.key, self.site)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_stands_where_torch_has_it_with_masks_from_counters(kind, norm_first):
    layers, step, seed = [torch_layer(kind, rate=0.4, norm_first=norm_first) for _ in range(2)], 7, 2**64 - 1
    for layer in layers:
        layer.dropout.p = 0.3
        for name in ("self_attn", "multihead_attn")[: 1 + (kind == "decoder")]:
            getattr(layer, name).dropout = 0.0
    stack = TransformerStack.from_layers(layers, schedule=0.0, seed=seed)
    set_step(stack, step)
    key = ops.step_key(torch.tensor([-1, step, 0]))
    branches = 2 if kind == "encoder" else 3
    # The memo makes the copies share the layers' parameters.
    masked = copy.deepcopy(layers, {id(weight): weight for layer in layers for weight in layer.parameters()})
    for number, layer in enumerate(masked):
        first = ops.FIRST_DROPOUT_SITE + 2 * branches * number
        for branch in range(branches):
            setattr(layer, f"dropout{branch + 1}", Masks(0.4, key, first + 2 * branch))
        layer.dropout = Masks(0.3, key, first + 2 * (branches - 1) + 1)

    def in_turn(x, *memory):
        for layer in masked:
            x = layer(x, *memory)
        return x

    every, leaves = nn.ModuleList(layers), leaves_of(kind)
    assert_same(results(stack, every, *leaves), results(in_turn, every, *leaves))


def changed(**settings):
    layer = torch_layer(rate=0.1)
    for name, value in settings.items():
        owner, _, last = name.rpartition("__")
        setattr(layer.get_submodule(owner.replace("__", ".")), last, value)
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (torch_layer(activation=F.elu), "activation: got <function elu.*expected gelu, relu or silu"),
        (torch_layer(batch_first=False), r"takes \[S, B, D\] \(batch_first=False\), expected .*batch_first=True"),
        (changed(self_attn__add_zero_attn=True), r"\(add_zero_attn=True\), expected add_zero_attn=False"),
        (changed(norm2=nn.RMSNorm(WIDTH)), r"got the norms \['LayerNorm', 'RMSNorm'\], expected LayerNorm alone"),
        (changed(dropout2__p=0.5), r"dropout behind the branches: got the rates \[0.1, 0.5\], expected one"),
        (changed(dropout1=nn.Identity()), "dropout1: got a Identity, expected an nn.Dropout"),
        (changed(self_attn=nn.MultiheadAttention(WIDTH, HEADS, kdim=4, batch_first=True)), "in_proj_weight: got none"),
        (changed(linear2=nn.Linear(20, WIDTH, bias=False)), r"linear2.bias: got none, expected \[12\]"),
        (changed(linear2=nn.Linear(24, WIDTH)), r"linear2.weight: got \[12, 24\], expected \[12, 20\]"),
        (changed(self_attn=nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, batch_first=True)), "bias_k"),
    ],
    ids=lambda value: value if isinstance(value, str) else "layer",
)
def test_layers_that_cannot_be_converted_say_why(layer, message):
    with pytest.raises(ValueError, match=message):
        TransformerLayer.from_torch(layer)


def test_other_classes_are_refused():
    class Other(nn.TransformerEncoderLayer):
        pass

    with pytest.raises(TypeError, match=r"got a Other, expected an nn\.TransformerEncoderLayer"):
        TransformerLayer.from_torch(Other(WIDTH, HEADS))
    with pytest.raises(TypeError, match=r"layer 1: got a Linear, expected an nn\.TransformerEncoderLayer"):
        TransformerStack.from_layers([torch_layer(), nn.Linear(4, 4)])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"norm": "rmsnorm"}, "got {'norm': 'rmsnorm'"),
        ({"activation": "swiglu"}, "'activation': 'swiglu'"),
        ({"num_kv_heads": 1}, "'num_kv_heads': 1, .*'num_kv_heads': 2"),
        ({"rope_theta": 10.0}, "'rope_theta': 10.0, .*'rope_theta': None"),
        ({"layer_scale": 0.1}, "'layer_scale': True.*'layer_scale': False"),
    ],
)
def test_what_torch_lacks_is_named(keywords, message):
    with pytest.raises(ValueError, match=f"torch's layers can't compute this: .*{message}"):
        TransformerLayer(WIDTH, HEADS, 20, **keywords).to_torch()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"d_model": 8}, "got d_model 8, expected d_model 12"),
        ({"nhead": 3}, "got nhead 3, num_kv_heads 3, expected nhead 2, num_kv_heads 2"),
        ({"num_kv_heads": 1}, "got num_kv_heads 1, expected num_kv_heads 2"),
        ({"rope_theta": 10.0}, "got rope_theta 10.0, expected rope_theta None"),
        ({"norm_first": False}, "got norm_first False, expected norm_first True"),
        ({"cross_attention": True}, "got branches 3, expected branches 2"),
    ],
)
def test_a_stack_names_the_first_layer_of_another_shape(keywords, message):
    alike = [TransformerLayer(WIDTH, HEADS), TransformerLayer(WIDTH, HEADS, 20, 0.5, "relu", 0.1, norm="rmsnorm")]
    TransformerStack.from_layers(alike)
    other = TransformerLayer(**({"d_model": WIDTH, "nhead": HEADS} | keywords))
    with pytest.raises(ValueError, match=f"layer 2: {message}, as layer 0 has"):
        TransformerStack.from_layers([*alike, other])


def test_a_stack_of_no_layers_is_refused():
    with pytest.raises(ValueError, match="layers: got none, expected at least one"):
        TransformerStack.from_layers([])

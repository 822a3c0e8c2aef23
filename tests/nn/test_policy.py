"""Rules without Flax: which recipe a path gets, and which rules are refused."""

import pytest

import lowbit_jax as lb
from lowbit_jax.nn.policy import Node, assign, make_policy

TWO, FOUR = lb.quest(2), lb.quest(4)
NODES = [
    Node(("",), "Model"),
    Node(("positions",), "Positions", opaque=("table",)),
    Node(("embed",), "Embed", layer=True, by_name=True),
    Node(("blocks",), "List"),
    Node(("blocks/0",), "Block"),
    Node(("blocks/0/mlp",), "Linear", layer=True),
    Node(("blocks/0/norm",), "LayerNorm"),
    Node(("blocks/1",), "Block"),
    Node(("blocks/1/mlp",), "Linear", layer=True),
    Node(("head", "tied"), "Linear", layer=True),
]


def assigned(*rules, recipe=None):
    return assign(make_policy(recipe, list(rules)), NODES)


def test_without_rules_every_layer_gets_the_recipe():
    every = {"blocks/0/mlp", "blocks/1/mlp", "head", "tied"}
    assert assigned() == dict.fromkeys(every, lb.quest(4))
    assert assigned(recipe=TWO) == dict.fromkeys(every, TWO)


def test_the_first_rule_that_names_a_layer_decides():
    got = assigned(("blocks/0/mlp", TWO), ("blocks", FOUR), ("head|tied", None))
    assert got == {"blocks/0/mlp": TWO, "blocks/1/mlp": FOUR}


def test_a_rule_names_all_that_is_inside():
    assert assigned(("blocks/1", TWO)) == {"blocks/1/mlp": TWO}
    assert assigned(("blocks", None)) == {"head": lb.quest(4), "tied": lb.quest(4)}


def test_the_default_recipe_is_left_out_when_rules_bring_one():
    assert set(assigned((".*/mlp", TWO))) == {"blocks/0/mlp", "blocks/1/mlp"}
    assert assigned((".*/mlp", TWO), recipe=FOUR)["head"] == FOUR


def test_an_embedding_takes_a_recipe_by_its_own_name_alone():
    assert assigned(("embed", TWO)) == {"embed": TWO}
    assert assigned(("embed", TWO), recipe=FOUR)["embed"] == TWO
    inside = [Node(("decoder",), "Decoder"), Node(("decoder/embed",), "Embed", layer=True, by_name=True)]
    inside += [Node(("decoder/mlp",), "Linear", layer=True)]
    take = lambda *rules: assign(make_policy(None, list(rules)), inside)
    assert take(("decoder", TWO)) == {"decoder/mlp": TWO}
    assert take(("decoder", TWO), ("decoder/embed", FOUR)) == {"decoder/mlp": TWO, "decoder/embed": FOUR}
    with pytest.raises(ValueError, match="has no effect"):
        take(("decoder", None), ("decoder/embed", FOUR))
    whole = [Node(("",), "Embed", layer=True, by_name=True)]
    assert assign(make_policy(TWO, None), whole) == {"": TWO}


def test_a_catch_all_passes_over_what_computes_in_its_own_code():
    """The root, and an attention with a table of its own, which hold layers; a rule for one of them reaches these."""
    table = dict(opaque=("table",), own_code=True)
    nodes = [Node(("",), "Model", **table), Node(("attn",), "Attention", **table)]
    nodes += [Node(("attn/qkv",), "Linear", layer=True), Node(("head",), "Linear", layer=True)]
    take = lambda *rules: assign(make_policy(None, list(rules)), nodes)
    assert take(("head", None), (".*", TWO)) == {"attn/qkv": TWO}
    assert take(("attn", TWO)) == take(("attn/.*", TWO)) == {"attn/qkv": TWO}
    assert assigned((".*", TWO)) == dict.fromkeys(("embed", "blocks/0/mlp", "blocks/1/mlp", "head", "tied"), TWO)
    with pytest.raises(ValueError, match="'attn' names nothing but .* attn is an Attention with its own table"):
        assign(make_policy(TWO, [("attn", FOUR)]), [*nodes[:2], nodes[3]])


def test_patterns_match_whole_paths():
    with pytest.raises(ValueError, match=r"'mlp' matches nothing.*did you mean '\.\*mlp\.\*'"):
        assigned(("mlp", TWO))


@pytest.mark.parametrize(
    "rules, words",
    [
        ([("blcks/0", TWO)], "matches nothing.*'blocks/0'"),
        ([("blocks/*/mlp", TWO)], r"matches nothing.*for this glob write 'blocks/\.\*/mlp'"),
        ([("*mlp", TWO)], "not a regular expression"),
        ([("(?!head).*", TWO)], "lookaround.*earlier rule with None"),
        ([("positions", TWO)], "cannot be quantized: positions is a Positions with its own table"),
        ([(".*norm", TWO)], "cannot be quantized: blocks/0/norm is a LayerNorm"),
        ([("positions", TWO), (".*", FOUR)], "'positions' names nothing but .* its own table.*or drop it"),
        ([("blocks", TWO), ("blocks/0", None)], "'blocks/0' has no effect.*put special cases first"),
        ([("head", TWO)], "head and tied are one shared layer"),
        ([(".*", None)], "leave all 4 layers in high precision"),
    ],
)
def test_rules_that_cannot_take_effect_raise(rules, words):
    with pytest.raises(ValueError, match=words):
        assigned(*rules)


@pytest.mark.parametrize(
    "recipe, way_out",
    [
        (4, r"lb\.quest\(4\)"),
        ("quest", r"lb\.methods\.get\('quest'\)"),
        (lb.quest, r"quest\(\.\.\.\)"),
        (lb.quest_quantizer(4), r"lb\.LinearRecipe\(out=lb\.Gemm"),
        (4.0, r"lb\.quest\(4\)"),
    ],
)
def test_what_is_no_recipe_is_told_the_way_out(recipe, way_out):
    with pytest.raises(TypeError, match=way_out):
        make_policy(recipe, None)
    with pytest.raises(TypeError, match=way_out):
        make_policy(None, [("head", recipe)])


@pytest.mark.parametrize("rules", ["head", [("head",)], [(1, TWO)], ["ab"], 3])
def test_what_is_no_rule_raises(rules):
    with pytest.raises(TypeError, match="pattern, recipe or None"):
        make_policy(None, rules)


def test_a_recipe_that_quantizes_nothing_raises():
    with pytest.raises(ValueError, match="quantizes no operand"):
        make_policy(lb.LinearRecipe(name="empty"), None)


def test_a_model_without_layers_raises():
    with pytest.raises(ValueError, match="found no layer that it can quantize among Positions"):
        assign(make_policy(None, None), NODES[1:2])


def test_weights_without_a_sign_raise():
    """Half of them would be 0; for activations behind a ReLU such a format is right."""
    unsigned = lb.Quantizer(format=lb.formats.UINT4)
    with pytest.raises(ValueError, match="uint4 for weights.*INT4"):
        make_policy(lb.LinearRecipe(out=lb.Gemm(rhs=unsigned)), None)
    make_policy(lb.LinearRecipe(out=lb.Gemm(lhs=unsigned)), None)

"""The rules of a decoder-only transformer, the recipe's and others of the usual names."""

from lowbit_jax.parallel.rules import Rules

DECODER = Rules.of(
    ("(embed|embedding|embed_tokens|token_embed)/embedding", ("tensor", "fsdp")),
    ("(qkv|query|key|value|[qkv]_proj|gate_up|gate|up|gate_proj|up_proj|lm_head|head)/kernel", (None, "output")),
    ("(attention/out|attn/out|out_proj|o_proj|down|down_proj)/kernel", ("tensor", "fsdp")),
    logical={"output": ("tensor", "fsdp")},
)
"""A decoder with weights of shape (input, output): what feeds heads or hidden units is cut along its outputs, what
gathers them along its inputs, as in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, section 3). `fsdp` always cuts
outputs: a row of a weight, and so its fit, its rotation and its packed bytes, lies whole on one device unless `tensor`
cuts it."""

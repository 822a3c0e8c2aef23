"""NNX: an `nnx.Embed` whose table is quantized, or packed, in both of its uses."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lowbit_jax.nn import embedding
from lowbit_jax.nn.product import Product


class QuantizedEmbed(nnx.Embed):
    """What `lb.quantize` makes of an `nnx.Embed`: the same parameter, and `product` beside it."""

    product: Product

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        if out_sharding is not None:
            raise NotImplementedError(
                f"the embedding {self.product.site.path!r} is quantized, and takes no out_sharding. Constrain its"
                " result, or leave it out by a rule."
            )
        dtype = self.dtype or self.param_dtype
        return embedding.lookup(self.embedding[...], inputs, self.product.recipe, self.product.site, dtype)

    def attend(self, query: Array, out_sharding: Any = None) -> Array:
        table = self.embedding[...]
        query, _ = self.promote_dtype((query, jnp.zeros((), table.dtype)), dtype=self.dtype)
        options = {} if out_sharding is None else {"out_sharding": out_sharding}
        return embedding.attend(query, table, self.product.recipe, self.product.site, **options)

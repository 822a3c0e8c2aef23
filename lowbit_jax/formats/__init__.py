"""Which values can an element take? `formats.E2M1`, `formats.get("e2m1")`, `formats.names()`."""

from lowbit_jax.formats.base import BlockFormat as BlockFormat
from lowbit_jax.formats.base import Codebook as Codebook
from lowbit_jax.formats.base import FloatFormat as FloatFormat
from lowbit_jax.formats.base import Format as Format
from lowbit_jax.formats.base import Grid as Grid
from lowbit_jax.formats.base import IntFormat as IntFormat
from lowbit_jax.formats.base import MidRiseFormat as MidRiseFormat
from lowbit_jax.formats.catalogue import *  # noqa: F403
from lowbit_jax.formats.catalogue import get as get
from lowbit_jax.formats.catalogue import names as names

"""Checks the shapes and dtypes in every signature of the library while tests run, given
`pytest --jaxtyping-packages=lowbit_jax,tests.typechecker.check`. Tests of bad arguments then meet its error first."""

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeException

_CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float, as type checkers have it


def check(function):
    """`function` with its arguments and answer checked; as it is where a hint cannot be checked (plain protocols)."""
    try:
        return beartype(function, conf=_CONF)
    except BeartypeException:
        return function

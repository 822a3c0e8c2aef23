"""The mesh: sizes from words and numbers, axes of type Auto, and what cannot be made."""

import socket

import jax
import pytest
from jax.sharding import AxisType

import lowbit_jax as lb
from lowbit_jax.parallel import make_mesh, parse_mesh


def test_every_mesh_has_the_three_axes():
    mesh = make_mesh(data=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}, "explicit axes make a row-parallel product raise"


def test_sizes_as_text_and_the_rest():
    assert parse_mesh(" data=2, fsdp = 4 ,tensor=-1") == {"data": 2, "fsdp": 4, "tensor": -1}
    assert dict(make_mesh("data=-1,tensor=2").shape) == {"data": 2, "fsdp": 1, "tensor": 2}
    assert dict(make_mesh({"data": 2}, expert=2).shape) == {"data": 2, "fsdp": 1, "tensor": 1, "expert": 2}


def test_fewer_devices_than_there_are():
    assert list(make_mesh(data=2).devices.flat) == jax.devices()[:2]
    chosen = jax.devices()[2:4]
    assert list(make_mesh(fsdp=2, devices=chosen).devices.flat) == chosen


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 8}, "data=8 is 8 devices, and 4 are present.*device_count=8"),
        ({"data": 2, "fsdp": 4}, "data=2 x fsdp=4 is 8 devices"),
        ({"data": 0}, "'data' has size 0"),
        ({"data": -2}, "'data' has size -2"),
        ({"data": 2.0}, "'data' has size 2.0"),
        ({"data": -1, "fsdp": -1}, "Only one axis may be"),
        ({"data": 3, "fsdp": -1}, "cannot take what is left of 4 devices after 3"),
        ("data=2,dta=2", "no axis 'dta'.*Did you mean 'data'"),
        ("data=2,data=2", "is not axis=size"),
        ("data", "is not axis=size"),
        ("data=two", "is not axis=size"),
    ],
)
def test_what_cannot_be_made(sizes, words):
    with pytest.raises(ValueError, match=words):
        make_mesh(sizes)


def test_an_axis_given_twice():
    with pytest.raises(ValueError, match="'data'.*twice"):
        make_mesh("data=2", data=2)


class TestStart:
    """Only what fails before anything is started; real processes run in tests/recipes/test_processes.py."""

    @pytest.mark.parametrize(
        ("place", "words"),
        [
            (("localhost:1", None, 0), "give all three, or none"),
            (("localhost", 2, 0), "give host:port"),
            (("localhost:99999", 2, 0), "give host:port"),
            ((":80", 2, 0), "give host:port"),
            (("localhost:8080", 2, 2), "process 2 of 2.*from 0 to 1"),
            (("localhost:8080", 0, 0), "process 0 of 0"),
        ],
    )
    def test_arguments_that_do_not_fit(self, place, words):
        with pytest.raises(ValueError, match=words):
            lb.parallel.start(*place)

    def test_too_late(self):
        jax.devices()
        with pytest.raises(RuntimeError, match="first in the program"):
            lb.parallel.start("localhost:8080", 2, 0, timeout_s=1)

    def test_nobody_there(self):
        with socket.socket() as taken:  # bound, but not listening
            taken.bind(("localhost", 0))
            place = f"localhost:{taken.getsockname()[1]}"
            with pytest.raises(RuntimeError, match=f"process 1 waits for all 2 processes at {place}.*Nobody answered"):
                lb.parallel.start(place, 2, 1, timeout_s=1)

"""Messages against msgpack itself and the layout that openpi-client packs, and what a stranger may send instead."""

import pickle
import sys

import msgpack
import numpy as np
import pytest

from z1_jax.errors import UserError
from z1_jax.serve import wire


def packed_as_openpi(value):
    """An array or NumPy number as openpi-client 0.1.2 lays it out."""
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return value


def test_arrays_and_numbers_arrive_as_they_were(rng):
    for dtype in ("|u1", "<i8", "<f2", "<f4", ">f8", "|b1", "<u2"):
        for shape in ((), (3,), (2, 0, 4), (2, 3, 4)):
            array = np.asarray(rng.integers(0, 2, shape)).astype(dtype)
            for sent in (msgpack.packb({"x": array}, default=packed_as_openpi), wire.pack({"x": array})):
                got = wire.unpack(sent)["x"]
                assert got.dtype == array.dtype and got.shape == array.shape
                np.testing.assert_array_equal(got, array)
    numbers = {"a": np.float32(1.5), "b": np.int64(-3), "c": np.bool_(True), "d": 2.5, "e": [1, None, "x"], "f": {}}
    got = wire.unpack(msgpack.packb(numbers, default=packed_as_openpi))
    assert got == numbers and got["a"].dtype == np.float32
    assert wire.unpack(wire.pack(numbers)) == {**numbers, "a": 1.5}


def test_a_prompt_may_be_numpys_text():
    for prompt in (np.array("öffne die Tür"), np.str_("öffne die Tür")):
        assert wire.unpack(msgpack.packb({"prompt": prompt}, default=packed_as_openpi)) == {"prompt": "öffne die Tür"}


class Exploding:
    """Unpickled it would end this process."""

    def __reduce__(self):
        return sys.exit, (1,)


def array(data=b"\0" * 8, dtype="<f4", shape=(2,), **more):
    return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape, **more}


BAD = {
    "object array": array(pickle.dumps(Exploding()), "|O", (1,)),
    "structured dtype": array(b"\0" * 8, "i4,f4", (1,)),
    "dtype that is a class": array(b"\0" * 8, "datetime64[ns]", (1,)),
    "void": array(b"\0" * 8, "|V8", (1,)),
    "complex": array(b"\0" * 8, "<c8", (1,)),
    "dtype that is a list": array(b"\0" * 8, [["a", "<f4"]], (2,)),
    "texts in an array": array("ab".encode("utf-32-le"), "<U1", (2,)),
    "text of another length": array("abc".encode("utf-32-le"), "<U2", ()),
    "text of no characters": array(b"\xff\xff\xff\xff", "<U1", ()),
    "too few bytes": array(b"\0" * 7),
    "too many bytes": array(b"\0" * 12),
    "negative size": array(shape=(-1, -2)),
    "huge size": array(shape=(1 << 40, 1 << 40)),
    "no shape": array(shape=None),
    "many axes": array(b"\0" * 4, shape=(1,) * 9),
    "truth as a size": array(b"\0" * 4, shape=(True,)),
    "data that are text": array("aaaaaaaa"),
    "no data": {b"__ndarray__": True},
    "number of no kind": {b"__npgeneric__": True, b"data": 3, b"dtype": "|O"},
    "number that is bytes": {b"__npgeneric__": True, b"data": b"\0\0\0\0", b"dtype": "<f4"},
    "number too large": {b"__npgeneric__": True, b"data": 3000, b"dtype": "|i1"},
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_plain_is_refused(what):
    with pytest.raises(wire.MessageError, match="holds a") as caught:
        wire.unpack(msgpack.packb({"state": BAD[what]}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_what_is_no_msgpack_is_refused(rng):
    for message in (b"", b"\xc1", b"\x81", b"\x81\xa1a", msgpack.packb({}) + b"x", pickle.dumps(Exploding()), "text"):
        with pytest.raises(wire.MessageError):
            wire.unpack(message)
    for _ in range(300):
        message = rng.bytes(int(rng.integers(1, 60)))
        try:
            wire.unpack(message)  # a few bytes may happen to be msgpack
        except wire.MessageError:
            pass


def test_claims_of_size_are_refused_before_anything_is_allocated():
    nest = b"\xdd\x00\xff\xff\xff" * 1000 + b"\x00" * (1 << 20)  # a thousand arrays of 16 million, one in another
    for message in (nest, b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x91" * 5000):
        with pytest.raises(wire.MessageError, match="is no msgpack that this server reads"):
            wire.unpack(message)
    with pytest.raises(wire.MessageError, match="no msgpack"):
        wire.unpack(msgpack.packb({"x": msgpack.ExtType(5, b"abc")}))


def test_only_plain_values_are_packed():
    for value in (np.array([None]), object(), np.array(["a"]), 1 << 70):
        with pytest.raises(wire.MessageError, match="cannot be packed"):
            wire.pack({"x": value})


def test_a_missing_package_names_the_extra():
    with pytest.raises(
        UserError, match=r"needs the package nowhere_at_all: install it with pip install 'z1-jax\[serve\]'"
    ):
        wire.package("nowhere_at_all.inside")

"""The reader of state dicts gives what PyTorch gives, and refuses what state dicts do not need."""

import io
import pickle
import struct
import time
import zipfile
from collections import OrderedDict

import pytest
import torch as th
from torch import nn

from sb3_ppo_plus import UntrustedFileError
from sb3_ppo_plus.untrusted.tensor_file import load_tensors

CPU = th.device("cpu")


def saved(value, **how):
    file = io.BytesIO()
    th.save(value, file, **how)
    return file.getvalue()


def archive(pickled, **members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        for name, content in ({"data.pkl": pickled, "byteorder": "little", "version": "3\n"} | members).items():
            opened.writestr(f"archive/{name}", content)
    return file.getvalue()


def refused(data, match, **how):
    # Of this process: a loaded machine does not prolong it
    started = time.process_time()
    with pytest.raises(UntrustedFileError, match=match):
        load_tensors(data, "policy.pth", CPU, **how)
    assert time.process_time() - started < 5


def trained(optimizer_class, **settings):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = optimizer_class(net.parameters(), **settings)
    for _ in range(2):
        net(th.randn(5, 3)).sum().backward()
        optimizer.step()
    return net, optimizer


STATES = {
    "module": lambda: trained(th.optim.Adam)[0].state_dict(),
    "adam": lambda: trained(th.optim.Adam, amsgrad=True)[1].state_dict(),
    "sgd": lambda: trained(th.optim.SGD, lr=0.1, momentum=0.9)[1].state_dict(),
    "dtypes": lambda: {
        str(dtype): th.ones(3, 2).to(dtype)
        for dtype in (th.float16, th.bfloat16, th.float64, th.int8, th.uint8, th.int16, th.int32, th.int64, th.bool)
    },
    "complex": lambda: {"a": th.randn(3, dtype=th.complex64), "b": th.randn(3, dtype=th.complex128)},
    "shapes": lambda: {"": th.tensor(1.0), "empty": th.empty(0, 3), "5d": th.randn(1, 2, 1, 3, 2)},
    "transposed": lambda: {"a": th.randn(3, 4).T, "b": th.randn(2, 3, 4, 4).to(memory_format=th.channels_last)},
    "parameter": lambda: {"a": nn.Parameter(th.randn(3)), "b": nn.Parameter(th.randn(3), requires_grad=False)},
    "numbers": lambda: {"a": 1, "b": -(2**40), "c": 0.5, "d": None, "e": True, "f": "é", "g": (1, 2), "h": [3, [4]]},
    "keys": lambda: {0: 1, 2**20: 2, "a": 3},
    "long numbers": lambda: {"a": 255, "b": 65536, "c": 2**33, "d": -1, "e": 2**62, "f": 1e300},
    "many": lambda: {f"{index}": th.tensor(float(index)) for index in range(1000)},
    "list": lambda: [th.randn(2), {"a": ()}],
}


def assert_equal(value, expected):
    assert type(value) is type(expected) or (isinstance(value, th.Tensor) and isinstance(expected, th.Tensor))
    if isinstance(expected, th.Tensor):
        assert value.dtype is expected.dtype and value.stride() == expected.stride()
        assert th.equal(value, expected)
    elif isinstance(expected, dict):
        assert list(value) == list(expected)
        assert getattr(value, "_metadata", None) == getattr(expected, "_metadata", None)
        for key, item in expected.items():
            assert_equal(value[key], item)
    elif isinstance(expected, list | tuple):
        assert len(value) == len(expected)
        for item, expected_item in zip(value, expected, strict=True):
            assert_equal(item, expected_item)
    else:
        assert value == expected


@pytest.mark.parametrize("is_legacy", [False, True], ids=["archive", "before 1.6"])
@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_state_dicts_are_read_as_pytorch_reads_them(make, is_legacy):
    data = saved(make(), _use_new_zipfile_serialization=not is_legacy)
    value = load_tensors(data, "policy.pth", CPU, allows_legacy=True)
    assert_equal(value, th.load(io.BytesIO(data), weights_only=True))


@pytest.mark.parametrize("is_legacy", [False, True], ids=["archive", "before 1.6"])
def test_tensors_that_share_memory_share_it_again(is_legacy):
    base = th.randn(10)
    data = saved({"a": base[:4], "b": base[2:6]}, _use_new_zipfile_serialization=not is_legacy)
    value = load_tensors(data, "policy.pth", CPU, allows_legacy=True)
    value["a"][2] = 7.0
    assert value["b"][0] == 7.0


def test_settings_that_groups_share_are_read():
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    optimizer = th.optim.Adam([{"params": part.parameters()} for part in net])
    assert_equal(load_tensors(saved(optimizer.state_dict()), "policy.pth", CPU), optimizer.state_dict())


# What PyTorch would take


def nested_tuple(depth):
    """A tuple that holds the same tuple twice, which does so too, and so on: 2**depth places in a few bytes."""
    return b"\x80\x02)" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(depth))


HOSTILE = {
    "bytearray": (pickle.dumps({"a": bytearray(8)}, 2), "bytearray"),
    "much memory": (b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "__builtin__ bytearray"),
    "endless key": (b"\x80\x02}" + nested_tuple(60)[2:] + b"K\x01s.", "a tuple is used twice"),
    "endless value": (nested_tuple(60) + b".", "a tuple is used twice"),
    "list in itself": (b"\x80\x02]q\x00h\x00a.", "a list is used twice"),
    "dict in itself": (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "a dict is used twice"),
    "tuple as key": (pickle.dumps({(1, 2): 3}, 2), "is no key"),
    "large key": (b"\x80\x02}\x8a\x0a" + b"\xff" * 9 + b"\x00K\x01s.", "is no key"),
    "negative key": (pickle.dumps({-1: 3}, 2), "is no key"),
    "key of 21 bits": (pickle.dumps({2**20 + 1: 3}, 2), "is no key"),
    "float as key": (pickle.dumps({0.5: 1}, 2), "is no key"),
    "large integer": (pickle.dumps({"a": 2**500}, 2), "has 501 bits"),
    "many digits": (b"\x80\x02I" + b"9" * 100_000 + b"\n.", "integer string conversion|INT"),
    "deep": (b"\x80\x02" + b"]" * 1000 + b"a" * 999 + b".", "more than 8 levels"),
    "many operations": (b"\x80\x02" + b"]0" * 300_000 + b"].", "operation POP is not allowed"),
    "many marks": (b"\x80\x02" + b"(" * 600_000 + b".", "more than 500000 operations"),
    "many lists": (b"\x80\x02](" + b"]" * 600_000 + b"e.", "more than 500000 operations"),
    "large pickle": (b"\x80\x02X" + struct.pack("<I", 2**23) + b"a" * 2**23 + b".", "at most 4194304"),
    "text that is not there": (b"\x80\x02X\xff\xff\xff\x7fa.", "expected"),
    "end that is not there": (b"\x80\x02}", "not enough|exhausted|truncated|STOP|end"),
    "nothing": (b"", "exhausted|end"),
    "stack that is empty": (b"\x80\x02a.", "IndexError"),
    "two values": (b"\x80\x02]].", "too many values"),
    "os.system": (b"cos\nsystem\n(X\x04\x00\x00\x00truetR.", "os system"),
    "class instance": (pickle.dumps(pytest.Class, 0), "not allowed"),
    "set": (pickle.dumps({1, 2}, 2), "set"),
    "rebuild of another tensor": (b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n)R.", "_rebuild_sparse_tensor"),
    "dict called with content": (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "cannot be called"),
    "attribute": (b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\x00\x00\x00aK\x01sb.", "has no attributes"),
    "attribute of a list": (b"\x80\x02]}X\x09\x00\x00\x00_metadata}sb.", "a list has no attributes"),
}


@pytest.mark.parametrize(("pickled", "match"), HOSTILE.values(), ids=HOSTILE)
def test_what_state_dicts_do_not_need_is_refused(pickled, match):
    refused(archive(pickled), match)


@pytest.mark.parametrize("name", ["bytearray", "endless key", "os.system"])
def test_the_format_before_1_6_has_the_same_limits(name):
    pickled, match = HOSTILE[name]
    prefix = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    refused(b"".join([*prefix, pickled, pickle.dumps([], 2)]), match, allows_legacy=True)


def metadata(entry):
    state = OrderedDict(a=th.zeros(1))
    state._metadata = OrderedDict({"": entry})
    return saved(state)


@pytest.mark.parametrize("entry", [{"assign_to_params_buffers": True}, {"version": "1"}, {"version": [1]}])
def test_metadata_holds_versions_only(entry):
    assert load_tensors(metadata({"version": 1}), "policy.pth", CPU)._metadata == {"": {"version": 1}}
    refused(metadata(entry), "no version of a module")


# Places in the memory


def with_tensor(offset, size, stride, n_numbers=4, n_bytes=16, kind="FloatStorage", key="0", others=()):
    """A file with one tensor whose place in its storage is as given, and others with other sizes of this storage."""

    class Tensor:
        def __init__(self, n_numbers):
            self.storage = Storage(n_numbers)

        def __reduce__(self):
            return th._utils._rebuild_tensor_v2, (self.storage, offset, size, stride, False, OrderedDict())

    class Storage:
        def __init__(self, n_numbers):
            self.n_numbers = n_numbers

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", getattr(th, kind), key, "cpu", value.n_numbers) if isinstance(value, Storage) else None

    file = io.BytesIO()
    Pickler(file, 2).dump({"a": Tensor(n_numbers), "more": [Tensor(other) for other in others]})
    return archive(file.getvalue(), **{"data/0": bytes(range(n_bytes))})


def test_a_tensor_at_a_place_of_its_storage_is_read():
    tensor = load_tensors(with_tensor(1, (2,), (2,)), "policy.pth", CPU)["a"]
    assert tensor.view(th.int32).tolist() == [int.from_bytes(bytes(range(k, k + 4)), "little") for k in (4, 12)]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((1, (4,), (1,)), "ends behind its storage"),
        ((4, (1,), (1,)), "ends behind its storage"),
        ((0, (2,), (4,)), "ends behind its storage"),
        ((0, (5,), (0,)), "more elements than numbers"),
        ((0, (10**12,), (0,)), "no shape|more elements than numbers"),
        ((0, (2**39, 2**39), (0, 0)), "more elements than numbers"),
        ((-1, (1,), (1,)), "no shape, stride or offset"),
        ((0, (-1,), (1,)), "no shape, stride or offset"),
        ((0, (2,), (-1,)), "no shape, stride or offset"),
        ((0, (True,), (1,)), "no shape, stride or offset"),
        ((0, (1.0,), (1,)), "no shape, stride or offset"),
        ((0, (2,), (1, 1)), "cannot have the shape"),
        ((0, (1,) * 40, (2,) * 40), "cannot have the shape"),
        ((0, [2], [1]), "no shape, stride or offset"),
        ((0, (2,), (1,), 5), "must have 20 bytes, got 16"),
        ((0, (2,), (1,), 2**50), "bytes"),
        ((0, (2,), (1,), -1), "cannot have -1 numbers"),
        ((0, (2,), (1,), 4, 16, "BoolStorage"), "must have 4 bytes"),
        ((0, (2,), (1,), 4, 4, "BoolStorage"), "no bool"),
        ((0, (2,), (1,), 4, 16, "QInt8Storage"), "QInt8Storage"),
        ((0, (2,), (1,), 4, 16, "FloatStorage", "1"), "KeyError"),
        ((0, (2,), (1,), 4, 16, "FloatStorage", "../0"), "KeyError"),
        ((0, (2,), (1,), 4, 16, "FloatStorage", 0), "no kind of storage"),
    ],
    ids=str,
)
def test_a_tensor_at_no_place_of_its_storage_is_refused(arguments, match):
    refused(with_tensor(*arguments), match)


def test_a_storage_with_two_descriptions_is_refused():
    load_tensors(with_tensor(0, (2,), (1,), others=(4,)), "policy.pth", CPU)
    refused(with_tensor(0, (2,), (1,), others=(3,)), "'0' is described twice")


def test_another_byte_order_is_refused():
    refused(archive(pickle.dumps({}, 2), byteorder="big"), "byte order")


def test_two_archives_in_one_are_refused():
    file = io.BytesIO(archive(pickle.dumps({}, 2)))
    with zipfile.ZipFile(file, "a") as opened:
        opened.writestr("other/data.pkl", pickle.dumps({}, 2))
    refused(file.getvalue(), "files of 2 archives")


def test_many_tensors_of_one_storage_are_refused():
    base = th.zeros(1000)
    assert len(load_tensors(saved({str(n): base[:] for n in range(8)}), "policy.pth", CPU)) == 8
    refused(saved({str(n): base[:] for n in range(9)}), "the storage '0' has more than 8 tensors")


def with_a_long_list(form, n_members=300_000):
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, *[0] * 7, 4, *[0] * 6)
    entries = b"".join(entry + struct.pack("<I", number) for number in range(n_members))
    size = len(entries)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, min(n_members, 2**16 - 1), min(n_members, 2**16 - 1), size, 0, 0)
    if form == "a decoy behind":
        return entries + end[:-2] + struct.pack("<H", 4) + b"PK\5\6"
    if form == "a decoy inside":
        # In the position of the list, which nobody reads before
        return entries + end[:16] + b"PK\5\6" + b"\0\0"
    if form == "ZIP64":
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 46, 0, 0)
        record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, n_members, n_members, size, 0)
        return entries + record + struct.pack("<4sLQL", b"PK\6\7", 0, size, 1) + end
    return entries + end


@pytest.mark.parametrize("form", ["plain", "ZIP64", "a decoy inside", "a decoy behind"])
def test_a_long_list_of_members_is_not_read(form, monkeypatch):
    read = []
    decode = zipfile.ZipInfo._decodeExtra
    monkeypatch.setattr(zipfile.ZipInfo, "_decodeExtra", lambda *arguments: (read.append(1), decode(*arguments)))
    refused(with_a_long_list(form), "lists its members in 15000000 bytes|is no readable zip archive")
    assert not read
    if form in ("plain", "ZIP64"):
        refused(with_a_long_list(form), "lists its members in 15000000 bytes; at most")


def test_an_archive_with_a_comment_and_with_zip64_is_read():
    file = io.BytesIO(saved({"a": th.ones(2)}))
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = b"x" * (2**16 - 1)
    assert th.equal(load_tensors(file.getvalue(), "policy.pth", CPU)["a"], th.ones(2))
    assert b"PK\6\6" in saved({"a": th.ones(2)})

"""Files of weights that are damaged or made to harm, by name, with words of the error that each must give.

A case is a folder that a user names as weights: what its files hold, or where they link to.
"""

import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from weight_files import entry, npy, npz, safetensors

SECRET = "secret"  # a file outside of the folder


class Link(NamedTuple):
    """A symbolic link, relative to the folder it lies in."""

    target: str


class Case(NamedTuple):
    files: dict[str, bytes | Link]
    words: str  # pattern


def write(case: Case, folder: Path) -> Path:
    """Makes the folder, and beside it the files that links lead to. Returns the folder."""
    folder.mkdir()
    (folder.parent / SECRET).write_bytes(WHOLE)
    (folder.parent / f"{SECRET}.safetensors").write_bytes(WHOLE)
    (folder.parent / f"{SECRET}.json").write_text("{}")
    for name, content in case.files.items():
        if isinstance(content, Link):
            os.symlink(content.target, folder / name)
        else:
            (folder / name).write_bytes(content)
    return folder


WHOLE = safetensors({"w": entry()})
HALF = entry(shape=(4, 2), offsets=(0, 32))
OTHER_HALF = entry(shape=(4, 2), offsets=(32, 64))
ARRAY = np.arange(12, dtype=np.float32).reshape(3, 4)
CONFIG = b'{"architecture": "vit"}'


def _model(header: Any, words: str, data: bytes = bytes(64), length: int | None = None) -> Case:
    return Case({"model.safetensors": safetensors(header, data, length)}, f"model.safetensors.*{words}")


def _raw(content: bytes, words: str) -> Case:
    return Case({"model.safetensors": content}, f"model.safetensors.*{words}")


def _member(content: bytes, words: str, name: str = "w.npy", compression: int = zipfile.ZIP_STORED) -> Case:
    return Case({"a.npz": npz({name: content}, compression)}, f"a.npz.*{words}")


def _zip(content: bytes, words: str) -> Case:
    return Case({"a.npz": content}, f"a.npz.*{words}")


def _config(content: bytes | Link, words: str, name: str = "config.json") -> Case:
    return Case({"model.safetensors": WHOLE, name: content}, f"{name}.*{words}")


def _index(content: Any, words: str, **shards: bytes | Link) -> Case:
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    files = {f"{name}.safetensors": shard for name, shard in shards.items()}
    return Case({"model.safetensors.index.json": content, **files}, words)


def _weight_map(**shard_of: str) -> dict[str, Any]:
    return {"metadata": {}, "weight_map": shard_of}


def _patched(content: bytes, old: bytes, new: bytes, count: int = -1) -> bytes:
    assert old in content and len(old) == len(new)
    return content.replace(old, new, count)


def _pickled() -> bytes:
    """A pickle that would make a file if it were loaded."""
    array = np.empty(1, object)
    text = f"cos\nsystem\n(S'touch {SECRET}-was-run'\ntR.".encode()
    return npy(array).partition(b"\n")[0] + b"\n" + text


def _flags(content: bytes, flags: int) -> bytes:
    """The zip with the flags of its only member set, in both of its headers."""
    local, central = content.index(b"PK\x03\x04") + 6, content.index(b"PK\x01\x02") + 8
    changed = bytearray(content)
    for offset in (local, central):
        changed[offset : offset + 2] = struct.pack("<H", flags)
    return bytes(changed)


def _directory(content: bytes, offset: int, field: str, value: int) -> bytes:
    """The zip with a field of its first member's entry in the directory changed."""
    start = content.index(b"PK\x01\x02") + offset
    size = struct.calcsize(field)
    return content[:start] + struct.pack(field, value) + content[start + size :]


def _end(content: bytes, offset: int, field: str, value: int) -> bytes:
    """The zip with a field of the record at its end changed."""
    start = content.rindex(b"PK\x05\x06") + offset
    return content[:start] + struct.pack(field, value) + content[start + struct.calcsize(field) :]


def _large_directory() -> bytes:
    """A zip of as many empty members as fit in 4 MB."""
    entry_ = b"PK\x01\x02" + bytes(24) + struct.pack("<HHH", 2, 0, 0) + bytes(12) + b"ab"
    directory = entry_ * ((4 << 20) // len(entry_))
    counts = len(directory) // len(entry_) % 65536
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, counts, counts, len(directory), 0, 0)
    return directory + end


def _bomb(size: int) -> bytes:
    """A compressed member of `size` zeros, which its header says are weights."""
    head = npy(np.empty(0, np.float32), shape=(size // 4,))
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = packer.compress(head)
    check, zeros = zlib.crc32(head), bytes(1 << 20)
    for _ in range(size >> 20):
        data, check = data + packer.compress(zeros), zlib.crc32(zeros, check)
    data += packer.flush()
    name, full = b"w.npy", len(head) + size
    common = struct.pack("<5H3L2H", 20, 0, zipfile.ZIP_DEFLATED, 0, 0, check, len(data), full, len(name), 0)
    local = b"PK\x03\x04" + common + name
    central = b"PK\x01\x02" + struct.pack("<H", 20) + common + struct.pack("<HHHLL", 0, 0, 0, 0, 0) + name
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(central), len(local) + len(data), 0)
    return local + data + central + end


NESTED = b"[" * 100_000 + b"]" * 100_000
FLAT = b"[" + b"[]," * 2_000_000 + b"[]]"  # 6 MB, which take 400 when they are parsed
DEEP = b'{"a":[' + (b"[" * 900 + b"]" * 900 + b",") * 2_300 + b"0]}"  # 4 MB, which take 200
KEYS = b"{" + b",".join(b'"%x":0' % number for number in range(380_000)) + b',"0":0}'  # 4 MB, which are parsed
ONE_SHARD = _weight_map(w="a.safetensors")
_NUMPY = npz({"w.npy": npy(ARRAY)})
_LARGE = npz({"w.npy": npy(np.zeros((128, 128), np.float32))})
_PACKED = npz({"w.npy": npy(np.zeros((128, 128), np.float32))}, zipfile.ZIP_DEFLATED)

CASES: dict[str, Case] = {
    # the length of a safetensors header
    "empty file": _raw(b"", "is no complete safetensors file .header too small.*fetch the file again"),
    "four bytes": _raw(b"\x10\0\0\0", "is no complete safetensors file .header too small"),
    "no header": _raw(struct.pack("<Q", 100), "is no complete .*invalid header length"),
    "header of 2^60": _model({"w": entry()}, "header claims 1152921504606846976 bytes.*fetch", length=1 << 60),
    "header of 2^64-1": _model({"w": entry()}, "header claims 18446744073709551615 bytes", length=(1 << 64) - 1),
    "header of 50 MB": _model({"w": entry()}, "header claims 50000000 bytes", length=50_000_000),
    "header ends after the file": _model({"w": entry()}, "invalid header length", length=4000),
    "header ends too early": _model({"w": entry()}, "invalid JSON", length=20),
    "header of length 0": _model(b"", "invalid JSON|too small"),
    "a picture": _raw(b"\x89PNG\r\n\x1a\n" + bytes(500), "header claims 727905341920923785 bytes"),
    "a pickle": _raw(b"\x80\x04\x95" + bytes(500), "is no complete .*invalid header length|claims"),
    # its syntax
    "header that is no UTF-8": _model(b'{"\xff\xfe": 1}', "UTF-8"),
    "header that is no JSON": _model(b"{'w': 1}", "invalid JSON"),
    "header that is a list": _model([], "invalid JSON in header: invalid type: sequence"),
    "header that is a number": _model(7, "invalid JSON in header: invalid type: integer"),
    "header with two values": _model(json.dumps({"w": entry()}).encode() * 2, "invalid JSON in header: trailing"),
    "header of nested brackets": _model(b'{"w":' + NESTED + b"}", "recursion limit"),
    "header of nested objects": _model(b'{"w":' * 100_000, "recursion limit|invalid type"),
    "metadata that is a list": _model({"__metadata__": [], "w": entry()}, "invalid JSON .*expected a map"),
    "metadata of numbers": _model({"__metadata__": {"a": 1}, "w": entry()}, "invalid JSON .*expected a string"),
    "entry that is a list": _model({"w": ["F32", [4, 4], [0, 64]]}, "'w' has no dtype, shape and data_offsets"),
    "entry without a shape": _model({"w": {"dtype": "F32", "data_offsets": [0, 64]}}, "missing field `shape`"),
    "entry without offsets": _model({"w": {"dtype": "F32", "shape": [4, 4]}}, "missing field `data_offsets`"),
    "three offsets": _model({"w": entry(offsets=(0, 32, 64))}, "invalid JSON"),
    "the same name twice": _model(
        b'{"w":%b,"w":%b}' % (json.dumps(entry()).encode(), json.dumps(entry(shape=(8, 2))).encode()),
        "header: cannot be read as JSON .*the key 'w' occurs twice",
    ),
    # its numbers
    "negative offset": _model({"w": entry(offsets=(-4, 60))}, "invalid value: integer `-4`"),
    "offsets that overlap": _model({"v": HALF, "w": entry(shape=(4, 2), offsets=(16, 48))}, "invalid offset .*`w`"),
    "two tensors at one offset": _model({"v": entry(), "w": entry()}, "invalid offset for tensor"),
    "a hole between tensors": _model({"v": HALF, "w": entry(shape=(4, 1), offsets=(48, 64))}, "invalid offset"),
    "a hole at the beginning": _model({"w": OTHER_HALF}, "invalid offset for tensor `w`"),
    "offsets after the end": _model({"w": entry(shape=(4, 8), offsets=(0, 128))}, "not fully covered"),
    "offsets in the wrong order": _model({"w": entry(offsets=(64, 0))}, "invalid"),
    "offset of 2^63": _model({"w": entry(offsets=(0, 1 << 63))}, "is no complete .*invalid shape"),
    "offset of 2^70": _model({"w": entry(offsets=(0, 1 << 70))}, "is no complete .*invalid JSON"),
    "cut short": _raw(WHOLE[:-1], "not fully covered.*fetch the file again"),
    "bytes after the end": _raw(WHOLE + b"\0", "not fully covered"),
    "shape of another product": _model({"w": entry(shape=(4, 3))}, "invalid shape"),
    "shape of a product above 2^64": _model({"w": entry(shape=(1 << 40, 1 << 40))}, "overflow computing buffer size"),
    "shape whose product wraps to the size": _model({"w": entry(shape=(1 << 62, 4, 4))}, "overflow"),
    "negative shape": _model({"w": entry(shape=(-4, -4))}, "invalid value: integer `-4`"),
    "shape of fractions": _model({"w": entry(shape=(4.0, 4))}, "invalid type: floating point"),
    "shape of text": _model({"w": entry(shape=("4", 4))}, "invalid type: string"),
    "empty tensor of a huge shape": _model({"w": entry(shape=(0, 1 << 62), offsets=(0, 0))}, "no tensor has", b""),
    "shape of 1,000 axes": _model({"w": entry(shape=(1,) * 1000 + (4, 4))}, "has 1002 axes"),
    "unknown dtype": _model({"w": entry("Q4")}, "unknown variant `Q4`"),
    "dtype of 4 bits": _model({"w": entry("F4", (16, 8))}, "'w' is of F4, which is not read; save it as F32"),
    "dtype that is an object": _model({"w": entry({"F32": None})}, "'w' has no dtype"),  # type: ignore[arg-type]
    "dtype that is a number": _model({"w": entry(4)}, "invalid JSON"),  # type: ignore[arg-type]
    # names
    "empty name": _model({"": entry()}, "expected a name of 1 to 500 printable characters"),
    "name with a line break": _model({"w\nerror: all is well": entry()}, r"'w\\nerror: all is well': expected a name"),
    "name that clears a terminal": _model({"\x1b[2J": entry()}, r"'\\x1b\[2J': expected a name"),
    "bad offsets and a bad name": _model({"\x1b[2J\n": entry(offsets=(1, 65))}, r"`\\x1b\[2J\\n`"),
    "name of a megabyte": _model({"w" * 1_000_000: entry()}, r"'w+\.\.\.': expected a name"),
    "60,000 tensors without an element": _model(
        {f"{number:x}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for number in range(60_000)},
        "not fully covered",
    ),
    # an index and its shards
    "index that is a list": _index([], "index.json: expected a JSON object, found list"),
    "index that is nested": _index(NESTED, "index.json: cannot be read as JSON"),
    "index without a map": _index({"metadata": {}}, "index.json: expected 'weight_map'"),
    "index with an empty map": _index(_weight_map(), "index.json: expected 'weight_map'"),
    "index with a list as map": _index({"weight_map": ["a.safetensors"]}, "index.json: expected 'weight_map'"),
    "index with numbers for names": _index({"weight_map": {"w": 1}}, "index.json: expected 'weight_map'"),
    "index with a name twice": _index(
        b'{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "index.json: .*the key 'w' occurs twice"
    ),
    "shard in another folder": _index(_weight_map(w=f"../{SECRET}.safetensors"), r"names the shard '\.\./secret"),
    "shard with an absolute path": _index(_weight_map(w="/etc/a.safetensors"), "names the shard '/etc/a.safetensors'"),
    "shard that is no safetensors": _index(_weight_map(w="pytorch_model.bin"), "names the shard 'pytorch_model.bin'"),
    "shard with a NUL": _index(_weight_map(w="a\0.safetensors"), r"names the shard 'a\\x00.safetensors'"),
    "shard that links out of the folder": _index(
        ONE_SHARD, "a.safetensors: is a link to .*secret, outside of its folder", a=Link(f"../{SECRET}")
    ),
    "shard that is a loop of links": _index(ONE_SHARD, "names the shard a.safetensors", a=Link("a.safetensors")),
    "shard that is missing": _index(ONE_SHARD, "names the shard a.safetensors, which is not beside it; fetch"),
    "shard that is cut": _index(ONE_SHARD, "a.safetensors: is no complete .*not fully covered", a=WHOLE[:-4]),
    "shard without the tensor": _index(_weight_map(w="a.safetensors", v="a.safetensors"), "'v' is not in a", a=WHOLE),
    "tensor in two shards": _index(
        _weight_map(w="a.safetensors", v="b.safetensors"),
        "b.safetensors: holds tensor 'w', which is in a.safetensors by model.safetensors.index.json",
        a=WHOLE,
        b=safetensors({"v": HALF, "w": OTHER_HALF}),
    ),
    "tensor that the index does not name": _index(
        _weight_map(v="a.safetensors"), "'w', which is nowhere by model", a=safetensors({"v": HALF, "w": OTHER_HALF})
    ),
    "index of more than 4 MiB": _index(FLAT, "index.json: is larger than 4 MiB"),
    # links
    "weights that link out of the folder": Case(
        {"model.safetensors": Link(f"../{SECRET}")}, "model.safetensors: is a link to .*secret, outside"
    ),
    "weights that link to nothing": Case({"model.safetensors": Link("gone")}, "model.safetensors: cannot be read"),
    "weights that link to a device": Case({"model.safetensors": Link("/dev/zero")}, "is a link to /dev/zero, outside"),
    "config that links out of the folder": _config(Link(f"../{SECRET}.json"), "is a link to .*secret.json, outside"),
    "config that links to nothing": _config(Link("gone.json"), "cannot be read .*No such file"),
    # configs
    "config that is a list": _config(b"[1, 2]", "expected a JSON object, found list"),
    "config that is text": _config(b'"vit"', "expected a JSON object, found str"),
    "config that is empty": _config(b"", "cannot be read as JSON"),
    "config that is no JSON": _config(b"architecture: vit", "cannot be read as JSON"),
    "config that is no UTF-8": _config(b'{"a": "\xff"}', "cannot be read as JSON .*utf-8"),
    "config of 100,000 brackets": _config(NESTED, "cannot be read as JSON .*recursion"),
    "config of 100,000 objects": _config(b'{"a":' * 100_000, "cannot be read as JSON .*recursion"),
    "config of 6 MB": _config(FLAT, "is larger than 4 MiB"),
    "config of 4 MB of lists": _config(DEEP, "has more than 200000 lists and objects"),
    "config of 380,000 keys": _config(KEYS, "has more than 100000 keys"),
    "header of 4 MB of lists": _model(b'{"__metadata__":{},"a":' + DEEP + b"}", "recursion limit"),
    "config with a number of 5,000 digits": _config(b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as JSON .*digits"),
    "config that says all twice": _config(b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
    "preprocessor that is a list": _config(b"[]", "found list", "preprocessor_config.json"),
    # zips
    "npz that is empty": _zip(b"", "cannot be read .*not a zip file"),
    "npz that is no zip": _zip(b"hello" * 100, "cannot be read .*not a zip file"),
    "npz that is cut": _zip(_NUMPY[:-40], "cannot be read .*not a zip file"),
    "npz without its beginning": _zip(_NUMPY[60:], "cannot be read"),
    "npz of a pickle": _zip(b"\x80\x04\x95" + bytes(100), "cannot be read .*not a zip file"),
    "member that is pickled": _member(_pickled(), "holds pickled objects, which are never loaded"),
    "member that is pickled and compressed": _member(
        _pickled(), "holds pickled objects, which are never loaded", compression=zipfile.ZIP_DEFLATED
    ),
    "member of records": _member(npy(np.zeros(3, "f4,i4")), "expected numbers"),
    "member of records with objects": _member(npy(np.zeros(0, "f4,O")), "holds pickled objects"),
    "member of text": _member(npy(np.array(["vit"])), "is of <U3, expected numbers"),
    "member of dates": _member(npy(np.zeros(3, "M8[s]")), "expected numbers"),
    "member of three void bytes": _member(npy(np.zeros(3, "V3")), r"is of \|V3, expected numbers"),
    "member of big-endian numbers": _member(npy(np.zeros(3, ">f4")), "big-endian numbers; save it as little-endian"),
    "member that is no array": _member(b"import os", "'setup.py' is no array", "setup.py"),
    "member in another folder": _member(b"x", r"'\.\./\.\./x' is no array", "../../x"),
    "member with no magic": _member(b"hello" * 20, "magic string is not correct"),
    "member that is empty": _member(b"", "cannot be read .*magic string"),
    "member of version 9": _member(b"\x93NUMPY\x09\x00" + npy(ARRAY)[8:], "version"),
    "member of version 3": _member(b"\x93NUMPY\x03\x00" + npy(ARRAY)[8:], r"version \(3, 0\)"),
    "header of 4 GB": _member(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100), "cannot be read .*header"),
    "header of 4 GB, compressed": _member(
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 3_000_000,
        "cannot be read .*header",
        "w.npy",
        zipfile.ZIP_DEFLATED,
    ),
    "header that calls a function": _member(
        _patched(npy(ARRAY), b"'descr': '<f4'", b"'descr': f(1) "), "cannot be read .*malformed node"
    ),
    "header of minus signs": _member(npy(ARRAY, shape=type("", (), {"__repr__": lambda _: "-" * 9000})()), "cannot be"),
    "header that lacks the order": _member(
        _patched(npy(ARRAY), b"'fortran_order'", b"'fortran_ordes'"), "cannot be read .*keys"
    ),
    "order that is text": _member(npy(ARRAY, fortran_order="F"), "cannot be read .*fortran_order is not a valid bool"),
    "shape that is larger": _member(npy(ARRAY, shape=(3, 5)), r"is float32 \[3, 5\] by its header, which takes 188"),
    "shape that is smaller": _member(npy(ARRAY, shape=(3, 3)), r"is float32 \[3, 3\] by its header"),
    "shape of 2^80": _member(npy(ARRAY, shape=(1 << 40, 1 << 40)), "which no tensor has"),
    "shape of 2^62": _member(npy(ARRAY, shape=(1 << 31, 1 << 29)), "by its header, which takes"),
    "shape that is negative": _member(npy(ARRAY, shape=(-3, -4)), "which no tensor has"),
    "member whose shape is text": _member(npy(ARRAY, shape="(3, 4)"), "cannot be read .*shape is not valid"),
    "dtype that is larger": _member(npy(ARRAY, descr="<f8"), r"is float64 \[3, 4\] by its header"),
    "dtype that does not exist": _member(npy(ARRAY, descr="<q9"), "cannot be read .*descr"),
    "the same member twice": _zip(npz({"w.npy": npy(ARRAY), "v.npy": npy(ARRAY)}).replace(b"v.npy", b"w.npy"), "twice"),
    "member with a name of control characters": _member(npy(ARRAY), "expected a name", "\x1b[2J\n.npy"),
    "member that is encrypted": _zip(_flags(_NUMPY, 1), "is encrypted; unpack it"),
    "member of patches": _zip(_flags(_NUMPY, 0x20), "cannot be read"),
    "member packed by bzip2": _member(npy(ARRAY), "save it again by numpy.savez", compression=zipfile.ZIP_BZIP2),
    "member packed by lzma": _member(npy(ARRAY), "save it again by numpy.savez", compression=zipfile.ZIP_LZMA),
    "member with two names": _zip(_patched(_NUMPY, b"w.npy", b"v.npy", 1), "cannot be read .*differ"),
    "member with two sizes": _zip(_directory(_LARGE, 20, "<L", 60_000), "has two sizes"),
    "member that is larger than the zip": _zip(_directory(_NUMPY, 20, "<L", 1 << 31), "overlaps what follows it"),
    "member that claims 4 GB": _zip(_directory(_NUMPY, 24, "<L", (1 << 32) - 2), "claim to unpack to 4294967294"),
    "member far after the end": _zip(_directory(_NUMPY, 42, "<L", 1 << 30), "cannot be read"),
    "members that overlap": _zip(
        _directory(npz({"w.npy": npy(ARRAY), "v.npy": npy(ARRAY)}), 20, "<L", 250), "'w.npy' overlaps what follows it"
    ),
    "directory of 4 MB": _zip(_large_directory(), "its directory is larger than 2 MiB"),
    "directory of 4 GB": _zip(_end(_NUMPY, 12, "<L", (1 << 32) - 2), "cannot be read"),
    "directory before the file": _zip(_end(_NUMPY, 16, "<L", 1 << 31), "cannot be read"),
    "zip bomb of 200 MB": _zip(_bomb(200 << 20), "claim to unpack to 209715328, as no weights do"),
    "zip bomb that claims to be small": _zip(_directory(_PACKED, 24, "<L", 20_000), "by its header, which takes"),
    # no weights
    "empty folder": Case({}, "holds no weights; expected model.safetensors .* found an empty folder"),
    "config alone": Case({"config.json": CONFIG}, "holds no weights; .* found config.json"),
    "two safetensors": Case(
        {"a.safetensors": WHOLE, "b.safetensors": WHOLE}, "holds a.safetensors, b.safetensors; name one of these"
    ),
    "torch's pickle alone": Case(
        {"config.json": CONFIG, "pytorch_model.bin": b"\x80"}, r"pytorch_model.bin: .bin is not read; .*import torch"
    ),
}

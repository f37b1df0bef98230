"""Damaged safetensors files: refused with a reason, or loaded to finite numbers; fast, and in little memory.

Taken are both golden files (and the golden model), and tiny models of the recipes kmeans and best. A mutation is a kind and
a number: together they seed all that is random in it. Nothing here needs torch: a file is a header in JSON and bytes.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from campaign import Case, seeded
from worker import Complaint, Worker

TITLE, COUNTED = "mutated files", ("tracebacks", "hangs", "non-finite models", "large allocations")
SHORT = 45
SOURCES = ("golden-v1", "golden-v3", "golden-v1-mixed", "kmeans", "best")
EACH = 4  # of each mutation and source
BASE_BYTES = 64e6  # that loading anything may take: its decoded weights, modules not imported before
NOT_FINITE = {"F16": (0x7C00, 0xFC00, 0x7E00), "F32": (0x7F800000, 0xFF800000, 0x7FC00000)}
SIZE = {"F16": 2, "F32": 4, "U8": 1, "I64": 8, "BF16": 2, "I32": 4, "F64": 8}


class Tensors:
    """A safetensors file, taken apart."""

    def __init__(self, content: bytes):
        (length,) = struct.unpack("<Q", content[:8])
        self.header: dict[str, Any] = json.loads(content[8 : 8 + length])
        self.body = bytearray(content[8 + length :])

    @property
    def names(self) -> list[str]:
        return sorted(name for name in self.header if name != "__metadata__")

    def span(self, name: str) -> slice:
        return slice(*self.header[name]["data_offsets"])

    def bytes(self, header: str | None = None) -> bytes:
        text = (header or json.dumps(self.header)).encode()
        return struct.pack("<Q", len(text)) + text + self.body


Mutation = Callable[[bytes, random.Random], bytes]


def flipped_bits(content: bytes, r: random.Random) -> bytes:
    tensors = Tensors(content)
    for _ in range(r.choice((1, 3, 30))):
        tensors.body[r.randrange(len(tensors.body))] ^= 1 << r.randrange(8)
    return tensors.bytes()


def flipped_header(content: bytes, r: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    changed = bytearray(content)
    for _ in range(r.choice((1, 3, 30))):
        changed[r.randrange(8 + length)] ^= 1 << r.randrange(8)
    return bytes(changed)


def truncated(content: bytes, r: random.Random) -> bytes:
    return content[: r.choice((0, 7, 8, 100, len(content) - 1, r.randrange(len(content))))]


def extended(content: bytes, r: random.Random) -> bytes:
    return content + r.randbytes(r.choice((1, 8, 4096)))


def header_length(content: bytes, r: random.Random) -> bytes:
    return struct.pack("<Q", r.choice((0, 1, 2**31, 2**63 - 1, 2**64 - 1, len(content)))) + content[8:]


def another_header(content: bytes, r: random.Random) -> bytes:
    texts = ("[]", "null", "{", "{}", "[" * 50_000, '{"a":' * 20_000, '{"__metadata__": 1}', '"x"', '{"x": 1}', "\x00" * 100)
    return Tensors(content).bytes(r.choice(texts))


def changed_shape(content: bytes, r: random.Random) -> bytes:
    tensors = Tensors(content)
    entry = tensors.header[r.choice(tensors.names)]
    shape = entry["shape"]
    entry["shape"] = r.choice(([], [0], shape[::-1], [1, *shape], [2**40], [-1], ["2"], None, [2**32, 2**32], [*shape, 0]))
    return tensors.bytes()


def changed_shape_and_bytes(content: bytes, r: random.Random) -> bytes:
    """A tensor with a different number of values, in a file that is as it should be."""
    tensors = Tensors(content)
    name = r.choice(tensors.names)
    count = r.choice((0, 1, 2, 3, 5, 1000))
    size = SIZE[tensors.header[name]["dtype"]]
    return with_bytes(tensors, name, r.randbytes(0) + b"\1" * (count * size), shape=[count])


def changed_dtype(content: bytes, r: random.Random) -> bytes:
    tensors = Tensors(content)
    tensors.header[r.choice(tensors.names)]["dtype"] = r.choice(
        ("F64", "F32", "BF16", "F16", "I8", "BOOL", "F8_E4M3", "X", None)
    )
    return tensors.bytes()


def another_dtype(content: bytes, r: random.Random) -> bytes:
    """The right number of values, in a type of another size."""
    tensors = Tensors(content)
    name = r.choice(tensors.names)
    entry = tensors.header[name]
    dtype = r.choice([dtype for dtype in SIZE if dtype != entry["dtype"]])
    count = (tensors.span(name).stop - tensors.span(name).start) // SIZE[entry["dtype"]]
    return with_bytes(tensors, name, bytes(count * SIZE[dtype]), dtype=dtype)


def with_bytes(tensors: Tensors, name: str, content: bytes, **entry: Any) -> bytes:
    """The file with other bytes, type or shape of one tensor; all offsets right."""
    header, body = {}, bytearray()
    for each in sorted(tensors.names, key=lambda n: tensors.span(n).start):
        values = content if each == name else tensors.body[tensors.span(each)]
        header[each] = {**tensors.header[each], **(entry if each == name else {})}
        header[each]["data_offsets"] = [len(body), len(body) + len(values)]
        body += values
    tensors.header, tensors.body = header, body
    return tensors.bytes()


def changed_offsets(content: bytes, r: random.Random) -> bytes:
    tensors = Tensors(content)
    entry = tensors.header[r.choice(tensors.names)]
    start, stop = entry["data_offsets"]
    new = ([stop, start], [0, stop - start], [start, 2**50], [-1, stop], [start + 1, stop + 1], "x", None)
    entry["data_offsets"] = r.choice(new)
    return tensors.bytes()


def renamed(content: bytes, r: random.Random) -> bytes:
    tensors = Tensors(content)
    name = r.choice(tensors.names)
    layer, _, last = name.rpartition(".")
    others = (
        f"{layer}.x",
        f"x.{last}",
        last,
        f"{layer}.codebook",
        f"{layer}.coded_weight",
        f"{layer}.coded_integers",
        f"{layer}.weight",
        "",
        ".codebook",
    )
    new = r.choice([other for other in others if other not in tensors.header])
    tensors.header[new] = tensors.header.pop(name)
    return tensors.bytes()


def without(content: bytes, r: random.Random) -> bytes:
    tensors = Tensors(content)
    name = r.choice(tensors.names)
    tensors.header = {each: tensors.header[each] for each in tensors.names if each != name}
    return with_bytes(tensors, "", b"")


def with_another(content: bytes, r: random.Random) -> bytes:
    tensors = Tensors(content)
    name = r.choice(tensors.names)
    last = r.choice(("row_scale", "codebook", "coded_weight", "coded_integers", "side_models", "weight", "bias", "\x1b[31m"))
    tensors.header.setdefault(
        f"{name.rpartition('.')[0]}.{last}",
        {"dtype": "U8", "shape": [8], "data_offsets": [len(tensors.body), len(tensors.body) + 8]},
    )
    tensors.body += bytes(8)
    return tensors.bytes()


def swapped(content: bytes, r: random.Random) -> bytes:
    """Two tensors change places."""
    tensors = Tensors(content)
    first, second = r.sample(tensors.names, 2)
    tensors.header[first], tensors.header[second] = tensors.header[second], tensors.header[first]
    return tensors.bytes()


def not_finite(content: bytes, r: random.Random) -> bytes:
    tensors = Tensors(content)
    floating = [name for name in tensors.names if tensors.header[name]["dtype"] in NOT_FINITE]
    dtype = tensors.header[name := r.choice(floating)]["dtype"]
    values = r.choice(NOT_FINITE[dtype]).to_bytes(SIZE[dtype], "little")
    span = tensors.span(name)
    at = span.start + SIZE[dtype] * r.randrange((span.stop - span.start) // SIZE[dtype])
    tensors.body[at : at + len(values)] = values
    return tensors.bytes()


def all_the_same(content: bytes, r: random.Random) -> bytes:
    """A tensor of nothing but one byte."""
    tensors = Tensors(content)
    span = tensors.span(r.choice(tensors.names))
    tensors.body[span] = bytes([r.choice((0, 1, 127, 255))]) * (span.stop - span.start)
    return tensors.bytes()


def random_bytes(content: bytes, r: random.Random) -> bytes:
    tensors = Tensors(content)
    span = tensors.span(r.choice([name for name in tensors.names if tensors.header[name]["dtype"] == "U8"]))
    tensors.body[span] = r.randbytes(span.stop - span.start)
    return tensors.bytes()


def last_word(content: bytes, r: random.Random) -> bytes:
    """The end of a stream is where its reader begins."""
    tensors = Tensors(content)
    span = tensors.span(r.choice([name for name in tensors.names if tensors.header[name]["dtype"] == "U8"]))
    tensors.body[max(span.start, span.stop - 4) : span.stop] = r.choice((bytes(4), b"\xff" * 4, r.randbytes(4)))[
        : span.stop - span.start
    ]
    return tensors.bytes()


MUTATIONS: tuple[Mutation, ...] = (
    flipped_bits, flipped_header, truncated, extended, header_length, another_header, changed_shape, changed_shape_and_bytes,
    changed_dtype, another_dtype, changed_offsets, renamed, without, with_another, swapped, not_finite, all_the_same,
    random_bytes, last_word,
)  # fmt: skip


def check(source: str, mutate: Mutation, seed: int, name: str, worker: Worker, home: Path) -> Iterator[Complaint]:
    r = seeded(seed, name)
    folder = shutil.copytree(worker.folder / source, home / source)
    path = min(folder.rglob("diffusion_pytorch_model.safetensors"), key=str)
    path.write_bytes(mutate(path.read_bytes(), r))
    outcome = worker.run(home, "load", source, r.choice(("load", "forward")), r.choice(("float32", "float16", "bfloat16")))
    yield from outcome.complaints(growth=int(BASE_BYTES + 2 * path.stat().st_size))
    for line in outcome.output.splitlines():
        if line.startswith("not finite: "):
            yield Complaint("non-finite models", line)
            break


def cases(seed: int) -> list[Case]:
    found = []
    for source in SOURCES:
        for mutation in MUTATIONS:
            for number in range(EACH):
                name = f"mutations/{source} {mutation.__name__}/{number}"
                found.append(Case(name, partial(check, source, mutation, seed, name)))
    return found

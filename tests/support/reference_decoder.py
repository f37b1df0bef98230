"""Read a packed model as `vq4dit/layers/FORMAT.md` describes it: plain Python and NumPy, and nothing of vq4dit.

Slow on purpose (an integer a microsecond or two): every line is one of the description. Section numbers are FORMAT.md's.
Whoever writes a decoder in another language can take this one as its test.
"""

import json
from bisect import bisect_right
from functools import cache
from math import erfc, sqrt
from pathlib import Path

import numpy as np

LITTLE_ENDIAN = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I64": "<i8"}
MANTISSAS = np.array([0x3F800000, 0x3F8B95C2, 0x3F9837F0, 0x3FA5FED7, 0x3FB504F3, 0x3FC5672A, 0x3FD744FD, 0x3FEAC0C7], "<u4")


class DamagedError(ValueError):
    """What a reader should refuse."""


# --- 1. files ---


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one file: a length of 8 bytes, a JSON header of that length, then the data."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = (start + offset for offset in entry["data_offsets"])
        values = np.frombuffer(content[begin:end], LITTLE_ENDIAN[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":  # the upper half of an fp32 number
            values = (values.astype("<u4") << 16).view("<f4")
        found[name] = values
    return found


def read_model(folder: Path, linears: dict[str, tuple[int, ...]], blocks: list[str]) -> dict[str, np.ndarray]:
    """The state dict of the ordinary model, floating-point tensors in fp32, from its `transformer` folder.

    Args:
        linears: (rows, columns) of the linear layers in the blocks, and (rows, columns, 1, ...) of 1x1 convolutions, by name:
            they follow from the architecture.
        blocks: names of the transformer blocks in their order, which do so too.
    """
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if config["quant_method"] != "vq4dit" or config["format_version"] not in (1, 3, 4):
        raise DamagedError(f"no packed model of a known version: {config}")
    stored: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= read_safetensors(path)
    found = {name: widened(values) for name, values in stored.items() if not is_packed(name)}
    for name, shape in linears.items():
        if f"{name}.coded_integers" in stored or f"{name}.codebook" in stored:
            found[f"{name}.weight"] = weight_of(stored, name, *shape[:2]).reshape(shape)
    first, *others = blocks
    for path in config["shared_embedders"]:  # 5.
        for name in [name for name in found if name.startswith(f"{first}.{path}.")]:
            found |= {other + name.removeprefix(first): found[name] for other in others}
    return found


def is_packed(name: str) -> bool:
    packed = ("codebook", "packed_assignments", "row_scale", "coded_integers", "side_models")
    return name.rpartition(".")[2] in packed


def widened(values: np.ndarray) -> np.ndarray:
    return values.astype("<f4") if values.dtype.kind == "f" else values


def weight_of(tensors: dict[str, np.ndarray], name: str, rows: int, columns: int) -> np.ndarray:
    """The weight of one packed layer, of whichever kind, in fp32."""
    if f"{name}.coded_integers" in tensors:
        integers, (row_scale, _, column_scale, _) = decode_integers(
            tensors[f"{name}.coded_integers"].tobytes(), tensors[f"{name}.side_models"].tolist(), rows, columns
        )
        return (integers.astype("<f4") * scale_of(row_scale)[:, None]) * scale_of(column_scale)
    codebook, packed = widened(tensors[f"{name}.codebook"]), tensors[f"{name}.packed_assignments"]
    return look_up(codebook, packed, tensors.get(f"{name}.row_scale"), rows, columns)


# --- 2. vector-quantized layers ---


def look_up(codebook: np.ndarray, packed: np.ndarray, row_scale: np.ndarray | None, rows: int, columns: int) -> np.ndarray:
    k, d = codebook.shape
    bits = max(1, (k - 1).bit_length())
    m = -(-columns // d)
    n = rows * m
    if not 1 <= d <= columns or len(packed) != (n * bits + 7) // 8:
        raise DamagedError(f"{rows} x {columns} weights do not take {len(packed)} bytes")
    stream = int.from_bytes(packed.tobytes(), "little")  # bit j of a little-endian number is bit j % 8 of byte j // 8
    if bits == 8:
        assignments = packed.astype(int)
    else:
        stream_bits = np.array([int(bit) for bit in reversed(f"{stream:0{8 * len(packed)}b}")])[: n * bits]
        assignments = stream_bits.reshape(n, bits) @ (1 << np.arange(bits))
    if n and assignments.max() >= k:
        raise DamagedError(f"there is no codeword {assignments.max()}")
    weight = codebook[assignments].reshape(rows, m * d)[:, :columns]
    return weight if row_scale is None else weight * widened(row_scale)[:, None]


# --- 3. entropy-coded layers ---


def scale_of(index: np.ndarray) -> np.ndarray:
    """3.2: 2^((k - 128) / 8) in fp32, without a power function."""
    octave, eighth = np.divmod(index.astype(int) - 128, 8)
    return np.ldexp(MANTISSAS.view("<f4")[eighth], octave)


@cache
def frequencies(scale_class: int) -> list[int]:
    """3.4: u(-1023) ... u(1023) at a scale class; they sum to 2^24."""
    spread = 2 ** ((scale_class - 32) / 4) * sqrt(2)
    tails = [erfc((z - 0.5) / spread) for z in range(1, 1025)]
    u = [max(1, round(2**24 * ((here - beyond) / 2))) for here, beyond in zip(tails, tails[1:], strict=False)]
    return [*reversed(u), 2**24 - 2 * sum(u), *u]


@cache
def starts(scale_class: int) -> list[int]:
    """3.4: c(0) ... c(2047)."""
    found, below = [], 0
    for symbol, u in enumerate(frequencies(scale_class)):
        found.append((below * (2**24 - 2047) >> 24) + symbol)
        below += u
    return [*found, 2**24]


class Stream:
    """3.5: the state of an rANS decoder of 64 bits, over words of 32."""

    def __init__(self, content: bytes):
        if len(content) % 4 or (content and not any(content[-4:])):
            raise DamagedError("a stream is 32-bit words, of which the last is not 0")
        self.words = np.frombuffer(content, "<u4").tolist()
        self.state = 0
        self.refill()
        self.refill()

    def refill(self) -> None:
        if self.state < 2**32 and self.words:
            self.state = self.state << 32 | self.words.pop()

    def read(self, scale_class: int) -> int:
        c = starts(scale_class)
        q = self.state % 2**24
        symbol = bisect_right(c, q) - 1
        if symbol == 0:
            raise DamagedError("the stream ends before its integers do")
        self.state = (self.state >> 24) * (c[symbol + 1] - c[symbol]) + q - c[symbol]
        self.refill()
        return symbol - 1023


def decode_integers(
    content: bytes, side_models: list[list[int]], rows: int, columns: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """3.6: Z, and the row scales, row classes, column scales and column classes as they are stored, 0 to 255."""
    stream, sides = Stream(content), []
    for (centre, scale_class), count in zip(side_models, (rows, rows, columns, columns), strict=True):
        if not 12 <= scale_class <= 68:
            raise DamagedError(f"there is no scale class {scale_class}")
        side = np.array([centre + stream.read(scale_class) for _ in range(count)], dtype=int)
        if count and not 0 <= side.min() <= side.max() <= 255:
            raise DamagedError("side information is a byte for each row and column")
        sides.append(side)
    classes = np.clip(sides[1][:, None] + sides[3], 12, 68)
    integers = np.zeros((rows, columns), dtype=int)
    for place in np.argsort(classes.flatten(), kind="stable"):
        integers.flat[place] = stream.read(int(classes.flat[place]))
    if stream.words or stream.state:
        raise DamagedError("the stream goes on behind its last integer")
    return integers, sides


def encode_integers(integers: np.ndarray, sides: list[np.ndarray], side_models: list[list[int]]) -> bytes:
    """3.7: the stream of which `decode_integers` makes these."""
    rows, columns = integers.shape
    classes = np.clip(np.asarray(sides[1], int)[:, None] + np.asarray(sides[3], int), 12, 68)
    coded = [(int(value) - centre, model) for side, (centre, model) in zip(sides, side_models, strict=True) for value in side]
    order = np.argsort(classes.flatten(), kind="stable")
    coded += [(int(integers.flat[place]), int(classes.flat[place])) for place in order]
    state, words = 0, []
    for z, scale_class in reversed(coded):
        c = starts(scale_class)
        start, size = c[z + 1023], c[z + 1024] - c[z + 1023]
        if state >> 40 >= size:
            words.append(state % 2**32)
            state >>= 32
        state = (state // size << 24) + state % size + start
    while state:
        words.append(state % 2**32)
        state >>= 32
    return np.array(words, "<u4").tobytes()

"""Read a packed model as `vq4dit/layers/FORMAT.md` describes it: plain Python and NumPy, and nothing of vq4dit.

Slow on purpose (an integer a microsecond or two): every line is one of the description. Section numbers are FORMAT.md's.
Whoever writes a decoder in another language can take this one as its test.
"""

import json
import struct
import zlib
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
    if config["quant_method"] != "vq4dit" or config["format_version"] not in (1, 3, 4, 5):
        raise DamagedError(f"no packed model of a known version: {config}")
    stored: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= read_safetensors(path)
    found = {name: widened(values) for name, values in stored.items() if not is_packed(name)}
    for name, shape in linears.items():
        if any(f"{name}.{kind}" in stored for kind in ("coded_weight", "coded_integers", "codebook")):
            found[f"{name}.weight"] = weight_of(stored, name, *shape[:2]).reshape(shape)
    first, *others = blocks
    for path in config["shared_embedders"]:  # 5.
        for name in [name for name in found if name.startswith(f"{first}.{path}.")]:
            found |= {other + name.removeprefix(first): found[name] for other in others}
    return found


def is_packed(name: str) -> bool:
    packed = ("codebook", "packed_assignments", "row_scale", "coded_weight", "coded_integers", "side_models")
    return name.rpartition(".")[2] in packed


def widened(values: np.ndarray) -> np.ndarray:
    return values.astype("<f4") if values.dtype.kind == "f" else values


def weight_of(tensors: dict[str, np.ndarray], name: str, rows: int, columns: int) -> np.ndarray:
    """The weight of one packed layer, of whichever kind, in fp32."""
    if f"{name}.coded_weight" in tensors:
        return weight_of_lanes(tensors[f"{name}.coded_weight"].tobytes(), rows, columns)
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


# --- 3. entropy-coded layers: a single stream ---


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


# --- 4. entropy-coded layers: lanes ---

TRELLIS = {0: (0, 3, 5, 6, 1, 2, 4, 7), 1: (1, 2, 4, 7, 0, 3, 5, 6)}  # 4.5: the next state, by the parity of the index
EDGES = {
    "integers": lambda k: k - 1 / 2,
    "even": lambda k: 2 * k - 1,
    "odd": lambda k: 1 / 8 if k == 1 else 2 * k - 2,
}


@cache
def frequencies_of_lanes(quantizer: str, scale_class: int) -> tuple[int, ...]:
    """4.3: f(esc), f(0), ..., f(K)."""
    t = [4096 * erfc(EDGES[quantizer](k) / (2 ** ((scale_class - 32) / 4) * sqrt(2))) / 2 for k in range(1, 130)]
    f = [round(here - beyond) for here, beyond in zip(t, t[1:], strict=False)][:127]
    f = f[: f.index(0)] if 0 in f else f
    escape = max(1, round(2 * t[len(f)]))
    return (escape, 4096 - escape - 2 * sum(f), *f)


@cache
def slots_of_lanes(quantizer: str, scale_class: int) -> list[tuple[int | None, int, int]]:
    """4.3: of each of 4,096 slots its owner (None is the escape), the owner's frequency and its first slot."""
    escape, zero, *f = frequencies_of_lanes(quantizer, scale_class)
    owners = [
        (None, escape),
        *((-k, f[k - 1]) for k in range(len(f), 0, -1)),
        (0, zero),
        *((k + 1, n) for k, n in enumerate(f)),
    ]
    found: list[tuple[int | None, int, int]] = []
    for owner, frequency in owners:
        found += [(owner, frequency, len(found))] * frequency
    return found


def low_bits(scale_class: int, quantizer: str) -> tuple[int, int]:
    """4.4: the class of the table, and h."""
    scale_class = min(68 if quantizer == "integers" else 52, max(12, scale_class))
    h = max(0, -(-(scale_class - 52) // 4))
    return scale_class - 4 * h, h


class Chunk:
    """4.2: states of lanes, and the words that follow them."""

    def __init__(self, words: list[int], lanes: int):
        if len(words) < 2 * lanes:
            raise DamagedError("a chunk has fewer words than its lanes' states")
        self.states = [words[2 * lane] | words[2 * lane + 1] << 16 for lane in range(lanes)]
        if any(state < 2**16 for state in self.states):
            raise DamagedError("a state is at least 2^16")
        self.words = words[: 2 * lanes - 1 : -1]

    def refill(self, lane: int) -> None:
        if self.states[lane] < 2**16:
            if not self.words:
                raise DamagedError("a chunk ends before its integers do")
            self.states[lane] = self.states[lane] << 16 | self.words.pop()

    def read(self, lane: int, quantizer: str, scale_class: int) -> int:
        """4.4."""
        table_class, h = low_bits(scale_class, quantizer)
        state = self.states[lane]
        k, frequency, first = slots_of_lanes(quantizer, table_class)[state % 4096]
        self.states[lane] = (state // 4096) * frequency + state % 4096 - first
        self.refill(lane)
        if k is not None and h == 0:
            return k
        raw_bits = 12 if k is None else h
        raw = self.states[lane] % 2**raw_bits
        self.states[lane] //= 2**raw_bits
        self.refill(lane)
        return raw - 2048 if k is None else (k << h) + raw

    def end(self) -> None:
        if self.words or any(state != 2**16 for state in self.states):
            raise DamagedError("a chunk does not end with its last integer")


def decode_lanes(content: bytes, rows: int, columns: int) -> tuple[np.ndarray, list[np.ndarray], np.ndarray | None]:
    """4.1: values, the four kinds of side information (no scale indices of columns that have gains), and these gains."""
    if len(content) < 28 or len(content) % 2:
        raise DamagedError("a layer is a header and whole words")
    checksum, kind, has_gains, n, zero, R, S, models, q = struct.unpack("<IBBBBII8sI", content[:28])
    if checksum != zlib.crc32(content[4:]):
        raise DamagedError("the checksum does not fit")
    if kind > 1 or has_gains > 1 or zero or not (1 <= n <= 32 and 1 <= R <= max(1, rows) and 1 <= S <= max(1, columns)):
        raise DamagedError("the header says what no writer writes")
    words = np.frombuffer(content, "<u2").tolist()
    at = 14
    side = Chunk(words[at : at + q], min(1, rows + columns))
    at += q
    sides = []
    for number, count in enumerate((rows, rows, 0 if has_gains else columns, columns)):
        centre, scale_class = models[2 * number : 2 * number + 2]
        if not 12 <= scale_class <= 68:
            raise DamagedError(f"there is no scale class {scale_class}")
        sides.append(np.array([centre + side.read(0, "integers", scale_class) for _ in range(count)], dtype=int))
        if count and not 0 <= sides[-1].min() <= sides[-1].max() <= 255:
            raise DamagedError("side information is a byte for each row and column")
    side.end()
    gains = widened(np.frombuffer(content, "<f2")[at : at + columns]) if has_gains else None
    at += columns * has_gains
    corners = [(top, left) for top in range(0, rows, R) for left in range(0, columns, S)]
    lengths = [words[at + 2 * i] | words[at + 2 * i + 1] << 16 for i in range(len(corners))]
    at += 2 * len(corners)
    found = np.zeros((rows, columns), dtype=int)
    for (top, left), words_of_chunk in zip(corners, lengths, strict=True):
        bottom, right = min(top + R, rows), min(left + S, columns)
        places = [(row, column) for row in range(top, bottom) for column in range(left, right)]
        if kind == 1:
            places.sort(key=lambda place: place[1])
        length, states = right - left if kind == 0 else bottom - top, dict.fromkeys(range(top, bottom), 0)
        chunk = Chunk(words[at : at + words_of_chunk], min(n, length))
        at += words_of_chunk
        for number, (row, column) in enumerate(places):
            t = states[row]
            quantizer = "integers" if kind == 0 else ("even", "odd")[t % 2]
            k = chunk.read(number % length % n, quantizer, int(sides[1][row] + sides[3][column]))
            found[row, column] = k if kind == 0 else 2 * k - (t % 2) * np.sign(k)
            states[row] = TRELLIS[k % 2][t]
        chunk.end()
    if at != len(words):
        raise DamagedError("the chunks do not end with the tensor")
    return found, sides, gains


def weight_of_lanes(content: bytes, rows: int, columns: int) -> np.ndarray:
    """3.2 and 4.6."""
    values, (row_scale, _, column_scale, _), gains = decode_lanes(content, rows, columns)
    return (values.astype("<f4") * scale_of(row_scale)[:, None]) * (scale_of(column_scale) if gains is None else gains)

"""What an artifact will take in memory, from its plan: to load, when it is loaded, and to run. No torch, no graph.

Of every tensor it is known which nodes lie between its stored parts and the operand of a kernel (`kernel_operands`,
`decoding`), so what folding makes and what stays is arithmetic; tests hold it against real graphs. `shares` then says
how much of it is there at once. What onnxruntime's kernels keep beside is theirs: packed codes, two more copies of the
scales. What is left are measured constants, for its libraries and for nodes.

All in bytes that a process grows by, from before the graph is opened, mapped files included: as `evaluate.bench`
measures it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compressor.export.decoder_config import rotary_tables
from compressor.export.forms import Coded, Form, Mode, Plane, bits_apart, coded, form
from compressor.export.shares import STAGES, WORTH_IT, Share, folding_of, share_out
from compressor.ops.widths import n_groups, packed_columns, plane_widths, zero_bits
from compressor.plan.plan import InUse, PlannedTensor
from compressor.plan.workload import Workload

FLOAT, INT32 = 4, 4
LIBRARIES = 10_000_000
"""Pages of onnxruntime's own files that loading a graph touches first."""
PER_TENSOR = 36_000
"""What nodes and their kernels take, for each tensor; half more where a product is three nodes."""
FIRST_RUN = 5_000_000
"""What the first run takes, whatever it computes."""
PIECE = 128
"""Tokens that are read at a time (`evaluate.reader`), or that an encoder is given."""
TOGETHER = 1.15
"""Of what a stage makes: what is made alike is put together first, and shared out again."""
PADDED_INT2 = 4
"""Blocks of a row that the int2 kernel packs together."""
PACKED_CONVOLUTION = 2
"""Copies of a convolution's weight beside itself while it is packed in blocks of channels."""
_JOINED = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
"""Ends of names whose products are one, in decoders that are written from their config."""


@dataclass
class Taken:
    """What a tensor takes.

    shares   what folds for it
    stays    bytes beside that, when the graph is loaded
    read     stored bytes that folding reads
    passing  bytes that are there once more while a kernel packs them
    packed   bytes that are there once more until all convolutions are packed
    touched  bytes of the file that a text reads, row by row
    """

    shares: list[Share] = field(default_factory=list)
    stays: float = 0
    read: float = 0
    passing: float = 0
    packed: float = 0
    touched: float = 0

    def __iadd__(self, other: Taken) -> Taken:
        self.shares += other.shares
        self.stays += other.stays
        self.read += other.read
        self.passing = max(self.passing, other.passing)
        self.packed += other.packed
        self.touched += other.touched
        return self


def memory_in_use(
    tensors: Sequence[PlannedTensor], tied: Mapping[str, str], config: Mapping[str, Any], mode: Mode,
    static: bool = False, load: Workload | None = None,
) -> InUse:  # fmt: skip
    """Of the artifact of a plan's tensors, about.

    Args:
        static: Convolutions compute on int8.
        load: What one example asks of a network that reads arrays, where it is known.
    """
    whole, tables = Taken(), [tensor.name for tensor in tensors if tensor.role == "embedding"]
    heads = {*tied.values()} | ({tables[0]} if config.get("tie_word_embeddings") and tables else set())
    overhead = float(LIBRARIES + FLOAT * rotary_tables(dict(config)))
    for tensor in tensors:
        whole += taken(tensor, mode, tensor.name in heads, tensor.name.endswith("lm_head.weight"), static)
        shifted = tensor.by and (found := form(tensor.describe(), mode)) is not None and found.shifted
        overhead += PER_TENSOR * (1.5 if shifted and tensor.role == "linear" else 1.0)
    kept = sum(share.kept for share in whole.shares if share.final)
    loaded = overhead + kept + whole.stays
    peak = max(loaded + whole.passing + whole.packed, overhead + folding_peak(whole.shares) + whole.read)
    cache = _cached(config)
    running = _running(tensors, config, load)
    return InUse(
        loading=int(peak), loaded=int(loaded),
        running=None if running is None else int(loaded + whole.touched + running), per_thousand_tokens=1000 * cache,
    )  # fmt: skip


def folding_peak(shares: Sequence[Share]) -> int:
    """The most that folding has at once, in stages where there is enough to be worth them."""
    made = sum(share.made for share in shares)
    if not shares or made < WORTH_IT:
        return made
    limit, pieces = made // STAGES, list[Share]()
    for share in shares:
        n = -(-share.made // limit)
        if n > 1 and share.made > 2 * share.kept:
            some = [Share(False, share.made // n, share.kept // n) for _ in range(n)]
            pieces += [*some, Share(share.final, share.kept, share.kept, set(some))]
        else:
            pieces.append(share)
    share_out(pieces, STAGES)
    return int(TOGETHER * folding_of(pieces).peak)


def taken(
    tensor: PlannedTensor, mode: Mode, is_head: bool = False, is_output: bool = False, static: bool = False
) -> Taken:
    """What one tensor takes; of a table `is_head` says that it is the output's too, `is_output` that it is nothing
    else; with `static` convolutions compute on int8."""
    description, dense = tensor.describe(), not tensor.by
    if dense and (tensor.role != "embedding" or is_output or is_head):
        return _dense(tensor)
    if dense:
        return Taken()
    if tensor.role == "embedding":
        return _table(description, tensor.bytes_after, mode, is_head, is_output)
    if tensor.role == "linear":
        found = _product(description, tensor.bytes_after, mode)
        if found is not None:
            joined = tensor.name.endswith(_JOINED)
            return _joined(found) if joined else found
    return _constant(description, tensor.bytes_after, tensor.role == "conv", static and tensor.role == "conv")


def _dense(tensor: PlannedTensor) -> Taken:
    """As it is, in float32: a product packs it, and lets go of it."""
    n = FLOAT * math.prod(tensor.shape)
    packed = PACKED_CONVOLUTION * n if tensor.role == "conv" else 0
    if n == tensor.bytes_after:
        return Taken(stays=n, passing=n if tensor.role == "linear" else 0, packed=packed)
    return Taken([Share(made=n, kept=n)], read=tensor.bytes_after, passing=n, packed=packed)


def _joined(found: Taken) -> Taken:
    """What folds is put one after another once more."""
    for share in found.shares:
        share.made += share.kept
    return found


def _table(description: dict[str, Any], stored: int, mode: Mode, is_head: bool, is_output: bool) -> Taken:
    """An embedding is read where it lies, unless it is an operand too; the halves of a refined one one by one."""
    if description["kind"] == "refined":
        found = Taken([Share(made=16 * description["shape"][0], kept=8 * description["shape"][0])])
        for half in (description["inner"], description["extra"]):
            found += _table(half, stored * half["shape"][0] // description["shape"][0], mode, is_head, is_output)
        return found
    chosen = form(description, mode)
    if is_output or chosen is None:
        return (_product(description, stored, mode) or _constant(description, stored)) if is_output else Taken()
    gathered = mode == "default" and (chosen.direct or is_head) and not chosen.shifted
    if not is_head:
        return _scales_and_zeros(description, chosen) if gathered else Taken()
    found = _product(description, stored, mode)
    assert found is not None
    if gathered:
        rows, blocks = description["shape"][0], _blocks(description, chosen)
        if chosen.direct:
            found.touched = _code_bytes(description, chosen)
        else:
            found.stays += _code_bytes(description, chosen)
        if not chosen.direct or description["shape"][1] % chosen.block:
            found.shares.append(Share(made=FLOAT * rows * blocks, kept=FLOAT * rows * blocks))
            if _has_zeros(description):
                packed = rows * packed_columns(blocks, chosen.bits)
                found.shares.append(Share(made=int(8 * packed + 3 * rows * blocks), kept=rows * blocks))
    return found


def _blocks(description: dict[str, Any], chosen: Form) -> int:
    return -(-description["shape"][1] // chosen.block)


def _code_bytes(description: dict[str, Any], chosen: Form) -> int:
    return description["shape"][0] * _blocks(description, chosen) * chosen.block * chosen.bits // 8


def _has_zeros(description: dict[str, Any]) -> bool:
    return "zero" in description and description["zero"] is None


def _product(description: dict[str, Any], stored: int, mode: Mode) -> Taken | None:
    """An operand of MatMulNBits: what folds, and what the kernel packs: codes, scales, and their sums."""
    chosen = form(description, mode)
    if chosen is None:
        return None
    rows, blocks, codes = description["shape"][0], _blocks(description, chosen), _code_bytes(description, chosen)
    padded = -(-blocks // PADDED_INT2) * PADDED_INT2 if chosen.bits == 2 else blocks
    packed = codes * padded // blocks + FLOAT * padded * (rows + -(-rows // 16) * 16)
    found = _scales_and_zeros(description, chosen)
    found.stays += packed
    if chosen.direct:
        found.passing = codes
        return found
    made, kept = _unfolded(description, chosen), codes
    # The kernel packs the folded codes and lets go of them: they are no more when the graph is loaded.
    found.shares.append(Share(made=int(made), kept=kept))
    found.stays -= kept
    found.read += stored
    found.passing = kept
    return found


def _scales_and_zeros(description: dict[str, Any], chosen: Form) -> Taken:
    """The scales in float32, zero points, and where they are fine what is between them and whole ones."""
    rows, columns = description["shape"]
    groups, blocks = n_groups(columns, description.get("group", columns)), _blocks(description, chosen)
    per_group, scales = FLOAT * rows * groups, FLOAT * rows * blocks
    found = Taken([Share(made=2 * per_group + 8 * rows + (scales if blocks != groups else 0), kept=scales)])
    if chosen.zero is not None:
        zeros = rows * packed_columns(blocks, chosen.bits)
        found.shares.append(Share(made=zeros, kept=zeros))
    elif _has_zeros(description):
        zeros = rows * packed_columns(blocks, chosen.bits)
        if chosen.direct and blocks == groups and not chosen.shifted:
            found.stays += zeros
        else:
            stored = zero_bits(description["bits"], description.get("zero_steps", 1))
            indices = INT32 * rows * packed_columns(groups, stored) // (2 if chosen.shifted else 1)
            found.shares.append(Share(made=indices + 3 * zeros, kept=zeros))
    if chosen.shifted:
        found.shares.append(Share(made=5 * per_group + 8 * rows, kept=per_group))
    return found


def _unfolded(description: dict[str, Any], chosen: Form) -> float:
    """Bytes that look-ups make of a tensor's codes."""
    kind, rows, operand = coded(description), description["shape"][0], _code_bytes(description, chosen)
    codes = kind.codes(description)
    if chosen.values is not None:
        stored = [plane.stored(codes.n) for plane in codes.planes]
        at_once = 2 if all(n % 2 == 0 for n in stored) else 1
        indices = sum(INT32 * n // at_once for n in stored)
        return rows * indices + 2 * len(stored) * operand
    widths = plane_widths(description["width"])
    window = description.get("window")
    if window is not None:
        return rows * _of_states(codes.n, widths, description["width"], window) + 2 * operand
    return rows * _of_codewords(codes.n, widths, description["width"]) + 2 * operand


def _of_codewords(n: int, widths: Sequence[int], width: int) -> float:
    """Bytes of a row's indices into a table of codewords (`units`)."""
    if len(widths) == 1:
        return INT32 * n * min(width, 8) / 8 if width < 8 else INT32 * n
    codes = 2 if widths[0] == 4 and 2 * width <= 14 else 1
    units, made = n // codes, 0.0
    for bits in (codes * each for each in widths):
        made += 2 * units if bits == 8 else INT32 * units * bits / 8 + 2 * units
    return made + 2 * units * (len(widths) - 1) + INT32 * units


def _of_states(n: int, widths: Sequence[int], width: int, window: int) -> float:
    """Bytes of a row's states, and of what they are made of (`states`): bytes of codes, twice where what lies high is
    apart."""
    planes = [INT32 * n * bits / 16 + n for bits in widths]  # looked up by pairs of bytes
    direct, apart = sum(planes) + n * len(planes), bits_apart(width, window)
    above = planes[0] + 3 * n if apart else 0.0
    if apart > widths[0]:
        above += sum(planes[1:]) + n
    return direct + above + INT32 * n


def _constant(description: dict[str, Any], stored: int, is_convolution: bool = False, static: bool = False) -> Taken:
    """Decoded to float32: convolutions, and what else has no kernel of its own; `static` ones stay whole numbers."""
    n = math.prod(description["shape"])
    if static:
        return Taken([Share(made=(2 * INT32 + 2) * n, kept=n)], read=stored, passing=n)
    kind = coded(description) if description["kind"] not in ("dense", "refined") else None
    made = FLOAT * n * (2 if kind is None else _floats(kind.codes(description).planes, kind, description))
    packed = PACKED_CONVOLUTION * FLOAT * n if is_convolution else 0
    return Taken([Share(made=int(made), kept=FLOAT * n)], read=stored, packed=packed)


def _floats(planes: Sequence[Plane], kind: Coded, description: dict[str, Any]) -> float:
    """Arrays of a tensor's size that decoding makes: of one plane a look-up, of several their sum, then scaled."""
    if len(planes) == 1 and planes[0].per > 1:
        return 1 / planes[0].per + 4
    return 2 * len(planes) + 4


def _cached(config: Mapping[str, Any]) -> int:
    """Bytes of a token's keys and values; 0 where none are kept, or each layer has its own sizes."""
    heads, width = _whole(config, "num_attention_heads", "n_head"), _whole(config, "hidden_size", "n_embd")
    layers = _whole(config, "num_hidden_layers", "n_layer")
    if not (heads and width and layers) or config.get("is_encoder_decoder"):
        return 0
    size = _whole(config, "head_dim") or width // heads
    return 2 * FLOAT * layers * size * (_whole(config, "num_key_value_heads") or heads)


def _whole(config: Mapping[str, Any], *names: str) -> int:
    """The first of these that a config states as a whole number above 0; else 0."""
    found = (config.get(name) for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), 0)


def _running(tensors: Sequence[PlannedTensor], config: Mapping[str, Any], load: Workload | None) -> float | None:
    """What running adds: a piece of text, or one example, on its way through the largest layers; None: not known."""
    if load is not None and load.layers:
        return FIRST_RUN + 2 * FLOAT * load.held
    widest = max((sum(tensor.matrix) for tensor in tensors if tensor.role == "linear"), default=0)
    return FIRST_RUN + 6 * FLOAT * PIECE * widest if config.get("vocab_size") else None

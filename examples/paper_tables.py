"""The figures of the D3D paper beside those of our code: parameters, multiply-adds of a step, bytes of the caches.

    python examples/paper_tables.py

Tables 1 to 5 of *Dissected 3D CNNs* (Köpüklü et al., 2020), as far as they need no training. The conventional networks come
from the zoo, everything else out of dissecting them; nothing is run, torch's own counter counts. A trunk and a head are
dissected and counted each by itself, and a row of a table is their sum. Exit code 1 where a figure is not the paper's.

What the paper counts, as its figures tell:

- multiply-adds: convolutions and linear layers; and, to give its last digit, 2 for each value of a batch norm, 1 of a ReLU,
  and a max pool's window. We show both. Its 108.2M for an LSTM of two layers are not those of one step, which are 15.3M.
  Its rows with an LSTM are those with `fc` less 9.8M (which are FLOPs, two a multiply-add) plus these 108.2M: so are, with
  our figures for `fc`, the ones that we compare; a step's true cost stands above them.
- caches: the volumes of the temporal skip connections, and for the head `fc` the vectors that it looks at. The frames of
  the stem are not among them (the paper feeds all three at every step), nor is what an LSTM carries. Ours hold those, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

import dissect
from dissect import heads, zoo
from dissect.convolution import FrameConv
from dissect.counting import multiply_adds, parameters
from dissect.stream import Stream

CLASSES = 600  # Kinetics-600
SIZE = 112
FACTORIES = {18: zoo.resnet18, 50: zoo.resnet50, 101: zoo.resnet101}

# Table 1: blocks and features of each stage.
TABLE_1 = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
FEATURES = (64, 128, 256, 512)
# Section 3.1: "parameter reduction of ~50% on D-ResNet-18 and ~23% on D-ResNet-50,101", without heads, in percent.
REDUCTION = {18: 50, 50: 23, 101: 23}
# Table 2: temporal skip connection to millions of parameters and of multiply-adds.
TABLE_2 = {"none": (15.94, 546), "sum": (15.94, 546), "concat": (20.66, 747)}
# Table 3 has accuracies alone; section 4.1 gives parameters and FLOPs of two of its heads, in millions.
TABLE_3 = {("fc", 1): (4.9, 9.8), ("lstm", 2): (15.3, 108.2)}
# Table 4: millions of parameters, millions of multiply-adds, megabytes of cache.
CONVENTIONAL = {18: (33.24, 8323), 50: (44.24, 9835), 101: (83.29, 13664)}
TABLE_4 = {
    (18, "fc"): (20.66, 747, 0.97),
    (50, "fc"): (40.81, 1654, 1.95),
    (101, "fc"): (69.83, 3077, 2.81),
    (18, "lstm"): (31.05, 845, 0.94),
    (50, "lstm"): (51.20, 1752, 1.92),
    (101, "lstm"): (80.22, 3175, 2.78),
}
# Table 5: multiply-adds for one output; the networks of it that are in our zoo. D-ResNets have LSTMs there.
TABLE_5 = {f"3D-ResNet-{depth}": row[1] for depth, row in CONVENTIONAL.items()} | {
    f"D-ResNet-{depth}": TABLE_4[depth, "lstm"][1] for depth in FACTORIES
}
LIMIT = 0.6  # percent


@dataclass(frozen=True)
class Cost:
    """What a network, or a part of one, needs: numbers a step, bytes a stream. ``counted`` is the paper's way to count."""

    parameters: int
    multiply_adds: int
    counted: int
    volumes: int = 0
    vectors: int = 0
    caches: int = 0

    def __add__(self, other: Cost) -> Cost:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Cost(*(mine + theirs for mine, theirs in pairs))


@dataclass(frozen=True)
class Figure:
    """One figure of ours beside the paper's: equal to the last of ``digits``, or no further off than ``limit`` percent."""

    table: str
    row: str
    what: str
    ours: float
    paper: float | None = None
    digits: int | None = None
    limit: float | None = None
    note: str = ""

    @property
    def deviation(self) -> float | None:
        return None if self.paper is None else (self.ours / self.paper - 1) * 100

    @property
    def ok(self) -> bool:
        if self.paper is None:
            return True
        if self.digits is not None:
            return round(self.ours, self.digits) == self.paper
        return self.deviation is not None and self.limit is not None and abs(self.deviation) <= self.limit

    def __str__(self) -> str:
        def shown(value: float) -> str:
            return f"{value:.{2 if self.digits is None else self.digits}f}"

        paper = "-" if self.paper is None else shown(self.paper)
        off = "" if self.deviation is None else f"{self.deviation:+.2f}%"
        mark = "" if self.ok else "  DIFFERS"
        note = f"  {self.note}" if self.note else ""
        return f"{self.row:<30} {self.what:<42} {shown(self.ours):>10} {paper:>10} {off:>8}{mark}{note}"


def empty(network: nn.Module) -> nn.Module:
    """The network in eval mode, its numbers whatever lies in memory: only shapes matter here."""
    return network.to_empty(device="cpu").eval()


@cache
def dissected(depth: int, skip: str = "concat") -> Stream:
    """The trunk of a D-ResNet, one vector of 512 a frame."""
    with torch.device("meta"):
        network = zoo.headed_resnet(depth, head=None)
    return dissect.convert(empty(network), torch.zeros(1, 3, 16, SIZE, SIZE), skip=skip)


@cache
def trunk(depth: int, skip: str = "concat") -> Cost:
    return cost(dissected(depth, skip), torch.zeros(1, 3, SIZE, SIZE))


@cache
def head(name: str, layers: int) -> Cost:
    """A head of Table 3 on vectors of 512, as the dissector makes it of the module alone."""
    with torch.device("meta"):
        module = heads.head(name, 512, CLASSES, layers=layers)
    stream = dissect.convert(empty(module), torch.zeros(1, 16, 512), time_dim=1)
    return cost(stream, torch.zeros(1, 512), of_head=True)


def cost(stream: Stream, frame: torch.Tensor, of_head: bool = False) -> Cost:
    held = [
        (entry.path, cache.numel() * cache.element_size())
        for entry, cache in zip(stream.cache_list, stream.caches(), strict=True)
    ]
    windows = {row.path for row in stream.plan if row.decision.startswith("linear over a window")}
    inputs = (frame, *stream.caches())
    return Cost(
        parameters(stream.clip),
        multiply_adds(stream.step, inputs),
        multiply_adds(stream.step, inputs, elementwise=True),
        volumes=sum(size for path, size in held if path.startswith("layer") and not of_head),
        vectors=sum(size for path, size in held if path in windows),
        caches=sum(size for _, size in held),
    )


@cache
def conventional(depth: int) -> Cost:
    """A conventional 3D-ResNet on a clip of 16 frames. Its parameters are those with 400 classes, as the paper's are."""
    with torch.device("meta"):
        network, fewer, clip = FACTORIES[depth](CLASSES), FACTORIES[depth](400), torch.empty(1, 3, 16, SIZE, SIZE)
    network.eval()
    return Cost(parameters(fewer), multiply_adds(network, clip), multiply_adds(network, clip, elementwise=True))


def multiply_add_figures(table: str, row: str, found: Cost, paper: float) -> Iterator[Figure]:
    yield Figure(table, row, "multiply-adds, M", found.multiply_adds / 1e6, paper, limit=LIMIT)
    yield Figure(table, row, "multiply-adds as the paper counts, M", found.counted / 1e6, paper, digits=0)


def lstm_figures(table: str, row: str, depth: int, paper: float) -> Iterator[Figure]:
    yield Figure(table, row, "multiply-adds, M", (trunk(depth) + head("lstm", 2)).multiply_adds / 1e6)
    theirs = (trunk(depth) + head("fc", 1)).counted / 1e6 - TABLE_3["fc", 1][1] + TABLE_3["lstm", 2][1]
    yield Figure(table, row, "multiply-adds, the paper's for its LSTM, M", theirs, paper, limit=LIMIT)


def table_1() -> Iterator[Figure]:
    for depth, blocks in TABLE_1.items():
        root, row = dissected(depth).clip, f"D-ResNet-{depth}"
        convolutions = {path: layer for path, layer in root.named_modules() if isinstance(layer, FrameConv)}
        stem = convolutions["conv1"].weight
        assert stem is not None
        for axis, size in zip("THW", (3, 7, 7), strict=True):
            yield Figure("1", row, f"conv1, kernel in {axis}", stem.shape["THW".index(axis) + 2], size, digits=0)
        yield Figure("1", row, "conv1, features", stem.shape[0], 64, digits=0)
        for at, (count, features) in enumerate(zip(blocks, FEATURES, strict=True), 1):
            stage = root.get_submodule(f"layer{at}")
            first = convolutions[f"layer{at}.0.conv1"].weight
            assert first is not None
            name = f"conv{at + 1}_x"
            yield Figure("1", row, f"{name}, blocks", len(list(stage.children())), count, digits=0)
            yield Figure("1", row, f"{name}, features", first.shape[0], features, digits=0)
            yield Figure("1", row, f"{name}, parameters, M", parameters(stage) / 1e6)
        if depth > 18:
            last = convolutions["neck"].weight
            assert last is not None
            yield Figure("1", row, "conv last, features", last.shape[0], 512, digits=0)
        with torch.device("meta"):
            network = FACTORIES[depth](shortcut="A" if depth == 18 else "B")
        whole = parameters(network) - parameters(network.fc)
        less = (1 - trunk(depth).parameters / whole) * 100
        yield Figure("1", row, "fewer parameters by, %", less, REDUCTION[depth], limit=5, note="the paper: 'about'")


def table_2() -> Iterator[Figure]:
    for skip, (millions, operations) in TABLE_2.items():
        row, found = f"D-ResNet-18 fc, {skip}", trunk(18, skip) + head("fc", 1)
        yield Figure("2", row, "parameters, M", found.parameters / 1e6, millions, digits=2)
        yield from multiply_add_figures("2", row, found, operations)


def table_3() -> Iterator[Figure]:
    for name in ("gru", "lstm", "fc"):
        for layers in (1, 2, 3):
            row, found = f"{name}, {layers} layer{'s' * (layers > 1)}", head(name, layers)
            millions, flops = TABLE_3.get((name, layers), (None, None))
            yield Figure("3", row, "parameters, M", found.parameters / 1e6, millions, digits=1)
            twice = 2 * found.multiply_adds / 1e6
            if name == "lstm" and flops is not None:
                yield Figure("3", row, "FLOPs, M", twice, note=f"the paper: {flops}, not those of one step")
            else:
                yield Figure("3", row, "FLOPs, M", twice, flops, limit=LIMIT)


def table_4() -> Iterator[Figure]:
    for depth, (millions, operations) in CONVENTIONAL.items():
        row, found = f"3D-ResNet-{depth}", conventional(depth)
        yield Figure("4", row, "parameters, M", found.parameters / 1e6, millions, digits=2)
        yield from multiply_add_figures("4", row, found, operations)
    for (depth, name), (millions, operations, megabytes) in TABLE_4.items():
        row, found = f"D-ResNet-{depth} {name}", trunk(depth) + head(name, 1 if name == "fc" else 2)
        yield Figure("4", row, "parameters, M", found.parameters / 1e6, millions, digits=2)
        if name == "fc":
            yield from multiply_add_figures("4", row, found, operations)
        else:
            yield from lstm_figures("4", row, depth, operations)
        counted = found.volumes + (found.vectors if name == "fc" else 0)
        yield Figure("4", row, "cache as the paper counts, MB", counted / 1e6, megabytes, digits=2)
        yield Figure("4", row, "all caches, frames of the stem included, MB", found.caches / 1e6)


def table_5() -> Iterator[Figure]:
    for row, paper in TABLE_5.items():
        depth = int(row.rpartition("-")[2])
        if row.startswith("3D"):
            yield from multiply_add_figures("5", row, conventional(depth), paper)
        else:
            yield from lstm_figures("5", row, depth, paper)


@cache
def figures() -> tuple[Figure, ...]:
    """Every figure, in the order of the paper."""
    return tuple(figure for table in (table_1, table_2, table_3, table_4, table_5) for figure in table())


def main() -> int:
    titles = {
        "1": "the architectures",
        "2": "temporal skip connections",
        "3": "heads",
        "4": "conventional and dissected",
        "5": "operations for one output, as far as our zoo goes",
    }
    for table, title in titles.items():
        print(f"\nTable {table}: {title}\n{'':<30} {'':<42} {'ours':>10} {'paper':>10}")
        for figure in figures():
            if figure.table == table:
                print(figure)
    compared = [figure for figure in figures() if figure.paper is not None]
    wrong = [figure for figure in compared if not figure.ok]
    print(f"\n{len(compared) - len(wrong)} of {len(compared)} figures are the paper's.")
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main())

"""Codes and bytes: what is coded comes back, the way through the trellis is the best one, and damaged files are refused."""

import hashlib
import itertools
import math
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from bslora_convert.bslora.codes import decode
from bslora_convert.bslora.codes.coded import GROUP, Coded, bits_of, groups_of, to_vectors, vectors_of
from bslora_convert.bslora.codes.file import (
    FLOATS_NAME,
    SCALES_NAME,
    WIDTHS_NAME,
    check_codes,
    coded_tensors,
    decoded,
    sizes,
    starts,
    to_file,
)
from bslora_convert.bslora.codes.packing import pack, packed_bytes, unpack
from bslora_convert.bslora.codes.trellis import STATES, TRELLIS_WIDTHS, tables, values_of, windows_of
from bslora_convert.bslora.codes.widths import WIDTHS
from bslora_convert.coding import viterbi
from bslora_convert.coding.encode import DISTORTIONS, encode, lost_shares
from bslora_convert.coding.viterbi import paths, paths_on_device
from bslora_convert.errors import InputError
from bslora_convert.files.tensorfile import DTYPE_CODES, file_bytes, holds_its_checksum, read_tensors, write_tensors

CODED = [width for width in WIDTHS if width < 16]
GOLDEN = Path(__file__).parent / "golden"


@given(st.sampled_from(CODED), st.integers(1, 67), st.integers(0, 1000))
def test_packing_loses_nothing(width: int, count: int, seed: int) -> None:
    codes = torch.randint(2**width, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, width)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(count, width)
    assert torch.equal(unpack(packed, width)[:count], codes)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(WIDTHS), st.integers(0, 3)), min_size=1, max_size=5),
    st.sampled_from([1, 5, 40, GROUP, GROUP + 1, 2 * GROUP + 7]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 5),
)
def test_files_give_back_what_was_coded(
    runs: list[tuple[int, int]], length: int, dtype: torch.dtype, at_once: int
) -> None:
    generator = torch.Generator().manual_seed(length)
    tensors, shapes = {}, []
    for index, (width, count) in enumerate(runs):
        key = f"m{index}.bslora_local_{'AB'[index % 2]}"
        tensors[key] = encode(torch.randn(count, length, generator=generator), [width] * count).coded
        shapes.append((key, (count, length) if index % 2 == 0 else (length, count)))
    file = to_file(tensors)
    promised = sizes(vectors_of(tensors.values()))
    assert [*promised] == [*file]
    assert all(promised[name].dtype == t.dtype and promised[name].shape == t.shape for name, t in file.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "GROUPS_AT_ONCE", at_once)
        check_codes(file, shapes, dtype, "file")
        back = decoded(file, shapes, dtype)
    for key, coded in tensors.items():
        vectors = back[key] if key.endswith("A") else back[key].T
        assert torch.equal(vectors, coded.decode().to(dtype))
    for key, coded in coded_tensors(file, shapes).items():
        assert torch.equal(coded.decode(), tensors[key].decode())
    again = to_file(coded_tensors(file, shapes))
    assert all(torch.equal(again[name], tensor) for name, tensor in file.items())
    bits = sum(bits_of(length, width) * count for width, count in runs)
    assert sum(tensor.nbytes for tensor in file.values()) <= bits / 8 + 8 * len(CODED)


@given(st.sampled_from(TRELLIS_WIDTHS), st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 99))
def test_windows_are_the_last_bits_of_each_vector(width: int, lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vectors = [torch.randint(2**width, (1, n), generator=generator, dtype=torch.uint8) for n in lengths]
    expected = []
    for vector in vectors:
        stream = 0
        for at, code in enumerate(vector[0].tolist()):
            stream |= code << width * at
            end = width * (at + 1)
            window = (stream << 12 >> end) & (STATES - 1)  # zeros before the first bit
            expected.append(float(tables()[width][window]))
    assert torch.cat([tables()[width][windows_of(v, width)[0]] for v in vectors]).tolist() == expected
    packed = pack(torch.cat(vectors, 1)[0], width)
    size, starts = torch.tensor(lengths), torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    assert values_of(packed, width, 0, sum(lengths), starts, size).tolist() == expected
    first = lengths[0]
    rest = values_of(packed, width, first, sum(lengths) - first, starts[1:] - first, size[1:])
    assert rest.tolist() == expected[first:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_compiled_reader_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Vectors of all widths and lengths in any order, from the beginning of the file and from within."""
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 2, 5, GROUP, GROUP + 1, 2 * GROUP, *torch.randint(1, 3000, (14,), generator=generator).tolist()]
    shapes = [
        (f"m{at}.bslora_local_{'AB'[at % 2]}", (13, length)[:: 1 - at % 2 * 2]) for at, length in enumerate(lengths)
    ]
    widths = torch.tensor(WIDTHS, dtype=torch.uint8)[
        torch.randint(len(WIDTHS), (len(lengths), 13), generator=generator)
    ]
    tensors = {}
    for (key, _), own, length in zip(shapes, widths, lengths, strict=True):
        codes = torch.randint(1 << 16, (13, length), generator=generator) % 2 ** own.long()[:, None].clamp_max(8)
        scales = torch.rand(13, groups_of(length), generator=generator).bfloat16()
        exact = torch.randn(13, length, generator=generator).bfloat16()
        tensors[key] = Coded(own, codes.to(torch.uint8), scales, exact)
    file = to_file(tensors)
    *_, within = itertools.islice(starts(file[WIDTHS_NAME], shapes), 8)
    found = []
    for many in (0, 1 << 60):
        monkeypatch.setattr(decode, "MANY", many)
        found.append(
            decoded(file, shapes, dtype)
            | {f"{key} alone": t for key, t in decoded(file, shapes[7:9], dtype, start=within).items()}
        )
    for key, tensor in found[1].items():
        assert found[0][key].dtype == dtype and torch.equal(found[0][key], tensor)
        if not key.endswith("alone"):
            assert torch.equal(to_vectors(key, tensor), tensors[key].decode().to(dtype))


@pytest.mark.parametrize("width", TRELLIS_WIDTHS)
def test_no_way_through_the_trellis_is_better_and_devices_find_the_same(width: int) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(width))
    table = tables()[width]
    found = paths(x.numpy(), table.numpy(), width)
    assert torch.equal(torch.from_numpy(found), paths_on_device(x, table, width))
    short = x[:, : max(12 // width // 2, 2)].double()  # few enough numbers to try every code
    length = short.shape[1]
    every = torch.cartesian_prod(*[torch.arange(2**width, dtype=torch.uint8)] * length).view(-1, length)
    values = table[windows_of(every, width)].double()
    for row in short:
        best = float((values - row).square().sum(1).min())
        mine = torch.from_numpy(paths(row.float()[None].numpy(), table.numpy(), width))
        assert float((table[windows_of(mine, width)].double() - row).square().sum()) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("width", sorted(viterbi.EDGE))
@pytest.mark.parametrize("length", [16, 64, 700])
def test_whole_numbers_lose_no_more_than_float32(monkeypatch: pytest.MonkeyPatch, width: int, length: int) -> None:
    """Normal numbers, such with far outliers, alone and side by side: beside the exact search."""
    generator = torch.Generator().manual_seed(length)
    normal = torch.randn(48, length, generator=generator)
    spread = torch.randn(48, length, generator=generator) / torch.rand(48, length, generator=generator).sqrt()
    table = tables()[width]
    beside, block = 0.8 * normal, 0.02 * normal
    beside[:, 5:8], block[:, : length // 8] = 4.0 * normal[:, 5:8].sign(), 3.9 * normal[:, : length // 8].sign()
    for x in (normal, spread / spread.square().mean(1, keepdim=True).sqrt(), beside, block):
        lost = []
        for edge in (viterbi.EDGE, {}):
            monkeypatch.setattr(viterbi, "EDGE", edge)
            codes = torch.from_numpy(paths(x.numpy(), table.numpy(), width))
            lost.append((table[windows_of(codes, width)] - x).double().square().sum(1))
            if edge:
                assert torch.equal(codes, paths_on_device(x, table, width))
        monkeypatch.undo()
        assert float(lost[0].sum()) <= 1.0005 * float(lost[1].sum())
        assert float((lost[0] / lost[1]).max()) < 1.05


def test_no_vectors_and_vectors_of_no_numbers_have_no_codes() -> None:
    for shape in ((0, 5), (3, 0)):
        for width in (1, 4, 6):
            assert paths(np.zeros(shape, np.float32), tables()[width].numpy(), width).shape == shape
            assert paths_on_device(torch.zeros(shape), tables()[width], width).shape == shape


def test_more_bits_lose_less_and_the_estimate_is_near() -> None:
    vectors = torch.randn(20, 500, generator=torch.Generator().manual_seed(1))
    shares = lost_shares(vectors).mean(0)
    assert bool((shares[:-1] > shares[1:]).all())
    for column, width in enumerate(WIDTHS):
        lost = float((vectors - encode(vectors, [width] * 20).decode()).square().sum() / vectors.square().sum())
        assert lost == pytest.approx(float(shares[column]), rel=0.15 if width < 16 else 0.5)
    assert DISTORTIONS[4] < 0.6 * 0.0095  # what the best levels of four bits lose of a normal number


def test_what_is_encoded_decodes_as_its_codes_do() -> None:
    vectors = torch.randn(5, 1500, generator=torch.Generator().manual_seed(3))
    found = encode(vectors, [1, 3, 6, 8, 16])
    assert torch.equal(found.decode(), found.coded.decode())
    by = torch.tensor([[0.5], [1.3], [2.0], [0.9], [1.1]])
    assert torch.equal(found.scaled(by).decode(), found.coded.scaled(by).decode())


def test_what_was_decoded_is_coded_again_as_it_was() -> None:
    vectors = torch.randn(4, 300, generator=torch.Generator().manual_seed(2))
    coded = encode(vectors, [2, 4, 8, 16], unbiased=True).coded
    decoded = coded.decode()
    gains = (decoded * vectors).sum(1) / vectors.square().sum(1)
    assert torch.allclose(gains, torch.ones(4), atol=6e-3)
    again = encode(decoded, [2, 4, 8, 16], coded.scales, unbiased=True).decode()
    assert float((again - decoded).square().sum() / decoded.square().sum()) < 1e-4


def test_tables_are_those_of_the_format() -> None:
    held = torch.stack([tables()[width] for width in TRELLIS_WIDTHS]).mul(4096).to(torch.int16)
    assert hashlib.sha256(held.numpy().tobytes()).hexdigest()[:32] == "4c00eec526b5ec18dfc4004e0c893739"


SHAPES_OF_GOLDEN = [("m.bslora_local_A", (7, 37)), ("m.bslora_local_B", (1030, 7))]


HASHES_OF_GOLDEN = ("e0650434cbe1dd1e45386e690e8cc880", "2e7295768493b9d2e5d9be5b287e37cc")


def test_a_golden_file_is_read_bit_for_bit() -> None:
    file = load_file(GOLDEN / "codes.safetensors")
    check_codes(file, SHAPES_OF_GOLDEN, torch.float32, "file")
    found = decoded(file, SHAPES_OF_GOLDEN, torch.float32)
    hashes = tuple(hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:32] for t in found.values())
    assert hashes == HASHES_OF_GOLDEN
    for one, start in zip(SHAPES_OF_GOLDEN, starts(file["bslora_widths"], SHAPES_OF_GOLDEN), strict=False):
        alone = decoded(file, [one], torch.float32, start)[one[0]]  # read from where it begins
        assert torch.equal(alone, found[one[0]])
    for key, coded in coded_tensors(file, SHAPES_OF_GOLDEN).items():
        assert torch.equal(coded.decode(), found[key] if key.endswith("A") else found[key].T)


def test_zeros_and_tiny_numbers_are_coded() -> None:
    vectors = torch.stack([torch.zeros(10), torch.full((10,), 1e-20)])
    for width in WIDTHS:
        decoded = encode(vectors, [width, width]).decode()
        assert bool(decoded.isfinite().all())
        assert float(decoded[0].abs().max()) == 0.0


def coded_file() -> tuple[dict[str, torch.Tensor], list[tuple[str, tuple[int, int]]]]:
    generator = torch.Generator().manual_seed(0)
    coded = {"m.bslora_local_A": encode(torch.randn(3, 21, generator=generator), [8, 3, 16]).coded}
    return to_file(coded), [("m.bslora_local_A", (3, 21))]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (WIDTHS_NAME, lambda t: t[:-1], "is expected"),
        (WIDTHS_NAME, lambda t: torch.full_like(t, 9), "holds 9"),
        (WIDTHS_NAME, lambda t: t.short(), "is expected"),
        (WIDTHS_NAME, lambda t: torch.full_like(t, 8), "is expected"),
        (WIDTHS_NAME, lambda t: None, "missing"),
        (SCALES_NAME, lambda t: t * math.nan, "NaN"),
        (SCALES_NAME, lambda t: t.float(), "is expected"),
        (SCALES_NAME, lambda t: t.repeat(2), "is expected"),
        (FLOATS_NAME, lambda t: t + math.inf, "NaN"),
        (FLOATS_NAME, lambda t: None, "missing"),
        ("bslora_trellis_3", lambda t: t[:-1], "is expected"),
        ("bslora_trellis_3", lambda t: t.view(3, -1), "is expected"),
        ("bslora_trellis_3", lambda t: t | 255, "beyond its last"),
        ("bslora_trellis_4", lambda t: torch.zeros(4, dtype=torch.uint8), "belongs to no vector"),
    ],
)
def test_damage_is_refused(name: str, change, words: str) -> None:  # type: ignore[no-untyped-def]
    file, shapes = coded_file()
    changed = change(file.get(name, torch.zeros(1)))
    file = {key: tensor for key, tensor in file.items() if key != name} | ({} if changed is None else {name: changed})
    with pytest.raises(InputError, match=words):
        check_codes(file, shapes, torch.float32, "file")


@given(st.data())
def test_the_size_of_a_file_is_known_before_it_is_written(data: st.DataObject) -> None:
    names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
    shapes = st.lists(st.integers(0, 40), max_size=3)
    kinds = st.sampled_from(list(DTYPE_CODES.values()))
    chosen = data.draw(st.dictionaries(names, st.tuples(shapes, kinds), max_size=10))
    tensors = {name: torch.zeros(shape).to(dtype) for name, (shape, dtype) in chosen.items()}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "file"
        write_tensors(file, tensors, checksum=True)
        assert file.stat().st_size == file_bytes(tensors)
        assert holds_its_checksum(file)
        assert {name: tensor.shape for name, tensor in read_tensors(file.rename(f"{file}.safetensors")).items()} == {
            name: tensor.shape for name, tensor in tensors.items()
        }


def test_groups() -> None:
    assert [groups_of(length) for length in (1, GROUP, GROUP + 1)] == [1, 1, 2]

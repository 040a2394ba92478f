from zlib import crc32

import numpy as np
import pytest
import torch

from bslora_convert.initialisation import kept
from bslora_convert.initialisation.stream import HALF, Place, Stream
from bslora_convert.initialisation.tape import BLOCK, KEPT, Tape
from tests.initialisation.planted import draws

SEEDS = (0, 42, 2**32 + 5, 67280421310721)
GOLDEN = 4150204981


@pytest.mark.parametrize("seed", SEEDS)
def test_draws_are_the_upper_bits_of_torchs_uniform_numbers(seed: int) -> None:
    torch.manual_seed(seed)
    bound = 0.0432
    uniform = torch.empty(100_000).uniform_(-bound, bound).double().numpy()
    centres = bound * (Stream(seed).take(100_000) + 0.5) / HALF
    assert np.abs(uniform - centres).max() <= bound / 2**16 + bound * 2**-22


def test_unit_numbers_floor_to_draws() -> None:
    torch.manual_seed(42)
    unit = torch.rand(50_000).double().numpy()  # 24 bits, exact
    assert np.array_equal(np.floor(unit * 2**16).astype(int) - HALF, Stream(42).take(50_000))


def test_published_outputs_of_the_generator() -> None:
    outputs = np.array([3499211612, 581869302, 3890346734, 3586334585, 545404204])
    assert np.random.RandomState(5489).randint(0, 2**32, 5, np.uint32).tolist() == outputs.tolist()
    assert Stream(5489).take(5).tolist() == ((outputs >> 8) % 2**16 - HALF).tolist()


def test_places_are_slices_of_the_stream() -> None:
    widths = {"late": 40, "early": 16, "middle": 7}
    places = {"late": Place(3_000_000, 4), "early": Place(5, 2), "middle": Place(37, 3)}
    found = draws(42, places, widths)
    stream = Stream(42).take(3_000_160)
    assert list(found) == ["early", "middle", "late"]
    for name, place in places.items():
        size = place.rank * widths[name]
        assert np.array_equal(found[name], stream[place.first : place.first + size].reshape(place.rank, -1))


def test_checksum_is_golden() -> None:
    found = draws(42, {"a": Place(0, 4), "b": Place(1000, 2)}, {"a": 8, "b": 16})

    def checksum(*parts: np.ndarray) -> int:
        return crc32(b"".join(part.astype("<i2").tobytes() for part in parts))

    assert checksum(*found.values()) == GOLDEN
    assert checksum(found["a"], found["b"] + np.int16(1)) != GOLDEN


def test_chunks_overlap() -> None:
    tape = Tape(7)
    first, second = tape.read(0, 1000), tape.read(900, 1000)
    assert np.array_equal(np.concatenate([first, second[100:]]), Stream(7).take(1900))


def test_a_tape_is_read_anywhere() -> None:
    tape, far = Tape(3), BLOCK * (KEPT + 2)
    stream = Stream(3)
    begin = stream.take(100)
    stream.skip(far - 150)
    assert np.array_equal(tape.read(far - 50, 300), stream.take(300))
    assert np.array_equal(tape.read(0, 100), begin)  # its block was dropped in between
    assert len(tape.read(5, 0)) == 0


def test_what_is_kept_has_a_bound_whatever_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_kept", {})
    monkeypatch.setattr(kept, "KEPT_BYTES", 4000)
    first, _ = kept.draws_at(1, [(0, 500), (500, 500)])
    again, _ = kept.draws_at(1, [(0, 500)])
    assert again[0] is first[0]
    kept.draws_at(1, [(2000, 1500)])  # the last used stays, what came before it goes
    kept.draws_at(2, [(0, 100)])
    held = sum(one.bytes for one in kept._kept.values())
    assert held <= 4000
    asked, _ = kept.draws_at(3, [(0, 5000)])  # what is asked for is had, however much it is
    assert len(asked[0]) == 5000
    kept.hold("file", np.zeros(10, dtype=np.int16))
    kept.release("file")
    assert not kept.is_held("file")

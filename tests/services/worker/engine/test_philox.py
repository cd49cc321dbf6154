import pytest

from services.worker.engine.philox import philox4x32, uniform


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # philox 4x32 10 in kat_vectors of the authors' Random123
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]) -> None:
    assert philox4x32(counter, key) == words


def test_uniform_is_in_range_and_even() -> None:
    draws = [uniform(seed=7, choice=0, position=position) for position in range(4000)]
    assert all(0.0 <= draw < 1.0 for draw in draws)
    counts = [sum(1 for draw in draws if int(draw * 10) == tenth) for tenth in range(10)]
    # 99.9 % of chi-square with 9 degrees of freedom
    assert sum((count - 400) ** 2 / 400 for count in counts) < 27.9


def test_every_part_of_the_key_matters() -> None:
    draws = {
        uniform(0, 0, 0),
        uniform(1, 0, 0),
        uniform(1 << 63, 0, 0),
        uniform(0, 1, 0),
        uniform(0, 0, 1),
    }
    assert len(draws) == 5

"""Random numbers without state: the same (seed, choice, position) always draws the same one.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): ten rounds of
multiplying and mixing turn a 128-bit counter and a 64-bit key into 128 random bits.
"""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, as 32-bit fractions
_ROUNDS = 10


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random 32-bit words for a counter of four and a key of two such words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        even = _MULTIPLIERS[0] * c0
        odd = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (odd >> 32) ^ c1 ^ k0, odd & _WORD, (even >> 32) ^ c3 ^ k1, even & _WORD
        k0 = (k0 + _KEY_INCREMENTS[0]) & _WORD
        k1 = (k1 + _KEY_INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, choice: int, position: int) -> float:
    """The draw in [0, 1), 53 bits fine, for the token at an absolute position of a request's choice.

    `seed` is taken modulo 2**64, `choice` and `position` modulo 2**32.
    """
    high, low, _, _ = philox4x32((position & _WORD, choice & _WORD, 0, 0), (seed & _WORD, seed >> 32 & _WORD))
    return (high << 21 | low >> 11) * 2.0**-53

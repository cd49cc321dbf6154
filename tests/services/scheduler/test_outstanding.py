from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.kv_plans import Credits
from services.scheduler.outstanding import Outstanding

PATIENCE_S = 5.0
KEYS = st.tuples(st.sampled_from("abc"), st.integers(1, 2))
STEPS = st.lists(st.tuples(st.sampled_from(["add", "remove", "forget"]), KEYS, st.integers(1, 9), st.floats(0, 4)))


@given(steps=STEPS)
def test_the_total_is_that_of_all_that_are_on_their_way(steps: list[tuple[str, tuple[str, int], int, float]]) -> None:
    outstanding, model, now = Outstanding(PATIENCE_S), dict[tuple[str, int], tuple[int, float]](), 0.0
    for kind, key, amount, passed_s in steps:
        now += passed_s
        if kind == "add":
            outstanding.add(key, Credits(1, amount, 2 * amount), now)
            model[key] = (amount, now)
        elif kind == "remove":
            outstanding.remove(key)
            model.pop(key, None)
        else:
            outstanding.forget_old(now)
            model = {key: placed for key, placed in model.items() if now <= placed[1] + PATIENCE_S}
        blocks = sum(amount for amount, _ in model.values())
        assert outstanding.total == Credits(len(model), blocks, 2 * blocks)
        oldest = min((placed_at for _, placed_at in model.values()), default=float("inf"))
        assert outstanding.next_is_old_at() == oldest + PATIENCE_S

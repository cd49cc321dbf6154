"""The placements on a worker that it has not reported yet, and what they take of it together."""

from services.scheduler.kv_plans import Credits

PlacementKey = tuple[str, int]
"""Request id and attempt."""


class Outstanding:
    """Every change and every question takes the same time however many there are. Times are of one clock."""

    def __init__(self, patience_s: float) -> None:
        """`patience_s`: after this, a placement is not on its way any more."""
        self.total = Credits()
        self._patience_s = patience_s
        self._placed: dict[PlacementKey, tuple[Credits, float]] = {}  # the oldest first

    def add(self, key: PlacementKey, cost: Credits, now: float) -> None:
        self.remove(key)
        self._placed[key] = (cost, now)
        self.total += cost

    def remove(self, key: PlacementKey) -> None:
        """Does nothing for one that is not there."""
        if placed := self._placed.pop(key, None):
            self.total -= placed[0]

    def forget_old(self, now: float) -> None:
        """Removes those that are not on their way any more."""
        while self._placed and now > self.next_is_old_at():
            self.remove(next(iter(self._placed)))

    def next_is_old_at(self) -> float:
        """When there will be one for `forget_old`."""
        return next((placed_at + self._patience_s for _, placed_at in self._placed.values()), float("inf"))

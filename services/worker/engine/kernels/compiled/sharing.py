"""How the panels of a product are shared out over a team, as the items of a phase.

Each group of tiles takes all panels, so that its rows stay with a thread. A single group's panels are shared out
instead: each thread begins with a run of its own, since memory is read fastest in order.
"""

from typing import Any

from numba import njit


@njit(nogil=True, error_model="numpy")
def share_out(panels: int, widest: int, groups: int, members: int) -> Any:
    """Parts and items of the phase, of at most `widest` panels each."""
    parts = members if groups == 1 else groups
    most = (panels + members - 1) // members if groups == 1 else panels  # of a part
    return parts, (most + widest - 1) // widest * parts


@njit(nogil=True, error_model="numpy")
def panels_of(item: int, parts: int, panels: int, widest: int, groups: int) -> Any:
    """An item's group of tiles, its first panel, and the end of its part's panels; beyond, it is no work."""
    part, before = item % parts, widest * (item // parts)
    if groups > 1:
        return part, before, panels
    return 0, panels * part // parts + before, panels * (part + 1) // parts

"""How long to wait before a process that ended is started again, or whether to give it up. Pure: knows no processes."""

BAD_SETTINGS_EXIT_CODE = 2
"""What a service exits with when a setting is unknown or bad: starting it again cannot help."""


class RestartPolicy:
    """Exponential backoff over ends in a row.

    A process that has never been ready is given up after `start_attempts` starts, since what keeps it from starting
    will hardly go away by itself. One that has been ready is started again for as long as it takes.
    """

    def __init__(
        self,
        *,
        start_attempts: int = 3,
        first_delay_s: float = 0.25,
        longest_delay_s: float = 10.0,
        steady_after_s: float = 30.0,
    ) -> None:
        self._start_attempts = start_attempts
        self._first_delay_s = first_delay_s
        self._longest_delay_s = longest_delay_s
        self._steady_after_s = steady_after_s
        self._ends_in_a_row = 0
        self._has_been_ready = False

    def delay_after_end(self, exit_code: int, ready_for_s: float | None) -> float | None:
        """Seconds to wait before the next start; None: give up.

        `ready_for_s` is how long ago the process became ready in this run, None if it never did.
        """
        if ready_for_s is not None:
            self._has_been_ready = True
            if ready_for_s >= self._steady_after_s:
                self._ends_in_a_row = 0
        self._ends_in_a_row += 1
        if not self._has_been_ready and self._starting_is_useless(exit_code):
            return None
        return min(self._first_delay_s * 2.0 ** min(self._ends_in_a_row - 1, 30), self._longest_delay_s)

    def _starting_is_useless(self, exit_code: int) -> bool:
        return exit_code == BAD_SETTINGS_EXIT_CODE or self._ends_in_a_row >= self._start_attempts

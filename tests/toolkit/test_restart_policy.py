"""When a process that ended is started again, and when it is given up."""

from toolkit.restart_policy import BAD_SETTINGS_EXIT_CODE, RestartPolicy


def test_gives_up_after_three_starts_that_never_became_ready() -> None:
    policy = RestartPolicy(start_attempts=3, first_delay_s=1.0)
    assert [policy.delay_after_end(1, None) for _ in range(3)] == [1.0, 2.0, None]


def test_bad_settings_are_not_tried_again() -> None:
    assert RestartPolicy().delay_after_end(BAD_SETTINGS_EXIT_CODE, None) is None


def test_one_that_has_been_ready_is_never_given_up() -> None:
    policy = RestartPolicy(first_delay_s=1.0, longest_delay_s=10.0)
    policy.delay_after_end(-9, ready_for_s=5.0)
    delays = [policy.delay_after_end(BAD_SETTINGS_EXIT_CODE, None) for _ in range(100)]
    assert delays[:3] == [2.0, 4.0, 8.0]
    assert set(delays[3:]) == {10.0}


def test_a_steady_run_starts_the_backoff_anew() -> None:
    policy = RestartPolicy(first_delay_s=1.0, steady_after_s=30.0)
    assert [policy.delay_after_end(-9, ready_for_s) for ready_for_s in (1.0, 29.0, 30.0, 0.0)] == [1.0, 2.0, 1.0, 2.0]

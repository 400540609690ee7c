"""Who is to blame, by what was reported when; the clock is the test's."""

from __future__ import annotations

import pytest

from longpretrain.engine.verdict import GONE, ROLL_CALL_S, START_S, WINDOW_S, Judge, Kind

FAREWELL_S = 5.0


def judge(ranks: int = 3, *, hung_after_s: float = 0.0) -> Judge:
    """All ranks there, at the mark of their number of steps."""
    made = Judge(ranks, 10.0, hung_after_s)
    for rank in range(ranks):
        made.hello(rank, f"n{rank}", 4710 + rank, 0.0)
    beats(made, 0.0)
    return made


def beats(made: Judge, now: float, *, but: tuple[int, ...] = (), age_s: float = 0.0) -> None:
    for rank in made.watched:
        if rank not in but:
            made.beat(rank, count=8, age_s=age_s, mark="step 4: forward", stopped_s=0.0, now=now)


def after(made: Judge, kind: Kind) -> str:
    """The verdict once the report of that kind is old enough; there is none a moment before."""
    assert made.verdict(100.0 + WINDOW_S[kind] - 0.01) is None
    return made.verdict(100.0 + WINDOW_S[kind] + 0.01) or ""


def test_nothing_is_said_of_ranks_that_beat() -> None:
    made = judge()
    for second in range(1, 40):
        beats(made, float(second))
        assert made.verdict(second + 0.5) is None
        assert not made.is_over(second + 0.5, FAREWELL_S)


def test_a_death_is_named_and_what_follows_from_it_is_not() -> None:
    made = judge()
    beats(made, 100.0)
    made.trouble(1, "died", "died of SIGKILL", 100.0)
    made.trouble(0, "broken", "RuntimeError: Connection closed by peer", 100.1)
    made.trouble(2, "died", "died of SIGTERM", 100.2)
    said = after(made, "died")
    assert said == "rank 1 (process 4711 on n1) died of SIGKILL after step 4: forward"
    assert made.blamed() == 1


def test_a_broken_collective_waits_for_its_cause() -> None:
    made = judge()
    beats(made, 100.0)
    made.trouble(0, "broken", "RuntimeError: Connection closed by peer", 100.0)
    beats(made, 101.0)
    assert made.verdict(101.0) is None
    made.trouble(2, "died", "ended with exit code 0", 101.5)
    said = made.verdict(101.5 + WINDOW_S["died"] + 0.01)
    assert said == "rank 2 (process 4712 on n2) ended with exit code 0 after step 4: forward"


def test_after_a_broken_collective_silence_counts_sooner() -> None:
    made = judge()
    beats(made, 100.0)
    made.trouble(0, "broken", "RuntimeError: Timed out", 100.0)
    beats(made, 102.0, but=(1,))
    said = after(made, "broken")
    assert ROLL_CALL_S < WINDOW_S["broken"] < made.dead_after_s
    assert said.startswith("rank 1 (process 4711 on n1) gave no sign of life for 3 s after step 4")


def test_a_collective_that_broke_by_itself_blames_nobody() -> None:
    made = judge()
    beats(made, 100.0)
    made.trouble(2, "broken", "RuntimeError: NCCL error", 100.0)
    beats(made, 102.0)
    said = after(made, "broken")
    assert said.startswith("no rank is lost, but rank 2 (process 4712 on n2) failed after step 4")
    assert said.endswith("RuntimeError: NCCL error")
    assert made.blamed() is None


def test_a_rank_that_was_lost_before_it_was_watched_is_named() -> None:
    made = judge(2)
    made.world_size = 3
    beats(made, 102.0)
    made.trouble(0, "broken", "RuntimeError: Connection closed by peer", 100.0)
    assert after(made, "broken").startswith("rank 2 never reported, and rank 0 (process 4710 on n0")
    assert made.blamed() == 2


def test_an_error_told_is_the_cause_of_that_ranks_end() -> None:
    """Another sentinel of the machine may see the end before the error is through."""
    made = judge()
    beats(made, 100.0)
    made.trouble(1, "died", "ended with exit code 1", 100.0)
    made.trouble(1, "failed", "OSError: [Errno 28] No space left on device", 100.1)
    said = after(made, "died")
    assert said.endswith(
        "failed after step 4: forward: OSError: [Errno 28] No space left on device"
    )


def test_ranks_that_all_fail_by_themselves_end_by_themselves() -> None:
    made = judge()
    beats(made, 100.0)
    for rank in range(3):
        made.trouble(rank, "failed", "FloatingPointError: 20 in a row", 100.0)
    assert made.verdict(101.0) is None
    assert made.is_over(101.0, FAREWELL_S)


def test_silence_and_nodes_name_all_ranks_that_are_gone() -> None:
    made = judge(8)
    for second in range(1, 13):
        beats(made, float(second), but=(2, 3, 4, 5, 6, 7))
        said = made.verdict(float(second))
        assert said is None or second > made.dead_after_s
    assert said is not None
    for rank in (2, 3, 4, 5):
        assert f"rank {rank} (process {4710 + rank} on n{rank})" in said
    assert "and 2 more gave no sign of life for 1" in said


def test_a_stopped_rank_does_not_answer() -> None:
    made = judge()
    for second in range(1, 10):
        stopped_s = max(0.0, second - 1.0)
        beats(made, float(second), but=(1,))
        seen = {"count": 8, "age_s": 0.0, "mark": "step 4: forward", "stopped_s": stopped_s}
        made.beat(1, **seen, now=float(second))  # type: ignore[arg-type]
        assert made.verdict(float(second)) is None
    beats(made, 11.5, but=(1,))
    made.beat(1, count=8, age_s=0.0, mark="step 4: forward", stopped_s=10.5, now=11.5)
    assert made.verdict(11.5) is None
    said = made.verdict(11.5 + WINDOW_S["stopped"]) or ""
    assert said.startswith("rank 1 (process 4711 on n1) does not answer (stopped for 10 s)")


@pytest.mark.parametrize(
    ("kind", "detail", "told"),
    [
        ("stopped", "does not answer (stopped for 10 s)", "do not answer (stopped for 10 s)"),
        ("lost", GONE, "are gone, and their nodes or watchdogs with them, after step 4: forward"),
    ],
)
def test_several_ranks_are_told_of_in_the_plural(kind: Kind, detail: str, told: str) -> None:
    made = judge()
    beats(made, 100.0)
    for rank in (1, 2):
        made.trouble(rank, kind, detail, 100.0)
    assert f"(process 4712 on n2) {told}" in (made.verdict(101.0) or "")


def test_a_pause_of_the_judge_itself_accuses_nobody() -> None:
    made = judge()
    made.forget_pause(500.0)
    assert made.verdict(505.0) is None
    assert made.verdict(511.0) is None  # the window of what is silent now
    assert "gave no sign of life" in (made.verdict(512.0) or "")


def test_a_pause_of_the_judge_itself_is_no_standing_still() -> None:
    made = judge(2, hung_after_s=60.0)
    beats(made, 100.0, age_s=50.0)
    made.forget_pause(1000.0)
    assert not made.is_hung(1000.0)
    assert not made.is_hung(1060.0)
    assert made.is_hung(1061.0)


def test_ranks_that_wait_for_one_that_was_paused_are_no_hang() -> None:
    """Where only its node was: its sentinel counts from the end of the pause, the others do not."""
    made = judge(3, hung_after_s=60.0)
    beats(made, 100.0, but=(1,), age_s=95.0)
    made.beat(1, count=8, age_s=0.0, mark="step 4: forward", stopped_s=0.0, now=100.0)
    assert not made.is_hung(100.0)


def test_who_has_left_is_not_judged() -> None:
    made = judge()
    made.trouble(1, "died", "ended with exit code 0", 100.0)  # seen before its leave was heard
    for rank in range(3):
        made.left(rank, 100.0)
    made.trouble(0, "lost", "is gone", 100.0)
    assert made.verdict(200.0) is None
    assert made.is_over(100.1, FAREWELL_S)


def test_the_first_to_leave_is_not_waited_for_long() -> None:
    made = judge()
    beats(made, 100.0)
    made.left(2, 100.0)
    assert not made.is_over(104.0, FAREWELL_S)
    assert made.is_over(105.5, FAREWELL_S)


@pytest.mark.parametrize("behind", [(), (1,), (1, 2)])
def test_hung_ranks_that_stand_out_are_named(behind: tuple[int, ...]) -> None:
    made = judge(4, hung_after_s=60.0)
    for second in range(1, 70):
        for rank in range(4):
            mark, count = ("step 5: batch", 9) if rank in behind else ("step 5: forward", 10)
            age_s = max(0.0, second - 5.0)
            made.beat(rank, count=count, age_s=age_s, mark=mark, stopped_s=0.0, now=float(second))
        assert made.is_hung(float(second)) == (second > 65)
    said = made.hung_sentence("RUN/stacks")
    assert said.startswith("no progress for 60 s: ")
    assert said.endswith("; stacks of all ranks in RUN/stacks")
    if not behind:
        assert "no rank stands out, all stand at step 5: forward" in said
    else:
        assert "at step 5: batch, the others at step 5: forward" in said
        assert [rank for rank in range(4) if f"rank {rank} " in said] == [*behind]


def test_reading_a_corpus_before_the_run_folder_is_opened_is_no_hang() -> None:
    """Rank 0 may hash it for longer than any step takes; the others wait for that."""
    made = judge(2, hung_after_s=60.0)
    made.is_opened = False
    for now in (100.0, START_S):
        for rank in range(2):
            made.beat(rank, count=2, age_s=now, mark="the check", stopped_s=0.0, now=now)
        assert not made.is_hung(now)
    assert made.is_hung(START_S + 1.0)
    assert made.hung_sentence("RUN").startswith("no progress for 10800 s: no rank stands out")
    made.opened(START_S + 1.0)
    assert not made.is_hung(START_S + 60.0)
    assert made.is_hung(START_S + 62.0)


def test_one_rank_that_goes_on_is_no_hang() -> None:
    made = judge(2, hung_after_s=60.0)
    made.beat(0, count=1, age_s=100.0, mark="a", stopped_s=0.0, now=100.0)
    made.beat(1, count=2, age_s=59.0, mark="b", stopped_s=0.0, now=100.0)
    assert not made.is_hung(100.0)
    assert not judge(2).is_hung(1e9), "0 never ends a run"

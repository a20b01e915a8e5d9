"""What budget suits the memory that is free: properties of the decision, and of what it is told."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.memory import following
from flashmoe.memory.following import Facts, budget_bytes, look_again_seconds
from flashmoe.memory.free_memory import reserve_of
from flashmoe.memory.pressure import Pressure

MIB, GIB = 1 << 20, 1 << 30


@st.composite
def facts(draw) -> Facts:
    least = draw(st.integers(1, GIB))
    most = draw(st.integers(least, 100 * GIB))
    memory = draw(st.integers(least, 120 * GIB))
    return Facts(
        available_bytes=draw(st.integers(0, 100 * GIB)),
        falling_bytes=draw(st.one_of(st.just(0), st.integers(0, 4 * GIB))),
        present_bytes=draw(st.integers(0, min(memory, most))),
        memory_bytes=memory,
        least_bytes=least,
        most_bytes=most,
        reserve_bytes=draw(st.integers(0, GIB)),
        beside_bytes=draw(st.integers(0, GIB)),
        pressed=draw(st.booleans()),
        calm_seconds=draw(st.floats(0, 60)),
        steady_seconds=draw(st.floats(0, 60)),
    )


def reserve(f: Facts) -> int:
    return reserve_of(f.available_bytes + f.present_bytes, f.reserve_bytes)


@given(facts())
def test_a_budget_stays_between_the_least_and_what_is_of_use(f):
    assert f.least_bytes <= budget_bytes(f) <= max(f.memory_bytes, f.most_bytes)


@given(facts())
def test_what_is_short_is_given_back_at_once_until_the_reserve_is_free_again(f):
    new = budget_bytes(f)
    if new < f.memory_bytes:
        given_back = f.present_bytes - min(f.present_bytes, new)
        ahead = f.available_bytes - f.falling_bytes + given_back
        assert ahead >= reserve(f) or new == f.least_bytes


@given(facts())
def test_it_neither_shrinks_with_enough_free_nor_grows_without(f):
    """Where all that it allows is filled."""
    new, unfilled = budget_bytes(f), max(0, min(f.memory_bytes, f.most_bytes) - f.present_bytes)
    ahead = f.available_bytes - f.falling_bytes - unfilled
    if ahead >= reserve(f):
        assert new >= f.memory_bytes
    if f.pressed or f.calm_seconds < following.CALM_SECONDS:
        assert new <= f.memory_bytes
    if ahead < reserve(f) * following.LOW_SHARE and f.memory_bytes > f.least_bytes:
        assert new < f.memory_bytes or f.memory_bytes < 1 / following.LEAST_STEP_SHARE
    elif ahead < reserve(f):
        assert new <= f.memory_bytes


@given(facts())
def test_it_grows_in_steps_and_only_where_it_can_be_filled(f):
    new = budget_bytes(f)
    if new > f.memory_bytes:
        assert new - f.memory_bytes <= f.most_bytes * following.MOST_STEP_SHARE
        left = f.available_bytes - (new - f.present_bytes)
        assert left >= reserve(f) + f.beside_bytes


@given(facts())
def test_what_it_has_come_to_it_keeps(f):
    """With all slots filled and nothing else changed, neither way."""
    f = f._replace(
        present_bytes=min(f.present_bytes, f.memory_bytes), falling_bytes=0, pressed=False,
        calm_seconds=60.0, steady_seconds=60.0,
    )  # fmt: skip
    directions = set()
    for _ in range(200):
        new = budget_bytes(f)
        if new == f.memory_bytes:
            break
        directions.add(new > f.memory_bytes)
        present = min(new, f.most_bytes)  # all slots are filled
        available = f.available_bytes + f.present_bytes - present
        f = f._replace(memory_bytes=new, present_bytes=present, available_bytes=max(0, available))
    assert budget_bytes(f) == f.memory_bytes
    assert len(directions) <= 1


@settings(max_examples=50)
@given(
    st.integers(3, 64),  # GiB in all
    st.floats(0.05, 2.0),  # GiB a second that a neighbour takes
    st.floats(0.0, 0.85),  # and how much of all
)
def test_a_neighbour_gets_what_it_takes_and_the_budget_comes_back(gib, speed, share):
    """It takes, waits and gives back; each look finds what is left, and experts fill their slots.

    What is decided at a look has come about by the next.
    """
    all_bytes, dense = gib * GIB, 256 * MIB
    most = all_bytes
    memory = present = all_bytes - dense - reserve_of(all_bytes)
    before = taken = 0
    at = calm_since = grew_at = 0.0
    seen = []
    until = all_bytes * share / (speed * GIB)
    while at < until + 200:
        wanted = min(at, until) * speed * GIB if at < until + 10 else 0
        taken = int(wanted)
        available = all_bytes - dense - taken - present
        assert available > 0 or memory <= MIB
        available = max(0, available)
        falling = max(0, before - available - present)
        before = available + present
        new = budget_bytes(
            Facts(
                available, falling, present, memory, MIB, most, 768 * MIB, 0, False,
                at - calm_since, at - grew_at,
            )
        )  # fmt: skip
        calm_since = at if new < memory else calm_since
        grew_at = at if new > memory else grew_at
        memory = new
        present = min(memory, present + 2 * GIB) if present < memory else memory
        seen.append(memory)
        at += look_again_seconds(available)
    assert seen[-1] >= 0.9 * seen[0]
    assert seen[-1] == seen[-20]


@given(st.integers(0, 1 << 50))
def test_no_program_takes_all_that_is_free_between_two_looks(available):
    seconds = look_again_seconds(available)
    assert following.SOONEST_SECONDS <= seconds <= following.LATEST_SECONDS
    if seconds > following.SOONEST_SECONDS:
        assert seconds * following.FASTEST_BYTES_PER_SECOND <= available


def test_pressure_is_that_of_the_own_cgroup_where_it_tells(tmp_path):
    machine, own = tmp_path / "machine", tmp_path / "cgroup" / "a" / "memory.pressure"
    membership = tmp_path / "own"
    membership.write_text("1:name=x:/\n0::/a\n")

    def wait(file, seconds):
        file.parent.mkdir(parents=True, exist_ok=True)
        total = int(seconds * 1e6)
        file.write_text(f"some avg10=0.00 total={total}\nfull avg10=0.00 total=0\n")

    wait(machine, 0)
    pressure = Pressure(machine, tmp_path / "cgroup", membership)
    assert not pressure.is_high()
    wait(machine, 1000)
    assert pressure.is_high()
    assert not pressure.is_high()  # nothing since
    wait(own, 0)
    pressure = Pressure(machine, tmp_path / "cgroup", membership)
    wait(machine, 5000)
    assert not pressure.is_high()
    wait(own, 1000)
    assert pressure.is_high()


def test_without_pressure_files_nothing_is_pressed(tmp_path):
    for content in (None, "", "nonsense\n", "some total=x\n"):
        if content is not None:
            (tmp_path / "machine").write_text(content)
        assert not Pressure(tmp_path / "machine", tmp_path, tmp_path / "none").is_high()

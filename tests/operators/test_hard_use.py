"""Copies, threads, Ctrl-C, forks, damaged states, and windows that run for long."""

import copy
import itertools
import pickle
import resource
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import BACKENDS, numpy64, relative_error

import mfac_core as mfac
from mfac_core.testing import dense_inverse, error_bound

ROWS = np.random.default_rng(0).standard_normal((9, 7))

OPERATORS = {
    "fisher": lambda g: mfac.EmpiricalFisher(g, damping=0.1),
    "inverse": lambda g: mfac.InverseFisher(g, damping=0.1),
    "whitened": lambda g: mfac.InverseFisher(g, damping=0.1, store_whitened=True),
    "blocks": lambda g: mfac.BlockInverseFisher(g, damping=0.1, block_size=3),
    "long blocks": lambda g: mfac.BlockInverseFisher(g[:2, :], damping=0.1, block_size=3),
    "power": lambda g: mfac.InverseFisher(g, damping=0.1).power(0.5),
    "parts": lambda g: mfac.InverseFisher([g[:, :3], g[:, 3:]], damping=0.1),
    "window": lambda g: filled(mfac.SlidingInverseFisher(7, 4, damping=0.1), g),
    "compressed": lambda g: filled(
        mfac.SparseSlidingInverseFisher(7, 4, density=0.5, damping=0.1), g
    ),
}


def filled(window, g):
    for i in range(int(g.shape[0])):
        window.append_matvec(g[i, :])
    return window


# -- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("kind", OPERATORS)
def test_operators_are_copied_and_pickled(backend, kind):
    operator = OPERATORS[kind](backend.asarray(ROWS))
    x = backend.asarray(ROWS[0])
    expected = numpy64(operator @ x)
    for duplicate in (copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
        assert type(duplicate) is type(operator)
        # A view of columns becomes contiguous, which another loop of BLAS sums.
        assert relative_error(duplicate @ x, expected) <= (1e-6 if kind == "parts" else 0.0)
        if "window" in kind:
            duplicate.append(x)
            assert np.array_equal(numpy64(operator @ x), expected)


def test_an_empty_window_of_a_given_library_is_copied():
    window = mfac.SlidingInverseFisher(7, 4, damping=0.1, xp=np, dtype="float32")
    copied = pickle.loads(pickle.dumps(window))
    filled(copied, ROWS.astype("float32"))
    assert len(copied) == 4
    assert len(window) == 0


# -- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["inverse", "blocks", "window"])
def test_many_threads_read(kind):
    operator = OPERATORS[kind](ROWS)
    queries = [
        lambda: operator @ ROWS[0],
        operator.diagonal,
        operator.logdet,
        lambda: operator.quadratic(ROWS[1]),
        lambda: operator.entries(0, 1),
    ]
    expected = [query() for query in queries]
    fresh = pickle.loads(pickle.dumps(operator))
    operator = fresh
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda k: queries[k % len(queries)](), range(400)))
    for k, value in enumerate(found):
        np.testing.assert_allclose(value, expected[k % len(queries)], rtol=1e-12)


def test_readers_see_a_window_before_or_after_a_step():
    m, steps = 5, 300
    rows = np.random.default_rng(1).standard_normal((m + steps, 7))
    window = mfac.SlidingInverseFisher(7, m, damping=0.1)
    filled(window, rows[:m])
    dense = np.stack([dense_inverse(rows[k : k + m], damping=0.1) for k in range(steps + 1)])
    possible = dense @ rows[0]
    written = threading.Event()

    def read(_):
        seen = []
        while not written.is_set():
            seen.append(window @ rows[0])
        return seen

    def write():
        for row in rows[m:]:
            window.append_matvec(row)
        written.set()

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read, k) for k in range(2)]
        pool.submit(write).result()
    for y in itertools.chain(*(reader.result() for reader in readers)):
        errors = np.linalg.norm(possible - y, axis=1) / np.linalg.norm(y)
        assert errors.min() <= 1e-9


def test_two_writers_wait_for_one_another():
    rows = np.random.default_rng(2).standard_normal((400, 7))
    window = mfac.SlidingInverseFisher(7, 6, damping=0.1)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(window.append_matvec, rows))
    held = window.gradients
    assert len(held) == 6
    assert all((rows == row).all(axis=1).any() for row in held)
    np.testing.assert_allclose(window.gram, held @ held.T, rtol=1e-12)
    assert relative_error(window @ rows[0], dense_inverse(held, damping=0.1) @ rows[0]) <= 1e-9


def test_a_fork_works_on():
    """In a process of its own: forking one that runs threads, as this may, is another matter."""
    code = (
        "import numpy as np, multiprocessing, mfac_core as mfac\n"
        "inverse = mfac.InverseFisher(np.eye(3, 5), damping=0.5)\n"
        "def ask(k): return inverse @ np.full(5, float(k))\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool:\n"
        "    found = pool.map(ask, range(4))\n"
        "print(all(np.array_equal(y, ask(k)) for k, y in enumerate(found)))\n"
    )
    if not hasattr(__import__("os"), "fork"):
        pytest.skip("this system cannot fork")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "True", run.stderr


# -- Ctrl-C --------------------------------------------------------------------------------------

PACKAGE = str(Path(mfac.__file__).parent)

CHANGES = {
    "append": lambda window, g: window.append(g),
    "append_matvec": lambda window, g: window.append_matvec(g),
    "replace": lambda window, g: window.replace(1, g),
    "remove": lambda window, g: window.remove(1),
    "clear": lambda window, g: window.clear(),
    "damping": lambda window, g: setattr(window, "damping", 0.3),
    "load": lambda window, g: window.load_state_dict(
        filled(copy.deepcopy(window), ROWS[:2]).state_dict()
    ),
}


def interrupt_at(line):
    """Send Ctrl-C to this process when the package executes its ``line``-th line from now on."""
    lines = itertools.count()

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and next(lines) == line:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)


@pytest.fixture
def interruptible():
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    tracer = sys.gettrace()
    yield
    sys.settrace(tracer)
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("held", [3, 4])
@pytest.mark.parametrize("change", CHANGES)
def test_an_interrupted_change_is_undone_or_done(interruptible, change, held):
    before = filled(mfac.SlidingInverseFisher(7, 4, damping=0.1), ROWS[:held])
    after = copy.deepcopy(before)
    CHANGES[change](after, ROWS[8])
    outcomes = set()
    for line in itertools.count():
        window = copy.deepcopy(before)
        interrupt_at(line)
        try:
            CHANGES[change](window, ROWS[8])
            break
        except KeyboardInterrupt:
            sys.settrace(None)
        held_now, x = window.gradients, ROWS[7]
        for name, state in (("before", before), ("after", after)):
            same = np.array_equal(held_now, state.gradients) and window.damping == state.damping
            if same:
                outcomes.add(name)
                break
        else:
            pytest.fail(f"neither before nor after, interrupted at line {line}")
        np.testing.assert_allclose(window.gram, held_now @ held_now.T, rtol=1e-12, atol=1e-12)
        dense = dense_inverse(held_now, damping=window.damping) if len(held_now) else None
        expected = x / window.damping if dense is None else dense @ x
        assert relative_error(window @ x, expected) <= 1e-9
        window.append(ROWS[6])
        assert np.array_equal(window.gradients[-1], ROWS[6])
    sys.settrace(None)
    assert "before" in outcomes
    assert line > 5


# -- states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["window", "compressed"])
def test_no_part_of_a_state_may_miss_or_be_cut(kind):
    window = OPERATORS[kind](ROWS)
    state = window.state_dict()
    x, before = ROWS[0], window @ ROWS[0]
    for name, value in state.items():
        without = {key: entry for key, entry in state.items() if key != name}
        with pytest.raises(ValueError, match="state"):
            window.load_state_dict(without)
        if getattr(value, "ndim", 0) and name != "probe":
            with pytest.raises(ValueError, match="state"):
                window.load_state_dict(state | {name: value[:-1]})
    with pytest.raises(ValueError, match=r"state must have \(version, .*got \(99,"):
        window.load_state_dict(state | {"version": 99})
    assert np.array_equal(window @ x, before)


# -- for long ------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_100_000_operations():
    """The error stays below its bound, and the memory where it was."""
    rng = np.random.default_rng(3)
    d, m, damping = 12, 5, 1e-3
    window = mfac.SlidingInverseFisher(d, m, damping=damping)
    memory = []
    for step in range(100_000):
        g = rng.standard_normal(d) * 10.0 ** rng.integers(-2, 2)
        if step % 7 == 3 and len(window):
            window.replace(int(rng.integers(len(window))), g)
        elif step % 11 == 5 and len(window) > 1:
            window.remove(int(rng.integers(len(window))))
        else:
            window.append(g)
        if step % 5 == 0:
            window @ g
        if step % 2_000 == 1_999:
            held = window.gradients
            exact = dense_inverse(held, damping=damping)
            y = rng.standard_normal(d)
            assert relative_error(window @ y, exact @ y) <= error_bound(held, damping=damping)
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert memory[-1] - memory[4] < 8 * 1024  # KiB, the peak of this process

"""The paper's rules give what its Table 4 says they give, and the argmin does at least as well."""

import pytest

from longctx.cost.choice import choose, fit_empirical, kv_hidden_from
from tests.cost.table4 import ACHIEVED, PEAKS, TABLE_4, gpu, work


def right(rule, on):
    """Rows of Table 4 whose faster strategy ``rule`` takes."""
    return sum(choose(rule, work(t, p), on).strategy == ("pass_kv" if kv <= q else "pass_q") for p, t, kv, q in TABLE_4)


@pytest.mark.parametrize(
    ("rule", "on", "rows"), [("alg1", PEAKS, 12), ("alg1", ACHIEVED, 13), ("alg5", PEAKS, 11), ("alg5", ACHIEVED, 12)]
)
def test_rows_of_table_4_that_a_rule_gets_right(rule, on, rows):
    assert right(rule, on) == rows


@pytest.mark.parametrize(("on", "threshold"), [(PEAKS, 4000), (ACHIEVED, 4950), (gpu(515, 3), 42900)])
def test_eq_2_threshold(on, threshold):
    assert kv_hidden_from(work(1, 0), on) == pytest.approx(threshold, rel=1e-2)


def test_the_argmin_loses_at_most_two_percent_on_table_4_but_for_one_row():
    """At T = 3,200 it finds the two even where the paper measured 6 %: no model of these terms gives more."""
    on = gpu(515, 26, exchange_gigabytes=2 * 23)  # answers in 16 bits there
    for p, t, kv, q in TABLE_4:
        took = {"pass_kv": kv, "pass_q": q}[choose("auto", work(t, p), on).strategy]
        assert took <= 1.02 * min(kv, q) or t == 3200, (t, p)


def test_fitted_constants_classify_all_of_table_4():
    fitted = fit_empirical([(t, p, kv, q) for p, t, kv, q in TABLE_4])
    on = gpu(515, 26)
    object.__setattr__(on, "empirical", fitted)
    assert right("empirical", on) == len(TABLE_4)


def test_what_cannot_be_fitted_is_refused():
    for points in ([(1, 2, 1.0, 2.0), (3, 4, 1.0, 3.0)], [(1, 2, 1.0, 1.0), (3, 4, 1.0, 3.0)], []):
        with pytest.raises(ValueError, match="one strategy won every row"):
            fit_empirical(points)
    with pytest.raises(ValueError, match=r"use context\.strategy=auto"):
        choose("empirical", work(1, 1), PEAKS)


def test_a_ring_of_one_has_nothing_to_choose():
    assert choose("alg5", work(5, 7, ranks=1), PEAKS).strategy == "pass_kv"

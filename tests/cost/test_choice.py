"""The paper's rules reproduce its Table 4, and the argmin of the cost model does at least as well."""

import pytest

from longctx.cost.choice import choose, fit_empirical, overlap_threshold
from tests.cost.table4 import ACHIEVED, PEAKS, TABLE_4, gpu, work


def count_correct(rule, hardware):
    """Count the rows of Table 4 for which ``rule`` chooses the faster strategy."""
    return sum(
        choose(rule, work(t, p), hardware).strategy == ("pass_kv" if kv <= q else "pass_q") for p, t, kv, q in TABLE_4
    )


@pytest.mark.parametrize(
    ("rule", "hardware", "rows"),
    [("alg1", PEAKS, 12), ("alg1", ACHIEVED, 13), ("alg5", PEAKS, 11), ("alg5", ACHIEVED, 12)],
)
def test_rules_choose_correctly_in_rows_of_table_4(rule, hardware, rows):
    assert count_correct(rule, hardware) == rows


@pytest.mark.parametrize(("hardware", "threshold"), [(PEAKS, 4000), (ACHIEVED, 4950), (gpu(515, 3), 42900)])
def test_overlap_threshold_of_eq_2(hardware, threshold):
    assert overlap_threshold(work(1, 0), hardware) == pytest.approx(threshold, rel=1e-2)


def test_argmin_loses_at_most_two_percent_in_all_but_one_row_of_table_4():
    """At T = 3,200 the modelled costs are equal, but the paper measured 6 %: no model of these terms gives more."""
    hardware = gpu(515, 26, exchange_gigabytes=2 * 23)  # the paper's partial outputs are 16-bit
    for p, t, kv, q in TABLE_4:
        chosen = {"pass_kv": kv, "pass_q": q}[choose("auto", work(t, p), hardware).strategy]
        assert chosen <= 1.02 * min(kv, q) or t == 3200, (t, p)


def test_fitted_constants_classify_all_of_table_4():
    fitted = fit_empirical([(t, p, kv, q) for p, t, kv, q in TABLE_4])
    hardware = gpu(515, 26)
    object.__setattr__(hardware, "empirical", fitted)
    assert count_correct("empirical", hardware) == len(TABLE_4)


def test_points_without_a_crossover_are_refused():
    for points in ([(1, 2, 1.0, 2.0), (3, 4, 1.0, 3.0)], [(1, 2, 1.0, 1.0), (3, 4, 1.0, 3.0)], []):
        with pytest.raises(ValueError, match="one of pass_kv and pass_q is at least as fast at every miss rate"):
            fit_empirical(points)
    with pytest.raises(ValueError, match=r"use context\.strategy=auto"):
        choose("empirical", work(1, 1), PEAKS)


def test_single_rank_always_chooses_pass_kv():
    assert choose("alg5", work(5, 7, ranks=1), PEAKS).strategy == "pass_kv"

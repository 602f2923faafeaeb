"""Progress: the remaining time follows from all steps of the phase, whether they are slow or come in bursts."""

import pytest

from recipes.common.progress import Progress, layers_to_run


@pytest.mark.parametrize(("seconds", "count"), [(40.0, 1), (20.0, 20), (0.5, 3)])
def test_remaining_time_is_that_of_the_whole_phase(seconds, count):
    now = [0.0]
    progress = Progress(shown=False)
    progress._bar.get_time = lambda: now[0]
    progress.start("steps", 100 * count)
    for _ in range(11):
        now[0] += seconds
        progress.step(count=count)
    assert progress._bar.tasks[0].time_remaining == pytest.approx(89 * seconds, abs=1)


@pytest.mark.parametrize(("tokens", "chunk", "layers"), [(430, None, 7), (430, 430, 7), (431, 430, 14), (430, 13, 238)])
def test_layers_are_run_once_for_each_chunk(tokens, chunk, layers):
    assert layers_to_run(7, tokens, chunk) == layers

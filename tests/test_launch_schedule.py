import pytest

from launch.config import ScheduleConfig
from launch.schedule import learning_rate


def rates(total, **settings):
    config = ScheduleConfig(**settings)
    return [learning_rate(step, config, peak=2.0, total_steps=total) for step in range(total)]


def test_warm_up_is_linear_and_ends_at_the_peak():
    assert rates(8, warmup_steps=4)[:4] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_it_falls_to_the_final_ratio_at_the_last_step(kind, warmup):
    values = rates(20, kind=kind, warmup_steps=warmup, final_ratio=0.25)
    assert values[-1] == pytest.approx(0.5)
    falling = values[max(warmup - 1, 0) :]
    assert falling == sorted(falling, reverse=True)


def test_golden_values():
    assert rates(4, kind="linear", warmup_steps=0, final_ratio=0.0) == pytest.approx([1.5, 1.0, 0.5, 0.0])
    assert rates(4, kind="cosine", warmup_steps=0, final_ratio=0.0) == pytest.approx(
        [1.70711, 1.0, 0.29289, 0.0], abs=1e-5
    )
    assert rates(3, kind="constant", warmup_steps=1, final_ratio=0.0) == [2.0, 2.0, 2.0]


def test_steps_beyond_the_total_and_a_run_of_warm_up_only():
    assert learning_rate(99, ScheduleConfig(warmup_steps=2), peak=1.0, total_steps=10) == pytest.approx(0.1)
    assert rates(3, warmup_steps=5) == pytest.approx([0.4, 0.8, 1.2])

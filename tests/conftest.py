"""Settings of the whole test run.

Hypothesis tries the same examples everywhere; `pytest --hypothesis-profile explore` looks for new ones.
"""

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # tests run in several processes; threads on top of them only wait

settings.register_profile(
    "same", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "explore", parent=settings.get_profile("same"), derandomize=False, max_examples=1000
)
settings.load_profile("same")

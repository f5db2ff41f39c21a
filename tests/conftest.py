"""Settings of the whole test run."""

import torch

torch.set_num_threads(1)  # tests run in several processes; threads on top of them only wait

"""What every test shares: two threads, as on the smallest machine the suite is meant for."""

from __future__ import annotations

import torch

torch.set_num_threads(2)

"""What a run of the app imports, for the server that forks runs; see :mod:`tests.helpers.app`."""

import logging
import os

os.environ["OMP_NUM_THREADS"] = "1"
logging.getLogger().addHandler(logging.NullHandler())  # as Hydra has one by then: else Lightning adds one of its own

import torch  # noqa: E402

import lightning_quant.cli.app  # noqa: E402
import lightning_quant.cli.run  # noqa: E402, F401
from tests.helpers.networks import Body, calibrated  # noqa: E402

torch.set_num_threads(1)
calibrated(Body())  # AIMET and the kernels are loaded when they are needed

"""What the fork server of train_child imports before its first child."""

import torch._dynamo  # noqa: F401

import minimoe.commands.train  # noqa: F401
import minimoe.data.tasks  # noqa: F401
import minimoe.interop  # noqa: F401
import minimoe.train.run  # noqa: F401

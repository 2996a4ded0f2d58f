"""What a process of the trainer imports and computes before its first step, once for all that runs.py forks."""

import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import runs  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")  # compiles two thousand expressions

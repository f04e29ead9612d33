"""A model and a run that are traced in seconds."""

from __future__ import annotations

from llama_ray.model.config import LlamaConfig
from llama_ray.training.config import TrainConfig

# More layers than are traced, so that plans extrapolate.
MODEL = LlamaConfig.preset(
    "llama-tiny", num_layers=9, hidden_size=128, intermediate_size=352, max_seq_len=128
)
# fp32, because in bf16 a CPU attends to short sequences in a way that no GPU does; within documents it does so in fp32.
RUN = TrainConfig(precision="fp32", batch_size=4, document_mask=False)

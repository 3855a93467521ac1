"""What a treatment costs: perplexity, divergence, sums, multiple choice, and the tasks of
lm-evaluation-harness.
"""

from safety_neurons.capability.measures import (
    Measurement,
    Treatment,
    divergence,
    measure_divergence,
    measure_gsm8k,
    measure_mmlu,
    measure_perplexity,
    measure_running_text,
    perplexity,
)
from safety_neurons.capability.tasks import (
    OWN,
    Task,
    TaskSettings,
    checked,
    harness_model,
    measure,
    measure_harness,
    task,
)

__all__ = [
    "OWN",
    "Measurement",
    "Task",
    "TaskSettings",
    "Treatment",
    "checked",
    "divergence",
    "harness_model",
    "measure",
    "measure_divergence",
    "measure_gsm8k",
    "measure_harness",
    "measure_mmlu",
    "measure_perplexity",
    "measure_running_text",
    "perplexity",
    "task",
]

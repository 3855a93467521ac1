"""What a treatment costs: perplexity, divergence, sums, multiple choice, and the tasks of lm-evaluation-harness."""

from safety_neurons.capability.gsm8k import measure_gsm8k
from safety_neurons.capability.harness import harness_model, measure_harness
from safety_neurons.capability.language import divergence, measure_divergence, measure_perplexity, measure_running_text, perplexity
from safety_neurons.capability.measured import Measured, Treatment
from safety_neurons.capability.mmlu import measure_mmlu
from safety_neurons.capability.tasks import OWN, Settings, Task, check, measure, task

__all__ = [
    "OWN",
    "Measured",
    "Settings",
    "Task",
    "Treatment",
    "check",
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

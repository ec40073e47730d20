"""From the tensors that a file holds of one module to the updates of its weight and bias, whatever the dialect.

Dialects differ in what they call a module, and agree on the *roles* of its tensors: `lora_down.weight` and its other
spellings, `alpha`, `hada_w1_a`, `dora_scale`, `diff_b`. A format splits names (`split`, `grouped`), decides which target
a module is, and asks `found_in` for the updates.
"""

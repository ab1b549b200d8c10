"""Continue prompts with a saved model: python examples/lm/generate.py [MODEL] [PROMPT ...].

MODEL is a model file or a checkpoint folder; the default is the file that minimal_train.py writes.
"""

import sys
from pathlib import Path

from psannlm import psannLM

path = sys.argv[1] if len(sys.argv) > 1 else "minimal_model.safetensors"
prompts = sys.argv[2:] or ["The tide", "A clock"]
if not Path(path).exists():
    sys.exit(f"{path} does not exist; make one with: python examples/lm/minimal_train.py")
model = psannLM.load(path)
for prompt, text in zip(prompts, model.generate_batch(prompts, max_new_tokens=24, top_p=0.9, seed=7), strict=True):
    print(f"{prompt}{text}\n")

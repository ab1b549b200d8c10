"""Train a tiny sine model on a dozen lines, generate text, save the model and load it again; seconds on a laptop.

Run it from anywhere: python examples/lm/minimal_train.py
"""

from pathlib import Path

from psannlm import psannLM, psannLMDataPrep

corpus = Path(__file__).with_name("sample_texts.txt").read_text(encoding="utf-8").splitlines()
data = psannLMDataPrep(corpus, tokenizer="auto", max_length=32, val_split=0.1, vocab_size=512)
print(f"{len(data)} windows, {data.vocab_size} ids from {data.tokenizer_backend}")

model = psannLM(
    base="waveresnet",
    d_model=64,
    n_layers=2,
    n_heads=4,
    vocab_size=data.vocab_size,
    positional_encoding="rope",
    sine_params={"amp_init": 1.0, "freq_init": 1.0, "damp_init": 0.01, "trainable": True},
)
model.fit(data, epochs=20, batch_tokens=256, lr=3e-3, amp="auto", ddp="off", optimizer="muon", log_interval_steps=20)

print(repr(model.generate("The tide", max_new_tokens=24, temperature=0.0)))
path = model.save("minimal_model.safetensors")
again = psannLM.load(path)
assert again.generate("The tide", max_new_tokens=24, temperature=0.0) == model.generate(
    "The tide", max_new_tokens=24, temperature=0.0
)
print(f"saved to {path}; continue with: python examples/lm/generate.py {path}")

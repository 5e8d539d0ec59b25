"""Quantization-aware fine-tuning of a Hugging Face Llama: 4-bit weights and activations, then packed.

    python examples/finetune_hf.py                     # a small random model, made from its config: nothing is fetched
    python examples/finetune_hf.py path/to/llama       # a model directory, by from_pretrained

The quantization is the two lines marked with an arrow; all else is an ordinary torch loop.
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import quest

torch.manual_seed(0)
if len(sys.argv) > 1:
    model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
else:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)

quest.prepare(model, quest.QuantConfig(weight="int4", activation="int4"))  # <- nn.Linear becomes QuestLinear

# A text small enough to learn by heart: bytes as token ids.
text = b"".join(b"%d squared is %d. " % (i, i * i) for i in range(100))
tokens = torch.tensor(list(text)).unfold(0, 32, 8)  # [sequences, 32]
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
model.train()
for step in range(30):
    batch = tokens[torch.randint(len(tokens), (8,))]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == 29:
        print(f"step {step:2}  loss {loss.item():.3f}")

model.eval()
with torch.no_grad():
    trained = model(input_ids=tokens[:8]).logits
    quest.convert(model)  # <- QuestLinear becomes PackedLinear: codes, scales, low-bit kernels
    packed = model(input_ids=tokens[:8]).logits
print(f"largest change of a logit by packing: {(trained - packed).abs().max():.1e}")

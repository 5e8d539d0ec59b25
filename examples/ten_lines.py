import torch

import quest

model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256))
quest.prepare(model, quest.QuantConfig(weight="int4", activation="int4"))  # nn.Linear -> quest.QuestLinear
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
x, target = torch.randn(64, 256), torch.randn(64, 256)
for _ in range(100):  # an ordinary training loop
    loss = torch.nn.functional.mse_loss(model(x), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
quest.convert(model)  # QuestLinear -> packed 4-bit weights on low-bit kernels
print(f"trained {loss.item():.4f}, packed {torch.nn.functional.mse_loss(model(x), target).item():.4f}")

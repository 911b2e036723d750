"""Train a network on handwritten digits with forward gradients: no backward pass anywhere. Takes a few seconds."""

import torch

import altgrad
from altgrad import data

digits = data.load("digits")
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))

learner = altgrad.Learner(model, torch.nn.functional.cross_entropy, engine="forward", tangents=16)
optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
for _ in range(10):
    for x, y in zip(digits.train_inputs.split(64), digits.train_targets.split(64), strict=True):
        optimizer.zero_grad()
        report = learner.backward(x, y)  # fills p.grad, as loss.backward() would
        optimizer.step()
accuracy = (learner.predict(digits.test_inputs).argmax(1) == digits.test_targets).float().mean()
print(f"loss {float(report.loss):.3f}, test accuracy {100 * float(accuracy):.1f} %")

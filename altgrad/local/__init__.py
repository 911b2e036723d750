"""Learning block by block: a model's blocks streamed one at a time, local losses, labels in inputs, read-outs, and errors broadcast to blocks."""

"""What the models are asked: calls recorded while they sample, translated, mixed and stored."""

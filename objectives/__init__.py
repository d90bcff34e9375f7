"""What the logits mean: the training objectives and the questions samplers may ask."""

"""The order of a step: encode, noise, predict, score, exclude, loss."""

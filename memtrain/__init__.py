"""memtrain: fine-tune text-to-image diffusion models without memorizing their training data."""

from memtrain.core.scores import text_conditional_magnitude

__version__ = "0.1.0"
__all__ = ["text_conditional_magnitude"]

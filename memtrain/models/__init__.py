"""Model families behind one protocol, `memtrain.models.base.DiffusionModel`."""

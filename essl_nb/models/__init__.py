"""Front ends, blocks, the encoder. The registries import every module of the folder when they are first asked."""
